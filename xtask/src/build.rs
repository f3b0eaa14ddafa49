//! Builds everything that runs below an operating system, and the images made of it.
//!
//! Owns the list of artefacts and their order: the bare-metal crates, each by its own cargo call so
//! that no crate's features leak into another, then ROMs, then IGVM images. Everything ends up in
//! [`Layout::artefacts`]; what is already up to date is not built again.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use e2e::chip::Chip;
use e2e::image::{self, Recipe, write_flat};
use protocols::launch::{Acceptance, Fault};

use crate::command::{self, tail};
use crate::layout::{Layout, lock, read, write};
use crate::progress;
use crate::toolchain::{BARE_TARGET, BareTarget, Toolchain};

/// Size of the machine's ROM in bytes, as its linker script has it.
const MACHINE_ROM_SIZE: u64 = 1 << 20;
/// Size of the VMPL1 test guests in bytes, as their linker script has it.
const GUEST_ROM_SIZE: u64 = 512 << 10;
/// Size of the test guest for an L2 VM in bytes, as its linker script has it.
const L2_ROM_SIZE: u64 = 256 << 10;

/// A program for the bare-metal target.
struct Program {
    package: &'static str,
    bin: &'static str,
    features: &'static [&'static str],
    /// Its name among the artefacts.
    artefact: &'static str,
}

const PARAVISOR: Program = Program {
    package: "svsm",
    bin: "svsm",
    features: &[],
    artefact: "svsm.elf",
};
const MACHINE: Program = Program {
    package: "machine",
    bin: "machine",
    features: &[],
    artefact: "machine.elf",
};
const ISA_CASES: Program = Program {
    package: "guest",
    bin: "isa_cases",
    features: &[],
    artefact: "isa_cases.elf",
};
const SVSM_CASES: Program = Program {
    package: "guest",
    bin: "svsm_cases",
    features: &[],
    artefact: "svsm_cases.elf",
};
const SVSM_COUNTS: Program = Program {
    package: "guest",
    bin: "svsm_counts",
    features: &[],
    artefact: "svsm_counts.elf",
};
const SVSM_EVIDENCE: Program = Program {
    package: "guest",
    bin: "svsm_evidence",
    features: &[],
    artefact: "svsm_evidence.elf",
};
const TDX_CASES: Program = Program {
    package: "guest",
    bin: "tdx_cases",
    features: &[],
    artefact: "tdx_cases.elf",
};
const L2_CASES: Program = Program {
    package: "guest",
    bin: "l2_cases",
    features: &[],
    artefact: "l2_cases.elf",
};
const L2_COUNTS: Program = Program {
    package: "guest",
    bin: "l2_counts",
    features: &[],
    artefact: "l2_counts.elf",
};
const FAULTY_PARAVISOR: Program = Program {
    package: "svsm",
    bin: "svsm",
    features: &["faults"],
    artefact: "svsm-faults.elf",
};

/// The packages that are built for the bare-metal target, for the lints of `xtask test`.
pub const BARE_PACKAGES: [&str; 3] = ["svsm", "machine", "guest"];

/// What a boot needs.
#[derive(Clone, Debug)]
pub struct ForRun {
    /// The machine, QEMU's firmware.
    pub rom: PathBuf,
    /// The machine's ELF file.
    pub machine: PathBuf,
    /// The paravisor's ELF file.
    pub paravisor: PathBuf,
    /// Paravisor and firmware.
    pub image: PathBuf,
}

/// The name of an image, wherever it is written.
pub const IMAGE: &str = "turnstile.igvm";

/// Builds what a boot with `firmware` needs, the image in `dir`. With a fault the paravisor is the
/// one that commits it.
pub fn for_run(
    layout: &Layout,
    target: BareTarget,
    firmware: &Path,
    td_firmware: Option<&Path>,
    fault: Fault,
    acceptance: Acceptance,
    dir: &Path,
) -> Result<ForRun> {
    let program = match fault {
        Fault::NONE => &PARAVISOR,
        _ => &FAULTY_PARAVISOR,
    };
    let step = progress::step("build the paravisor and the machine");
    let paravisor = compile(layout, target, program, &step)?;
    let machine = compile(layout, target, &MACHINE, &step)?;
    step.done("");
    let rom = layout.artefacts.join("machine.rom");
    write_flat(&machine, MACHINE_ROM_SIZE, &rom)?;
    let image = dir.join(IMAGE);
    let step = progress::step("build the image");
    let sidecar = Recipe {
        paravisor: &paravisor,
        firmware: Some(firmware),
        td_firmware,
        fault,
        acceptance,
    }
    .write(&image)?;
    step.done(&format!("launch digest {}", sidecar.digest));
    Ok(ForRun {
        rom,
        machine,
        paravisor,
        image,
    })
}

/// Builds the paravisor alone, an ELF file.
pub fn paravisor(layout: &Layout, target: BareTarget, step: &progress::Step) -> Result<PathBuf> {
    compile(layout, target, &PARAVISOR, step)
}

