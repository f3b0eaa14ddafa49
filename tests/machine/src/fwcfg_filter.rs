//! Hides the machine's memory from a guest that reads fw_cfg itself.
//!
//! Firmware learns the memory map from QEMU's file `etc/e820`. [`patch_e820`] makes a copy in
//! which the RAM entries end where the machine begins; the number of entries stays, because
//! firmware takes it from the file's size. [`Filter`] watches the guest's use of the interface
//! (QEMU, docs/specs/fw_cfg): selector writes, data reads byte by byte and DMA, keeps track of
//! the offset in the selected file, and replaces what the device answered for that file.
//!
//! Everything else passes through unchanged.

use alloc::vec::Vec;

use crate::types::Gpa;

/// Selector register (16 bits, write).
pub const PORT_SELECTOR: u16 = 0x510;
/// Data register (8 bits, read).
pub const PORT_DATA: u16 = 0x511;
/// DMA address, upper half (big endian).
pub const PORT_DMA_HIGH: u16 = 0x514;
/// DMA address, lower half (big endian); the write starts the transfer.
pub const PORT_DMA_LOW: u16 = 0x518;
/// Selector of the file directory.
pub const SELECTOR_DIRECTORY: u16 = 0x19;

/// Bytes of one directory entry: u32 size, u16 selector, u16 reserved (all big endian), name.
const DIRECTORY_ENTRY: usize = 64;
/// Bytes of one e820 entry: u64 address, u64 length, u32 type.
const E820_ENTRY: usize = 20;
const E820_RAM: u32 = 1;

/// A file found in the directory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct File {
    /// Its selector.
    pub selector: u16,
    /// Its size in bytes.
    pub size: u32,
}

/// Finds `name` in the bytes of the file directory.
pub fn find_file(directory: &[u8], name: &str) -> Option<File> {
    let (count, entries) = directory.split_first_chunk::<4>()?;
    let count = u32::from_be_bytes(*count) as usize;
    entries
        .chunks_exact(DIRECTORY_ENTRY)
        .take(count)
        .find_map(|entry| {
            let (size, rest) = entry.split_first_chunk::<4>()?;
            let (selector, rest) = rest.split_first_chunk::<2>()?;
            let stored = rest.get(2..)?;
            let length = stored.iter().position(|&b| b == 0).unwrap_or(stored.len());
            (stored.get(..length)? == name.as_bytes()).then_some(File {
                selector: u16::from_be_bytes(*selector),
                size: u32::from_be_bytes(*size),
            })
        })
}

/// A copy of QEMU's e820 table without `[hidden, hidden + bytes)`. The hidden range must end
/// where a RAM entry ends; that entry is shortened. `None` if it does not.
pub fn patch_e820(table: &[u8], hidden: u64, bytes: u64) -> Option<Vec<u8>> {
    let mut patched = table.to_vec();
    let mut done = false;
    for entry in patched.chunks_exact_mut(E820_ENTRY) {
        let (address, rest) = entry.split_first_chunk_mut::<8>()?;
        let (length, kind) = rest.split_first_chunk_mut::<8>()?;
        let start = u64::from_le_bytes(*address);
        let end = start.checked_add(u64::from_le_bytes(*length))?;
        let kind = u32::from_le_bytes(kind.try_into().ok()?);
        if kind == E820_RAM && end == hidden.checked_add(bytes)? && start < hidden {
            *length = (hidden - start).to_le_bytes();
            done = true;
        }
    }
    done.then_some(patched)
}

/// Control bits of a DMA request.
mod control {
    pub const READ: u32 = 1 << 1;
    pub const SKIP: u32 = 1 << 2;
    pub const SELECT: u32 = 1 << 3;
    pub const WRITE: u32 = 1 << 4;
}

/// A DMA request as the guest put it into memory, decoded from big endian.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Dma {
    control: u32,
    length: u32,
    address: u64,
}

impl Dma {
    /// Bytes of a request in memory.
    pub const SIZE: usize = 16;

    /// Decodes a request.
    pub const fn from_bytes(bytes: &[u8; Self::SIZE]) -> Self {
        let value = u128::from_be_bytes(*bytes);
        Self {
            control: (value >> 96) as u32,
            length: (value >> 64) as u32,
            address: value as u64,
        }
    }
}

impl Dma {
    /// Address and length of the guest's buffer.
    pub const fn buffer(&self) -> (u64, u64) {
        (self.address, self.length as u64)
    }
}

/// Bytes to put into guest memory once the device has finished a transfer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Patch<'a> {
    /// Where; the address the guest gave, in the shared alias.
    pub gpa: Gpa,
    /// What.
    pub bytes: &'a [u8],
}

/// The watcher.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    selector: u16,
    contents: Vec<u8>,
    selected: Option<u16>,
    offset: usize,
}

