//! `igvm-build build`.

use std::fmt::Display;
use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;
use clap::error::ErrorKind;
use igvm_build::accept::{Accept, BadAccept, Extras};
use igvm_build::elf::Program;
use igvm_build::error::{Error, FileError};
use igvm_build::firmware::{self, Firmware};
use igvm_build::handover::Item;
use igvm_build::image::{self, Options};
use igvm_build::recipe::Recipe;
use igvm_build::sidecar::Sidecar;
use igvm_build::target::Target;
use igvm_build::td_firmware::TdFirmware;
use protocols::hob::IgvmDataKind;
use protocols::launch::{Fault, Touch};

use super::input::IGVM_MAGIC;
use super::{Input, print, usage, with_suffix, write};

#[derive(Args)]
pub struct Build {
    /// A recipe in TOML: the options below without their dashes; they come before what it says
    #[arg(long)]
    recipe: Option<PathBuf>,
    /// The paravisor, an ELF file linked at its region
    #[arg(long)]
    paravisor: Option<PathBuf>,
    /// The firmware, an OVMF .fd with SEV-SNP and SVSM support, or an IGVM file that has one
    #[arg(long)]
    firmware: Option<PathBuf>,
    /// The firmware for trust domains, a TDVF .fd: makes the image one for TDX, too
    #[arg(long)]
    td_firmware: Option<PathBuf>,
    #[command(flatten)]
    data: Data,
    /// Where to write the image
    #[arg(long)]
    out: Option<PathBuf>,
    /// Whose loader it is for [default: qemu]
    #[arg(long)]
    target: Option<Target>,
    /// Whether an image with a firmware is for the native platform as well [default: true]
    #[arg(long, value_name = "BOOL")]
    native: Option<bool>,
    /// Position of the C-bit: 51 on EPYC, 47 on the emulated machine [default: 51]
    #[arg(long, value_parser = clap::value_parser!(u32).range(32..=51))]
    c_bit: Option<u32>,
    /// When the paravisor accepts memory: lazy, eager, ahead, the last two with or without a budget
    /// such as ahead:512M or ahead:50% [default: lazy]
    #[arg(long, value_name = "POLICY")]
    accept: Option<Accept>,
    #[command(flatten)]
    accept_extras: Extras,
    /// Deliberate fault; only test builds of the paravisor obey it
    #[arg(long, default_value_t = Fault::NONE.0)]
    fault: u32,
}

/// What the firmware is handed; it must be OVMF 2025.11 or newer.
#[derive(Args)]
struct Data {
    /// An EFI program that the firmware starts as the kernel, such as a unified kernel image
    #[arg(long)]
    uki: Option<PathBuf>,
    /// Platform key of secure boot, an EFI list of signatures; with it only what --db allows is started
    #[arg(long)]
    pk: Option<PathBuf>,
    /// Key exchange keys, likewise
    #[arg(long)]
    kek: Option<PathBuf>,
    /// What may be started, likewise
    #[arg(long)]
    db: Option<PathBuf>,
    /// What may not be started, likewise
    #[arg(long)]
    dbx: Option<PathBuf>,
}

impl Data {
    /// Reads what is named here or in the recipe.
    fn read(self, recipe: &Recipe) -> Result<Vec<Piece>> {
        let signatures = Input::SIGNATURES;
        [
            (IgvmDataKind::PK, self.pk, &recipe.pk, signatures),
            (IgvmDataKind::KEK, self.kek, &recipe.kek, signatures),
            (IgvmDataKind::DB, self.db, &recipe.db, signatures),
            (IgvmDataKind::DBX, self.dbx, &recipe.dbx, signatures),
            (IgvmDataKind::KERNEL, self.uki, &recipe.uki, Input::PROGRAM),
        ]
        .into_iter()
        .filter_map(|(kind, option, recipe, input)| {
            let file = option.or_else(|| recipe.clone())?;
            Some(input.read(&file).map(|bytes| Piece { kind, file, bytes }))
        })
        .collect()
    }
}

/// A piece of data, as it was read.
struct Piece {
    kind: IgvmDataKind,
    file: PathBuf,
    bytes: Vec<u8>,
}

impl Piece {
    fn item(&self) -> Result<Item<'_>, FileError> {
        Item::new(self.kind, &self.bytes).map_err(FileError::content(&self.file))
    }
}

