//! Does a real Debian on a disk boot and use its devices, its memory accepted by the paravisor?
//!
//! The firmware finds the EFI system partition and starts the UKI there; nothing is handed over by
//! fw_cfg but the script to run. Disk, network and randomness reach the guest by DMA, so everything
//! they move goes through memory that the guest shares. Contents are compared by checksum.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use protocols::launch::Fault;
use protocols::report::Outcome;

use crate::guests::Kernel;
use crate::scenario::{Context, Findings, Scenario};
use crate::vm::{Backing, Bus, Disk, Finished, Plain, Settings, Vc};

/// How long a boot from the disk, and the use of its devices, may take on a busy host.
const LIMIT: Duration = Duration::from_secs(1800);
/// MiB of the file that is written, read back, and copied past the page cache.
const FILE_MIB: u64 = 192;
/// MiB that go over the network, in each direction.
const NET_MIB: u64 = 32;
/// Bytes of a 64 KiB file of noise that gzip leaves, at least.
const NOISE: u64 = 64 << 10;

/// One way of booting the disk.
#[derive(Clone, Copy, Debug)]
struct Row {
    kernel: Kernel,
    bus: Bus,
    backing: Backing,
    vcpus: u32,
}

impl Row {
    /// The disk that both kinds of scenarios boot.
    const DEFAULT: Row = Row {
        kernel: Kernel::Cloud6_12,
        bus: Bus::Virtio,
        backing: Backing::Large,
        vcpus: 2,
    };
}

pub fn scenarios() -> Vec<Scenario> {
    let uki = |name: &str, row: Row| {
        Scenario::new(format!("disk/{name}"), move |context| uki(context, row))
            .booting(row.kernel)
            .on_disk()
    };
    let nvme = Row {
        bus: Bus::Nvme,
        backing: Backing::Small,
        ..Row::DEFAULT
    };
    let later = Row {
        kernel: Kernel::Cloud7_2,
        ..Row::DEFAULT
    };
    vec![
        uki("uki-virtio", Row::DEFAULT),
        uki("uki-nvme", nvme).only_in_full(),
        uki("uki-virtio-7.2", later).only_in_full(),
        Scenario::new("disk/same-image", same_image).on_disk(),
    ]
}

/// The disk boots above the paravisor and its devices move data unharmed.
fn uki(context: &Context, row: Row) -> Result<Findings> {
    let server = EchoServer::start()?;
    let script = include_str!("disk_guest.sh")
        .replace("@PORT@", &server.port.to_string())
        .replace("@MIB@", &FILE_MIB.to_string())
        .replace("@NET_MIB@", &NET_MIB.to_string());
    let mut findings = Findings::default();
    let finished = confidential(context, &mut findings, row, &script)?;
    let said = Said::by(&finished);

    let device = match row.bus {
        Bus::Virtio => "/dev/vda2",
        Bus::Nvme => "/dev/nvme0n1p2",
    };
    let release = said.word("release")?;
    findings.check(
        "the disk's kernel runs",
        row.kernel.is_release(release),
        || release.to_owned(),
    );
    findings.equal("the root file system is on", said.word("root")?, device);
    let stub = said.word("stub")?;
    findings.check(
        "a stub started the kernel",
        stub.starts_with("systemd-stub "),
        || stub.to_owned(),
    );
    let written = said.word("written")?;
    findings.equal("read back as written", said.word("read-back")?, written);
    findings.equal("copied as written", said.word("copied")?, written);
    for name in ["disk-read-mib", "disk-written-mib"] {
        // The file is read and written twice, and the caches were empty each time.
        let mib = said.number(name)?;
        findings.check(
            format!("{name}: the disk did it"),
            mib >= 2 * FILE_MIB,
            || format!("{mib} MiB"),
        );
    }
    findings.equal("an address by DHCP", said.word("address")?, "10.0.2.15/24");
    findings.equal(
        "the network's echo",
        said.word("echoed")?,
        said.word("sent")?,
    );
    findings.equal("bytes at the host's end", server.end()?, NET_MIB << 20);
    findings.equal(
        "the source of randomness",
        said.word("rng")?,
        "virtio_rng.0",
    );
    let noise = said.number("rng-entropy-bytes")?;
    findings.check("randomness does not compress", noise >= NOISE, || {
        format!("to {noise} bytes")
    });
    findings.equal(
        "randomness does not repeat",
        said.word("rng-repeats")?,
        "no",
    );
    let slots = said.number("bounced-slots")?;
    findings.check("DMA was bounced", slots > 0, || {
        "no slot was ever in use".into()
    });
    Ok(findings)
}