impl Filter {
    /// Replaces the file at `selector` by `contents` of the same length.
    pub const fn new(selector: u16, contents: Vec<u8>) -> Self {
        Self {
            selector,
            contents,
            selected: None,
            offset: 0,
        }
    }

    /// The guest wrote the selector register.
    pub const fn select(&mut self, selector: u16) {
        self.selected = Some(selector);
        self.offset = 0;
    }

    fn is_selected(&self) -> bool {
        self.selected == Some(self.selector)
    }

    /// The guest read one byte of data and the device answered `byte`; what the guest gets.
    pub fn read(&mut self, byte: u8) -> u8 {
        let replacement = if self.is_selected() {
            self.contents.get(self.offset).copied()
        } else {
            None
        };
        self.offset = self.offset.saturating_add(1);
        replacement.unwrap_or(byte)
    }

    /// The device has carried out `request`. Follows selector and offset, and says what to
    /// patch.
    pub fn complete(&mut self, request: Dma) -> Option<Patch<'_>> {
        if request.control & control::SELECT != 0 {
            self.select((request.control >> 16) as u16);
        }
        let moves = control::READ | control::SKIP | control::WRITE;
        if request.control & moves == 0 {
            return None;
        }
        let start = self.offset;
        self.offset = self.offset.saturating_add(request.length as usize);
        if request.control & control::READ == 0 || !self.is_selected() {
            return None;
        }
        let end = self.offset.min(self.contents.len());
        let bytes = self
            .contents
            .get(start..end)
            .filter(|bytes| !bytes.is_empty())?;
        Some(Patch {
            gpa: Gpa::new(request.address),
            bytes,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(address: u64, length: u64, kind: u32) -> Vec<u8> {
        [
            &address.to_le_bytes()[..],
            &length.to_le_bytes(),
            &kind.to_le_bytes(),
        ]
        .concat()
    }

    fn request(control: u32, length: u32, address: u64) -> Dma {
        let bytes = [
            &control.to_be_bytes()[..],
            &length.to_be_bytes(),
            &address.to_be_bytes(),
        ]
        .concat();
        Dma::from_bytes(bytes[..].try_into().unwrap())
    }

    #[test]
    fn the_ram_entry_ends_where_the_machine_begins() {
        let table = [
            entry(0xFEFF_C000, 0x4000, 2),
            entry(0, 0x8000_0000, 1),
            entry(1 << 32, 0x8000_0000, 1),
        ]
        .concat();
        let patched = patch_e820(&table, 0x7800_0000, 0x800_0000).unwrap();
        assert_eq!(patched.len(), table.len());
        assert_eq!(patched[20..40], entry(0, 0x7800_0000, 1));
        assert_eq!(patched[..20], table[..20]);
        assert_eq!(patched[40..], table[40..]);
        assert_eq!(patch_e820(&table, 0x7000_0000, 0x800_0000), None);
    }

    #[test]
    fn a_file_is_found_by_its_whole_name() {
        let mut directory = 2u32.to_be_bytes().to_vec();
        for (name, selector, size) in [("etc/e820x", 0x21u16, 7u32), ("etc/e820", 0x22, 60)] {
            directory.extend(size.to_be_bytes());
            directory.extend(selector.to_be_bytes());
            directory.extend([0; 2]);
            let mut field = [0; 56];
            field[..name.len()].copy_from_slice(name.as_bytes());
            directory.extend(field);
        }
        assert_eq!(
            find_file(&directory, "etc/e820"),
            Some(File {
                selector: 0x22,
                size: 60
            })
        );
        assert_eq!(find_file(&directory, "etc"), None);
        assert_eq!(find_file(&directory[..3], "etc/e820"), None);
    }

    #[test]
    fn bytes_of_the_file_are_replaced_and_no_others() {
        let mut filter = Filter::new(0x22, vec![1, 2, 3]);
        filter.select(0x19);
        assert_eq!(filter.read(0xAA), 0xAA);
        filter.select(0x22);
        let read: Vec<u8> = (0..4).map(|_| filter.read(0xAA)).collect();
        assert_eq!(read, [1, 2, 3, 0xAA]);
    }

    #[test]
    fn dma_goes_on_where_the_last_transfer_ended() {
        let mut filter = Filter::new(0x22, vec![1, 2, 3, 4, 5]);
        let first = filter.complete(request(
            0x22 << 16 | control::SELECT | control::READ,
            2,
            0x100,
        ));
        assert_eq!(
            first,
            Some(Patch {
                gpa: Gpa::new(0x100),
                bytes: &[1, 2]
            })
        );
        assert_eq!(filter.complete(request(control::SKIP, 1, 0)), None);
        let second = filter.complete(request(control::READ, 9, 0x200));
        assert_eq!(
            second,
            Some(Patch {
                gpa: Gpa::new(0x200),
                bytes: &[4, 5]
            })
        );
        filter.select(0x19);
        assert_eq!(filter.complete(request(control::READ, 4, 0x300)), None);
    }
}
