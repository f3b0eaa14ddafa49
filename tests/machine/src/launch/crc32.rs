//! CRC-32 as of IEEE 802.3, the checksum of IGVM headers.

/// The polynomial, bits reflected.
const POLYNOMIAL: u32 = 0xEDB8_8320;

/// A checksum in the making.
pub struct Crc32(u32);

impl Crc32 {
    /// Nothing seen yet.
    pub const fn new() -> Self {
        Self(!0)
    }

    /// Takes in `bytes`. Bit by bit: headers are some ten KiB, once per run.
    pub fn update(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 ^= u32::from(byte);
            for _ in 0..8 {
                let carry = self.0 & 1 != 0;
                self.0 >>= 1;
                if carry {
                    self.0 ^= POLYNOMIAL;
                }
            }
        }
    }

    /// The checksum of everything taken in.
    pub const fn finish(self) -> u32 {
        !self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The check value every catalogue of CRCs gives for this one.
    #[test]
    fn the_check_value_comes_out() {
        let mut crc = Crc32::new();
        crc.update(b"1234");
        crc.update(b"56789");
        assert_eq!(crc.finish(), 0xCBF4_3926);
    }
}