/// The very same file boots above the paravisor and in plain QEMU.
fn same_image(context: &Context) -> Result<Findings> {
    let row = Row::DEFAULT;
    let disk = context.artefacts.disk(row.kernel)?;
    let command = "echo \"release $(uname -r)\"; echo \"machine-check $(sha256sum </boot/vmlinuz-$(uname -r) | \
                   cut -d' ' -f1)\"; dmesg | grep -e 'Memory Encryption Features' -e 'SNP running'; true";
    let before = sha256(disk)?;
    let mut findings = Findings::default();
    let confidential = confidential(context, &mut findings, row, command)?;
    findings.equal("the image after the machine", sha256(disk)?, before.clone());

    let dir = context.dir.join("plain");
    std::fs::create_dir_all(&dir).with_context(|| format!("{}", dir.display()))?;
    let plain = Plain {
        qemu: context.artefacts.qemu.clone(),
        firmware: context.artefacts.ovmf.clone(),
        memory: "4G".into(),
        vcpus: row.vcpus,
        disk: Disk {
            file: disk.to_owned(),
            bus: row.bus,
            exec: Some(script(&dir, command)?),
        },
        dir,
    }
    .run(LIMIT, |_| {})?;
    findings.check("plain QEMU ends by itself", !plain.timed_out, || {
        format!("ended after {:.0} s", plain.wall.as_secs_f64())
    });
    findings.equal(
        "in plain QEMU the command succeeds",
        plain.exec_status,
        Some(0),
    );
    findings.equal("the image after plain QEMU", sha256(disk)?, before);
    let (with, without) = (Said::by(&confidential), Said::by(&plain));
    for name in ["release", "machine-check"] {
        let what = format!("the same {name} on both");
        findings.equal(&what, without.word(name)?, with.word(name)?);
    }
    let alone = !without.0.contains("SEV");
    findings.check("plain QEMU is not confidential", alone, || {
        without.0.clone()
    });
    Ok(findings)
}

/// Boots the disk above the paravisor, everything reflected, and checks what holds for every run.
fn confidential(
    context: &Context,
    findings: &mut Findings,
    row: Row,
    command: &str,
) -> Result<Finished> {
    let artefacts = &context.artefacts;
    let (image, sidecar) =
        context.image(&artefacts.paravisor, Some(&artefacts.ovmf), Fault::NONE)?;
    let settings = Settings {
        backing: row.backing,
        vc: Vc::Strict,
        ..Settings::default()
    };
    let mut config = context.machine(image, &sidecar, settings);
    config.vcpus = row.vcpus;
    if row.backing == Backing::Small {
        // OVMF accepts all memory below 4 GiB, page by page here: half of it does as well.
        config.memory = "3G".into();
        config.low_memory = Some("1G".into());
    }
    config.disk = Some(Disk {
        file: artefacts.disk(row.kernel)?.to_owned(),
        bus: row.bus,
        exec: Some(script(&context.dir, command)?),
    });
    let finished = config.run(LIMIT, |_| {})?;
    findings.ended(&finished, Outcome::PowerOff)?;
    findings.good_run(&finished, &sidecar)?;
    findings.only_expected_exits(&finished)?;
    findings.equal(
        "the guest's command succeeds",
        finished.exec_status,
        Some(0),
    );
    let said = Said::by(&finished).0;
    for words in [
        "Memory Encryption Features active: AMD SEV SEV-ES SEV-SNP",
        "SNP running at VMPL1",
    ] {
        findings.check(
            format!("the guest says {words:?}"),
            said.contains(words),
            || said.clone(),
        );
    }
    Ok(finished)
}

