//! The program to be launched: what an ELF file says about itself.
//!
//! Invariants of a [`Program`]:
//!
//! 1. it is a little-endian x86-64 executable at fixed addresses,
//! 2. no segment wraps around the address space, and none has more bytes in the file than in
//!    memory,
//! 3. segments that take no memory are not listed.

use object::elf::{ET_EXEC, FileHeader64, PF_R, PF_W, PF_X, PT_LOAD};
use object::read::elf::{FileHeader as _, ProgramHeader as _, Sym as _};
use object::{Endianness, LittleEndian};

use crate::error::Error;

/// Machine number of x86-64 (System V ABI, AMD64 supplement, §4.1).
const EM_X86_64: u16 = object::elf::EM_X86_64;

/// What the pages of a segment may be used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access {
    /// May be read.
    pub read: bool,
    /// May be written.
    pub write: bool,
    /// May be executed.
    pub execute: bool,
}

/// One loadable segment.
#[derive(Debug, Clone, Copy)]
pub struct Segment<'a> {
    /// Address the segment runs at, in bytes.
    pub address: u64,
    /// Physical address the segment is loaded at, in bytes.
    pub load_address: u64,
    /// Size in memory, in bytes; at least `data.len()`, the rest is zero.
    pub memory_size: u64,
    /// The bytes in the file.
    pub data: &'a [u8],
    /// What its pages may be used for.
    pub access: Access,
}

impl Segment<'_> {
    /// Address behind the segment.
    pub fn end(&self) -> u64 {
        // Cannot wrap: invariant 2 of `Program`.
        self.address + self.memory_size
    }

    /// Physical address behind the bytes of the file.
    pub fn load_end(&self) -> u64 {
        // Cannot wrap: invariant 2 of `Program`.
        self.load_address + self.data.len() as u64
    }
}

/// A parsed ELF executable.
#[derive(Debug)]
pub struct Program<'a> {
    bytes: &'a [u8],
    entry: u64,
    segments: Vec<Segment<'a>>,
}

impl<'a> Program<'a> {
    /// Parses `bytes` and checks the invariants of the type.
    ///
    /// # Errors
    ///
    /// [`Error::NotAnElf`] says which of them does not hold.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, Error> {
        let fail = |reason: &str| Error::NotAnElf {
            reason: reason.to_owned(),
        };
        let header = FileHeader64::<Endianness>::parse(bytes).map_err(|e| fail(&e.to_string()))?;
        let endian = header.endian().map_err(|e| fail(&e.to_string()))?;
        if endian != Endianness::Little || header.e_machine(endian) != EM_X86_64 {
            return Err(fail("built for another processor"));
        }
        if header.e_type(endian) != ET_EXEC {
            return Err(fail("not linked at fixed addresses"));
        }
        let mut segments = Vec::new();
        for program_header in header
            .program_headers(endian, bytes)
            .map_err(|e| fail(&e.to_string()))?
        {
            if program_header.p_type(endian) != PT_LOAD || program_header.p_memsz(endian) == 0 {
                continue;
            }
            let data = program_header
                .data(endian, bytes)
                .map_err(|()| fail("a segment lies outside the file"))?;
            let segment = Segment {
                address: program_header.p_vaddr(endian),
                load_address: program_header.p_paddr(endian),
                memory_size: program_header.p_memsz(endian),
                data,
                access: access(program_header.p_flags(endian)),
            };
            if segment.memory_size < data.len() as u64 {
                return Err(fail("a segment is larger in the file than in memory"));
            }
            if segment.address.checked_add(segment.memory_size).is_none()
                || segment
                    .load_address
                    .checked_add(segment.memory_size)
                    .is_none()
            {
                return Err(fail("a segment wraps around the address space"));
            }
            segments.push(segment);
        }
        if segments.is_empty() {
            return Err(fail("no loadable segment"));
        }
        segments.sort_by_key(|segment| segment.address);
        Ok(Self {
            bytes,
            entry: header.e_entry(endian),
            segments,
        })
    }

    /// The entry point.
    pub fn entry(&self) -> u64 {
        self.entry
    }

    /// The loadable segments, ascending by address.
    pub fn segments(&self) -> &[Segment<'a>] {
        &self.segments
    }

    /// Value of the symbol `name`; `None` if the file has no such symbol or no symbols.
    pub fn symbol(&self, name: &str) -> Option<u64> {
        let header = FileHeader64::<LittleEndian>::parse(self.bytes).ok()?;
        let sections = header.sections(LittleEndian, self.bytes).ok()?;
        let symbols = sections
            .symbols(LittleEndian, self.bytes, object::elf::SHT_SYMTAB)
            .ok()?;
        symbols
            .iter()
            .find(|symbol| {
                !symbol.is_undefined(LittleEndian)
                    && symbol.name(LittleEndian, symbols.strings()) == Ok(name.as_bytes())
            })
            .map(|symbol| symbol.st_value(LittleEndian))
    }
}

/// Decodes `p_flags` of a program header.
fn access(flags: u32) -> Access {
    Access {
        read: flags & PF_R != 0,
        write: flags & PF_W != 0,
        execute: flags & PF_X != 0,
    }
}
