//! All the guest's memory, held and compared with what was written into it.
//!
//! Workers take memory in chunks until little is left and the kernel has accepted everything it
//! has. From then on one of them compares what is held, over and over, until it is told to end; the
//! last comparison covers every chunk.

use std::fs;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result};

/// Bytes of a chunk.
const CHUNK: usize = 16 << 20;
/// What is left to the kernel, in KiB of `MemAvailable`. It may be less while there is unaccepted
/// memory, because that counts as available, and the kernel accepts the last of it only when
/// nearly nothing else is left.
const RESERVE_KIB: u64 = 320 << 10;
const RESERVE_WHILE_UNACCEPTED_KIB: u64 = 128 << 10;

/// How long nothing is compared after a chunk was.
const REST: Duration = Duration::from_millis(200);

/// A piece of memory and the number that its contents come from.
#[derive(Debug)]
struct Chunk {
    number: u64,
    words: Box<[u64]>,
}

impl Chunk {
    fn filled(number: u64) -> Chunk {
        Chunk {
            number,
            words: (0..CHUNK / 8).map(|at| word(number, at)).collect(),
        }
    }
}

/// What the workers share.
#[derive(Debug, Default)]
pub struct Hoard {
    chunks: Mutex<Vec<Chunk>>,
    next: AtomicU64,
    full: AtomicBool,
    /// Words that were wrong.
    pub words_wrong: AtomicU64,
    /// Bytes compared so far.
    pub compared: AtomicU64,
}

impl Hoard {
    /// Takes memory until little is left.
    pub fn grow(&self) -> Result<()> {
        // A chunk is written outside the lock, so that processors accept at the same time.
        while !self.full.load(Ordering::Relaxed) {
            let info = MemInfo::read()?;
            let reserve = if info.unaccepted_kib > 0 {
                RESERVE_WHILE_UNACCEPTED_KIB
            } else {
                RESERVE_KIB
            };
            if info.available_kib < reserve + (CHUNK >> 10) as u64 {
                self.full.store(true, Ordering::Relaxed);
                return Ok(());
            }
            let chunk = Chunk::filled(self.next.fetch_add(1, Ordering::Relaxed));
            self.lock().push(chunk);
        }
        Ok(())
    }

    /// Bytes taken so far.
    pub fn held(&self) -> u64 {
        self.next.load(Ordering::Relaxed) * CHUNK as u64
    }

    /// Compares one chunk after another until `end` says so, with a rest between two, so that the
    /// processors are there for the conversions.
    pub fn watch(&self, end: &AtomicBool) {
        for at in 0.. {
            if end.load(Ordering::Relaxed) {
                return;
            }
            {
                let chunks = self.lock();
                if let Some(chunk) = chunks.get(at % chunks.len().max(1)) {
                    self.compare(chunk);
                }
            }
            sleep(REST);
        }
    }

    /// Compares everything that is held; returns its size in bytes.
    pub fn compare_all(&self) -> u64 {
        let chunks = self.lock();
        chunks.iter().for_each(|chunk| self.compare(chunk));
        (chunks.len() * CHUNK) as u64
    }

    fn compare(&self, chunk: &Chunk) {
        let Chunk { number, words } = chunk;
        let wrong = words
            .iter()
            .enumerate()
            .filter(|(at, found)| **found != word(*number, *at))
            .count();
        if wrong > 0 {
            eprintln!("stress: chunk {number}: {wrong} words are wrong");
        }
        self.words_wrong.fetch_add(wrong as u64, Ordering::Relaxed);
        self.compared.fetch_add(CHUNK as u64, Ordering::Relaxed);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Chunk>> {
        self.chunks
            .lock()
            .unwrap_or_else(|poison| poison.into_inner())
    }
}

/// Odd, hence with an inverse modulo 2⁶⁴.
const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;

/// The word at index `at` of chunk `seed`: different for each place, and not zero but for one.
fn word(seed: u64, at: usize) -> u64 {
    (seed << 32 | at as u64)
        .wrapping_add(1)
        .wrapping_mul(FACTOR)
}

/// The lines of `/proc/meminfo` that matter here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemInfo {
    /// `MemAvailable`, in KiB.
    pub available_kib: u64,
    /// `Unaccepted`, in KiB.
    pub unaccepted_kib: u64,
}

impl MemInfo {
    /// The figures as of now.
    pub fn read() -> Result<MemInfo> {
        let text = fs::read_to_string("/proc/meminfo").context("/proc/meminfo")?;
        MemInfo::parse(&text)
    }

    fn parse(text: &str) -> Result<MemInfo> {
        let field = |name: &str| -> Result<u64> {
            text.lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
                .and_then(|rest| rest.trim().strip_suffix(" kB")?.trim().parse().ok())
                .with_context(|| format!("/proc/meminfo: expected a line \"{name}: N kB\""))
        };
        Ok(MemInfo {
            available_kib: field("MemAvailable")?,
            unaccepted_kib: field("Unaccepted")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::{CHUNK, Chunk, Hoard, MemInfo};

    #[test]
    fn a_changed_word_is_counted() {
        let hoard = Hoard::default();
        let mut chunk = Chunk::filled(3);
        chunk.words[1000] ^= 1;
        hoard.lock().push(chunk);
        assert_eq!(hoard.compare_all(), CHUNK as u64);
        assert_eq!(hoard.words_wrong.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn meminfo_without_the_line_is_an_error() {
        let text = "MemAvailable:  12 kB\nUnaccepted:     0 kB\n";
        let info = MemInfo::parse(text).unwrap();
        assert_eq!((info.available_kib, info.unaccepted_kib), (12, 0));
        assert!(MemInfo::parse("MemAvailable: 12 kB\n").is_err());
    }
}
