//! The guest's userspace: one static busybox and an init script.
//!
//! Built afresh for every run, because the command of `--exec` is a file in it: so it needs no
//! quoting on its way through the kernel command line.

mod cpio;

use cpio::Archive;

/// What init prints on the console when userspace is reached.
pub const USERSPACE_MARKER: &str = "turnstile: userspace reached";
/// What precedes the output of `--exec` on the second serial port: NUL, this, LF.
pub const OUTPUT_BEGINS: &str = "turnstile-begin:";
/// What follows the output of `--exec` on the second serial port: NUL, this, the exit status, LF.
pub const EXIT_TRAILER: &str = "turnstile-exit:";

/// What the kernel is told: its console is the first serial port, and a panic ends the run by a
/// reset instead of waiting for ever.
pub const COMMAND_LINE: &str = "console=ttyS0 panic=-1";

const INIT: &str = include_str!("init.sh");

/// A file that some guests have besides.
#[derive(Clone, Debug)]
pub struct Extra {
    /// Its path relative to the root, in a directory that is there anyway: [`DIRECTORIES`].
    pub name: String,
    /// Its permission bits.
    pub permissions: u32,
    /// Its contents.
    pub data: Vec<u8>,
}

/// The files of a guest that can start its kernel anew by the command `kexec-again`: the program
/// kexec and the kernel it is booted with.
pub fn kexec_files(program: Vec<u8>, kernel: Vec<u8>) -> Vec<Extra> {
    let extra = |name: &str, permissions, data| Extra {
        name: name.to_owned(),
        permissions,
        data,
    };
    vec![
        extra("bin/kexec", 0o755, program),
        extra(
            "bin/kexec-again",
            0o755,
            include_bytes!("kexec-again.sh").to_vec(),
        ),
        extra("turnstile/vmlinuz", 0o644, kernel),
    ]
}

/// The directories of the initramfs.
pub const DIRECTORIES: [&str; 7] = ["bin", "dev", "proc", "sys", "tmp", "root", "turnstile"];

/// An initramfs with `busybox` (the program's bytes) and `extras` that runs `exec`, or gives a
/// shell.
pub fn build(busybox: &[u8], exec: Option<&str>, extras: &[Extra]) -> Vec<u8> {
    let init = INIT
        .replace("@MARKER@", USERSPACE_MARKER)
        .replace("@BEGINS@", OUTPUT_BEGINS)
        .replace("@TRAILER@", EXIT_TRAILER);
    let mut archive = Archive::default();
    for dir in DIRECTORIES {
        archive.directory(dir);
    }
    archive.file("bin/busybox", 0o755, busybox);
    archive.file("init", 0o755, init.as_bytes());
    if let Some(command) = exec {
        archive.file("turnstile/exec", 0o644, format!("{command}\n").as_bytes());
    }
    for Extra {
        name,
        permissions,
        data,
    } in extras
    {
        archive.file(name, *permissions, data);
    }
    archive.finish()
}

#[cfg(test)]
mod tests {
    use super::{Extra, build};

    fn contains(haystack: &[u8], needle: &str) -> bool {
        haystack
            .windows(needle.len())
            .any(|window| window == needle.as_bytes())
    }

    #[test]
    fn the_command_is_a_file_and_needs_no_quoting() {
        let command = "echo \"a b\" 'c'; cat /proc/meminfo";
        let archive = build(b"BUSYBOX", Some(command), &[]);
        assert!(contains(&archive, command));
        assert!(contains(&archive, "turnstile/exec"));
    }

    #[test]
    fn extra_files_are_in_the_archive() {
        let extra = Extra {
            name: "turnstile/more".into(),
            permissions: 0o755,
            data: b"MORE OF IT".to_vec(),
        };
        let archive = build(b"BUSYBOX", None, &[extra]);
        assert!(contains(&archive, "turnstile/more\0"));
        assert!(contains(&archive, "MORE OF IT"));
    }

    #[test]
    fn without_a_command_there_is_no_command_file() {
        let archive = build(b"BUSYBOX", None, &[]);
        assert!(!contains(&archive, "turnstile/exec\0"));
        assert!(contains(&archive, super::USERSPACE_MARKER));
        assert!(!contains(&archive, "@MARKER@") && !contains(&archive, "@TRAILER@"));
        assert!(!contains(&archive, "@BEGINS@"));
    }
}
