//! An L2 VM of a few pages: 64-bit code at privilege level 0, all memory mapped one to one, twice, as
//! L1 has it. Every gate of its IDT leads to a VMCALL of its own, so that L1 hears of each exception
//! and interrupt by an exit.

use guest::harness::{Finding, Verdict, expect};
use guest::memory::{self, page_of, private};
use guest::tdcall::{self, Registers, call, expect_accept, write_attributes};
use protocols::addr::{Gpa, PAGE_SIZE, PageSize};
use protocols::tdx::l2::{EnterState, Exit, Flush, enter_operand};
use protocols::tdx::metadata::{FieldId, L2Controls};
use protocols::tdx::ve::ExitReason;
use protocols::tdx::vmcall::register::{R8, R9, RAX, RBP, RBX, RCX, RDX, RSP};
use protocols::tdx::vmcs::{Field, SecondaryControls, msr_bitmaps};
use protocols::tdx::{L2Vm, Leaf, PageAttributes, Status};

/// HLT.
pub const HLT: &[u8] = &[0xF4];
/// MOV RAX, [RBX]; HLT.
pub const LOAD: &[u8] = &[0x48, 0x8B, 0x03, 0xF4];
/// MOV [RBX], RAX; HLT.
pub const STORE: &[u8] = &[0x48, 0x89, 0x03, 0xF4];
/// CALL RBX; HLT.
pub const CALL: &[u8] = &[0xFF, 0xD3, 0xF4];
/// RDMSR; HLT.
pub const RDMSR: &[u8] = &[0x0F, 0x32, 0xF4];
/// WRMSR; HLT.
pub const WRMSR: &[u8] = &[0x0F, 0x30, 0xF4];
/// TDCALL; HLT.
pub const TDCALL: &[u8] = &[0x66, 0x0F, 0x01, 0xCC, 0xF4];
/// STI; NOP; NOP; HLT.
pub const STI: &[u8] = &[0xFB, 0x90, 0x90, 0xF4];
/// A jump to itself.
pub const SPIN: &[u8] = &[0xEB, 0xFE];

const ALL: PageAttributes = PageAttributes::ALL_ACCESS.union(PageAttributes::VALID);

/// Where things are: pages from the VM's first.
mod place {
    pub const PML4: u64 = 0;
    pub const PRIVATE: u64 = 1;
    pub const SHARED: u64 = 2;
    pub const CODE: u64 = 3;
    pub const STACK: u64 = 4;
    pub const IDT: u64 = 5;
    pub const GDT: u64 = 6;
    /// Behind these, L1's.
    pub const GIVEN: u64 = 7;
    pub const VIRTUAL_APIC: u64 = 8;
    pub const STATE: u64 = 9;
}

/// Offset in the page of code of the first gate's VMCALL; the others follow by [`STUB`] bytes.
const STUBS: u64 = 0x800;
const STUB: u64 = 4;
/// Offset in the page of code of an IRETQ with a HLT behind it.
const IRETQ: u64 = 0xC00;

const CODE_SELECTOR: u64 = 0x08;

/// A VM that was made.
pub struct Vm {
    /// Which.
    pub vm: L2Vm,
    base: Gpa,
    /// What its registers are at the next entry, and were at the last exit.
    pub state: EnterState,
    /// What an entry drops.
    pub flush: Flush,
    /// RBP after the last exit.
    pub rbp: u64,
}

/// TDG.VP.WR of all bits: RAX, R8.
pub fn write_field(id: FieldId, value: u64) -> Result<(u64, u64), Finding> {
    write_field_masked(id, value, u64::MAX)
}

/// TDG.VP.WR: RAX, R8.
pub fn write_field_masked(id: FieldId, value: u64, mask: u64) -> Result<(u64, u64), Finding> {
    let operands = [(RCX, 0), (RDX, id.0), (R8, value), (R9, mask)];
    let after = call(Leaf::VP_WR, &operands)?;
    Ok((after[RAX], after[R8]))
}

/// TDG.VP.RD: RAX, R8.
pub fn read_field(id: FieldId) -> Result<(u64, u64), Finding> {
    let after = call(Leaf::VP_RD, &[(RCX, 0), (RDX, id.0)])?;
    Ok((after[RAX], after[R8]))
}

/// TDG.VP.ENTER with these operands; the registers afterwards.
pub fn enter(rcx: u64, rdx: u64) -> Result<Registers, Finding> {
    call(Leaf::VP_ENTER, &[(RCX, rcx), (RDX, rdx)])
}

