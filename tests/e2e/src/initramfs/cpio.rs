//! Writes the "newc" cpio archive that Linux unpacks into its first root file system.
//!
//! Format: Linux, Documentation/driver-api/early-userspace/buffer-format.rst. An entry is a header
//! of a magic and thirteen 8-digit hexadecimal fields, the name with a final NUL, the data; name and
//! data are each padded to 4 bytes. Times and owners are zero, so that an archive depends on its
//! contents only.

/// Magic of the format without checksums.
const MAGIC: &str = "070701";
/// Name of the entry that ends an archive.
const TRAILER: &str = "TRAILER!!!";
/// File type bits of `mode` (POSIX, sys/stat.h).
const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;

/// An archive under construction.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    /// Adds a directory. Parents must be added before their children.
    pub fn directory(&mut self, name: &str) {
        self.entry(name, DIRECTORY | 0o755, b"");
    }

    /// Adds a regular file with the given permission bits.
    pub fn file(&mut self, name: &str, permissions: u32, data: &[u8]) {
        self.entry(name, REGULAR | (permissions & 0o7777), data);
    }

    /// Ends the archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry(TRAILER, 0, b"");
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, data: &[u8]) {
        self.entries += 1;
        let links = if mode & DIRECTORY == DIRECTORY { 2 } else { 1 };
        let fields = [
            self.entries,
            mode,
            0, // uid
            0, // gid
            links,
            0, // mtime
            u32::try_from(data.len()).expect("no file of 4 GiB goes into an initramfs"),
            0, // device major and minor
            0,
            0, // device major and minor of a device node
            0,
            u32::try_from(name.len() + 1).expect("names are short"),
            0, // checksum, unused in this format
        ];
        self.bytes.extend_from_slice(MAGIC.as_bytes());
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(data);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::{Command, Stdio};

    use super::Archive;

    #[test]
    fn headers_names_and_data_are_padded_to_four_bytes() {
        let mut archive = Archive::default();
        archive.directory("d");
        archive.file("d/f", 0o644, b"12345");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        assert_eq!(&bytes[..6], b"070701");
        // 110 bytes of header, "d" and NUL: the next header follows at once.
        assert_eq!(&bytes[112..118], b"070701");
        // mode of the file, the second field
        assert_eq!(&bytes[112 + 14..112 + 22], b"000081a4");
        // 112 + 110 + 4 ("d/f" and NUL) = 226, padded to 228
        assert_eq!(&bytes[228..233], b"12345");
        assert!(bytes.windows(11).any(|window| window == b"TRAILER!!!\0"));
    }

    /// The system's own cpio, where there is one, must read what is written here.
    #[test]
    fn cpio_lists_the_archive() {
        let mut archive = Archive::default();
        archive.directory("bin");
        archive.file("bin/sh", 0o755, b"#!");
        let child = Command::new("cpio")
            .args(["-t", "--quiet"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        let Ok(mut child) = child else { return };
        child
            .stdin
            .take()
            .unwrap()
            .write_all(&archive.finish())
            .unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success());
        assert_eq!(String::from_utf8_lossy(&output.stdout), "bin\nbin/sh\n");
    }
}