/// The same with deliberate faults.
pub fn faulty_paravisor(
    layout: &Layout,
    target: BareTarget,
    step: &progress::Step,
) -> Result<PathBuf> {
    compile(layout, target, &FAULTY_PARAVISOR, step)
}

/// What the scenarios need besides.
#[derive(Clone, Debug)]
pub struct ForTests {
    /// The paravisor with deliberate faults, an ELF file.
    pub faulty_paravisor: PathBuf,
    /// The VMPL0 test program, an ELF file.
    pub isa_cases: PathBuf,
    /// The VMPL1 test guest, packed as a firmware.
    pub svsm_cases: PathBuf,
    /// The VMPL1 guest that counts, packed as a firmware.
    pub svsm_counts: PathBuf,
    /// The VMPL1 guest that hands out its evidence, packed as a firmware.
    pub svsm_evidence: PathBuf,
    /// The test program for L1 of a trust domain, an ELF file.
    pub tdx_cases: PathBuf,
    /// The test guest for an L2 VM, packed as a firmware.
    pub l2_cases: PathBuf,
    /// The guest for an L2 VM that counts, packed as a firmware.
    pub l2_counts: PathBuf,
}

/// Builds what only the scenarios need.
pub fn for_tests(layout: &Layout, target: BareTarget) -> Result<ForTests> {
    let step = progress::step("build the test guests");
    let isa_cases = compile(layout, target, &ISA_CASES, &step)?;
    let guest = compile(layout, target, &SVSM_CASES, &step)?;
    let counts = compile(layout, target, &SVSM_COUNTS, &step)?;
    let evidence = compile(layout, target, &SVSM_EVIDENCE, &step)?;
    let tdx_cases = compile(layout, target, &TDX_CASES, &step)?;
    let l2_guest = compile(layout, target, &L2_CASES, &step)?;
    let l2_counting = compile(layout, target, &L2_COUNTS, &step)?;
    step.done("");
    let svsm_cases = layout.artefacts.join("svsm_cases.fd");
    write_flat(&guest, GUEST_ROM_SIZE, &svsm_cases)?;
    let svsm_counts = layout.artefacts.join("svsm_counts.fd");
    write_flat(&counts, GUEST_ROM_SIZE, &svsm_counts)?;
    let svsm_evidence = layout.artefacts.join("svsm_evidence.fd");
    write_flat(&evidence, GUEST_ROM_SIZE, &svsm_evidence)?;
    let l2_cases = layout.artefacts.join("l2_cases.fd");
    write_flat(&l2_guest, L2_ROM_SIZE, &l2_cases)?;
    let l2_counts = layout.artefacts.join("l2_counts.fd");
    write_flat(&l2_counting, L2_ROM_SIZE, &l2_counts)?;
    let step = progress::step("build the paravisor with deliberate faults");
    let faulty_paravisor = faulty_paravisor(layout, target, &step)?;
    step.done("");
    Ok(ForTests {
        faulty_paravisor,
        isa_cases,
        svsm_cases,
        svsm_counts,
        svsm_evidence,
        tdx_cases,
        l2_cases,
        l2_counts,
    })
}

/// The chip of the emulated security processor, made if there is none.
pub fn chip(layout: &Layout) -> Result<Chip> {
    let dir = layout.artefacts.join("chip");
    let step = progress::step("the keys of the emulated security processor");
    let _building = building(layout)?;
    let chip = Chip::obtain(&dir)?;
    step.done("");
    Ok(chip)
}

/// One process at a time makes what several runs use; held until the file is dropped.
fn building(layout: &Layout) -> Result<File> {
    lock(&layout.artefacts.join("lock"))
}

/// The toolchain made ready for the bare-metal target.
pub fn prepare(layout: &Layout) -> Result<BareTarget> {
    Toolchain::find(layout)?.prepare(layout)
}

/// Compiles `program` and copies its ELF file to its place among the artefacts: the next build with
/// other features overwrites cargo's own copy. Another run may be at just that, so both are done under a lock.
fn compile(
    layout: &Layout,
    target: BareTarget,
    program: &Program,
    step: &progress::Step,
) -> Result<PathBuf> {
    let _building = building(layout)?;
    let mut cargo = target.cargo(&layout.root, "build");
    cargo.args(["--package", program.package, "--bin", program.bin]);
    if !program.features.is_empty() {
        cargo.args(["--features", &program.features.join(",")]);
    }
    let (ok, text) = command::watched(&mut cargo, step)?;
    if !ok {
        let log = layout.artefacts.join(format!("{}.log", program.artefact));
        write(&log, &text)?;
        bail!(
            "{} does not build; its last words, the rest is in {}:\n{}",
            program.package,
            log.display(),
            tail(&text, 20).trim_end()
        );
    }
    let built = layout
        .target
        .join(BARE_TARGET)
        .join("release")
        .join(program.bin);
    let place = layout.artefacts.join(program.artefact);
    image::write(&place, &read(&built)?)?;
    Ok(place)
}