/// Writes the guest's script into `dir`.
fn script(dir: &Path, command: &str) -> Result<PathBuf> {
    let file = dir.join("exec.sh");
    std::fs::write(&file, format!("{command}\n")).with_context(|| format!("{}", file.display()))?;
    Ok(file)
}

/// The lines of the guest's script.
struct Said(String);

impl Said {
    fn by(finished: &Finished) -> Said {
        Said(String::from_utf8_lossy(&finished.output).replace('\r', ""))
    }

    /// What stands after `name` on its line.
    fn word(&self, name: &str) -> Result<&str> {
        let mut lines = self.0.lines();
        let found = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        found.with_context(|| format!("the guest did not say {name:?}; it said: {}", self.0))
    }

    fn number(&self, name: &str) -> Result<u64> {
        let word = self.word(name)?;
        word.parse()
            .with_context(|| format!("the guest's {name}: expected a number, found {word:?}"))
    }
}

/// The SHA-256 of a file, by the program: images are large and sparse.
fn sha256(file: &Path) -> Result<String> {
    let output = Command::new("sha256sum")
        .arg(file)
        .output()
        .context("sha256sum cannot be started")?;
    let text = String::from_utf8_lossy(&output.stdout);
    match text.split_whitespace().next() {
        Some(sum) if output.status.success() => Ok(sum.to_owned()),
        _ => bail!("sha256sum {}: {}", file.display(), output.status),
    }
}

/// Sends back what one client says, until it has nothing more to say.
struct EchoServer {
    port: u16,
    thread: JoinHandle<std::io::Result<u64>>,
}

impl EchoServer {
    fn start() -> Result<EchoServer> {
        let naming = || "the host's echo server cannot be started";
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).with_context(naming)?;
        let port = listener.local_addr().with_context(naming)?.port();
        let thread = thread::spawn(move || {
            let (mut client, _) = listener.accept()?;
            client.set_read_timeout(Some(LIMIT))?;
            let mut buffer = vec![0; 64 << 10];
            let mut bytes = 0;
            loop {
                let length = client.read(&mut buffer)?;
                let said = buffer.get(..length).unwrap_or_default();
                if said.is_empty() {
                    return Ok(bytes);
                }
                client.write_all(said)?;
                bytes += length as u64;
            }
        });
        Ok(EchoServer { port, thread })
    }

    /// The number of bytes that were sent back. A client that never came counts as none.
    fn end(self) -> Result<u64> {
        // Lets a thread that still waits for its client come to its end.
        drop(std::net::TcpStream::connect((
            Ipv4Addr::LOCALHOST,
            self.port,
        )));
        match self.thread.join() {
            Ok(result) => result.context("the host's echo server"),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{Ipv4Addr, TcpStream};

    use super::{EchoServer, Said};

    #[test]
    fn the_server_counts_what_it_sends_back() {
        let server = EchoServer::start().unwrap();
        let mut client = TcpStream::connect((Ipv4Addr::LOCALHOST, server.port)).unwrap();
        client.write_all(b"hello").unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        let mut echo = Vec::new();
        client.read_to_end(&mut echo).unwrap();
        assert_eq!((echo.as_slice(), server.end().unwrap()), (&b"hello"[..], 5));
        assert_eq!(EchoServer::start().unwrap().end().unwrap(), 0);
    }

    #[test]
    fn words_are_found_by_their_whole_name() {
        let said = Said("root-x no\nroot /dev/vda2\nn 12\n".into());
        assert_eq!(said.word("root").unwrap(), "/dev/vda2");
        assert_eq!(said.number("n").unwrap(), 12);
        assert!(said.word("roo").is_err() && said.number("root").is_err());
    }
}
