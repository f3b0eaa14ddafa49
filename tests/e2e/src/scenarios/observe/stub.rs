//! The little of GDB's remote protocol that shows whether a breakpoint hits.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

/// How long the stub may take to appear, and the guest to get to a breakpoint.
const PATIENCE: Duration = Duration::from_secs(240);
/// Number of RIP among the registers of x86-64, hexadecimal.
const RIP: &str = "10";

/// A connection to QEMU's stub.
pub struct Stub(UnixStream);

impl Stub {
    /// Connects as soon as there is somebody; `gone` says when there never will be.
    pub fn connect(socket: &Path, mut gone: impl FnMut() -> bool) -> Result<Stub> {
        let started = Instant::now();
        loop {
            match UnixStream::connect(socket) {
                Ok(stream) => {
                    stream.set_read_timeout(Some(PATIENCE))?;
                    return Ok(Stub(stream));
                }
                Err(_) if started.elapsed() < PATIENCE && !gone() => {
                    sleep(Duration::from_millis(50));
                }
                Err(error) => {
                    return Err(error).with_context(|| format!("{}", socket.display()));
                }
            }
        }
    }

    /// Runs to `address` and returns RIP where it stopped.
    pub fn run_to(&mut self, address: u64) -> Result<u64> {
        self.expect(&format!("Z0,{address:x},1"), "OK")?;
        self.expect("c", "T05")?;
        let rip = self.ask(&format!("p{RIP}"))?;
        self.expect(&format!("z0,{address:x},1"), "OK")?;
        // Little endian, two digits a byte.
        let value = u64::from_str_radix(&rip, 16).with_context(|| format!("RIP is {rip:?}"))?;
        Ok(value.swap_bytes())
    }

    /// Ends the machine.
    pub fn kill(mut self) -> Result<()> {
        self.send("k")
    }

    fn expect(&mut self, request: &str, begin: &str) -> Result<()> {
        let reply = self.ask(request)?;
        if reply.starts_with(begin) {
            Ok(())
        } else {
            bail!("{request} was answered {reply:?} instead of {begin}")
        }
    }

    fn ask(&mut self, request: &str) -> Result<String> {
        self.send(request)?;
        let reply = self.receive()?;
        self.0.write_all(b"+")?;
        Ok(reply)
    }

    fn send(&mut self, text: &str) -> Result<()> {
        let sum = text.bytes().fold(0_u8, u8::wrapping_add);
        self.0.write_all(format!("${text}#{sum:02x}").as_bytes())?;
        Ok(())
    }

    /// The next packet, without its frame. Acknowledgements before it are skipped.
    fn receive(&mut self) -> Result<String> {
        let mut text = String::new();
        let mut inside = false;
        loop {
            match self.byte()? {
                b'$' => inside = true,
                b'#' if inside => break,
                byte if inside => text.push(byte.into()),
                _ => {}
            }
        }
        for _checksum_digit in 0..2 {
            self.byte()?;
        }
        Ok(text)
    }

    fn byte(&mut self) -> Result<u8> {
        let mut byte = [0];
        self.0
            .read_exact(&mut byte)
            .context("the debugger stub went away")?;
        let [byte] = byte;
        Ok(byte)
    }
}
