//! Inputs made by hand, so that the tests need neither a compiler nor a firmware: an ELF file
//! and an OVMF image, byte by byte.

#![allow(
    dead_code,
    reason = "each test program uses another part of this module"
)]

use protocols::guid::Guid;
use protocols::launch::REGION_GPA;
use protocols::ovmf::{FOOTER_GUID, RESET_BLOCK_GUID, SEV_METADATA_GUID};
use zerocopy::IntoBytes;

/// `p_flags` of the kinds of segments.
pub const TEXT: u32 = 0x5;
pub const RODATA: u32 = 0x4;
pub const DATA: u32 = 0x6;
pub const ALL: u32 = 0x7;

/// A loadable segment to be written into an ELF file.
#[derive(Clone)]
pub struct Load {
    pub address: u64,
    pub load_address: u64,
    pub flags: u32,
    pub data: Vec<u8>,
    pub memory_size: u64,
}

impl Load {
    pub fn new(address: u64, flags: u32, data: Vec<u8>, memory_size: u64) -> Self {
        Self {
            address,
            load_address: address,
            flags,
            data,
            memory_size,
        }
    }
}

/// Appends numbers, each in its own width.
macro_rules! put {
    ($file:expr, $($value:expr),+ $(,)?) => { $( $file.extend($value.to_le_bytes()); )+ };
}

/// An ELF file with the given segments and one symbol, laid out as the System V ABI has it:
/// header, program headers, section headers (none, symbols, strings), then all bytes.
pub fn elf(entry: u64, loads: &[Load], symbol: (&str, u64)) -> Vec<u8> {
    let sections_at = 64 + loads.len() * 56;
    let mut body_at = (sections_at + 3 * 64) as u64;
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    // Type: executable; machine: x86-64.
    put!(
        file,
        2u16,
        62u16,
        1u32,
        entry,
        64u64,
        sections_at as u64,
        0u32
    );
    put!(file, 64u16, 56u16, loads.len() as u16, 64u16, 3u16, 2u16);
    let mut body = Vec::new();
    for load in loads {
        put!(
            file,
            1u32,
            load.flags,
            body_at,
            load.address,
            load.load_address
        );
        put!(file, load.data.len() as u64, load.memory_size, 4096u64);
        body.extend(&load.data);
        body_at += load.data.len() as u64;
    }

    let (name, value) = symbol;
    let mut symbols = vec![0u8; 24];
    // A global object, defined in section 1.
    put!(symbols, 1u32, 0x11u8, 0u8, 1u16, value, 0u64);
    let strings = [b"\0", name.as_bytes(), b"\0"].concat();

    file.extend([0; 64]);
    let mut section = |kind: u32, at: u64, size: usize, link: u32, entry: u64| {
        put!(
            file,
            0u32,
            kind,
            0u64,
            0u64,
            at,
            size as u64,
            link,
            1u32,
            1u64,
            entry
        );
    };
    section(2, body_at, symbols.len(), 2, 24);
    section(3, body_at + symbols.len() as u64, strings.len(), 0, 0);
    [file, body, symbols, strings].concat()
}

/// Segments like those of the paravisor: code, constants, data with .bss behind it.
pub fn loads() -> Vec<Load> {
    let load = |page: u64, flags, byte, bytes, memory_size| {
        Load::new(
            REGION_GPA + page * 0x1000,
            flags,
            vec![byte; bytes],
            memory_size,
        )
    };
    vec![
        load(0, TEXT, 0x90, 0x1800, 0x1800),
        load(2, RODATA, 0x11, 0x1000, 0x1000),
        load(3, DATA, 0x22, 0x800, 0x2800),
    ]
}

/// Where the symbol of [`paravisor`] points.
pub const MAP_DESCRIPTOR: u64 = REGION_GPA + 0x3000;
/// Entry point of [`paravisor`].
pub const ENTRY: u64 = REGION_GPA + 0x40;

/// The ELF file of [`loads`], with the symbol of the map descriptor.
pub fn paravisor() -> Vec<u8> {
    elf(
        ENTRY,
        &loads(),
        ("TURNSTILE_MAP_DESCRIPTOR", MAP_DESCRIPTOR),
    )
}

