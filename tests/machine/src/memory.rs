//! How the platform reaches bytes: the [`PhysicalMemory`] trait and the scramble pattern.
//!
//! On the real machine encryption makes a page unreadable when it changes owner. Here every
//! such page is filled with a pattern made of its address and a generation number. The
//! pattern is never zero in any 64-bit word, so a page that was not scrubbed is told from a
//! zeroed one by looking at one word per 64-byte line.
//!
//! The fill and compare loops are trait methods with plain default bodies, so that the bare
//! metal side can replace them by loops over its direct map.

use crate::types::{PAGE_SIZE, Spa};

/// Bytes of a cache line: the grain at which a missing scrub is seen.
pub const LINE: u64 = 64;

/// One 64-bit word of the scramble pattern. Bit 0 is always set, so no word is zero.
///
/// A multiplication is all it takes: the pattern has to be different per address and
/// generation, not secret.
#[inline(always)]
pub const fn scramble_word(generation: u32, address: u64) -> u64 {
    const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;
    (address.wrapping_mul(GOLDEN) ^ ((generation as u64) << 17)) | 1
}

/// The memory below the machine, addressed by system-physical address.
///
/// Implementations hold raw or shared memory, so all methods take `&self`; the platform
/// never keeps a reference into it. Callers only pass ranges that the [`crate::layout`]
/// covers; an implementation must not fault on others: it reads ones and drops writes, as
/// a bus does.
pub trait PhysicalMemory {
    /// Copies `out.len()` bytes from `spa`.
    fn read(&self, spa: Spa, out: &mut [u8]);
    /// Copies `data` to `spa`.
    fn write(&self, spa: Spa, data: &[u8]);

    /// Reads a little-endian 64-bit word.
    fn read_u64(&self, spa: Spa) -> u64 {
        let mut bytes = [0; 8];
        self.read(spa, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    /// Writes a little-endian 64-bit word.
    fn write_u64(&self, spa: Spa, value: u64) {
        self.write(spa, &value.to_le_bytes());
    }

    /// Fills `bytes` (a multiple of 4 KiB) from `spa` with zeroes.
    fn fill_zero(&self, spa: Spa, bytes: u64) {
        for offset in (0..bytes).step_by(PAGE_SIZE as usize) {
            self.write(spa.plus(offset), &[0; PAGE_SIZE as usize]);
        }
    }

    /// Fills `bytes` (a multiple of 8) from `spa` with the pattern of `generation`.
    fn fill_scramble(&self, spa: Spa, bytes: u64, generation: u32) {
        let mut offset = 0;
        while offset < bytes {
            let at = spa.plus(offset);
            self.write_u64(at, scramble_word(generation, at.get()));
            offset += 8;
        }
    }

    /// Offset of the first 64-byte line in `bytes` from `spa` that still begins with the
    /// pattern of `generation`.
    fn find_scrambled(&self, spa: Spa, bytes: u64, generation: u32) -> Option<u64> {
        let mut offset = 0;
        while offset < bytes {
            let at = spa.plus(offset);
            if self.read_u64(at) == scramble_word(generation, at.get()) {
                return Some(offset);
            }
            offset += LINE;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Sparse;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_word_of_the_pattern_is_zero(generation: u32, word in 0..1u64 << 49) {
            prop_assert_ne!(scramble_word(generation, word * 8), 0);
        }

        #[test]
        fn generations_differ_at_every_address(a: u32, b: u32, word in 0..1u64 << 49) {
            prop_assume!(a != b);
            prop_assert_ne!(scramble_word(a, word * 8), scramble_word(b, word * 8));
        }
    }

    #[test]
    fn one_forgotten_line_is_found() {
        let memory = Sparse::default();
        memory.fill_scramble(Spa::new(0x1000), 0x1000, 7);
        for line in 0..64 {
            if line != 41 {
                memory.write(Spa::new(0x1000 + line * 64), &[0; 64]);
            }
        }
        assert_eq!(
            memory.find_scrambled(Spa::new(0x1000), 0x1000, 7),
            Some(41 * 64)
        );
        memory.write(Spa::new(0x1000 + 41 * 64), &[0; 8]);
        assert_eq!(memory.find_scrambled(Spa::new(0x1000), 0x1000, 7), None);
    }
}