/// Gives a page of 4 KiB that L1 has accepted to a VM.
pub fn give(vm: L2Vm, page: Gpa, attributes: PageAttributes) -> Verdict {
    let new = vm.field(attributes | PageAttributes::VALID);
    let mask = vm.field(PageAttributes::ALL_ACCESS);
    let (rax, ..) = write_attributes(page.get(), new, mask)?;
    expect("RAX of ATTR.WR", rax, 0)
}

/// Takes it away again; translations may stay.
pub fn withdraw(vm: L2Vm, page: Gpa) -> Verdict {
    give(vm, page, PageAttributes::empty())
}

impl Vm {
    /// Makes VM 1.
    pub fn new() -> Result<Self, Finding> {
        Self::with(L2Vm::Vm1)
    }

    /// Makes a VM whose code is `code`.
    pub fn of(code: &[u8]) -> Result<Self, Finding> {
        let mut vm = Self::new()?;
        vm.load(code)?;
        Ok(vm)
    }

    /// Makes a VM.
    pub fn with(vm: L2Vm) -> Result<Self, Finding> {
        // What earlier cases left behind would keep the VM from being entered.
        guest::insn::open_interrupts();
        let base = memory::fresh_region();
        for page in 0..=place::STATE {
            let page = page_of(base, page);
            expect_accept(page, PageSize::Size4K, 0)?;
        }
        for page in 0..place::GIVEN {
            give(vm, page_of(base, page), ALL)?;
        }
        let mut made = Self {
            vm,
            base,
            state: EnterState::default(),
            flush: Flush::Ept,
            rbp: 0,
        };
        made.build_tables()?;
        made.reset_fields()?;
        made.restart();
        Ok(made)
    }

    fn build_tables(&self) -> Verdict {
        const TABLE: u64 = 0x27;
        const LARGE: u64 = 0xE7;
        let at = |page: u64, offset: u64| private(page_of(self.base, page)) + offset;
        memory::write(at(place::PML4, 0), self.page(place::PRIVATE) | TABLE)?;
        memory::write(at(place::PML4, 8), self.page(place::SHARED) | TABLE)?;
        // The first four gigabytes.
        for gigabyte in 0..4_u64 {
            let entry = gigabyte << 30 | LARGE;
            memory::write(at(place::PRIVATE, gigabyte * 8), entry)?;
            memory::write(at(place::SHARED, gigabyte * 8), entry | 1 << 47)?;
        }
        memory::write(at(place::GDT, 8), 0x00AF_9B00_0000_FFFF)?;
        memory::write(at(place::GDT, 16), 0x00CF_9300_0000_FFFF)?;
        for vector in 0..256_u64 {
            let stub = self.stub(vector as u8);
            let low =
                (stub & 0xFFFF) | CODE_SELECTOR << 16 | 0x8E00 << 32 | (stub >> 16 & 0xFFFF) << 48;
            memory::write(at(place::IDT, vector * 16), low)?;
            memory::write(at(place::IDT, vector * 16 + 8), stub >> 32)?;
        }
        // Two stubs at a time: VMCALL; HLT.
        for pair in 0..128_u64 {
            let offset = STUBS + pair * 2 * STUB;
            memory::write(at(place::CODE, offset), 0xF4C1_010F_F4C1_010F)?;
        }
        memory::write(at(place::CODE, IRETQ), 0x00F4_CF48)
    }

    /// Sets a field of the VMCS; it must take the value.
    pub fn set(&self, field: Field, value: u64) -> Verdict {
        let (rax, _) = write_field(field.id(self.vm), value)?;
        if rax == 0 {
            Ok(())
        } else {
            Err(Finding::new(format_args!(
                "VP.WR of {field:x?} to {value:#x}: {rax:#x}"
            )))
        }
    }

    /// A field of the VMCS.
    pub fn get(&self, field: Field) -> Result<u64, Finding> {
        let (rax, value) = read_field(field.id(self.vm))?;
        expect("RAX of VP.RD", rax, 0)?;
        Ok(value)
    }

