//! `xtask doctor`: what this machine has, what it lacks and how to get it. Changes nothing.

use anyhow::Result;
use e2e::guests::Kernel;

use crate::disk;
use crate::fetch;
use crate::fetch::apt::is_root;
use crate::fetch::sources::Debian;
use crate::layout::Layout;
use crate::qemu::{self, Found};
use crate::toolchain::{BARE_TARGET, BareTarget, Toolchain};

/// How a thing stands.
enum State {
    Ready(String),
    /// Missing, but `xtask` gets it by itself when it is needed.
    Fetched(String),
    /// Missing, and only some runs need it.
    Optional(String),
    /// Missing, and somebody has to do something.
    Missing(String),
}

/// Prints one line per thing; says whether everything is there or can be fetched.
pub fn run(layout: &Layout) -> Result<bool> {
    let debian = Debian::of_this_machine();
    let toolchain = Toolchain::find(layout)?;
    let mut lines = vec![
        (
            "packages from",
            match &debian {
                Ok(debian) => State::Ready(format!("{} ({})", debian.mirror, debian.codename)),
                Err(error) => State::Missing(format!("{error:#}")),
            },
        ),
        (
            "downloads in",
            State::Ready(layout.cache.display().to_string()),
        ),
        ("rustc", State::Ready(toolchain.release.clone())),
        (
            BARE_TARGET,
            match toolchain.ready() {
                Some(BareTarget::Precompiled) => State::Ready("installed".into()),
                Some(BareTarget::FromSource) => {
                    State::Ready("built from the library source".into())
                }
                None => State::Fetched(format!(
                    "rustup target add {BARE_TARGET}, or the library source of Debian's rust-src"
                )),
            },
        ),
        (
            "qemu",
            match qemu::look()? {
                Found::Good(path, version) => {
                    State::Ready(format!("{version}, {}", path.display()))
                }
                Found::Old(path, version) => State::Missing(format!(
                    "{version} in {} is too old; {}",
                    path.display(),
                    qemu::advice()
                )),
                Found::Missing if is_root() && debian.is_ok() => State::Fetched(qemu::advice()),
                Found::Missing => State::Missing(format!("as root: {}", qemu::advice())),
            },
        ),
    ];
    for wanted in fetch::for_a_run() {
        let state = match wanted.cached(layout) {
            Some((file, version)) => State::Ready(format!("{version}, {}", file.display())),
            None if debian.is_ok() => State::Fetched(format!(
                "{} from {}: {}",
                wanted.package,
                wanted.suites.join(" or "),
                wanted.purpose
            )),
            None => State::Missing(format!(
                "{}: no Debian mirror to take it from",
                wanted.purpose
            )),
        };
        lines.push((wanted.name, state));
    }
    lines.push((
        "disk",
        match disk::made(layout, Kernel::default()) {
            Some(file) => State::Ready(file.display().to_string()),
            None if is_root() => {
                State::Fetched("made when --disk debian or a test needs it".into())
            }
            None => State::Optional("--disk debian and tests disk/*: made once, by root".into()),
        },
    ));
    let mut good = true;
    for (name, state) in lines {
        let (mark, text) = match state {
            State::Ready(text) => ("ready", text),
            State::Fetched(text) => ("will be fetched", text),
            State::Optional(text) => ("not needed", text),
            State::Missing(text) => {
                good = false;
                ("MISSING", text)
            }
        };
        println!("{name:<24} {mark:<16} {text}");
    }
    Ok(good)
}
