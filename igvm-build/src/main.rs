//! `igvm-build`: the command around the library of the same name.

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use igvm_build::error::FileError;
use igvm_build::flat::elf_to_flat;

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
        Command::Flat { elf, size, out } => {
            let bytes = read(&elf, "an ELF file, build it with `cargo xtask build`")?;
            let image = elf_to_flat(&bytes, size).map_err(FileError::content(&elf))?;
            write(&out, &image)?;
        }
    }
    Ok(())
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
