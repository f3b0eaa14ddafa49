//! A program of a few bytes at VMPL1, in any mode of the processor.
//!
//! VMPL0 writes a VMSA and everything the mode needs (code, descriptor tables, page tables,
//! stacks) into memory that both levels may use, and runs it. Whatever exception or interrupt
//! the program gets, its handler asks for VMPL0 at once; then VMPL0 looks at the VMSA and at the
//! frame on the stack. So nothing of this program's own exception handling takes part.

use guest::ghcb;
use guest::harness::{Finding, Verdict, expect};
use guest::insn::{Pvalidated, SIZE_4K, attributes};
use guest::memory;
use protocols::addr::{Gpa, PAGE_SIZE, Vmpl};
use protocols::exit_code::ExitCode;
use protocols::ghcb::event::{ApCreation, ApRequest};
use protocols::ghcb::msr::Response;
use protocols::ghcb::page::Field;
use protocols::vmsa::{Efer, Segment, SegmentAttributes, SevFeatures, Vmsa};
use spin::Once;
use zerocopy::IntoBytes;

use crate::setup::{FULL, VALIDATE, expect_pvalidate, expect_rmpadjust, ghcb_page, valid_page};
use crate::start;

/// A mode of the processor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// Real mode.
    Real,
    /// Protected mode with 16-bit segments and gates.
    Protected16,
    /// Protected mode without paging.
    Protected32,
    /// Protected mode with two-level page tables.
    Paged,
    /// Protected mode with three-level page tables.
    Pae,
    /// 32-bit code under long mode.
    Compatibility,
    /// 64-bit code.
    Long,
}

/// Where things are in the block of pages, in bytes. The block is private memory below 4 GiB,
/// mapped one to one.
pub mod place {
    /// The program; 16-bit code has its base here.
    pub const CODE: u64 = 0xC00;
    /// Interrupt descriptors.
    pub const IDT: u64 = 0x1000;
    /// Segment descriptors.
    pub const GDT: u64 = 0x2000;
    /// Task state segment.
    pub const TSS: u64 = 0x2800;
    /// Base of the stack that the program runs on; it ends at [`STACK_TOP`].
    pub const STACK: u64 = 0x3000;
    /// End of the program's stack.
    pub const STACK_TOP: u64 = 0x4000;
    /// End of the stack that the TSS has for level 0.
    pub const INNER_TOP: u64 = 0x5000;
    /// End of the stack of IST2.
    pub const IST2_TOP: u64 = 0x6000;
    /// Two-level tables.
    pub const LEGACY_ROOT: u64 = 0x6000;
    /// Three-level tables: the root, then four directories.
    pub const PAE_ROOT: u64 = 0x7000;
    /// Four-level tables: the root, then one page of 1 GiB entries.
    pub const LONG_ROOT: u64 = 0xC000;
    /// What a program may use.
    pub const DATA: u64 = 0xE000;
    /// The first byte behind it all: pages of the block that are not valid.
    pub const NOT_VALID: u64 = 0x1_0000;
    /// End of the stack of IST1, which is not valid.
    pub const IST1_TOP: u64 = NOT_VALID + 0x1000;
    /// A page directory pointer table that is not valid; the second half TiB is mapped by it.
    pub const LOST_TABLE: u64 = NOT_VALID + 0x1000;
    /// For cases: what is not valid.
    pub const HOLE: u64 = NOT_VALID + 0x2000;
}

/// Selectors of the GDT that [`Block::new`] writes.
mod selector {
    pub const CODE_32: u16 = 0x08;
    pub const DATA_32: u16 = 0x10;
    pub const CODE_64: u16 = 0x18;
    pub const CODE_16: u16 = 0x20;
    pub const USER_CODE: u16 = 0x2B;
    pub const USER_DATA: u16 = 0x33;
}

/// Bytes between two handlers.
const HANDLER_SIZE: u64 = 32;
/// Handlers, and gates, there are.
const VECTORS: u64 = 0x41;
/// The interrupt that cases use.
pub const INTERRUPT: u64 = 0x40;

/// Where real mode's handlers are: it reaches no higher.
const REAL_HANDLERS: u64 = 0x5_0000;

/// Asks for VMPL0 by the GHCB MSR, in code of 32 and of 64 bits.
const CALL: [u8; 18] = [
    0xB9, 0x30, 0x01, 0x01, 0xC0, // mov ecx, 0xC001_0130
    0xB8, 0x16, 0, 0, 0, // mov eax, 0x16: run VMPL
    0x31, 0xD2, // xor edx, edx: VMPL0
    0x0F, 0x30, // wrmsr
    0xF3, 0x0F, 0x01, 0xD9, // vmgexit
];

