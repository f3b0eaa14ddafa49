//! What an image is made of, in a file: a recipe in TOML, for what would be a long command line.
//!
//! ```toml
//! paravisor = "svsm.elf"
//! firmware = "OVMF.fd"
//! td-firmware = "OVMF.inteltdx.fd"
//! native = true
//! target = "qemu"
//! c-bit = 51
//! accept = "ahead:50%"
//! out = "turnstile.igvm"
//! ```
//!
//! Every key may be left out; options of the command line come first. Relative paths are relative to the
//! recipe, so that it means the same wherever the command is run. A key that is not known is an error.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::target::Target;

/// A recipe.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Recipe {
    /// The paravisor, an ELF file.
    pub paravisor: Option<PathBuf>,
    /// The firmware: an OVMF image, or an IGVM file that has one.
    pub firmware: Option<PathBuf>,
    /// The firmware for trust domains, a TDVF image.
    pub td_firmware: Option<PathBuf>,
    /// An EFI program that the firmware starts as the kernel.
    pub uki: Option<PathBuf>,
    /// Platform key of secure boot, a list of signatures.
    pub pk: Option<PathBuf>,
    /// Key exchange keys.
    pub kek: Option<PathBuf>,
    /// What may be started.
    pub db: Option<PathBuf>,
    /// What may not be started.
    pub dbx: Option<PathBuf>,
    /// Whether the image is for the native platform as well.
    pub native: Option<bool>,
    /// Whose loader it is for.
    pub target: Option<Target>,
    /// Position of the C-bit.
    pub c_bit: Option<u32>,
    /// When memory is accepted.
    pub accept: Option<String>,
    /// Where to write the image.
    pub out: Option<PathBuf>,
}

impl Recipe {
    /// Reads a recipe that lies in `directory`.
    ///
    /// # Errors
    ///
    /// What is wrong with it, with its line.
    pub fn parse(text: &str, directory: &Path) -> Result<Self, toml::de::Error> {
        let mut recipe: Self = toml::from_str(text)?;
        for path in [
            &mut recipe.paravisor,
            &mut recipe.firmware,
            &mut recipe.td_firmware,
            &mut recipe.uki,
            &mut recipe.pk,
            &mut recipe.kek,
            &mut recipe.db,
            &mut recipe.dbx,
            &mut recipe.out,
        ]
        .into_iter()
        .flatten()
        {
            *path = directory.join(&*path);
        }
        Ok(recipe)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_relative_to_the_recipe() {
        let text = "paravisor = \"svsm.elf\"\nfirmware = \"/ovmf.fd\"\ntarget = \"hyper-v\"\n";
        let recipe = Recipe::parse(text, Path::new("a/b")).unwrap();
        assert_eq!(recipe.paravisor.unwrap(), Path::new("a/b/svsm.elf"));
        assert_eq!(recipe.firmware.unwrap(), Path::new("/ovmf.fd"));
        assert_eq!(recipe.target, Some(Target::HyperV));
        assert_eq!(recipe.out, None);
    }

    #[test]
    fn what_is_not_known_is_an_error_that_says_where() {
        for (text, expected) in [
            ("paravisor = \"a\"\nfirmwear = \"b\"\n", "firmwear"),
            ("target = \"xen\"\n", "xen"),
            ("c-bit = \"51\"\n", "c-bit"),
        ] {
            let error = Recipe::parse(text, Path::new("")).unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
        }
    }
}
