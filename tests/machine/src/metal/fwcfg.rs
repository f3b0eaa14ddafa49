//! The machine's own fw_cfg client (QEMU `docs/specs/fw_cfg.rst`), by DMA.
//!
//! Used before the guest runs, for the image and the settings; afterwards the guest is the
//! device's only user (its accesses go through the filter in [`super::exit::io`]).

#![expect(unsafe_code, reason = "a device writes into our buffers")]

use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use core::ptr;
use core::sync::atomic::{Ordering, fence};

use super::{cpu, memory};

/// Port of the selector register.
pub const PORT_SELECTOR: u16 = 0x510;
/// First port of the 64-bit big-endian DMA address register; writing its low half starts.
pub const PORT_DMA: u16 = 0x514;

/// Key of the file directory.
const KEY_DIRECTORY: u16 = 0x19;
/// Size of one directory entry: size, key, reserved, name.
const ENTRY: usize = 64;

/// Bits of the DMA control word; the key is in bits 31:16.
mod control {
    pub const ERROR: u32 = 1 << 0;
    pub const READ: u32 = 1 << 1;
    pub const SELECT: u32 = 1 << 3;
}

/// The DMA descriptor; every field big-endian.
#[repr(C)]
struct Access {
    control: u32,
    length: u32,
    address: u64,
}

/// One DMA transfer; false if the device reports an error.
fn transfer(control: u32, buffer: &mut [u8]) -> bool {
    let length = u32::try_from(buffer.len()).expect("fw_cfg items are below 4 GiB");
    let mut access = Access {
        control: control.to_be(),
        length: length.to_be(),
        address: memory::phys_of(buffer.as_ptr()).to_be(),
    };
    let at = memory::phys_of(&raw const access);
    let done = &raw mut access.control;
    fence(Ordering::SeqCst);
    cpu::port_out(PORT_DMA, 4, ((at >> 32) as u32).to_be());
    cpu::port_out(PORT_DMA + 4, 4, (at as u32).to_be());
    loop {
        // SAFETY: a valid field of a local; volatile because the device writes it.
        let control = u32::from_be(unsafe { ptr::read_volatile(done) });
        if control & !control::ERROR == 0 {
            fence(Ordering::SeqCst);
            return control & control::ERROR == 0;
        }
    }
}

fn select(key: u16) -> u32 {
    u32::from(key) << 16 | control::SELECT
}

/// The contents of the file called `name`, if the device has it.
pub fn file(name: &str) -> Option<Vec<u8>> {
    let mut count = [0; 4];
    if !transfer(select(KEY_DIRECTORY) | control::READ, &mut count) {
        return None;
    }
    let mut entry = [0; ENTRY];
    for _ in 0..u32::from_be_bytes(count) {
        if !transfer(control::READ, &mut entry) {
            return None;
        }
        let (size, rest) = entry.split_first_chunk::<4>()?;
        let (key, rest) = rest.split_first_chunk::<2>()?;
        let entry_name = rest[2..].split(|&b| b == 0).next().unwrap_or_default();
        if entry_name == name.as_bytes() {
            let mut contents = vec![0; u32::from_be_bytes(*size) as usize];
            let key = u16::from_be_bytes(*key);
            return transfer(select(key) | control::READ, &mut contents).then_some(contents);
        }
    }
    None
}

/// The contents of a text file; bytes that are not UTF-8 are replaced.
pub fn text(name: &str) -> Option<String> {
    file(name).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
}
