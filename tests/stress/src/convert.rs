//! The threads that have pages converted, one for each processor.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, bail};
use rustix::thread::{CpuSet, sched_setaffinity};
use stress::Conversions;

/// The module's device.
pub const DEVICE: &str = "/dev/turnstile-convert";
/// Pages of 4 KiB in the block of an opened file, as the module has it.
const BLOCK_PAGES: u64 = 512;
/// Cycles after which a thread asks for its processor again: the kernel moves it away when that
/// goes offline.
const CYCLES_PER_PLACING: u64 = 32;

/// Cycles that are to be done by all threads together.
#[derive(Debug)]
pub struct Work {
    /// How many are to be done.
    pub cycles: u64,
    /// How many are begun.
    pub begun: AtomicU64,
    /// How many of them were on a whole block.
    pub whole_blocks: AtomicU64,
}

impl Work {
    /// Does cycles on `processor` until there are none left to begin; returns how many it did.
    pub fn do_on(&self, processor: u32) -> Result<u64> {
        let mut block = OpenOptions::new()
            .write(true)
            .open(DEVICE)
            .with_context(|| format!("{DEVICE}: is the module loaded?"))?;
        let mut random = Random(u64::from(processor) + 1);
        let mut done = 0;
        while self.begun.fetch_add(1, Ordering::Relaxed) < self.cycles {
            if done % CYCLES_PER_PLACING == 0 {
                place(processor);
            }
            let (first, pages) = random.range();
            cycle(&mut block, first, pages, random.next())?;
            if pages == BLOCK_PAGES {
                self.whole_blocks.fetch_add(1, Ordering::Relaxed);
            }
            done += 1;
        }
        Ok(done)
    }
}

fn cycle(block: &mut File, first: u64, pages: u64, seed: u64) -> Result<()> {
    let command = format!("{first} {pages} {seed}");
    let written = block
        .write(command.as_bytes())
        .with_context(|| format!("conversion of {pages} pages from page {first}"))?;
    if written != command.len() {
        bail!("{DEVICE}: took {written} of {} bytes", command.len());
    }
    Ok(())
}

/// Moves this thread to `processor`. That fails while the processor is offline; then the thread
/// goes on where it is.
fn place(processor: u32) {
    let mut set = CpuSet::new();
    set.set(processor as usize);
    let _ = sched_setaffinity(None, &set);
}

/// What the module has counted since it was loaded.
pub fn counted() -> Result<Conversions> {
    let text = fs::read_to_string(Path::new(DEVICE)).with_context(|| DEVICE.to_owned())?;
    parse(&text)
}

fn parse(text: &str) -> Result<Conversions> {
    let value = |name: &str| -> Result<u64> {
        text.split_whitespace()
            .find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
            .and_then(|digits| digits.parse().ok())
            .with_context(|| format!("{DEVICE}: expected {name}=NUMBER in {text:?}"))
    };
    Ok(Conversions {
        to_shared_calls: value("to_shared_calls")?,
        to_shared_pages: value("to_shared_pages")?,
        to_private_calls: value("to_private_calls")?,
        to_private_pages: value("to_private_pages")?,
        words_checked: value("words_checked")?,
        words_wrong: value("words_wrong")?,
        failed_calls: value("failed_calls")?,
        ..Conversions::default()
    })
}

/// A small generator (xorshift64), so that a run can be repeated.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A range of a block: mostly one page, often some, now and then the whole block.
    fn range(&mut self) -> (u64, u64) {
        let pages = match self.next() >> 8 & 15 {
            0 => BLOCK_PAGES,
            1..=4 => 2 + (self.next() >> 8) % 31,
            _ => 1,
        };
        let first = (self.next() >> 8) % (BLOCK_PAGES - pages + 1);
        (first, pages)
    }
}

#[cfg(test)]
mod tests {
    use super::{BLOCK_PAGES, Random, parse};

    #[test]
    fn ranges_lie_in_the_block_and_have_all_kinds() {
        let mut random = Random(1);
        let mut kinds = [0; 3];
        for _ in 0..10_000 {
            let (first, pages) = random.range();
            assert!(pages > 0 && first + pages <= BLOCK_PAGES);
            kinds[match pages {
                1 => 0,
                BLOCK_PAGES => 2,
                _ => 1,
            }] += 1;
        }
        assert!(kinds.iter().all(|kind| *kind > 400), "{kinds:?}");
    }

    #[test]
    fn the_modules_line_is_read() {
        let line = "to_shared_calls=1 to_shared_pages=2 to_private_calls=3 to_private_pages=4 \
                    words_checked=5 words_wrong=6 failed_calls=7\n";
        let counted = parse(line).unwrap();
        assert_eq!((counted.to_shared_calls, counted.failed_calls), (1, 7));
        assert!(parse("to_shared_calls=1\n").is_err());
    }
}
