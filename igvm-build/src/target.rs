//! Whose loader an image is for.
//!
//! | | QEMU | Hyper-V | Vanadium |
//! |---|---|---|---|
//! | highest VTL of an image with a firmware | 0 (ignored) | 2 | 2 |
//! | VMSA at | 0xffff_ffff_f000 | the region's last page | 0xffff_ffff_f000 |
//! | shared memory from | nowhere (C-bit) | 2^46 (vTOM) | nowhere (C-bit) |
//! | PAT of the first processor | after reset | after reset | 0x70106 |
//! | pages of zeroes | as data | as data | filled by the security processor |
//! | native platform | if wanted | no | no |
//!
//! The rules for Hyper-V and Vanadium are those that COCONUT-SVSM's builder keeps to; neither loader is to be
//! had here. What starts in QEMU is tested, of the others only that the files are as the table says.
//! [docs/images.md](../../docs/images.md) has what else these loaders expect, and why it is not kept.

use clap::ValueEnum;
use protocols::addr::PAGE_SIZE;
use protocols::vmsa::{LAUNCH_GPA, Vmsa};
use serde::{Deserialize, Serialize};

use crate::layout::REGION_END;
use crate::measure::snp::{Loader, Processors};

/// A loader.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Target {
    /// QEMU 10.1 and newer with KVM, and the machine
    #[default]
    Qemu,
    /// Hyper-V
    #[value(name = "hyper-v")]
    HyperV,
    /// Google's Vanadium
    Vanadium,
}

impl Target {
    /// Where the VMSA is launched.
    #[must_use]
    pub const fn vmsa_gpa(self) -> u64 {
        match self {
            Self::Qemu | Self::Vanadium => LAUNCH_GPA,
            Self::HyperV => REGION_END - PAGE_SIZE,
        }
    }

    /// Address behind what the paravisor's region may take of memory that is not launched.
    #[must_use]
    pub const fn region_end(self) -> u64 {
        match self {
            Self::Qemu | Self::Vanadium => REGION_END,
            Self::HyperV => REGION_END - PAGE_SIZE,
        }
    }

    /// The highest virtual trust level that an image says it has: 2 is the paravisor of a guest.
    #[must_use]
    pub const fn highest_vtl(self, with_guest: bool) -> u8 {
        match self {
            Self::HyperV | Self::Vanadium if with_guest => 2,
            _ => 0,
        }
    }

    /// First shared address; 0 where a C-bit tells.
    #[must_use]
    pub const fn shared_boundary(self) -> u64 {
        match self {
            Self::Qemu | Self::Vanadium => 0,
            Self::HyperV => 1 << 46,
        }
    }

    /// Whether an image may be for the native platform as well.
    #[must_use]
    pub const fn has_native(self) -> bool {
        matches!(self, Self::Qemu)
    }

    /// Changes of the first processor's state.
    pub const fn adjust(self, vmsa: &mut Vmsa) {
        if matches!(self, Self::Vanadium) {
            vmsa.g_pat = 0x7_0106;
        }
    }

    /// How the image is measured, with one processor.
    #[must_use]
    pub const fn loader(self) -> Loader {
        self.loader_for(Processors {
            count: 1,
            signature: None,
        })
    }

    /// How the image is measured. Only KVM asks how many processors there are.
    #[must_use]
    pub const fn loader_for(self, processors: Processors) -> Loader {
        match self {
            Self::Qemu => Loader::Qemu(processors),
            Self::HyperV => Loader::AsWritten {
                native_zeroes: false,
            },
            Self::Vanadium => Loader::AsWritten {
                native_zeroes: true,
            },
        }
    }
}
