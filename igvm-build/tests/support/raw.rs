//! IGVM files written byte by byte, right or wrong.

#![allow(
    dead_code,
    reason = "each test program uses another part of this module"
)]

use igvm_build::file::edit::seal;

/// Where the data of a [`Raw`] begins.
pub const DATA: u32 = 0x1000;
/// Data: a page of 0xAB, then a VMSA.
pub const VMSA: usize = DATA as usize + 0x1000;
/// Where the pages of [`Raw::snp`] lie.
pub const REGION: u64 = 0x800_0000;
/// Where KVM has VMSAs.
pub const LAUNCH: u64 = 0xFFFF_FFFF_F000;

/// Types of headers, as numbers: what is tested here has names for them of its own.
pub mod kind {
    pub const PLATFORM: u32 = 0x1;
    pub const POLICY: u32 = 0x101;
    pub const MANIFEST: u32 = 0x104;
    pub const AREA: u32 = 0x301;
    pub const PAGE: u32 = 0x302;
    pub const INSERT: u32 = 0x303;
    pub const CONTEXT: u32 = 0x304;
    pub const REQUIRED: u32 = 0x305;
    pub const VP_COUNT: u32 = 0x307;
    pub const SRAT: u32 = 0x308;
    pub const MEMORY_MAP: u32 = 0x30C;
}

/// A file: its variable headers, and two pages of data.
#[derive(Clone)]
pub struct Raw {
    pub version: u32,
    pub headers: Vec<(u32, Vec<u8>)>,
}

impl Raw {
    /// A file for SEV-SNP that breaks no rule, with one header of each kind that we use.
    pub fn snp() -> Self {
        Self {
            version: 1,
            headers: vec![
                platform(1, 2),
                policy(1, 0x3_0000),
                area(0, 0x4000),
                area(1, 0x1000),
                usage(kind::MEMORY_MAP, 0, 0),
                usage(kind::VP_COUNT, 1, 8),
                insert(REGION + 0x4000, 0),
                insert(REGION + 0x8000, 1),
                required(REGION + 0x9000, 0x7000),
                page(1, REGION, DATA, 0),
                page(1, REGION + 0x1000, 0, 0),
                page(1, REGION + 0x2000, 0, 1),
                page(1, REGION + 0x3000, 0, 2),
                context(1, LAUNCH, 0),
            ],
        }
    }

    /// A file for TDX alone that breaks no rule of the format.
    pub fn tdx() -> Self {
        Self {
            version: 1,
            headers: vec![
                platform(4, 3),
                policy(4, 0),
                area(0, 0x1000),
                usage(kind::VP_COUNT, 0, 0),
                insert(REGION, 0).with_mask(8, 4),
                page(4, REGION + 0x1000, DATA, 0),
                page(4, 0xFFFF_F000, 0, 0),
            ],
        }
    }

    /// A file for the native platform that breaks no rule if its VMSA is overwritten ([`Raw::natively`]).
    pub fn native() -> Self {
        Self {
            version: 1,
            headers: vec![
                platform(1, 0),
                area(0, 0x1000),
                usage(kind::VP_COUNT, 0, 0),
                insert(REGION, 0),
                page(1, REGION + 0x1000, DATA, 0),
                context(1, 0, 0),
            ],
        }
    }

    /// The bytes, with a native context in the VMSA's place in which one byte is set.
    pub fn natively(&self, at: usize, byte: u8) -> Vec<u8> {
        self.spoiled(|bytes| {
            bytes[VMSA..].fill(0);
            bytes[VMSA + at] = byte;
        })
    }

    /// The bytes of the file.
    pub fn bytes(&self) -> Vec<u8> {
        let head = if self.version == 1 { 24 } else { 32 };
        let mut section = Vec::new();
        for (kind, body) in &self.headers {
            section.extend(kind.to_le_bytes());
            section.extend((body.len() as u32).to_le_bytes());
            section.extend(body);
            section.resize(section.len().next_multiple_of(8), 0);
        }
        let total = VMSA + 0x1000;
        let mut bytes = b"IGVM".to_vec();
        for word in [self.version, head, section.len() as u32, total as u32, 0] {
            bytes.extend(word.to_le_bytes());
        }
        if self.version != 1 {
            bytes.extend([0u32.to_le_bytes(), 4096u32.to_le_bytes()].concat());
        }
        bytes.extend(section);
        assert!(bytes.len() <= DATA as usize);
        bytes.resize(DATA as usize, 0);
        bytes.resize(VMSA, 0xAB);
        bytes.resize(total, 0);
        bytes[VMSA + 0x3B0] = 1;
        bytes[VMSA + 0xD1] = 0x10;
        // Fails where headers cannot be told apart, which is then what the file is for.
        let _ = seal(&mut bytes);
        bytes
    }