/// The same for 16-bit code.
const CALL_16: [u8; 21] = [
    0x66, 0xB9, 0x30, 0x01, 0x01, 0xC0, //
    0x66, 0xB8, 0x16, 0, 0, 0, //
    0x66, 0x31, 0xD2, //
    0x0F, 0x30, //
    0xF3, 0x0F, 0x01, 0xD9,
];

/// Where a handler goes on when it is run again: it takes the error code off and returns.
const RETURN: [u8; 6] = [
    0x48, 0x83, 0xC4, 8, // add rsp, 8
    0x48, 0xCF, // iretq
];

/// The memory of all programs.
pub struct Block {
    base: u64,
    vmsa: Gpa,
}

static BLOCK: Once<Block> = Once::new();

/// What stopped a program, and the state it left.
pub struct Stop {
    /// Vector of the handler that ran.
    pub vector: u64,
    /// The VMSA.
    pub vmsa: Vmsa,
}

/// The block of pages and the VMSA of VMPL1, made for the first program.
///
/// # Errors
///
/// A finding when memory or the VMSA cannot be had.
pub fn block() -> Result<&'static Block, Finding> {
    if BLOCK.get().is_none() {
        let block = Block::new()?;
        BLOCK.call_once(|| block);
    }
    BLOCK
        .get()
        .ok_or_else(|| Finding::new(format_args!("no memory for programs at VMPL1")))
}

/// Makes a page valid and gives it to VMPL1.
///
/// # Errors
///
/// A finding with what the platform said.
pub fn give_page(page: u64) -> Verdict {
    expect_pvalidate(page, SIZE_4K, VALIDATE, Pvalidated::DONE)?;
    for word in (page..page + PAGE_SIZE).step_by(8) {
        memory::write(word, 0)?;
    }
    expect_rmpadjust(page, SIZE_4K, attributes(1, FULL, false), 0)
}

fn put(at: u64, bytes: &[u8]) -> Verdict {
    for (index, chunk) in bytes.chunks(8).enumerate() {
        let address = at + 8 * index as u64;
        let mut word = memory::read(address)?.to_le_bytes();
        word[..chunk.len()].copy_from_slice(chunk);
        memory::write(address, u64::from_le_bytes(word))?;
    }
    Ok(())
}

impl Block {
    fn new() -> Result<Self, Finding> {
        let base = memory::fresh_region().get();
        for page in (base..base + place::NOT_VALID).step_by(PAGE_SIZE as usize) {
            give_page(page)?;
        }
        give_page(REAL_HANDLERS)?;
        let vmsa = valid_page()?;
        let block = Self { base, vmsa };
        block.write_segments()?;
        block.write_page_tables()?;
        // A new VMSA page has to be marked before the host may be told of it.
        block.write_vmsa(&Vmsa::at_reset(0))?;
        expect_rmpadjust(vmsa.get(), SIZE_4K, attributes(1, 0, true), 0)?;
        let info = ApCreation {
            request: ApRequest::CREATE_ON_INIT,
            vmpl: Vmpl::VMPL1,
            apic_id: 0,
        };
        let reply = ghcb_page().call(
            ExitCode::AP_CREATION,
            [info.encode(), vmsa.get()],
            &[(Field::RAX, SevFeatures::SNP_ACTIVE.0)],
        );
        expect("reply to AP creation", reply, guest::ghcb::Reply::DONE)?;
        Ok(block)
    }

    /// The address of a place.
    pub const fn at(&self, place: u64) -> u64 {
        self.base + place
    }

    fn write_segments(&self) -> Verdict {
        // 16-bit code has its base at the block.
        let base = self.base;
        let code_16 = 0x0000_9B00_0000_FFFF | (base & 0xFF_FFFF) << 16 | (base >> 24) << 56;
        let descriptors = [
            0,
            0x00CF_9B00_0000_FFFF,
            0x00CF_9300_0000_FFFF,
            0x00AF_9B00_0000_FFFF,
            code_16,
            0x00CF_FB00_0000_FFFF,
            0x00CF_F300_0000_FFFF,
        ];
        for (index, descriptor) in descriptors.into_iter().enumerate() {
            memory::write(self.at(place::GDT) + 8 * index as u64, descriptor)?;
        }
        Ok(())
    }

