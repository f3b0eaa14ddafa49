//! Files that somebody spoiled, by the ten thousand: no panic, no memory beyond a bound, and an answer that
//! names offset and rule.
//!
//! One test in a program of its own, because memory is counted for the whole program. The numbers are drawn
//! from a fixed seed: a failure is the same every time, and its round is in the message.

#![expect(unsafe_code, reason = "an allocator that counts")]

#[path = "support/everything.rs"]
mod everything;
#[path = "support/raw.rs"]
mod raw;
mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};

use everything::{everything, everything_and_sign};
use igvm_build::elf::Program;
use igvm_build::file::edit::seal;
use igvm_build::file::{File, Rule};
use igvm_build::firmware::Firmware;
use igvm_build::image::{Options, build};
use igvm_build::measure::MAX_PAGES;
use igvm_build::measure::snp::launch_digest;
use igvm_build::target::Target;
use raw::Raw;
use support::{AREAS, ovmf, paravisor};

/// Spoiled files.
const ROUNDS: usize = 12_000;
/// Of them, spoiled images of ours, which are larger.
const IMAGE_ROUNDS: usize = 250;
/// Memory that may be in use at once for a file: so much for each of its bytes, and so much besides.
const PER_BYTE: usize = 64;
const BESIDES: usize = 1 << 20;

static IN_USE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

struct Counting;

// SAFETY: every call is passed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = IN_USE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(now, Ordering::Relaxed);
        // SAFETY: the caller keeps to the contract of `GlobalAlloc::alloc`, which is the system's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        IN_USE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the pointer came from `alloc` above, with this layout.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Numbers that look random (xorshift).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }
}

/// Values at which arithmetic goes wrong.
const AWKWARD: [u64; 16] = [
    0,
    1,
    7,
    0xFFF,
    0x1000,
    0x1001,
    0x7FFF_FFFF,
    0x8000_0000,
    0xFFFF_F000,
    0xFFFF_FFFF,
    0x1_0000_0000,
    0xFFFF_FFFF_F000,
    0x7FFF_FFFF_FFFF_FFFF,
    0xFFFF_FFFF_FFFF_F000,
    0xFFFF_FFFF_FFFF_FFFF,
    64 << 20,
];

/// Spoils a file in one of many ways; most of the time the checksum is made right again, so that what lies
/// behind that check is reached.
fn spoil(bytes: &mut Vec<u8>, numbers: &mut Numbers) {
    let (start, end) = File::read(bytes).unwrap().fixed.headers;
    let offsets: Vec<usize> = File::read(bytes)
        .unwrap()
        .headers
        .iter()
        .map(|header| header.offset)
        .collect();
    for _ in 0..=numbers.below(3) {
        match numbers.below(8) {
            // A bit of the headers.
            0 | 1 => {
                let at = numbers.below(end);
                flip(bytes, at, numbers);
            }
            // A bit anywhere.
            2 => {
                let at = numbers.below(bytes.len());
                flip(bytes, at, numbers);
            }
            // An awkward value in a field.
            3 | 4 => {
                let value = AWKWARD[numbers.below(AWKWARD.len())].to_le_bytes();
                let width = [1, 2, 4, 8][numbers.below(4)];
                let at = (start + numbers.below(end - start)) & !(width - 1);
                write(bytes, at, &value[..width]);
            }
            // One header over another one.
            5 => {
                let from = offsets[numbers.below(offsets.len())];
                let to = offsets[numbers.below(offsets.len())];
                let header = bytes.get(from..from + 32).map(<[u8]>::to_vec);
                write(bytes, to, &header.unwrap_or_default());
            }
            // Cut off.
            6 => {
                let length = numbers.below(bytes.len() + 1);
                bytes.truncate(length);
                write(bytes, 16, &(length as u32).to_le_bytes());
            }
            // Too long.
            _ => {
                bytes.resize(bytes.len() + numbers.below(0x2000), 0xEE);
                let length = bytes.len() as u32;
                write(bytes, 16, &length.to_le_bytes());
            }
        }
    }
    if numbers.below(8) != 0 {
        let _ = seal(bytes);
    }
}

