//! The subcommands, one module each; what they share is here.

use std::ffi::OsString;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use igvm_build::elf::Program;
use igvm_build::error::{Error, FileError};
use igvm_build::flat::elf_to_flat;
use igvm_build::sidecar::hex;
use igvm_build::td;
use igvm_build::td_firmware::{TdFirmware, with_variables};
use serde::Serialize;

mod build;
mod check;
mod diff;
mod input;
mod measure;
mod processors;
mod show;
mod sign;

use input::Input;

/// What a command found out, where it is asked a question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// Done, or as it should be.
    Yes,
    /// Not as it should be.
    No,
}

#[derive(Parser)]
#[command(
    version,
    about = "Builds, shows, measures, checks, signs and compares IGVM images",
    after_help = "Exit status: 0 done, or the answer is yes; 1 check: the file does not load, diff: the files \
                  differ; 2 wrong command line; 3 wrong content of an input; 4 a file cannot be read or written."
)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Build an image and write it, with a description beside it (FILE.json)
    Build(build::Build),
    /// Build the image of a trust domain: every page of an ELF file that brings its own reset vector
    Td(Td),
    /// Build the image of a trust domain whose firmware is its only software: no paravisor
    TdFirmware(TdFirmwareOnly),
    /// Say what is in an IGVM file, and its measurements
    Show(show::Show),
    /// Compute the launch digest or MRTD of an IGVM file, or the launch digest of an OVMF image
    Measure(measure::Measure),
    /// Say whether an IGVM file will load, and by which rules not
    Check(check::Check),
    /// Sign the launch digest and policy of an image: put an ID block into it
    Sign(sign::Sign),
    /// Say in what the guests of two IGVM files differ
    Diff(diff::Diff),
    /// Lay an ELF file out as a ROM that ends at 4 GiB
    Flat(Flat),
    /// Print the completions of a shell
    Completions {
        /// The shell
        shell: Shell,
    },
}

#[derive(Args)]
struct Td {
    /// The ELF file
    elf: PathBuf,
    /// Where to write the image
    #[arg(long)]
    out: PathBuf,
}

#[derive(Args)]
struct TdFirmwareOnly {
    /// The firmware, a TDVF .fd
    firmware: PathBuf,
    /// Take the variables from this image or variable store instead of the firmware's own
    #[arg(long, value_name = "FILE")]
    variables: Option<PathBuf>,
    /// Where to write the image
    #[arg(long)]
    out: PathBuf,
}

#[derive(Args)]
struct Flat {
    /// The ELF file
    elf: PathBuf,
    /// Size of the ROM in bytes
    #[arg(long)]
    size: u64,
    /// Where to write the ROM
    #[arg(long)]
    out: PathBuf,
}

impl Arguments {
    /// Does it.
    pub fn run(self) -> Result<Answer> {
        match self.command {
            Command::Build(build) => build.run()?,
            Command::Td(td) => td.run()?,
            Command::TdFirmware(firmware) => firmware.run()?,
            Command::Show(show) => show.run()?,
            Command::Measure(measure) => measure.run()?,
            Command::Check(check) => return check.run(),
            Command::Sign(sign) => sign.run()?,
            Command::Diff(diff) => return diff.run(),
            Command::Flat(flat) => flat.run()?,
            Command::Completions { shell } => {
                let mut command = Self::command();
                clap_complete::generate(shell, &mut command, "igvm-build", &mut io::stdout());
            }
        }
        Ok(Answer::Yes)
    }
}

impl Td {
    fn run(&self) -> Result<()> {
        let bytes = Input::ELF.read(&self.elf)?;
        let program = Program::parse(&bytes).map_err(FileError::content(&self.elf))?;
        let image = td::build(&program).map_err(FileError::content(&self.elf))?;
        write(&self.out, &image.bytes)?;
        print(&format!("MRTD {}\n", hex(&image.mrtd)))
    }
}

impl TdFirmwareOnly {
    fn run(&self) -> Result<()> {
        let mut bytes = Input::TD_FIRMWARE.read(&self.firmware)?;
        if let Some(file) = &self.variables {
            let store = Input::VARIABLES.read(file)?;
            bytes = with_variables(&bytes, &store).map_err(FileError::content(&self.firmware))?;
        }
        let parsed = TdFirmware::parse(&bytes).map_err(FileError::content(&self.firmware))?;
        let built = td::build_firmware(&parsed).map_err(FileError::content(&self.firmware))?;
        write(&self.out, &built.image.bytes)?;
        let (mrtd, hob) = (hex(&built.image.mrtd), built.hob);
        print(&format!("MRTD {mrtd}\nhand-off blocks {hob:#x}\n"))
    }
}

impl Flat {
    fn run(&self) -> Result<()> {
        let bytes = Input::ELF.read(&self.elf)?;
        let image = elf_to_flat(&bytes, self.size).map_err(|error| match error {
            Error::FlatSize { .. } => usage("flat", ErrorKind::InvalidValue, error),
            other => FileError::content(&self.elf)(other).into(),
        })?;
        write(&self.out, &image)
    }
}

/// What is wrong with the command line of a subcommand, where clap cannot know it.
fn usage(subcommand: &str, kind: ErrorKind, message: impl std::fmt::Display) -> anyhow::Error {
    let mut command = Arguments::command();
    // So that the subcommand knows its whole name.
    command.build();
    let error = match command.find_subcommand_mut(subcommand) {
        Some(subcommand) => subcommand.error(kind, message),
        None => command.error(kind, message),
    };
    error.into()
}

/// `file` with `suffix` behind its whole name.
fn with_suffix(file: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(file);
    name.push(suffix);
    name.into()
}

fn write(file: &Path, bytes: &[u8]) -> Result<()> {
    let written = std::fs::write(file, bytes).map_err(|source| FileError::Write {
        file: file.to_owned(),
        source,
    });
    Ok(written?)
}

/// Writes to standard output. A reader that has seen enough, such as `head`, is no error.
fn print(text: &str) -> Result<()> {
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

fn print_json(value: &impl Serialize) -> Result<()> {
    print(&(serde_json::to_string_pretty(value)? + "\n"))
}