    fn write_page_tables(&self) -> Verdict {
        /// Present, writable, user, accessed, dirty.
        const LEAF: u64 = 0x67;
        const LARGE: u64 = 1 << 7;
        const TABLE: u64 = 0x27;
        let c_bit = 1 << start::launch().c_bit;
        for n in 0..512 {
            let pair = |index: u64| index << 22 | LEAF | LARGE;
            memory::write(
                self.at(place::LEGACY_ROOT) + 8 * n,
                pair(2 * n) | pair(2 * n + 1) << 32,
            )?;
            memory::write(
                self.at(place::LONG_ROOT) + PAGE_SIZE + 8 * n,
                n << 30 | c_bit | LEAF | LARGE,
            )?;
        }
        for n in 0..4 * 512 {
            let directory = self.at(place::PAE_ROOT) + PAGE_SIZE;
            memory::write(directory + 8 * n, n << 21 | LEAF | LARGE)?;
        }
        for n in 0..4 {
            let directory = self.at(place::PAE_ROOT) + PAGE_SIZE * (n + 1);
            memory::write(self.at(place::PAE_ROOT) + 8 * n, directory | 1)?;
        }
        let root = self.at(place::LONG_ROOT);
        memory::write(root, (root + PAGE_SIZE) | c_bit | TABLE)?;
        memory::write(root + 8, self.at(place::LOST_TABLE) | c_bit | TABLE)
    }

    /// Handlers and gates for a mode. `ist` is for vector 29, `other_ist` for all others;
    /// they count in long mode only.
    pub fn write_gates(&self, mode: Mode, ist: u64, other_ist: u64) -> Verdict {
        let narrow = matches!(mode, Mode::Real | Mode::Protected16);
        let handlers = if mode == Mode::Real {
            REAL_HANDLERS
        } else {
            self.base
        };
        for vector in 0..VECTORS {
            let handler = handlers + vector * HANDLER_SIZE;
            if narrow {
                put(handler, &CALL_16)?;
            } else {
                put(handler, &CALL)?;
                put(handler + CALL.len() as u64, &RETURN)?;
            }
            let split = |kind: u64, selector: u16, offset: u64| {
                offset & 0xFFFF | u64::from(selector) << 16 | kind << 40 | (offset >> 16) << 48
            };
            let idt = self.at(place::IDT);
            match mode {
                Mode::Real => {
                    let pointer = (REAL_HANDLERS << 12) + vector * HANDLER_SIZE;
                    put(idt + 4 * vector, &(pointer as u32).to_le_bytes())?;
                }
                Mode::Protected16 => {
                    let gate = split(0x86, selector::CODE_16, vector * HANDLER_SIZE);
                    memory::write(idt + 8 * vector, gate)?;
                }
                Mode::Protected32 | Mode::Paged | Mode::Pae => {
                    let gate = split(0x8E, selector::CODE_32, handler);
                    memory::write(idt + 8 * vector, gate)?;
                }
                Mode::Compatibility | Mode::Long => {
                    let gate = split(0x8E, selector::CODE_64, handler);
                    let vc = vector == u64::from(guest::trap::VMM_COMMUNICATION);
                    let ist = if vc { ist } else { other_ist };
                    memory::write(idt + 16 * vector, gate | ist << 32)?;
                    memory::write(idt + 16 * vector + 8, handler >> 32)?;
                }
            }
        }
        let tss = self.at(place::TSS);
        if matches!(mode, Mode::Compatibility | Mode::Long) {
            put(tss + 4, &self.at(place::INNER_TOP).to_le_bytes())?;
            put(tss + 0x24, &self.at(place::IST1_TOP).to_le_bytes())?;
            put(tss + 0x2C, &self.at(place::IST2_TOP).to_le_bytes())
        } else {
            let pair = self.at(place::INNER_TOP) | u64::from(selector::DATA_32) << 32;
            put(tss + 4, &pair.to_le_bytes())
        }
    }

