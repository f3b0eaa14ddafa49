//! What `xtask run` can be told about a disk.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::Args;
use e2e::guests::Kernel;
use e2e::vm::{Bus, Disk};

use crate::fetch::guests::Choice;
use crate::layout::{Layout, write};

/// The options about a disk.
#[derive(Debug, Args)]
pub struct DiskOptions {
    /// Disk to boot from instead of a kernel: debian (made on first use, with the kernel that
    /// --kernel names in it), or a raw image FILE. It is not changed; network and randomness come
    /// with it
    #[arg(long, value_name = "DISK", value_parser = chosen, conflicts_with_all = ["initrd", "append"])]
    disk: Option<Chosen>,
    /// How the disk is attached: virtio or nvme
    #[arg(long, value_name = "BUS", default_value = "virtio", requires = "disk")]
    disk_bus: Bus,
}

/// Which disk.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Chosen {
    Debian,
    File(PathBuf),
}

/// What is no name of ours is a file. A file of that name is reached by `./debian`.
fn chosen(text: &str) -> Result<Chosen, std::convert::Infallible> {
    Ok(match text {
        "debian" => Chosen::Debian,
        file => Chosen::File(file.into()),
    })
}

impl DiskOptions {
    /// Fails if a file was chosen that is not there.
    pub fn check(&self) -> Result<()> {
        match &self.disk {
            Some(Chosen::File(file)) if !file.is_file() => bail!(
                "{}: expected a disk image, there is no such file; check the path, or give debian",
                file.display()
            ),
            _ => Ok(()),
        }
    }

    /// The disk, made if need be, with `exec` for it to run; what that needs is written to `dir`.
    pub fn obtain(
        &self,
        layout: &Layout,
        kernel: &Choice<Kernel>,
        exec: Option<&str>,
        dir: &Path,
    ) -> Result<Option<Disk>> {
        let file = match (&self.disk, kernel) {
            (None, _) => return Ok(None),
            (Some(Chosen::File(file)), _) => file.clone(),
            (Some(Chosen::Debian), Choice::Named(kernel)) => super::obtain(layout, *kernel)?,
            (Some(Chosen::Debian), Choice::File(kernel)) => bail!(
                "{}: expected one of Debian's kernels for --disk debian (see --help), found a file",
                kernel.display()
            ),
        };
        let exec = exec
            .map(|command| {
                let script = dir.join("exec.sh");
                write(&script, format!("{command}\n")).map(|()| script)
            })
            .transpose()?;
        Ok(Some(Disk {
            file,
            bus: self.disk_bus,
            exec,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::{Chosen, chosen};

    #[test]
    fn what_is_no_name_is_a_file() {
        assert_eq!(chosen("debian"), Ok(Chosen::Debian));
        assert_eq!(chosen("./debian"), Ok(Chosen::File("./debian".into())));
    }
}
