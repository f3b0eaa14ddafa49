//! `igvm-build build`.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::Args;
use igvm_build::accept::{Accept, Extras};
use igvm_build::elf::Program;
use igvm_build::error::FileError;
use igvm_build::firmware::{self, Firmware};
use igvm_build::handover::Item;
use igvm_build::image::{self, Options};
use igvm_build::recipe::Recipe;
use igvm_build::sidecar::Sidecar;
use igvm_build::target::Target;
use igvm_build::td_firmware::TdFirmware;
use protocols::hob::IgvmDataKind;
use protocols::launch::Fault;

use super::{print, read, with_suffix, write};

/// First bytes of an IGVM file.
const IGVM_MAGIC: &[u8] = b"IGVM";

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
    #[arg(long)]
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
    fn read(self, recipe: &Recipe) -> Result<Vec<(IgvmDataKind, Vec<u8>)>> {
        let signatures = "an EFI list of signatures";
        [
            (IgvmDataKind::PK, self.pk, &recipe.pk, signatures),
            (IgvmDataKind::KEK, self.kek, &recipe.kek, signatures),
            (IgvmDataKind::DB, self.db, &recipe.db, signatures),
            (IgvmDataKind::DBX, self.dbx, &recipe.dbx, signatures),
            (
                IgvmDataKind::KERNEL,
                self.uki,
                &recipe.uki,
                "an EFI program",
            ),
        ]
        .into_iter()
        .filter_map(|(kind, option, recipe, expected)| {
            let file = option.or_else(|| recipe.clone())?;
            Some(read(&file, expected).map(|bytes| (kind, bytes)))
        })
        .collect()
    }
}

impl Build {
    pub fn run(self) -> Result<()> {
        let recipe = match &self.recipe {
            Some(file) => read_recipe(file)?,
            None => Recipe::default(),
        };
        let Some(paravisor) = self.paravisor.or(recipe.paravisor.clone()) else {
            bail!("no paravisor; give --paravisor, or a recipe that has one");
        };
        let Some(out) = self.out.or(recipe.out.clone()) else {
            bail!("no file to write; give --out, or a recipe that has one");
        };
        let firmware_file = self.firmware.or(recipe.firmware.clone());
        let td_file = self.td_firmware.or(recipe.td_firmware.clone());
        let accept = match (self.accept, &recipe.accept) {
            (Some(accept), _) => accept,
            (None, Some(text)) => text.parse()?,
            (None, None) => Accept::default(),
        };
        let default = Options::default();
        let options = Options {
            c_bit: self.c_bit.or(recipe.c_bit).unwrap_or(default.c_bit),
            acceptance: accept.with(self.accept_extras)?,
            fault: Fault(self.fault),
            native: self.native.or(recipe.native).unwrap_or(default.native),
            target: self.target.or(recipe.target).unwrap_or(default.target),
        };

        let expected = "the paravisor's ELF file, build it with `cargo xtask build`";
        let elf = read(&paravisor, expected)?;
        let program = Program::parse(&elf).map_err(FileError::content(&paravisor))?;
        let firmware_bytes = firmware_file.as_deref().map(read_firmware).transpose()?;
        let firmware = match (&firmware_file, &firmware_bytes) {
            (Some(file), Some(bytes)) => {
                Some(Firmware::parse(bytes).map_err(FileError::content(file))?)
            }
            _ => None,
        };
        let expected = "OVMF.inteltdx.fd of Debian's ovmf-inteltdx 2026.08 or newer";
        let td_bytes = td_file
            .as_deref()
            .map(|file| read(file, expected))
            .transpose()?;
        let td_firmware = match (&td_file, &td_bytes) {
            (Some(file), Some(bytes)) => {
                Some(TdFirmware::parse(bytes).map_err(FileError::content(file))?)
            }
            _ => None,
        };

        let data = self.data.read(&recipe)?;
        let items: Vec<Item<'_>> = data
            .iter()
            .map(|(kind, bytes)| Item { kind: *kind, bytes })
            .collect();
        let image = image::build_with_data(
            &program,
            firmware.as_ref(),
            td_firmware.as_ref(),
            &items,
            &options,
        )
        .map_err(FileError::content(&paravisor))?;
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

/// Reads a recipe. What is wrong with one has several lines: where, what, and what would be right.
fn read_recipe(file: &Path) -> Result<Recipe> {
    let bytes = read(file, "a recipe in TOML")?;
    let directory = file.parent().unwrap_or(Path::new(""));
    let parsed = std::str::from_utf8(&bytes)
        .map_err(anyhow::Error::from)
        .and_then(|text| Ok(Recipe::parse(text, directory)?));
    parsed.map_err(|error| anyhow::anyhow!("{}: {error}", file.display()))
}

/// Reads a firmware from an image or an IGVM file.
fn read_firmware(file: &Path) -> Result<Vec<u8>> {
    let bytes = read(file, "OVMF.fd of Debian's ovmf-generic 2026.08 or newer")?;
    if !bytes.starts_with(IGVM_MAGIC) {
        return Ok(bytes);
    }
    Ok(firmware::of_igvm(&bytes).map_err(FileError::content(file))?)
}
