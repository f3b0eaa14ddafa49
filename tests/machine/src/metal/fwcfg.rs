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

use machine::fwcfg_filter::{File, PORT_DMA_HIGH, PORT_DMA_LOW, SELECTOR_DIRECTORY, find_file};

use super::{cpu, memory};

/// Key of the file directory.
const KEY_DIRECTORY: u16 = SELECTOR_DIRECTORY;
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
    cpu::port_out(PORT_DMA_HIGH, 4, ((at >> 32) as u32).to_be());
    cpu::port_out(PORT_DMA_LOW, 4, (at as u32).to_be());
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

/// Reads the directory entry of the file called `name`.
fn find(name: &str) -> Option<File> {
    let count = u32::from_be_bytes(item(KEY_DIRECTORY)?);
    let mut directory = vec![0; 4 + count as usize * ENTRY];
    if !transfer(select(KEY_DIRECTORY) | control::READ, &mut directory) {
        return None;
    }
    find_file(&directory, name)
}

/// The key of the file called `name`, if the device has it.
pub fn selector(name: &str) -> Option<u16> {
    find(name).map(|file| file.selector)
}

/// The contents of the file called `name`, if the device has it.
pub fn file(name: &str) -> Option<Vec<u8>> {
    let file = find(name)?;
    let mut contents = vec![0; file.size as usize];
    transfer(select(file.selector) | control::READ, &mut contents).then_some(contents)
}

/// The contents of a text file; bytes that are not UTF-8 are replaced.
pub fn text(name: &str) -> Option<String> {
    file(name).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
}

/// The first bytes of the item with a fixed key.
pub fn item<const N: usize>(key: u16) -> Option<[u8; N]> {
    let mut value = [0; N];
    transfer(select(key) | control::READ, &mut value).then_some(value)
}
