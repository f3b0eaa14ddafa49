//! From fw_cfg to a launched guest: settings, platform, memory map, image.
//!
//! Every way this can fail ends the run with a report that says what was wrong.

use alloc::format;
use alloc::string::ToString;

use igvm_defs::IgvmNativeVpContextX64;
use machine::Platform;
use machine::amd_sp::Chip;
use machine::cpuid::{Leaf, Table};
use machine::launch::Environment;
use machine::platform::End;
use machine::settings::{PlatformKind, Settings};
use machine::types::Gpa;
use protocols::report::{Event, FORMAT_VERSION, Machine as MachineEvent};

use super::memory::{self, DirectMap, Layout};
use super::npt::Tables;
use super::ports::Ports;
use super::shared::{self, Machine};
use super::{clock, console, cpu, finish, fwcfg, smp};

/// fw_cfg name of the image.
const FILE_IMAGE: &str = "opt/turnstile/igvm";
/// fw_cfg name of the chip's identity.
const FILE_ENDORSEMENT: &str = "opt/turnstile/endorsement";
/// fw_cfg name of the host's certificates.
const FILE_CERTIFICATES: &str = "opt/turnstile/certificates";
/// fw_cfg name of the settings.
const FILE_SETTINGS: &str = "opt/turnstile/settings";
/// Number of CPUs (QEMU `FW_CFG_NB_CPUS`).
const KEY_CPUS: u16 = 0x05;

/// Starting a processor is an INIT, which would end the machine that runs on it.
const PLAIN_IS_ALONE: &str = "plain mode has one processor";

/// Conventional memory ends here; ROMs and video memory follow up to 1 MiB.
const CONVENTIONAL_END: u64 = 0xA_0000;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Makes the machine and puts the guest into it. In plain mode, returns where the guest starts.
pub fn launch(layout: &Layout) -> Option<IgvmNativeVpContextX64> {
    let vcpus = fwcfg::item::<2>(KEY_CPUS)
        .map_or(1, u16::from_le_bytes)
        .max(1);
    let text = fwcfg::text(FILE_SETTINGS).unwrap_or_default();
    let settings = Settings::parse(&text);
    let (settings, bad) = match settings {
        Ok(settings) => (settings, None),
        Err(error) => (Settings::default(), Some(error.to_string())),
    };
    console::event(&Event::Machine(MachineEvent {
        version: FORMAT_VERSION,
        low_ram: layout.low_end,
        high_ram: layout.high,
        reserved: layout.reserved.len(),
        vcpus: u32::from(vcpus),
        tsc_hz: clock::tsc_hz(),
        settings: settings.echo(),
    }));
    let low_end = settings.low_end;
    let plain = settings.platform == Some(PlatformKind::Native);
    let platform = Platform::new(DirectMap, settings, u32::from(vcpus), cpu::tsc);
    shared::init(Machine {
        platform,
        tables: Tables::new(layout.tables),
        ports: Ports::new(layout, low_end),
        cpuid: if plain {
            Table::build_plain(&native_cpuid, u32::from(vcpus))
        } else {
            Table::build(&native_cpuid, u32::from(vcpus))
        },
    });
    if let Some(error) = bad {
        finish::end(End::BadSettings(error), 0);
    }
    if plain && vcpus != 1 {
        finish::end(End::LaunchFailed(PLAIN_IS_ALONE.to_string()), 0);
    }
    smp::init_table(u32::from(vcpus));
    match fill(layout, plain) {
        Ok(start) => start,
        Err(why) => finish::end(End::LaunchFailed(why), 0),
    }
}

/// Adds the memory and launches or, in plain mode, loads the image.
fn fill(
    layout: &Layout,
    plain: bool,
) -> Result<Option<IgvmNativeVpContextX64>, alloc::string::String> {
    let mut machine = shared::lock(0);
    let vcpus = machine.platform.vcpu_count();
    let td_cpuid = Table::build_td(&native_cpuid, vcpus, clock::tsc_hz());
    let Machine {
        platform, cpuid, ..
    } = &mut *machine;
    let ranges = [
        (0, CONVENTIONAL_END),
        (MIB, layout.reserved.start - MIB),
        (4 * GIB, layout.high),
    ];
    for (start, bytes) in ranges.into_iter().filter(|&(_, bytes)| bytes != 0) {
        platform
            .add_ram(Gpa::new(start), bytes)
            .map_err(|error| format!("memory at {start:#x}+{bytes:#x}: {error:?}"))?;
    }
    let image = fwcfg::file(FILE_IMAGE).ok_or_else(|| format!("fw_cfg has no {FILE_IMAGE}"))?;
    if let Some(endorsement) = fwcfg::file(FILE_ENDORSEMENT) {
        let chip = Chip::parse(&endorsement).ok_or_else(|| {
            format!(
                "{FILE_ENDORSEMENT}: {} bytes, no identity of a chip",
                endorsement.len()
            )
        })?;
        platform.endorse(chip, &fwcfg::file(FILE_CERTIFICATES).unwrap_or_default());
    }
    let mut environment = Environment {
        allocate: &mut memory::allocate_window,
        random: &mut cpu::random,
        cpuid,
        td_cpuid: &td_cpuid,
    };
    if plain {
        let start = platform.load_plain(&image, &mut environment);
        return start.map(Some).map_err(|error| error.to_string());
    }
    platform
        .launch(&image, &mut environment)
        .map_err(|error| error.to_string())?;
    if platform.kind() == PlatformKind::Tdx {
        *cpuid = td_cpuid;
    }
    Ok(None)
}

/// CPUID of the processor below.
fn native_cpuid(leaf: u32, subleaf: u32) -> Leaf {
    let [eax, ebx, ecx, edx] = cpu::cpuid(leaf, subleaf);
    Leaf { eax, ebx, ecx, edx }
}
