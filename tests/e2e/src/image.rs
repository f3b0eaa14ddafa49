//! Makes the images that are run here, and the ROMs that go with them.
//!
//! A thin layer over `igvm-build` that opens files: the image is written with its sidecar beside it,
//! as the `igvm-build` command does.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
pub use igvm_build::accept::{Accept, Extras};
use igvm_build::elf::Program;
use igvm_build::error::FileError;
use igvm_build::firmware::Firmware;
use igvm_build::flat::elf_to_flat;
pub use igvm_build::handover::Item;
use igvm_build::image::{self, Options};
use igvm_build::sidecar::{Sidecar, hex};
use igvm_build::td;
use igvm_build::td_firmware::{TdFirmware, with_variables};
use protocols::launch::{Acceptance, Fault};

/// The emulated machine's C-bit: its nested tables have four levels, so 47 is the highest bit that
/// can tell the two aliases apart.
pub const MACHINE_C_BIT: u32 = 47;

/// What an image is made of.
#[derive(Clone, Copy, Debug)]
pub struct Recipe<'a> {
    /// The program that starts at VMPL0, an ELF file.
    pub paravisor: &'a Path,
    /// What it starts at VMPL1, an OVMF image; none for a program that needs no guest.
    pub firmware: Option<&'a Path>,
    /// What it starts as the L2 VM of a trust domain, a TDVF image; none if the image is not for TDX.
    pub td_firmware: Option<&'a Path>,
    /// A deliberate fault, which only the test build of the paravisor heeds.
    pub fault: Fault,
    /// When memory is accepted.
    pub acceptance: Acceptance,
}

impl Recipe<'_> {
    /// Builds the image in memory.
    pub fn build(&self) -> Result<(image::Image, Sidecar)> {
        self.build_with(&[])
    }

    /// The same, with data that the firmware is handed.
    pub fn build_with(&self, items: &[Item<'_>]) -> Result<(image::Image, Sidecar)> {
        let paravisor = read(self.paravisor, "the paravisor's ELF file")?;
        let program = Program::parse(&paravisor).map_err(FileError::content(self.paravisor))?;
        let firmware_bytes = match self.firmware {
            Some(path) => Some((path, read(path, "an OVMF image")?)),
            None => None,
        };
        let firmware = match &firmware_bytes {
            Some((path, bytes)) => Some(Firmware::parse(bytes).map_err(FileError::content(path))?),
            None => None,
        };
        let td_bytes = match self.td_firmware {
            Some(path) => Some((path, read(path, "a TDVF image")?)),
            None => None,
        };
        let td_firmware = match &td_bytes {
            Some((path, bytes)) => {
                Some(TdFirmware::parse(bytes).map_err(FileError::content(path))?)
            }
            None => None,
        };
        let options = Options {
            c_bit: MACHINE_C_BIT,
            fault: self.fault,
            acceptance: self.acceptance,
            ..Options::default()
        };
        let (firmware, td_firmware) = (firmware.as_ref(), td_firmware.as_ref());
        let image = image::build_with_data(&program, firmware, td_firmware, items, &options)
            .map_err(FileError::content(self.firmware.unwrap_or(self.paravisor)))?;
        let name = self.firmware.and_then(Path::file_name);
        let sidecar = Sidecar::new(
            &image,
            MACHINE_C_BIT,
            name.map(|name| name.to_string_lossy().into()),
        );
        Ok((image, sidecar))
    }

    /// Builds the image and writes it to `out`, its sidecar to `out` with `.json` appended.
    pub fn write(&self, out: &Path) -> Result<Sidecar> {
        self.write_with(&[], out)
    }

    /// The same, with data that the firmware is handed.
    pub fn write_with(&self, items: &[Item<'_>], out: &Path) -> Result<Sidecar> {
        let (image, sidecar) = self.build_with(items)?;
        write(out, &image.bytes)?;
        write(
            &sidecar_path(out),
            serde_json::to_string_pretty(&sidecar)?.as_bytes(),
        )?;
        Ok(sidecar)
    }
}

/// Builds the image of a trust domain and writes it to `out`; its MRTD.
pub fn write_td(elf: &Path, out: &Path) -> Result<String> {
    let bytes = read(elf, "an ELF file")?;
    let program = Program::parse(&bytes).map_err(FileError::content(elf))?;
    let image = td::build(&program).map_err(FileError::content(elf))?;
    write(out, &image.bytes)?;
    Ok(hex(&image.mrtd))
}

/// The image of a trust domain whose firmware is its only software.
#[derive(Clone, Debug)]
pub struct TdFirmwareImage {
    /// Its measurement, hexadecimal.
    pub mrtd: String,
    /// Where the host writes the hand-off blocks.
    pub hob: u64,
}

/// Builds the image of a trust domain that runs `firmware`, without a paravisor, and writes it to `out`.
pub fn write_td_firmware(firmware: &Path, out: &Path) -> Result<TdFirmwareImage> {
    let bytes = read(firmware, "a TDVF image")?;
    let parsed = TdFirmware::parse(&bytes).map_err(FileError::content(firmware))?;
    let built = td::build_firmware(&parsed).map_err(FileError::content(firmware))?;
    write(out, &built.image.bytes)?;
    Ok(TdFirmwareImage {
        mrtd: hex(&built.image.mrtd),
        hob: built.hob,
    })
}

/// Writes to `out` the TDVF image `firmware` with the variables of `store`.
pub fn write_with_variables(firmware: &Path, store: &Path, out: &Path) -> Result<()> {
    let image = read(firmware, "a TDVF image")?;
    let store = read(store, "an OVMF image or variable store")?;
    let image = with_variables(&image, &store).map_err(FileError::content(firmware))?;
    write(out, &image)
}

/// Where the description of an image lies.
pub fn sidecar_path(image: &Path) -> PathBuf {
    let mut name = image.as_os_str().to_owned();
    name.push(".json");
    PathBuf::from(name)
}

/// The description of an image that was built before.
pub fn sidecar(image: &Path) -> Result<Sidecar> {
    let path = sidecar_path(image);
    serde_json::from_slice(&read(&path, "the description of an image")?).with_context(|| {
        format!(
            "{}: not the description of an image; build it again",
            path.display()
        )
    })
}

/// Lays the ELF file out as a ROM of `size` bytes that ends at 4 GiB.
pub fn write_flat(elf: &Path, size: u64, out: &Path) -> Result<()> {
    let bytes = read(elf, "an ELF file")?;
    let flat = elf_to_flat(&bytes, size).map_err(FileError::content(elf))?;
    write(out, &flat)
}

fn read(path: &Path, expected: &'static str) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| {
        format!(
            "{}: expected {expected}, which cannot be read",
            path.display()
        )
    })
}

/// Replaces the file as a whole: another run that reads it meanwhile sees the old or the new content,
/// never half of it.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}", std::process::id()));
    let temporary = PathBuf::from(name);
    fs::write(&temporary, bytes)
        .and_then(|()| fs::rename(&temporary, path))
        .with_context(|| format!("{}: cannot be written", path.display()))
}