impl Build {
    pub fn run(self) -> Result<()> {
        let recipe = match &self.recipe {
            Some(file) => read_recipe(file)?,
            None => Recipe::default(),
        };
        let Some(paravisor) = self.paravisor.or(recipe.paravisor.clone()) else {
            return Err(missing(
                "no paravisor; give --paravisor, or a recipe that has one",
            ));
        };
        let Some(out) = self.out.or(recipe.out.clone()) else {
            return Err(missing(
                "no file to write; give --out, or a recipe that has one",
            ));
        };
        let firmware_file = self.firmware.or(recipe.firmware.clone());
        let td_file = self.td_firmware.or(recipe.td_firmware.clone());
        let accept = match (self.accept, &recipe.accept) {
            (Some(accept), _) => accept,
            (None, Some(text)) => text.parse()?,
            (None, None) => Accept::default(),
        };
        let wrong = |error: BadAccept| usage("build", ErrorKind::ValueValidation, error);
        let acceptance = accept.with(self.accept_extras).map_err(wrong)?;
        if acceptance.touch != Touch::FAULT && td_file.is_none() {
            return Err(missing(Error::TouchWithoutTd));
        }
        let default = Options::default();
        let options = Options {
            c_bit: self.c_bit.or(recipe.c_bit).unwrap_or(default.c_bit),
            acceptance,
            fault: Fault(self.fault),
            native: self.native.or(recipe.native).unwrap_or(default.native),
            target: self.target.or(recipe.target).unwrap_or(default.target),
        };

        let elf = Input::ELF.read(&paravisor)?;
        let program = Program::parse(&elf).map_err(FileError::content(&paravisor))?;
        let firmware_bytes = firmware_file.as_deref().map(read_firmware).transpose()?;
        let firmware = match (&firmware_file, &firmware_bytes) {
            (Some(file), Some(bytes)) => {
                Some(Firmware::parse(bytes).map_err(FileError::content(file))?)
            }
            _ => None,
        };
        let td_bytes = td_file
            .as_deref()
            .map(|file| Input::TD_FIRMWARE.read(file))
            .transpose()?;
        let td_firmware = match (&td_file, &td_bytes) {
            (Some(file), Some(bytes)) => {
                Some(TdFirmware::parse(bytes).map_err(FileError::content(file))?)
            }
            _ => None,
        };

        let data = self.data.read(&recipe)?;
        let items: Vec<Item<'_>> = data.iter().map(Piece::item).collect::<Result<_, _>>()?;
        let image = image::build_with_data(
            &program,
            firmware.as_ref(),
            td_firmware.as_ref(),
            &items,
            &options,
        )
        .map_err(|error| {
            let blamed = match (&error, &firmware_file) {
                (Error::NoDataArea, Some(firmware)) => firmware,
                _ => &paravisor,
            };
            FileError::content(blamed)(error)
        })?;
        let firmware_name = firmware_file
            .as_deref()
            .and_then(Path::file_name)
            .map(|name| name.to_string_lossy().into_owned());
        let sidecar = Sidecar::new(&image, options.c_bit, firmware_name);
        write(&out, &image.bytes)?;
        let mut description = serde_json::to_vec_pretty(&sidecar)?;
        description.push(b'\n');
        write(&with_suffix(&out, ".json"), &description)?;
        print(&format!("launch digest {}\n", sidecar.digest))?;
        if let Some(mrtd) = &sidecar.mrtd {
            print(&format!("MRTD {mrtd}\n"))?;
        }
        Ok(())
    }
}

/// A command line that lacks something.
fn missing(message: impl Display) -> anyhow::Error {
    usage("build", ErrorKind::MissingRequiredArgument, message)
}

/// Reads a recipe. What is wrong with one has several lines: where, what, and what would be right.
fn read_recipe(file: &Path) -> Result<Recipe> {
    let bytes = Input::RECIPE.read(file)?;
    let directory = file.parent().unwrap_or(Path::new(""));
    let parsed = std::str::from_utf8(&bytes)
        .map_err(anyhow::Error::from)
        .and_then(|text| Ok(Recipe::parse(text, directory)?));
    parsed.map_err(|error| anyhow::anyhow!("{}: {error}", file.display()))
}

/// Reads a firmware from an image or an IGVM file.
fn read_firmware(file: &Path) -> Result<Vec<u8>> {
    let bytes = Input::FIRMWARE.read(file)?;
    if !bytes.starts_with(IGVM_MAGIC) {
        return Ok(bytes);
    }
    Ok(firmware::of_igvm(&bytes).map_err(FileError::content(file))?)
}