    /// The bytes, changed by `spoil`, with a right checksum.
    pub fn spoiled(&self, spoil: impl Fn(&mut Vec<u8>)) -> Vec<u8> {
        let mut bytes = self.bytes();
        spoil(&mut bytes);
        seal(&mut bytes).unwrap();
        bytes
    }

    /// Where the first header of `kind` is.
    pub fn first(&self, kind: u32) -> usize {
        let position = self.headers.iter().position(|header| header.0 == kind);
        position.unwrap()
    }

    /// The file with the body of the first header of `kind` overwritten at `at`.
    pub fn with(mut self, kind: u32, at: usize, bytes: &[u8]) -> Self {
        let index = self.first(kind);
        self.headers[index].1[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    /// The file with a header more, before the first one of `kind`.
    pub fn before(mut self, kind: u32, header: (u32, Vec<u8>)) -> Self {
        let index = self.first(kind);
        self.headers.insert(index, header);
        self
    }

    /// The file with a header more, at the end.
    pub fn and(mut self, header: (u32, Vec<u8>)) -> Self {
        self.headers.push(header);
        self
    }

    /// The file without the first header of `kind`.
    pub fn without(mut self, kind: u32) -> Self {
        let index = self.first(kind);
        self.headers.remove(index);
        self
    }

    /// The file with the first header of `kind` moved to the end.
    pub fn last(mut self, kind: u32) -> Self {
        let index = self.first(kind);
        let header = self.headers.remove(index);
        self.headers.push(header);
        self
    }
}

/// Changes the mask of a header, which lies at `at` in its body.
pub trait WithMask {
    fn with_mask(self, at: usize, mask: u32) -> Self;
}

impl WithMask for (u32, Vec<u8>) {
    fn with_mask(mut self, at: usize, mask: u32) -> Self {
        self.1[at..at + 4].copy_from_slice(&mask.to_le_bytes());
        self
    }
}

pub fn platform(mask: u32, kind: u8) -> (u32, Vec<u8>) {
    let fields: [&[u8]; 4] = [&mask.to_le_bytes(), &[0, kind], &[1, 0], &[0; 8]];
    (kind::PLATFORM, fields.concat())
}

pub fn policy(mask: u32, policy: u64) -> (u32, Vec<u8>) {
    let fields: [&[u8]; 3] = [&policy.to_le_bytes(), &mask.to_le_bytes(), &[0; 4]];
    (kind::POLICY, fields.concat())
}

/// A CoRIM document, or its signature.
pub fn manifest(kind: u32, mask: u32, offset: u32, bytes: u32) -> (u32, Vec<u8>) {
    (
        kind,
        [mask, offset, bytes, 0].map(u32::to_le_bytes).concat(),
    )
}

pub fn area(index: u32, bytes: u64) -> (u32, Vec<u8>) {
    let fields: [&[u8]; 3] = [&bytes.to_le_bytes(), &index.to_le_bytes(), &[0; 4]];
    (kind::AREA, fields.concat())
}

pub fn usage(kind: u32, index: u32, offset: u32) -> (u32, Vec<u8>) {
    (kind, [index.to_le_bytes(), offset.to_le_bytes()].concat())
}

pub fn insert(gpa: u64, index: u32) -> (u32, Vec<u8>) {
    let fields: [&[u8]; 3] = [&gpa.to_le_bytes(), &[1, 0, 0, 0], &index.to_le_bytes()];
    (kind::INSERT, fields.concat())
}

pub fn required(gpa: u64, bytes: u32) -> (u32, Vec<u8>) {
    let fields: [&[u8]; 4] = [
        &gpa.to_le_bytes(),
        &[1, 0, 0, 0],
        &bytes.to_le_bytes(),
        &[0; 8],
    ];
    (kind::REQUIRED, fields.concat())
}

/// A page without flags.
pub fn page(mask: u32, gpa: u64, offset: u32, data_type: u16) -> (u32, Vec<u8>) {
    let fields: [&[u8]; 6] = [
        &gpa.to_le_bytes(),
        &mask.to_le_bytes(),
        &offset.to_le_bytes(),
        &[0; 4],
        &data_type.to_le_bytes(),
        &[0; 2],
    ];
    (kind::PAGE, fields.concat())
}

pub fn context(mask: u32, gpa: u64, index: u16) -> (u32, Vec<u8>) {
    let fields: [&[u8]; 5] = [
        &gpa.to_le_bytes(),
        &mask.to_le_bytes(),
        &(VMSA as u32).to_le_bytes(),
        &index.to_le_bytes(),
        &[0; 2],
    ];
    (kind::CONTEXT, fields.concat())
}
