//! The root file system: Debian's packages by mmdebstrap, and the recipe's files.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::recipe::{FILES, LINKS, Recipe, SUITE};
use super::tools::Tools;
use crate::command::{self, telling_line};
use crate::fetch::sources::Debian;
use crate::layout::{create_dir, write};
use crate::progress;

/// A root file system in a directory.
#[derive(Debug)]
pub struct Root {
    /// Where it begins.
    pub dir: PathBuf,
    /// The kernel in it.
    pub kernel: PathBuf,
    /// Its version, as `uname -r` says it.
    pub release: String,
    /// The initial root file system that its packages made.
    pub initrd: PathBuf,
}

/// Makes one below `work`, which also takes what is of use only meanwhile.
pub fn make(recipe: &Recipe, tools: &Tools, work: &Path) -> Result<Root> {
    let debian = Debian::of_this_machine()?;
    let dir = work.join("root");
    let sources = work.join("sources.list");
    let lines: String = recipe
        .suites()
        .iter()
        .map(|suite| debian.source_line(suite))
        .collect();
    write(&sources, lines)?;

    let step = progress::step(format!(
        "a root file system of {} with kernel {}",
        recipe.suites().join(" and "),
        recipe.kernel.name()
    ));
    let mut mmdebstrap = Command::new(&tools.perl);
    mmdebstrap
        .arg(&tools.mmdebstrap)
        .args(["--mode=root", "--format=directory", "--variant=minbase"])
        .args(["--aptopt=APT::Install-Recommends \"false\""])
        .args(["--aptopt=Acquire::Languages \"none\""])
        // As for all package lists: a mirror may be frozen, what it says is signed (fetch::apt).
        .args(["--aptopt=Acquire::Check-Valid-Until \"false\""])
        .arg(format!("--include={}", recipe.packages().join(",")))
        .arg(SUITE)
        .arg(&dir)
        .arg(&sources)
        .env("TMPDIR", work)
        .env("LC_ALL", "C.UTF-8");
    let (ok, text) = command::watched(&mut mmdebstrap, &step)?;
    let log = work.join("mmdebstrap.log");
    write(&log, &text)?;
    if !ok {
        bail!(
            "mmdebstrap: the root file system could not be made: {}; the whole output is in {}",
            telling_line(&text, ""),
            log.display()
        );
    }
    for file in FILES {
        let path = dir.join(file.path);
        parent(&path)?;
        write(&path, file.contents())?;
        fs::set_permissions(&path, fs::Permissions::from_mode(file.mode))
            .with_context(|| format!("{}", path.display()))?;
    }
    for link in LINKS {
        let path = dir.join(link.path);
        parent(&path)?;
        if path.is_symlink() {
            fs::remove_file(&path).with_context(|| format!("{}", path.display()))?;
        }
        symlink(link.target, &path).with_context(|| format!("{}", path.display()))?;
    }
    let (kernel, release) = only(&dir.join("boot"), "vmlinuz-")?;
    let initrd = dir.join("boot").join(format!("initrd.img-{release}"));
    if !initrd.is_file() {
        bail!(
            "{}: expected the initrd of the kernel; see {}",
            initrd.display(),
            log.display()
        );
    }
    step.done(&release);
    Ok(Root {
        dir,
        kernel,
        release,
        initrd,
    })
}

fn parent(path: &Path) -> Result<()> {
    path.parent().map_or(Ok(()), create_dir)
}

/// The one file in `dir` whose name begins with `prefix`, and the rest of its name.
fn only(dir: &Path, prefix: &str) -> Result<(PathBuf, String)> {
    let mut found: Vec<(PathBuf, String)> = fs::read_dir(dir)
        .with_context(|| format!("{}: cannot be read", dir.display()))?
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let rest = entry.file_name().to_str()?.strip_prefix(prefix)?.to_owned();
            Some((entry.path(), rest))
        })
        .collect();
    match (found.pop(), found.is_empty()) {
        (Some(one), true) => Ok(one),
        (last, _) => bail!(
            "{}: expected one file {prefix}*, found {}",
            dir.display(),
            found.len() + usize::from(last.is_some())
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::only;

    #[test]
    fn one_file_of_a_prefix_is_wanted() {
        let dir = std::env::temp_dir().join(format!("turnstile-only-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        assert!(only(&dir, "vmlinuz-").is_err());
        fs::write(dir.join("vmlinuz-6.12"), "").unwrap();
        fs::write(dir.join("other"), "").unwrap();
        assert_eq!(only(&dir, "vmlinuz-").unwrap().1, "6.12");
        fs::write(dir.join("vmlinuz-7.2"), "").unwrap();
        let error = only(&dir, "vmlinuz-").unwrap_err().to_string();
        assert!(error.contains("found 2"), "{error}");
        fs::remove_dir_all(&dir).unwrap();
    }
}
