//! `igvm-build`: the command around the library of the same name.

#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};
use igvm_build::accept::{Accept, Extras};
use igvm_build::elf::Program;
use igvm_build::error::FileError;
use igvm_build::firmware::Firmware;
use igvm_build::flat::elf_to_flat;
use igvm_build::image::{self, Options};
use igvm_build::show::show;
use igvm_build::sidecar::{Sidecar, hex};
use igvm_build::td;
use igvm_build::td_firmware::{TdFirmware, with_variables};
use protocols::launch::Fault;

#[derive(Parser)]
#[command(
    version,
    about = "Builds, inspects and measures the IGVM images of Turnstile"
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Build an image and write it, with a description beside it (FILE.json)
    Build(Build),
    /// Build the image of a trust domain: every page of an ELF file that brings its own reset vector
    Td {
        /// The ELF file
        elf: PathBuf,
        /// Where to write the image
        #[arg(long)]
        out: PathBuf,
    },
    /// Build the image of a trust domain whose firmware is its only software: no paravisor
    TdFirmware {
        /// The firmware, a TDVF .fd
        firmware: PathBuf,
        /// Take the variables from this image or variable store instead of the firmware's own
        #[arg(long, value_name = "FILE")]
        variables: Option<PathBuf>,
        /// Where to write the image
        #[arg(long)]
        out: PathBuf,
    },
    /// Say what is in an image, and its launch digest
    Show {
        /// The IGVM file
        file: PathBuf,
    },
    /// Lay an ELF file out as a ROM that ends at 4 GiB
    Flat {
        /// The ELF file
        elf: PathBuf,
        /// Size of the ROM in bytes
        #[arg(long)]
        size: u64,
        /// Where to write the ROM
        #[arg(long)]
        out: PathBuf,
    },
}

#[derive(Args)]
struct Build {
    /// The paravisor, an ELF file linked at its region
    #[arg(long)]
    paravisor: PathBuf,
    /// The firmware, an OVMF .fd with SEV-SNP and SVSM support
    #[arg(long)]
    firmware: Option<PathBuf>,
    /// The firmware for trust domains, a TDVF .fd: makes the image one for TDX, too
    #[arg(long)]
    td_firmware: Option<PathBuf>,
    /// Where to write the image
    #[arg(long)]
    out: PathBuf,
    /// Position of the C-bit: 51 on EPYC, 47 on the emulated machine
    #[arg(long, default_value_t = Options::default().c_bit)]
    c_bit: u32,
    /// When the paravisor accepts memory: lazy, eager, ahead, the last two with or without a budget
    /// such as ahead:512M or ahead:50%
    #[arg(long, value_name = "POLICY", default_value = "lazy")]
    accept: Accept,
    #[command(flatten)]
    accept_extras: Extras,
    /// Deliberate fault; only test builds of the paravisor obey it
    #[arg(long, default_value_t = Fault::NONE.0)]
    fault: u32,
}

/// What is expected of a firmware for trust domains.
const TDVF: &str = "OVMF.inteltdx.ms.fd of Debian's ovmf-inteltdx 2026.08 or newer";

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("igvm-build: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Build(arguments) => build(&arguments)?,
        Command::Td { elf, out } => {
            let bytes = read(&elf, "an ELF file, build it with `cargo xtask build`")?;
            let program = Program::parse(&bytes).map_err(FileError::content(&elf))?;
            let image = td::build(&program).map_err(FileError::content(&elf))?;
            write(&out, &image.bytes)?;
            println!("MRTD {}", hex(&image.mrtd));
        }
        Command::TdFirmware {
            firmware,
            variables,
            out,
        } => {
            let mut bytes = read(&firmware, TDVF)?;
            if let Some(file) = &variables {
                let store = read(file, "an OVMF image or variable store")?;
                bytes = with_variables(&bytes, &store).map_err(FileError::content(&firmware))?;
            }
            let parsed = TdFirmware::parse(&bytes).map_err(FileError::content(&firmware))?;
            let built = td::build_firmware(&parsed).map_err(FileError::content(&firmware))?;
            write(&out, &built.image.bytes)?;
            println!("MRTD {}", hex(&built.image.mrtd));
            println!("hand-off blocks {:#x}", built.hob);
        }
        Command::Show { file } => {
            let bytes = read(&file, "an IGVM file, build one with `igvm-build build`")?;
            print!("{}", show(&bytes).map_err(FileError::content(&file))?);
        }
        Command::Flat { elf, size, out } => {
            let bytes = read(&elf, "an ELF file, build it with `cargo xtask build`")?;
            let image = elf_to_flat(&bytes, size).map_err(FileError::content(&elf))?;
            write(&out, &image)?;
        }
    }
    Ok(())
}

fn build(arguments: &Build) -> Result<()> {
    let elf = read(
        &arguments.paravisor,
        "the paravisor's ELF file, build it with `cargo xtask build`",
    )?;
    let program = Program::parse(&elf).map_err(FileError::content(&arguments.paravisor))?;
    let firmware_bytes = arguments
        .firmware
        .as_deref()
        .map(|file| read(file, "OVMF.fd of Debian's ovmf-generic 2026.08 or newer"))
        .transpose()?;
    let firmware = match (&arguments.firmware, &firmware_bytes) {
        (Some(file), Some(bytes)) => {
            Some(Firmware::parse(bytes).map_err(FileError::content(file))?)
        }
        _ => None,
    };
    let td_bytes = arguments
        .td_firmware
        .as_deref()
        .map(|file| read(file, TDVF))
        .transpose()?;
    let td_firmware = match (&arguments.td_firmware, &td_bytes) {
        (Some(file), Some(bytes)) => {
            Some(TdFirmware::parse(bytes).map_err(FileError::content(file))?)
        }
        _ => None,
    };
    let options = Options {
        c_bit: arguments.c_bit,
        acceptance: arguments.accept.with(arguments.accept_extras)?,
        fault: Fault(arguments.fault),
        ..Options::default()
    };
    let image = image::build(&program, firmware.as_ref(), td_firmware.as_ref(), &options)
        .map_err(FileError::content(&arguments.paravisor))?;
    let firmware_name = arguments
        .firmware
        .as_deref()
        .and_then(Path::file_name)
        .map(|name| name.to_string_lossy().into_owned());
    let sidecar = Sidecar::new(&image, options.c_bit, firmware_name);
    write(&arguments.out, &image.bytes)?;
    let mut description = serde_json::to_vec_pretty(&sidecar)?;
    description.push(b'\n');
    write(&with_suffix(&arguments.out, ".json"), &description)?;
    println!("launch digest {}", sidecar.digest);
    if let Some(mrtd) = &sidecar.mrtd {
        println!("MRTD {mrtd}");
    }
    Ok(())
}

/// `file` with `suffix` behind its whole name.
fn with_suffix(file: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(file);
    name.push(suffix);
    name.into()
}

fn read(file: &Path, expected: &'static str) -> Result<Vec<u8>, FileError> {
    std::fs::read(file).map_err(|source| FileError::Read {
        file: file.to_owned(),
        expected,
        source,
    })
}

fn write(file: &Path, bytes: &[u8]) -> Result<(), FileError> {
    std::fs::write(file, bytes).map_err(|source| FileError::Write {
        file: file.to_owned(),
        source,
    })
}