fn flip(bytes: &mut [u8], at: usize, numbers: &mut Numbers) {
    let bit = 1 << numbers.below(8);
    if let Some(byte) = bytes.get_mut(at) {
        *byte ^= bit;
    }
}

fn write(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(place) = bytes.get_mut(at..at + value.len()) {
        place.copy_from_slice(value);
    }
}

/// An image as we build it, for SEV-SNP and native.
fn image() -> Vec<u8> {
    let (elf, firmware) = (paravisor(), ovmf(Some(&AREAS)));
    let firmware = Firmware::parse(&firmware).unwrap();
    let program = Program::parse(&elf).unwrap();
    build(&program, Some(&firmware), None, &Options::default())
        .unwrap()
        .bytes
}

/// A file with so many of the largest parameter areas.
fn areas(count: u32) -> Vec<u8> {
    let mut file = Raw::snp();
    for index in 10..10 + count {
        file = file
            .before(raw::kind::PAGE, raw::area(index, 64 << 20))
            .before(raw::kind::PAGE, raw::insert(u64::from(index) << 32, index));
    }
    file.bytes()
}

/// Files whose headers ask for far more than they are long.
fn greedy() -> Vec<Vec<u8>> {
    let huge = Raw::snp().with(raw::kind::AREA, 0, &u64::MAX.to_le_bytes());
    let far = Raw::snp().with(raw::kind::INSERT, 0, &(u64::MAX - 0xFFF).to_le_bytes());
    vec![areas(4), huge.bytes(), far.bytes()]
}

#[test]
fn no_file_brings_the_tool_down() {
    let good = [Raw::snp().bytes(), Raw::tdx().bytes()];
    let image = image();
    let mut numbers = Numbers(0x7E57_1D1E_5EED_0001);
    let mut ends: BTreeMap<Rule, usize> = BTreeMap::new();
    let mut read = 0;
    for round in 0..ROUNDS {
        let mut bytes = match round % (ROUNDS / IMAGE_ROUNDS) {
            0 => image.clone(),
            other => good[other % 2].clone(),
        };
        spoil(&mut bytes, &mut numbers);
        let before = IN_USE.load(Ordering::Relaxed);
        PEAK.store(before, Ordering::Relaxed);
        let result = if round % 64 == 0 {
            everything_and_sign(&bytes)
        } else {
            everything(&bytes)
        };
        match result {
            Ok(()) => read += 1,
            Err(problem) => *ends.entry(problem.rule).or_default() += 1,
        }
        let used = PEAK.load(Ordering::Relaxed) - before;
        let limit = PER_BYTE * bytes.len() + BESIDES;
        assert!(
            used <= limit,
            "round {round}: {used} bytes for {}",
            bytes.len()
        );
    }
    // Neither all stopped at the door, nor none: both halves of the tool were tried.
    assert!(read > ROUNDS / 4, "{read} read; {ends:?}");
    for rule in [
        Rule::TooShort,
        Rule::Magic,
        Rule::HeaderSection,
        Rule::HeaderCut,
        Rule::BodyLength,
    ] {
        assert!(ends.contains_key(&rule), "{rule} never; {ends:?}");
    }
    for bytes in greedy() {
        let before = IN_USE.load(Ordering::Relaxed);
        PEAK.store(before, Ordering::Relaxed);
        everything(&bytes).unwrap();
        let used = PEAK.load(Ordering::Relaxed) - before;
        assert!(used <= PER_BYTE * bytes.len() + BESIDES, "{used} bytes");
    }
    // Work is bounded as well.
    let bytes = areas(66);
    let file = File::read(&bytes).unwrap();
    let mut steps = 0;
    let error = launch_digest(&file, Target::Qemu.loader(), &mut |_| steps += 1).unwrap_err();
    assert!(
        error.to_string().contains("more than 1048576 pages"),
        "{error}"
    );
    assert_eq!(steps, MAX_PAGES);
}
