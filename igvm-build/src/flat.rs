//! Flat images: an ELF file laid out as a ROM that ends at 4 GiB.
//!
//! Used for the machine (QEMU's `-bios`) and for the test guest that takes the place of a
//! firmware. Only load addresses count: a program may be linked to run elsewhere.

use crate::elf::Program;
use crate::error::Error;

/// Address behind the last byte of a flat image.
pub const FLAT_END: u64 = 1 << 32;

/// Largest flat image: the ROM window of a PC below 4 GiB.
const MAX_FLAT: u64 = 16 << 20;

/// Copies the loadable segments of `elf`, by physical address, into an image of `size` bytes
/// that ends at 4 GiB. Bytes that no segment covers are zero.
///
/// # Errors
///
/// When `elf` is not an ELF file, `size` is not a whole number of pages up to 16 MiB, or a
/// segment does not lie in the image.
pub fn elf_to_flat(elf: &[u8], size: u64) -> Result<Vec<u8>, Error> {
    if size == 0 || size > MAX_FLAT || !size.is_multiple_of(4096) {
        return Err(Error::FlatSize { size });
    }
    let start = FLAT_END - size;
    let mut image = vec![0u8; size as usize];
    for segment in Program::parse(elf)?.segments() {
        // A segment without bytes in the file (.bss) takes no room in a ROM.
        if segment.data.is_empty() {
            continue;
        }
        let target = segment
            .load_address
            .checked_sub(start)
            .and_then(|offset| usize::try_from(offset).ok())
            .and_then(|offset| image.get_mut(offset..)?.get_mut(..segment.data.len()))
            .ok_or(Error::SegmentOutsideRegion {
                start: segment.load_address,
                end: segment.load_end(),
                region_start: start,
                region_end: FLAT_END,
            })?;
        target.copy_from_slice(segment.data);
    }
    Ok(image)
}
