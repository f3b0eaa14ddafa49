//! Attestation in a Linux guest: what it is given, what it does, and how its evidence comes out. The test guest
//! `svsm_evidence` writes the same lines.
//!
//! The guest uses nothing but the kernel's own interface, configfs-tsm: it asks the service provider "svsm" for
//! a report on the paravisor, and the security processor for one on itself. It also asks that for one on VMPL0,
//! which the interface does unless it is told otherwise; that must bring none.

use anyhow::{Context, Result};
use base64ct::{Base64, Encoding as _};

use crate::guests::Kernel;
use crate::initramfs::Extra;
use crate::scenario;
use crate::verify::Evidence;

/// A module of the kernel.
#[derive(Clone, Copy, Debug)]
pub struct Module {
    /// What it is called in the guest.
    pub name: &'static str,
    /// Where it may lie below the kernel's modules, by the kernel's version.
    pub files: &'static [&'static str],
    /// Kernels that do not need it may lack it.
    pub optional: bool,
}

impl Module {
    const fn needed(name: &'static str, files: &'static [&'static str]) -> Module {
        Module {
            name,
            files,
            optional: false,
        }
    }

    const fn optional(name: &'static str, files: &'static [&'static str]) -> Module {
        Module {
            optional: true,
            ..Module::needed(name, files)
        }
    }
}

/// The modules that attestation needs, in the order of their loading. The ciphers are 6.12's, which asks for
/// them by name; later kernels have theirs built in.
pub const MODULES: [Module; 7] = [
    Module::optional("gf128mul.ko.xz", &["lib/crypto/gf128mul.ko.xz"]),
    Module::optional("ghash-generic.ko.xz", &["crypto/ghash-generic.ko.xz"]),
    Module::optional("crypto_null.ko.xz", &["crypto/crypto_null.ko.xz"]),
    Module::optional("gcm.ko.xz", &["crypto/gcm.ko.xz"]),
    Module::needed("configfs.ko.xz", &["fs/configfs/configfs.ko.xz"]),
    Module::needed(
        "tsm.ko.xz",
        &[
            "drivers/virt/coco/tsm.ko.xz",
            "drivers/virt/coco/guest/tsm_report.ko.xz",
        ],
    ),
    Module::needed(
        "sev-guest.ko.xz",
        &["drivers/virt/coco/sev-guest/sev-guest.ko.xz"],
    ),
];

/// Bytes of a nonce.
pub const NONCE_SIZE: usize = 64;
/// Where the nonce lies in the guest.
const NONCE: &str = "turnstile/nonce";

/// The path of a module, relative to the root of the initramfs.
pub fn module_path(module: &Module) -> String {
    format!("turnstile/{}", module.name)
}

/// A nonce that nobody has seen.
pub fn fresh_nonce() -> [u8; NONCE_SIZE] {
    let mut nonce = [0; NONCE_SIZE];
    rand_core::RngCore::fill_bytes(&mut rand_core::OsRng, &mut nonce);
    nonce
}

/// The files that a guest needs for [`command`]: the modules of its kernel, for a scenario that said that it
/// loads them, and the nonce.
pub fn guest_files(
    context: &scenario::Context,
    kernel: Kernel,
    nonce: &[u8; NONCE_SIZE],
) -> Result<Vec<Extra>> {
    let modules = context.artefacts.modules.get(&kernel);
    let mut files = modules
        .context("the kernel's modules were not fetched for this scenario")?
        .clone();
    files.push(Extra {
        name: NONCE.to_owned(),
        permissions: 0o644,
        data: nonce.to_vec(),
    });
    Ok(files)
}

/// The shell command that gathers the evidence. Whatever fails is told, and shows in what is missing.
pub fn command() -> String {
    format!(
        r#"{}
ask services svsm ""
ask own "" 1
ask above "" ""
dmesg | grep -i -e sev -e tsm
"#,
        preparation()
    )
}

/// Entries of [`command_after_lies`] whose reports are asked for when the host lies; the last is the guest's own.
pub const LIED_ABOUT: [&str; 3] = ["second", "third", "own"];

/// The same where the host lies about all messages but the first: how reading each report ended is told.
pub fn command_after_lies() -> String {
    let [second, third, own] = LIED_ABOUT;
    format!(
        r#"{}
ask services svsm ""
attempt() {{
    prepare $1 "$2" "$3" || return 1
    if dd if=$entry/outblob of=/outblob bs=8192 2> /error
    then echo "$1 read"
    else echo "$1 failed: $(cat /error)"
    fi
    echo "$1 outblob $(base64 /outblob | tr -d '\n')"
}}
attempt {second} svsm ""
attempt {third} svsm ""
attempt {own} "" 1
dmesg | grep -i -e sev -e tsm
"#,
        preparation()
    )
}

/// Loads the modules, and says what it is to `prepare` an entry and to `ask` for a report and all that comes with
/// it.
fn preparation() -> String {
    let load: String = MODULES
        .iter()
        .map(|module| {
            let path = module_path(module);
            let otherwise = if module.optional { "true" } else { "exit 1" };
            format!("[ ! -e /{path} ] || insmod /{path} || {otherwise}\n")
        })
        .collect();
    format!(
        r#"{load}mount -t configfs none /sys/kernel/config || exit 1
prepare() {{
    entry=/sys/kernel/config/tsm/report/$1
    mkdir $entry || return 1
    dd if=/{NONCE} of=$entry/inblob bs={NONCE_SIZE} count=1 2>/dev/null || return 1
    [ -z "$2" ] || echo $2 > $entry/service_provider || return 1
    [ -z "$3" ] || echo $3 > $entry/privlevel || return 1
}}
ask() {{
    prepare $1 "$2" "$3" || return 1
    for blob in outblob auxblob manifestblob; do
        [ "$2$blob" = manifestblob ] || echo "$1 $blob $(base64 $entry/$blob | tr -d '\n')"
    done
    echo "$1 provider $(cat $entry/provider)"
}}"#
    )
}

/// What the guest has told about one entry.
pub fn evidence(output: &str, entry: &str) -> Result<Evidence> {
    let blob = |name: &str| -> Result<Vec<u8>> {
        let mark = format!("{entry} {name} ");
        let line = output.lines().find_map(|line| line.strip_prefix(&mark));
        let text = line.with_context(|| format!("the guest has told no {name} of {entry}"))?;
        Base64::decode_vec(text.trim()).with_context(|| format!("{name} of {entry}: no base64"))
    };
    let is_own = !output.contains(&format!("{entry} manifestblob "));
    Ok(Evidence {
        report: blob("outblob")?,
        certificates: blob("auxblob")?,
        manifest: if is_own {
            Vec::new()
        } else {
            blob("manifestblob")?
        },
    })
}

#[cfg(test)]
mod tests {
    use super::{command, evidence};

    #[test]
    fn evidence_is_found_by_its_entry() {
        let output = "services outblob TQ==\r\nservices auxblob TWE=\nservices manifestblob TWFu\n\
                      own outblob TWE=\nown auxblob TQ==\n";
        let services = evidence(output, "services").unwrap();
        assert_eq!(services.report, b"M");
        assert_eq!(services.certificates, b"Ma");
        assert_eq!(services.manifest, b"Man");
        let own = evidence(output, "own").unwrap();
        assert_eq!((own.report.as_slice(), own.manifest.len()), (&b"Ma"[..], 0));
        assert!(evidence(output, "other").is_err());
        assert!(evidence("own outblob TWE\nown auxblob TQ==\n", "own").is_err());
    }

    #[test]
    fn the_command_loads_what_others_need_first() {
        let command = command();
        let at = |text: &str| command.find(text).unwrap();
        assert!(at("configfs.ko.xz") < at("tsm.ko.xz"));
        assert!(at("tsm.ko.xz") < at("sev-guest.ko.xz"));
    }
}
