//! Everything that touches the CPU.
//!
//! [`start`] is where the reset code arrives. From there: memory, heap, settings and image by
//! fw_cfg, launch, and the run loop of each CPU until the run ends in [`finish`].

mod apic;
mod backtrace;
mod boot;
mod clock;
mod console;
mod cpu;
mod descriptors;
mod events;
mod exit;
mod finish;
mod fwcfg;
mod guest_memory;
mod heap;
mod l2;
mod memory;
mod npt;
mod permissions;
mod plain;
mod ports;
mod setup;
mod shared;
mod smp;
mod svm;
mod vcpu;
mod world;

use machine::settings::PlatformKind;
use machine::types::{VcpuId, Vmpl};

use permissions::Permissions;
use vcpu::Vcpu;

/// The first Rust code, on the first CPU.
pub extern "C" fn start(image: u64, low_end: u64) -> ! {
    descriptors::load();
    let layout = memory::init(image, low_end);
    heap::init(layout.heap);
    mask_pic();
    apic::enable_x2apic();
    let plain = setup::launch(layout);
    finish::break_if_told();
    let permissions = Permissions::new();
    let mut first = Vcpu::new(VcpuId(0), permissions);
    if let Some(start) = plain {
        plain::run(&mut first, &start, layout);
    }
    smp::start_others(permissions);
    if first.kind == PlatformKind::Tdx {
        // No processor of a trust domain waits for another.
        smp::release_others();
    }
    first.run(Vmpl::VMPL0)
}

/// Masks both interrupt controllers: QEMU leaves them open, and vector 8 would be a double fault.
fn mask_pic() {
    cpu::port_out(0x21, 1, 0xFF);
    cpu::port_out(0xA1, 1, 0xFF);
}
