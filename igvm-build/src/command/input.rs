//! Inputs: what each is expected to be, and how much of it is read.
//!
//! A file may be of any size, and some never end; whoever names the wrong one is told so before memory is
//! full of it.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;

use anyhow::Result;
use igvm_build::error::FileError;
use igvm_build::{firmware, handover};

/// First bytes of an IGVM file.
pub const IGVM_MAGIC: &[u8] = b"IGVM";

/// The header has 32 bits for the size of a file.
const IGVM_LIMIT: u64 = u32::MAX as u64;

/// A kind of input.
#[derive(Debug, Clone, Copy)]
pub struct Input {
    /// What it should be and how to get it, for messages.
    expected: &'static str,
    /// Most bytes.
    limit: u64,
    /// Whether it may be an IGVM file, which may have [`IGVM_LIMIT`].
    igvm: bool,
}

impl Input {
    /// An IGVM file. What does not begin as one is read for the message about it alone.
    pub const IGVM: Self = Self {
        expected: "an IGVM file, build one with `igvm-build build`",
        limit: firmware::MAX_SIZE,
        igvm: true,
    };
    /// An IGVM file or the firmware that QEMU launches by itself.
    pub const IGVM_OR_FIRMWARE: Self = Self {
        expected: "an IGVM file or an OVMF image",
        ..Self::IGVM
    };
    /// The guest's firmware.
    pub const FIRMWARE: Self = Self {
        expected: "OVMF.fd of Debian's ovmf-generic 2026.08 or newer",
        ..Self::IGVM
    };
    /// The firmware of trust domains.
    pub const TD_FIRMWARE: Self = Self {
        expected: "OVMF.inteltdx.fd of Debian's ovmf-inteltdx 2026.08 or newer",
        limit: firmware::MAX_SIZE,
        igvm: false,
    };
    /// Variables of a firmware.
    pub const VARIABLES: Self = Self {
        expected: "an OVMF image or variable store",
        ..Self::TD_FIRMWARE
    };
    /// A program; what debuggers need of it is most of the file.
    pub const ELF: Self = Self {
        expected: "an ELF file, build it with `cargo xtask build`",
        limit: 256 << 20,
        igvm: false,
    };
    /// A list of signatures.
    pub const SIGNATURES: Self = Self {
        expected: "an EFI list of signatures",
        limit: handover::MAX_BYTES as u64,
        igvm: false,
    };
    /// An EFI program.
    pub const PROGRAM: Self = Self {
        expected: "an EFI program",
        ..Self::SIGNATURES
    };
    /// A recipe.
    pub const RECIPE: Self = Self {
        expected: "a recipe in TOML",
        limit: 1 << 20,
        igvm: false,
    };
    /// A key that signs.
    pub const KEY: Self = Self {
        expected: "a private key in PEM",
        limit: 64 << 10,
        igvm: false,
    };

    /// Reads a file.
    pub fn read(self, path: &Path) -> Result<Vec<u8>> {
        let read = self.bounded(path).map_err(|source| FileError::Read {
            file: path.to_owned(),
            expected: self.expected,
            source,
        });
        Ok(read?.map_err(|limit| FileError::TooLong {
            file: path.to_owned(),
            limit,
            unless: if self.igvm && limit != IGVM_LIMIT {
                " that do not begin with IGVM"
            } else {
                ""
            },
            expected: self.expected,
        })?)
    }

    /// The bytes of a file, or how many it may have.
    fn bounded(self, path: &Path) -> io::Result<Result<Vec<u8>, u64>> {
        let mut file = File::open(path)?;
        // Zero for what is no ordinary file. Room for all of it: keys leave no copies behind.
        let told = file.metadata()?.len();
        let mut bytes = Vec::with_capacity(told.min(self.limit) as usize);
        let magic = IGVM_MAGIC.len() as u64;
        file.by_ref().take(magic).read_to_end(&mut bytes)?;
        let limit = if self.igvm && bytes == IGVM_MAGIC {
            IGVM_LIMIT
        } else {
            self.limit
        };
        if told <= limit {
            let rest = limit + 1 - bytes.len() as u64;
            file.take(rest).read_to_end(&mut bytes)?;
        }
        let short = told <= limit && bytes.len() as u64 <= limit;
        Ok(if short { Ok(bytes) } else { Err(limit) })
    }
}
