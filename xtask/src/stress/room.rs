//! A small Debian of its own, in which a kernel module is compiled with the compiler and the tools
//! that the kernel itself was made with.
//!
//! Kernels of newer Debian releases come with build programs that this machine's C library cannot
//! run, so headers, compiler, make and all that they need are downloaded from the release of the
//! kernel and unpacked into one directory of the cache. Nothing is installed, no script of a package
//! runs. The compiler is started inside by chroot, in a user namespace unless the user is root.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::command::{self, tail};
use crate::fetch::apt::{self, Archive};
use crate::fetch::lock;
use crate::fetch::sources::Debian;
use crate::layout::{Layout, create_dir, read, write};
use crate::progress;

/// Directories of a Debian system that are links into `usr` (Debian policy, merged /usr).
const MERGED: [&str; 4] = ["bin", "sbin", "lib", "lib64"];
/// Programs that kbuild starts and nothing depends on.
const TOOLS: [&str; 9] = [
    "make",
    "dash",
    "bash",
    "coreutils",
    "findutils",
    "grep",
    "sed",
    "mawk",
    "binutils",
];
/// Where the module lies in the room.
const PLACE: &str = "module";

/// Compiles a module from `sources` (name and text) for the kernel `release`; returns `file`.
pub fn compile(
    layout: &Layout,
    release: &str,
    sources: &[(String, String)],
    file: &str,
) -> Result<Vec<u8>> {
    let _filling = lock(layout)?;
    let room = furnish(layout, release)?;
    let step = progress::step(format!("build the kernel module for {release}"));
    let place = room.join(PLACE);
    if place.exists() {
        fs::remove_dir_all(&place).with_context(|| format!("{}", place.display()))?;
    }
    create_dir(&place)?;
    for (name, text) in sources {
        write(&place.join(name), text)?;
    }
    // objtool looks up the bounds of its stack here; those of this process will do.
    write(
        &room.join("proc/self/maps"),
        read(Path::new("/proc/self/maps"))?,
    )?;
    let mut make = inside(&room);
    make.arg("make")
        .arg("-C")
        .arg(format!("/usr/src/linux-headers-{release}"))
        .arg(format!("M=/{PLACE}"))
        .arg("modules")
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin");
    let (ok, text) = command::watched(&mut make, &step)?;
    if !ok {
        bail!(
            "the kernel module does not build for {release}; its last words:\n{}",
            tail(&text, 20).trim_end()
        );
    }
    step.done("");
    read(&place.join(file))
}

/// A command whose root directory is `room`.
fn inside(room: &Path) -> Command {
    let mut command = if apt::is_root() {
        Command::new("chroot")
    } else {
        let mut unshare = Command::new("unshare");
        unshare.args(["--map-root-user", "chroot"]);
        unshare
    };
    command.arg(room);
    command
}

/// The room for modules of `release`, filled if it is not yet.
fn furnish(layout: &Layout, release: &str) -> Result<PathBuf> {
    let room = layout.cache.join("rooms").join(release);
    let complete = room.join("complete");
    if complete.is_file() {
        return Ok(room);
    }
    let suites = suites(release)?;
    let debian = Debian::of_this_machine()?;
    let archive =
        Archive::open_several(&debian, &format!("room-{release}"), &suites, &layout.cache)?;
    let headers = format!("linux-headers-{release}");
    if archive.offers(&headers).is_empty() {
        bail!(
            "{headers}: {} does not offer it (any more), and a module fits one kernel only; \
             remove {} to fetch a kernel that is offered",
            suites.join(", "),
            layout.cache.join("packages").display()
        );
    }
    let mut wanted = vec![headers.as_str()];
    wanted.extend(TOOLS);
    let debs = archive.download_with_dependencies(&wanted)?;
    let step = progress::step(format!("unpack {} packages", debs.len()));
    if room.exists() {
        fs::remove_dir_all(&room).with_context(|| format!("{}", room.display()))?;
    }
    for dir in MERGED {
        create_dir(&room.join("usr").join(dir))?;
        link(&format!("usr/{dir}"), &room.join(dir))?;
    }
    create_dir(&room.join("proc/self"))?;
    for deb in &debs {
        unpack_into_merged(deb, &room)?;
        fs::remove_file(deb).with_context(|| format!("{}", deb.display()))?;
    }
    // What the package's script would do.
    link("mawk", &room.join("usr/bin/awk"))?;
    write(&complete, "")?;
    step.done("");
    Ok(room)
}

fn link(to: &str, from: &Path) -> Result<()> {
    symlink(to, from).with_context(|| format!("{}: cannot be made a link", from.display()))
}

/// Unpacks a package into a root directory whose top directories are links: `dpkg-deb --extract`
/// would replace the links.
fn unpack_into_merged(deb: &Path, room: &Path) -> Result<()> {
    let tar = room.join("package.tar");
    let file = fs::File::create(&tar).with_context(|| format!("{}", tar.display()))?;
    let status = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(deb)
        .stdout(file)
        .status()
        .context("dpkg-deb cannot be started")?;
    if !status.success() {
        bail!(
            "{}: the package cannot be unpacked ({status})",
            deb.display()
        );
    }
    command::output(
        Command::new("tar")
            .args(["--extract", "--keep-directory-symlink", "--no-same-owner"])
            .arg("--file")
            .arg(&tar)
            .arg("--directory")
            .arg(room),
    )
    .with_context(|| format!("{}: the package cannot be unpacked", deb.display()))?;
    fs::remove_file(&tar).with_context(|| format!("{}", tar.display()))
}

/// The suites that have the headers of `release` and the tools that fit: Debian's releases carry
/// the Debian they were built for in their name, as in `6.12.95+deb12-cloud-amd64`.
pub fn suites(release: &str) -> Result<Vec<String>> {
    let code_name = match release.split_once("+deb").map(|(_, rest)| rest) {
        Some(rest) if rest.starts_with("12") => "bookworm",
        Some(rest) if rest.starts_with("13") => "trixie",
        Some(rest) if rest.starts_with("14") => "forky",
        _ => bail!(
            "{release}: expected a kernel of Debian 12, 13 or 14 (such as \
             6.12.95+deb12-cloud-amd64); a module is built for those only"
        ),
    };
    // Debian 14 is not released, so it has no backports.
    Ok(match code_name {
        "forky" => vec![code_name.to_owned()],
        _ => vec![code_name.to_owned(), format!("{code_name}-backports")],
    })
}

#[cfg(test)]
mod tests {
    use super::suites;

    #[test]
    fn the_release_tells_the_suites() {
        assert_eq!(
            suites("6.12.95+deb12-cloud-amd64").unwrap(),
            ["bookworm", "bookworm-backports"]
        );
        assert_eq!(suites("7.2.1+deb14-amd64").unwrap(), ["forky"]);
        assert!(suites("6.12.95").is_err());
        assert!(suites("6.12.95+deb11-amd64").is_err());
    }
}