    fn reset_fields(&self) -> Verdict {
        for (number, rights) in [(0, 0xC093), (1, 0xA09B), (2, 0xC093), (3, 0xC093)] {
            self.segment(number, rights, u64::from(u32::MAX), 0)?;
        }
        for number in [4, 5] {
            self.segment(number, 0xC093, u64::from(u32::MAX), 0)?;
        }
        self.segment(6, 0x1_0000, 0, 0)?;
        self.segment(7, 0x8B, 0x67, 0)?;
        self.set(Field::CS_SELECTOR, CODE_SELECTOR)?;
        for (field, value) in [
            (Field::GDTR_LIMIT, 23),
            (Field::GDTR_BASE, self.page(place::GDT)),
            (Field::IDTR_LIMIT, 4095),
            (Field::IDTR_BASE, self.page(place::IDT)),
            (Field::CR0, 0x8000_0033),
            (Field::CR3, self.page(place::PML4)),
            (Field::CR4, 0x2620),
            (Field::EFER, 0xD01),
            (Field::ENTRY_CONTROLS, 0xC200),
            (Field::PAT, 0x0007_0406_0007_0406),
            (Field::DR7, 0x400),
            (Field::CR0_MASK, 0x20),
            (Field::CR0_SHADOW, 0x20),
            (Field::CR4_MASK, 0x2000),
            (Field::CR4_SHADOW, 0),
            (Field::EXCEPTION_BITMAP, 0),
            (Field::PAGE_FAULT_MASK, 0),
            (Field::PAGE_FAULT_MATCH, 0),
            (Field::ENTRY_INTERRUPTION, 0),
            (Field::TPR_THRESHOLD, 0),
            (Field::INTERRUPTIBILITY, 0),
            (Field::ACTIVITY, 0),
            (Field::EOI_EXIT_0, 0),
            (Field::VIRTUAL_APIC, self.page(place::VIRTUAL_APIC)),
        ] {
            self.set(field, value)?;
        }
        self.open_primary(0)?;
        self.open_secondary(SecondaryControls::empty())?;
        let (rax, _) = write_field(FieldId::l2_ctls(self.vm), 0)?;
        expect("RAX of VP.WR of L2_CTLS", rax, 0)?;
        for number in [
            0x10,
            0x802,
            0x808,
            0x80B,
            0x80F,
            0x83F,
            0xC000_0080,
            0xC000_0102,
        ] {
            self.exit_msr(number, true)?;
        }
        Ok(())
    }

    /// Sets a segment by its number in the VMCS.
    pub fn segment(&self, number: u32, rights: u64, limit: u64, base: u64) -> Verdict {
        let nth = |field: Field| Field(field.0 + 2 * number);
        self.set(nth(Field::ES_SELECTOR), if number < 4 { 16 } else { 0 })?;
        self.set(nth(Field::ES_RIGHTS), rights)?;
        self.set(nth(Field::ES_LIMIT), limit)?;
        self.set(nth(Field::ES_BASE), base)
    }

    /// Sets those of the primary controls that L1 decides about.
    pub fn open_primary(&self, bits: u32) -> Verdict {
        const OPEN: u64 = 1 << 2 | 1 << 11 | 1 << 12 | 1 << 23;
        let id = Field::PRIMARY_CONTROLS.id(self.vm);
        let (rax, _) = write_field_masked(id, bits.into(), OPEN)?;
        expect("RAX of VP.WR of the controls", rax, 0)
    }

    /// The same for the secondary ones.
    pub fn open_secondary(&self, bits: SecondaryControls) -> Verdict {
        const OPEN: u64 = 1 << 4 | 1 << 8 | 1 << 9;
        let id = Field::SECONDARY_CONTROLS.id(self.vm);
        let (rax, _) = write_field_masked(id, bits.bits().into(), OPEN)?;
        expect("RAX of VP.WR of the controls", rax, 0)
    }

    /// Says whether an MSR exits.
    pub fn exit_msr(&self, number: u32, exits: bool) -> Verdict {
        for write in [false, true] {
            let Some((word, bit)) = msr_bitmaps::place(number, write) else {
                return Err(Finding::new(format_args!("MSR {number:#x} has no bit")));
            };
            let id = msr_bitmaps::id(self.vm, word);
            let (rax, _) = write_field_masked(id, u64::from(exits) << bit, 1 << bit)?;
            expect("RAX of VP.WR of a bitmap", rax, 0)?;
        }
        Ok(())
    }

    /// Sets L2_CTLS.
    pub fn control(&self, controls: L2Controls) -> Verdict {
        let (rax, _) = write_field(FieldId::l2_ctls(self.vm), controls.bits())?;
        expect("RAX of VP.WR of L2_CTLS", rax, 0)
    }

    const fn page(&self, number: u64) -> u64 {
        self.base.get() + number * PAGE_SIZE
    }

    /// The page of code.
    pub const fn code(&self) -> u64 {
        self.page(place::CODE)
    }

    /// The pages of the stack and of the tables.
    pub const fn stack(&self) -> u64 {
        self.page(place::STACK) + PAGE_SIZE
    }

    /// A page of L1's that the VM does not have.
    pub const fn kept(&self) -> u64 {
        self.page(place::GIVEN)
    }

    /// The page tables' root.
    pub const fn root(&self) -> u64 {
        self.page(place::PML4)
    }

    /// The virtual-APIC page.
    pub const fn virtual_apic(&self) -> u64 {
        self.page(place::VIRTUAL_APIC)
    }

    /// The structure of TDG.VP.ENTER.
    pub const fn state_at(&self) -> u64 {
        self.page(place::STATE)
    }

