//! Inputs made by hand, so that the tests need neither a compiler nor a firmware: an ELF file
//! and an OVMF image, byte by byte.

use protocols::launch::REGION_GPA;

/// `p_flags` of the three kinds of segments.
pub const TEXT: u32 = 0x5;
pub const RODATA: u32 = 0x4;
pub const DATA: u32 = 0x6;

/// A loadable segment to be written into an ELF file.
#[derive(Clone)]
pub struct Load {
    pub address: u64,
    pub flags: u32,
    pub data: Vec<u8>,
    pub memory_size: u64,
}

/// An ELF file with the given segments and one symbol, in the layout of the System V ABI:
/// header, program headers, section headers (null, symbols, strings), then all bytes.
pub fn elf(entry: u64, loads: &[Load], symbol: Option<(&str, u64)>) -> Vec<u8> {
    const HEADER: usize = 64;
    const PROGRAM_HEADER: usize = 56;
    const SECTION_HEADER: usize = 64;
    let sections_at = HEADER + loads.len() * PROGRAM_HEADER;
    let mut body_at = sections_at + 3 * SECTION_HEADER;
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    for half in [2u16, 62] {
        file.extend(half.to_le_bytes()); // ET_EXEC, EM_X86_64
    }
    file.extend(1u32.to_le_bytes());
    for word in [entry, HEADER as u64, sections_at as u64] {
        file.extend(word.to_le_bytes());
    }
    file.extend(0u32.to_le_bytes());
    for half in [HEADER, PROGRAM_HEADER, loads.len(), SECTION_HEADER, 3, 2] {
        file.extend((half as u16).to_le_bytes());
    }
    let mut body = Vec::new();
    for load in loads {
        file.extend(1u32.to_le_bytes()); // PT_LOAD
        file.extend(load.flags.to_le_bytes());
        let words =
            [body_at as u64, load.address, load.address, load.data.len() as u64, load.memory_size];
        for word in words.into_iter().chain([4096]) {
            file.extend(word.to_le_bytes());
        }
        body.extend(&load.data);
        body_at += load.data.len();
    }

    let (name, value) = symbol.unwrap_or(("nothing_of_interest", 0));
    let mut symbols = vec![0u8; 24];
    symbols.extend(1u32.to_le_bytes());
    symbols.extend([0x11, 0]); // global object
    symbols.extend(1u16.to_le_bytes()); // defined in section 1
    symbols.extend(value.to_le_bytes());
    symbols.extend(0u64.to_le_bytes());
    let strings = [b"\0", name.as_bytes(), b"\0"].concat();

    file.extend([0; SECTION_HEADER]);
    let section = |file: &mut Vec<u8>, kind: u32, at: usize, size: usize, link: u32, entry: u64| {
        file.extend(0u32.to_le_bytes());
        file.extend(kind.to_le_bytes());
        for word in [0, 0, at as u64, size as u64] {
            file.extend(word.to_le_bytes());
        }
        file.extend(link.to_le_bytes());
        file.extend(1u32.to_le_bytes());
        file.extend(1u64.to_le_bytes());
        file.extend(entry.to_le_bytes());
    };
    section(&mut file, 2, body_at, symbols.len(), 2, 24); // SHT_SYMTAB
    section(&mut file, 3, body_at + symbols.len(), strings.len(), 0, 0); // SHT_STRTAB
    [file, body, symbols, strings].concat()
}

/// Segments like those of the paravisor: code, constants, data with .bss.
pub fn loads() -> Vec<Load> {
    let load = |page: u64, flags, byte, bytes: usize, memory_size| Load {
        address: REGION_GPA + page * 0x1000,
        flags,
        data: vec![byte; bytes],
        memory_size,
    };
    vec![
        load(0, TEXT, 0x90, 0x1800, 0x1800),
        load(2, RODATA, 0x11, 0x1000, 0x1000),
        load(3, DATA, 0x22, 0x800, 0x2800),
    ]
}

/// The ELF file of [`loads`], with the symbol of the map descriptor.
pub fn paravisor() -> Vec<u8> {
    elf(
        REGION_GPA + 0x40,
        &loads(),
        Some(("TURNSTILE_MAP_DESCRIPTOR", REGION_GPA + 0x3000)),
    )
}

/// The sections of OVMF 2026.08: address, size, type.
pub const SECTIONS: [(u32, u32, u32); 7] = [
    (0x80_0000, 0x9000, 1),
    (0x80_A000, 0x3000, 1),
    (0x80_D000, 0x1000, 2),
    (0x80_E000, 0x1000, 3),
    (0x80_F000, 0x1000, 4),
    (0x81_1000, 0x1_F000, 1),
    (0x81_0000, 0x1000, 0x10),
];

/// GUIDs as they lie in the image (mixed endian).
const FOOTER: &str = "de82b596b21ff745baeaa366c55a082d";
const RESET_BLOCK: &str = "de71f7007e1acb4f890e68c77e2fb44e";
const SEV_METADATA: &str = "666588dc4a989847a75e5585a7bf67cc";
const IGVM_METADATA: &str = "3e17fa8476317746" ;

/// An OVMF image of `size` bytes whose table holds what is asked for.
pub fn ovmf(size: usize, sections: Option<&[(u32, u32, u32)]>, reset_eip: Option<u32>) -> Vec<u8> {
    let _ = IGVM_METADATA;
    let mut image = vec![0u8; size];
    for (index, byte) in image.iter_mut().enumerate().take(size / 2) {
        *byte = (index / 4096) as u8;
    }
    let mut table = Vec::new();
    if let Some(sections) = sections {
        let mut metadata = b"ASEV".to_vec();
        metadata.extend((16 + 12 * sections.len() as u32).to_le_bytes());
        metadata.extend(1u32.to_le_bytes());
        metadata.extend((sections.len() as u32).to_le_bytes());
        for (gpa, bytes, kind) in sections {
            for word in [gpa, bytes, kind] {
                metadata.extend(word.to_le_bytes());
            }
        }
        let from_end = 2048usize;
        image[size - from_end..][..metadata.len()].copy_from_slice(&metadata);
        table.extend(entry(SEV_METADATA, &(from_end as u32).to_le_bytes()));
    }
    if let Some(eip) = reset_eip {
        table.extend(entry(RESET_BLOCK, &eip.to_le_bytes()));
    }
    let total = table.len() as u16 + 18;
    table.extend(total.to_le_bytes());
    table.extend(bytes(FOOTER));
    image[size - 32 - table.len()..size - 32].copy_from_slice(&table);
    image
}

/// One entry of the table: data, length, GUID.
fn entry(guid: &str, data: &[u8]) -> Vec<u8> {
    let length = data.len() as u16 + 18;
    [data, &length.to_le_bytes(), &bytes(guid)].concat()
}

fn bytes(hex: &str) -> Vec<u8> {
    (0..hex.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap())
        .collect()
}