    /// The state in which a program at [`place::CODE`] starts in a mode. Handlers and tables are
    /// those of [`Self::write_gates`].
    pub fn state(&self, mode: Mode, cpl: u8) -> Vmsa {
        let user = cpl == 3;
        let mut vmsa = Vmsa::at_reset(0);
        vmsa.vmpl = 1;
        vmsa.sev_features = SevFeatures::SNP_ACTIVE;
        vmsa.cpl = cpl;
        // IOPL 3: ports are everybody's.
        vmsa.rflags = 0x3002;
        vmsa.idtr = Segment {
            base: self.at(place::IDT),
            limit: 0xFFF,
            ..Segment::default()
        };
        vmsa.gdtr = Segment {
            base: self.at(place::GDT),
            limit: 0x37,
            ..Segment::default()
        };
        vmsa.tr = Segment {
            base: self.at(place::TSS),
            limit: 0x67,
            attributes: SegmentAttributes::TSS_BUSY,
            selector: 0,
        };
        let narrow = matches!(mode, Mode::Real | Mode::Protected16);
        let level = u16::from(cpl) << 5;
        let segment = |selector: u16, attributes: u16, base, limit| Segment {
            selector,
            attributes: SegmentAttributes(attributes),
            limit,
            base,
        };
        if narrow {
            vmsa.cs = segment(selector::CODE_16, 0x9B, self.base, 0xFFFF);
            let data = segment(selector::DATA_32, 0x93, self.at(place::STACK), 0xFFFF);
            vmsa.ss = data;
            vmsa.ds = segment(selector::DATA_32, 0x93, self.base, u32::MAX);
            vmsa.es = vmsa.ds;
            vmsa.rip = place::CODE;
            vmsa.rsp = place::STACK_TOP - place::STACK;
        } else {
            let (code, data) = if user {
                (selector::USER_CODE, selector::USER_DATA)
            } else {
                (selector::CODE_32, selector::DATA_32)
            };
            let code_attributes = if mode == Mode::Long { 0xA9B } else { 0xC9B };
            vmsa.cs = segment(code, code_attributes | level, 0, u32::MAX);
            vmsa.ss = segment(data, 0xC93 | level, 0, u32::MAX);
            vmsa.ds = vmsa.ss;
            vmsa.es = vmsa.ss;
            vmsa.rip = self.at(place::CODE);
            vmsa.rsp = self.at(place::STACK_TOP);
        }
        // Extension type, numeric errors, write protection; then protection and paging.
        const BASE: u64 = 0x0001_0030;
        const PROTECTION: u64 = 1;
        const PAGING: u64 = 1 << 31;
        const PSE: u64 = 1 << 4;
        const PAE: u64 = 1 << 5;
        (vmsa.cr0, vmsa.cr3, vmsa.cr4) = match mode {
            Mode::Real => (BASE, 0, 0),
            Mode::Protected16 | Mode::Protected32 => (BASE | PROTECTION, 0, 0),
            Mode::Paged => (BASE | PROTECTION | PAGING, self.at(place::LEGACY_ROOT), PSE),
            Mode::Pae => (BASE | PROTECTION | PAGING, self.at(place::PAE_ROOT), PAE),
            Mode::Compatibility | Mode::Long => {
                vmsa.efer = Efer::SVME | Efer::LME | Efer::LMA;
                let c_bit = 1 << start::launch().c_bit;
                (
                    BASE | PROTECTION | PAGING,
                    self.at(place::LONG_ROOT) | c_bit,
                    PAE,
                )
            }
        };
        vmsa
    }

    /// Gives one gate of long mode another stack.
    pub fn set_ist(&self, vector: u64, ist: u64) -> Verdict {
        let at = self.at(place::IDT) + 16 * vector;
        let gate = memory::read(at)?;
        memory::write(at, gate & !(7 << 32) | ist << 32)
    }

    /// Puts a program at [`place::CODE`].
    pub fn write_code(&self, code: &[u8]) -> Verdict {
        put(self.at(place::CODE), code)
    }

    fn write_vmsa(&self, vmsa: &Vmsa) -> Verdict {
        put(self.vmsa.get(), vmsa.as_bytes())
    }

    /// Runs `code` in `vmsa`'s state until a handler asks for VMPL0.
    pub fn run(&self, vmsa: &Vmsa, code: &[u8]) -> Result<Stop, Finding> {
        self.write_code(code)?;
        self.write_vmsa(vmsa)?;
        self.go_on()
    }

    /// Lets the handler that asked for VMPL0 return, and runs until the next one asks.
    pub fn go_on(&self) -> Result<Stop, Finding> {
        expect(
            "reply to run VMPL1",
            ghcb::run_vmpl(1),
            Response::RunVmpl { error: 0 },
        )?;
        let mut vmsa = Vmsa::at_reset(0);
        for (index, word) in vmsa.as_mut_bytes().chunks_exact_mut(8).enumerate() {
            let value = memory::read(self.vmsa.get() + 8 * index as u64)?;
            word.copy_from_slice(&value.to_le_bytes());
        }
        let start = if vmsa.cs.base == 0 { self.base } else { 0 };
        let vector = vmsa.rip.wrapping_sub(start) / HANDLER_SIZE;
        if vector >= VECTORS {
            return Err(Finding::new(format_args!(
                "VMPL1 stopped at {:#x}, in no handler",
                vmsa.rip
            )));
        }
        Ok(Stop { vector, vmsa })
    }
}

impl Stop {
    /// Words of `width` bytes on the handler's stack, lowest first.
    pub fn frame<const N: usize>(&self, width: u64) -> Result<[u64; N], Finding> {
        let mut words = [0; N];
        let bottom = self.vmsa.ss.base + self.vmsa.rsp;
        for (index, word) in words.iter_mut().enumerate() {
            let raw = memory::read(bottom + width * index as u64)?;
            *word = raw & (u64::MAX >> (64 - 8 * width));
        }
        Ok(words)
    }
}