    /// Where a gate's VMCALL is.
    pub const fn stub(&self, vector: u8) -> u64 {
        self.code() + STUBS + vector as u64 * STUB
    }

    /// Puts code where the VM begins.
    pub fn load(&mut self, code: &[u8]) -> Verdict {
        for (index, chunk) in code.chunks(8).enumerate() {
            let mut word = [0xF4; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            let at = self.code() + index as u64 * 8;
            memory::write(at, u64::from_le_bytes(word))?;
        }
        self.restart();
        Ok(())
    }

    /// Back to the beginning.
    pub fn restart(&mut self) {
        self.state.rip = self.code();
        self.state.rflags = 2;
        self.state.gprs[RSP] = self.stack() - 64;
        self.state.interrupt_status = 0;
    }

    /// Goes on at an IRETQ, at the end of a handler.
    pub const fn return_from_handler(&mut self) {
        self.state.rip = self.code() + IRETQ;
    }

    /// Enters the VM; what it stopped for.
    pub fn run(&mut self) -> Result<Exit, Finding> {
        match self.run_or_wait()? {
            Some(exit) => Ok(exit),
            None => Err(Finding::new(format_args!("an interrupt waits for L1"))),
        }
    }

    /// The same; `None` if it was not entered because an interrupt waits for L1.
    pub fn run_or_wait(&mut self) -> Result<Option<Exit>, Finding> {
        for (index, value) in self.words().into_iter().enumerate() {
            memory::write(self.state_at() + index as u64 * 8, value)?;
        }
        let mut after = tdcall::registers(&[
            (RAX, u64::from(Leaf::VP_ENTER.0)),
            (RCX, enter_operand(self.vm, self.flush)),
            (RDX, self.state_at()),
        ]);
        after = tdcall::tdcall(after)
            .map_err(|trap| Finding::new(format_args!("TDG.VP.ENTER: {trap:x?}")))?;
        let words = core::array::from_fn(|index| {
            memory::read(self.state_at() + index as u64 * 8).unwrap_or(0)
        });
        self.set_words(words);
        self.rbp = after[RBP];
        if after[RAX] == Status::PENDING_INTERRUPT.with(0) {
            return Ok(None);
        }
        if after[RBX] == tdcall::MARK {
            return Err(Finding::new(format_args!(
                "TDG.VP.ENTER did not enter: {:#x}",
                after[RAX]
            )));
        }
        let exit = Exit::load(&after);
        let resumed = (
            Status::L2_EXIT_HOST_ROUTED_ASYNC,
            ExitReason::EXTERNAL_INTERRUPT,
        );
        if (exit.status, exit.reason) == resumed {
            // A host may go on with L1 at any time, for nothing.
            return self.run_or_wait();
        }
        Ok(Some(exit))
    }

    fn words(&self) -> [u64; 20] {
        let mut words = [0; 20];
        words[..16].copy_from_slice(&self.state.gprs);
        words[16] = self.state.rflags;
        words[17] = self.state.rip;
        words[18] = self.state.ssp;
        words[19] = self.state.interrupt_status.into();
        words
    }

    fn set_words(&mut self, words: [u64; 20]) {
        self.state.gprs.copy_from_slice(&words[..16]);
        self.state.rflags = words[16];
        self.state.rip = words[17];
        self.state.ssp = words[18];
        self.state.interrupt_status = words[19] as u16;
    }

    /// Enters the VM, which must stop by itself for this reason.
    pub fn expect_exit(&mut self, reason: ExitReason) -> Result<Exit, Finding> {
        let exit = self.run()?;
        expect("why", (exit.status, exit.reason), (Status::SUCCESS, reason))?;
        Ok(exit)
    }

    /// Enters the VM, which must come to the HLT at this offset of its code.
    pub fn expect_halt(&mut self, offset: u64) -> Verdict {
        self.expect_exit(ExitReason::HLT)?;
        expect("RIP", self.state.rip - self.code(), offset)
    }

    /// Enters the VM, which must come to the handler of this vector.
    pub fn expect_handler(&mut self, vector: u8) -> Verdict {
        self.expect_exit(ExitReason::VMCALL)?;
        expect("RIP of the handler", self.state.rip, self.stub(vector))
    }

    /// Enters the VM, which must fault at this address: qualification and extended type.
    pub fn expect_violation(&mut self, gpa: u64, qualification: u64, extended: u64) -> Verdict {
        let exit = self.expect_exit(ExitReason::EPT_VIOLATION)?;
        expect("GPA, GLA", (exit.gpa, exit.gla), (gpa, gpa))?;
        expect(
            "qualification, extended",
            (exit.qualification, exit.extended),
            (qualification, extended),
        )
    }
}