/// Areas as OVMF 2026.08 has them: address, size, kind.
pub const AREAS: [(u32, u32, u32); 7] = [
    (0x80_0000, 0x9000, 1),
    (0x80_A000, 0x3000, 1),
    (0x80_D000, 0x1000, 2),
    (0x80_E000, 0x1000, 3),
    (0x80_F000, 0x1000, 4),
    (0x81_1000, 0x1_F000, 1),
    (0x81_0000, 0x1000, 0x10),
];

/// Size of [`ovmf`]'s images.
pub const FIRMWARE_SIZE: usize = 0x1_0000;

/// An OVMF image whose table leads to the given areas, or to none at all.
pub fn ovmf(areas: Option<&[(u32, u32, u32)]>) -> Vec<u8> {
    const FROM_END: usize = 2048;
    let mut image = vec![0u8; FIRMWARE_SIZE];
    // Half of the pages differ, the other half are zero.
    for (index, byte) in image.iter_mut().enumerate().take(FIRMWARE_SIZE / 2) {
        *byte = 1 + (index / 4096) as u8;
    }
    let mut table = entry(RESET_BLOCK_GUID, 0x80_B004);
    if let Some(areas) = areas {
        let mut list = b"ASEV".to_vec();
        put!(list, 16 + 12 * areas.len() as u32, 1u32, areas.len() as u32);
        for (gpa, size, kind) in areas {
            put!(list, gpa, size, kind);
        }
        image[FIRMWARE_SIZE - FROM_END..][..list.len()].copy_from_slice(&list);
        table.extend(entry(SEV_METADATA_GUID, FROM_END as u32));
    }
    let length = table.len() as u16 + 18;
    put!(table, length);
    table.extend(FOOTER_GUID.as_bytes());
    let end = FIRMWARE_SIZE - 32;
    image[end - table.len()..end].copy_from_slice(&table);
    image
}

/// One entry of the table: value, length, GUID.
fn entry(guid: Guid, value: u32) -> Vec<u8> {
    [
        &value.to_le_bytes()[..],
        &22u16.to_le_bytes(),
        guid.as_bytes(),
    ]
    .concat()
}

/// The type of a list of certificates, as it is stored.
pub const X509: [u8; 16] = [
    0xA1, 0x59, 0xC0, 0xA5, 0xE4, 0x94, 0xA7, 0x4A, 0x87, 0xB5, 0xAB, 0x15, 0x5C, 0x2B, 0xF0, 0x72,
];
/// The type of a list of SHA-256 hashes.
pub const SHA256: [u8; 16] = [
    0x26, 0x16, 0xC4, 0xC1, 0x4C, 0x50, 0x92, 0x40, 0xAC, 0xA9, 0x41, 0xF9, 0x36, 0x93, 0x43, 0x28,
];

/// A list of signatures, all as long as the first; each has an owner of ones.
pub fn signature_list(kind: [u8; 16], signatures: &[&[u8]]) -> Vec<u8> {
    let size = 16 + signatures[0].len();
    let mut list = kind.to_vec();
    put!(
        list,
        (28 + size * signatures.len()) as u32,
        0u32,
        size as u32
    );
    for signature in signatures {
        list.extend([1; 16]);
        list.extend(*signature);
    }
    list
}

/// Something that begins as a certificate in DER.
pub const CERTIFICATE: [u8; 12] = *b"\x30\x82\x00\x08\x30\x06etc...";

/// The list that `cert-to-efi-sig-list` makes of a certificate.
pub fn certificate_list() -> Vec<u8> {
    signature_list(X509, &[&CERTIFICATE])
}

/// An EFI program of so many bytes: the headers of one, and then nothing but `filling`.
pub fn efi_program(bytes: usize, filling: u8) -> Vec<u8> {
    const NT: usize = 0x80;
    let mut program = vec![filling; bytes];
    program[..NT + 24 + 240].fill(0);
    program[..2].copy_from_slice(b"MZ");
    program[0x3C] = NT as u8;
    program[NT..NT + 4].copy_from_slice(b"PE\0\0");
    // For x86-64, with an optional header of 240 bytes.
    program[NT + 4..NT + 6].copy_from_slice(&0x8664u16.to_le_bytes());
    program[NT + 20] = 240;
    program[NT + 24..NT + 26].copy_from_slice(&0x20Bu16.to_le_bytes());
    // An EFI application.
    program[NT + 24 + 68] = 10;
    // 16 directories.
    program[NT + 24 + 108] = 16;
    program
}
