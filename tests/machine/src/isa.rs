//! PVALIDATE, RMPADJUST and RMPQUERY: the tables of `snp-isa.md` §3–§5 in their order.
//!
//! An instruction goes through three hands. The CPU side catches the #UD, decodes the opcode
//! and calls [`Request::decode`] (rows 1–3, which look at registers only). Then it walks the
//! guest's page tables for [`Request::gva`] (row 4), and hands the GPA to
//! [`Platform::execute`] (the rest). What hardware reports to the host as a nested page fault
//! that the host can cure (page not assigned yet, 4 KiB request in a large entry) is cured
//! inside, as KVM does, and the instruction completes.

use alloc::format;
use alloc::string::String;

use protocols::snp::{self, RmpAdjust};

use crate::access::{Denial, owner_fault};
use crate::layout::Place;
use crate::memory::PhysicalMemory;
use crate::platform::{Cause, Platform, Views};
use crate::rmp::{Entry, Permissions};
use crate::stale::Finding;
use crate::types::{Alias, Gpa, Kind, PageSize, Vmpl};

/// Return codes in EAX (`snp-isa.md` §2).
pub mod status {
    use protocols::snp::ReturnCode;

    /// Done; for PVALIDATE look at CF.
    pub const SUCCESS: u32 = ReturnCode::SUCCESS.0;
    /// Misaligned operand or a reserved value.
    pub const FAIL_INPUT: u32 = ReturnCode::FAIL_INPUT.0;
    /// Not allowed at this VMPL.
    pub const FAIL_PERMISSION: u32 = ReturnCode::FAIL_PERMISSION.0;
    /// The page is a VMSA that runs.
    pub const FAIL_IN_USE: u32 = ReturnCode::FAIL_IN_USE.0;
    /// The RMP entry is smaller than the request.
    pub const FAIL_SIZE_MISMATCH: u32 = ReturnCode::FAIL_SIZE_MISMATCH.0;
}

/// Which instruction, with its decoded operands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Operation {
    /// PVALIDATE.
    Pvalidate {
        /// Page size asked for.
        size: PageSize,
        /// Validate, or rescind.
        validate: bool,
    },
    /// RMPADJUST.
    Rmpadjust(Adjustment),
    /// RMPQUERY.
    Rmpquery {
        /// Whose permissions.
        target: Vmpl,
    },
}

/// The operands of RMPADJUST.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Adjustment {
    /// Page size asked for.
    pub size: PageSize,
    /// Whose permissions.
    pub target: Vmpl,
    /// The new permissions.
    pub permissions: Permissions,
    /// The new VMSA bit; counts at VMPL0 only.
    pub vmsa: bool,
}

/// An instruction whose register operands are in order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Request {
    /// The page, as a guest-virtual address to be walked; low 12 bits are clear.
    pub gva: u64,
    /// What to do.
    pub operation: Operation,
}

/// Which of the three opcodes was met (`snp-isa.md` §1).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Opcode {
    /// F2 0F 01 FF.
    Pvalidate,
    /// F3 0F 01 FE.
    Rmpadjust,
    /// F3 0F 01 FD.
    Rmpquery,
}

/// The registers an instruction reads, and the mode it is executed in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Operands {
    /// RAX: guest-virtual address.
    pub rax: u64,
    /// RCX: page size in bit 0.
    pub rcx: u64,
    /// RDX: validate bit, or target and permissions.
    pub rdx: u64,
    /// Current privilege level.
    pub cpl: u8,
    /// 64-bit code segment in long mode.
    pub long_mode: bool,
}

/// What the instruction leaves in registers. `None` means unchanged.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Completion {
    /// EAX; OF, ZF, AF, PF and SF follow it, see [`Completion::flags`].
    pub eax: u32,
    /// CF; false where the documents leave it undefined.
    pub carry: bool,
    /// RCX, for RMPQUERY.
    pub rcx: Option<u64>,
    /// RDX, for RMPQUERY.
    pub rdx: Option<u64>,
}

/// The outcome of an instruction.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Instruction {
    /// It completed; step over it.
    Complete(Completion),
    /// #UD.
    UndefinedOpcode,
    /// #GP(0).
    GeneralProtection,
    /// #VC 0x404 with the GVA in CR2.
    NotValidated,
    /// A nested page fault that no host can resolve: the run ends.
    Refused(Denial),
}

/// rFLAGS bits (APM volume 1, 3.1.4).
mod flags {
    pub const CF: u64 = 1 << 0;
    pub const PF: u64 = 1 << 2;
    pub const AF: u64 = 1 << 4;
    pub const ZF: u64 = 1 << 6;
    pub const SF: u64 = 1 << 7;
    pub const OF: u64 = 1 << 11;
}

impl Completion {
    const fn code(eax: u32) -> Self {
        Self {
            eax,
            carry: false,
            rcx: None,
            rdx: None,
        }
    }

    /// `rflags` as the instruction leaves them: ZF, SF and PF from the code as a compare with
    /// zero would set them, OF and AF clear, CF as said.
    pub const fn flags(&self, rflags: u64) -> u64 {
        let cleared = flags::CF | flags::PF | flags::AF | flags::ZF | flags::SF | flags::OF;
        let mut value = rflags & !cleared;
        if self.carry {
            value |= flags::CF;
        }
        if self.eax == 0 {
            value |= flags::ZF;
        }
        if (self.eax as u8).count_ones().is_multiple_of(2) {
            value |= flags::PF;
        }
        if self.eax >> 31 != 0 {
            value |= flags::SF;
        }
        value
    }
}

impl Request {
    /// Rows 1 to 3 (RMPADJUST: to 4): mode, privilege, register operands. What fails here
    /// never looks at memory. `vmpl` is the level that executes.
    pub fn decode(opcode: Opcode, vmpl: Vmpl, operands: &Operands) -> Result<Self, Instruction> {
        if !operands.long_mode {
            return Err(Instruction::UndefinedOpcode);
        }
        let at_vmpl0 = vmpl == Vmpl::VMPL0;
        if operands.cpl != 0 || (opcode == Opcode::Pvalidate && !at_vmpl0) {
            return Err(Instruction::GeneralProtection);
        }
        let fail = |code| Err(Instruction::Complete(Completion::code(code)));
        let gva = operands.rax & !0xFFF;
        let size = if operands.rcx & 1 == 0 {
            PageSize::Size4K
        } else {
            PageSize::Size2M
        };
        let misaligned = gva & (size.bytes() - 1) != 0;
        let operation = match opcode {
            Opcode::Pvalidate if misaligned => return fail(status::FAIL_INPUT),
            // Bits above 0 of ECX and EDX are ignored: compilers leave garbage there.
            Opcode::Pvalidate => Operation::Pvalidate {
                size,
                validate: operands.rdx & 1 != 0,
            },
            Opcode::Rmpadjust => {
                let adjust = RmpAdjust(operands.rdx);
                let target = Vmpl::try_new(adjust.target().into());
                let permissions = Permissions::from_mask(adjust.permissions().bits());
                let vmsa = adjust.is_vmsa();
                let reserved = adjust.has_reserved_bits();
                let (Some(target), Some(permissions), false, false) =
                    (target, permissions, reserved, misaligned)
                else {
                    return fail(status::FAIL_INPUT);
                };
                // Stricter than known hardware: a large VMSA page has no use but the erratum.
                if vmsa && size == PageSize::Size2M {
                    return fail(status::FAIL_INPUT);
                }
                if !vmpl.is_more_privileged_than(target) {
                    return fail(status::FAIL_PERMISSION);
                }
                Operation::Rmpadjust(Adjustment {
                    size,
                    target,
                    permissions,
                    vmsa,
                })
            }
            Opcode::Rmpquery => {
                let Some(target) = Vmpl::try_new(operands.rdx & 0xFF) else {
                    return fail(status::FAIL_INPUT);
                };
                if target.is_more_privileged_than(vmpl) {
                    return fail(status::FAIL_PERMISSION);
                }
                Operation::Rmpquery { target }
            }
        };
        Ok(Self { gva, operation })
    }
}

impl<P: PhysicalMemory> Platform<P> {
    /// Counts an instruction that completed in [`Request::decode`].
    pub fn count_early(&mut self, opcode: Opcode, vmpl: Vmpl, operands: &Operands, eax: u32) {
        let size = if operands.rcx & 1 == 0 {
            PageSize::Size4K
        } else {
            PageSize::Size2M
        };
        match opcode {
            Opcode::Pvalidate => {
                self.count_pvalidate(vmpl, size, operands.rdx & 1 != 0, eax, false);
            }
            Opcode::Rmpadjust => self.count_rmpadjust(vmpl, size, eax),
            Opcode::Rmpquery => self.counters.vmpl(vmpl).rmpquery += 1,
        }
    }

    /// Executes a decoded instruction of `vmpl` on `gpa`, to which the guest's own tables map
    /// [`Request::gva`] in `alias`.
    pub fn execute(
        &mut self,
        vmpl: Vmpl,
        request: &Request,
        alias: Alias,
        gpa: Gpa,
    ) -> Instruction {
        let gpa = gpa.align_down(PageSize::Size4K);
        match request.operation {
            Operation::Pvalidate { size, validate } => {
                let result = self.pvalidate(vmpl, alias, gpa, size, validate);
                if let Instruction::Complete(done) = &result {
                    self.count_pvalidate(vmpl, size, validate, done.eax, done.carry);
                }
                result
            }
            Operation::Rmpadjust(adjustment) => {
                let result = self.rmpadjust(vmpl, alias, gpa, adjustment);
                if let Instruction::Complete(done) = &result {
                    self.count_rmpadjust(vmpl, adjustment.size, done.eax);
                }
                result
            }
            Operation::Rmpquery { target } => {
                self.counters.vmpl(vmpl).rmpquery += 1;
                self.rmpquery(vmpl, alias, gpa, target)
            }
        }
    }

    /// The nested walk and the ownership checks that all three instructions share. Cures what
    /// the host can cure; `Err` is final.
    fn owned_entry(
        &mut self,
        vmpl: Vmpl,
        alias: Alias,
        gpa: Gpa,
        size: Option<PageSize>,
    ) -> Result<(Place, Entry), Instruction> {
        let refused = |platform: &mut Self, denial: Denial, what: String| {
            platform.refuse(vmpl, Some(gpa), what);
            Err(Instruction::Refused(denial))
        };
        let Some(place) = self.host.layout().place(gpa) else {
            let denial = Denial::NotCovered;
            return refused(self, denial, format!("RMP instruction: {denial}"));
        };
        if alias == Alias::Shared {
            let what = String::from("RMP instruction on a page mapped with C=0");
            return refused(self, Denial::NotOwned, what);
        }
        if self.host.attribute(&place) == Alias::Shared {
            // Nothing shared is in use as a VMSA, so the host can do this.
            let _ = self.convert_implicitly(vmpl, &place, gpa, Alias::Private, Kind::Read);
        }
        if let Err(error) = self.host.prepare(&self.memory, &place, gpa) {
            return refused(
                self,
                Denial::NotOwned,
                format!("host cannot assign: {error:?}"),
            );
        }
        let entry = self.host.rmp().entry(&place);
        if let Some(denial) = owner_fault(&entry, gpa) {
            return refused(self, denial, format!("RMP instruction: {denial}"));
        }
        // A 4 KiB request in a large entry faults with SIZEM; the host splits and resumes.
        if size == Some(PageSize::Size4K) && self.host.psmash(&place, gpa) {
            return Ok((place, self.host.rmp().entry(&place)));
        }
        Ok((place, entry))
    }

    fn pvalidate(
        &mut self,
        vmpl: Vmpl,
        alias: Alias,
        gpa: Gpa,
        size: PageSize,
        validate: bool,
    ) -> Instruction {
        let (place, entry) = match self.owned_entry(vmpl, alias, gpa, Some(size)) {
            Ok(found) => found,
            Err(refused) => return refused,
        };
        if is_smaller(&entry, gpa, size) {
            return complete(status::FAIL_SIZE_MISMATCH);
        }
        let no_change = entry.is_validated() == validate;
        // What counts is what VMPL0 did, which alone can execute this: a host that removes the page
        // and adds it again makes a second validation succeed with CF=0.
        let before = self.host.note_validation(&place, size, validate);
        if validate && (before || no_change) {
            self.counters.violations.double_validation += 1;
            let carry = u8::from(no_change);
            let what = format!("PVALIDATE of what was validated before (CF={carry})");
            self.refuse(vmpl, Some(gpa), what);
        }
        if no_change {
            let done = Completion {
                carry: true,
                ..Completion::code(status::SUCCESS)
            };
            return Instruction::Complete(done);
        }
        if !validate && entry.has_lower_permissions() {
            self.counters.violations.live_rescind += 1;
            let what = String::from("rescind of a page that a lower VMPL may still use");
            self.refuse(vmpl, Some(gpa), what);
        }
        if !validate && self.is_vmsa_in_use(gpa, size) {
            self.counters.violations.in_use_rescind += 1;
            let what = String::from("rescind of a VMSA that runs");
            self.refuse(vmpl, Some(gpa), what);
        }
        self.host.rmp_mut().set_validated(&place, validate);
        if !validate {
            // Validating makes nothing stale: nobody had a mapping.
            let cause = Cause::Instruction(vmpl);
            self.host.invalidate(gpa, size, Views::ALL, cause);
        }
        if validate {
            self.stale.validated(gpa, size.bytes());
        }
        self.book_validated(size.bytes(), validate);
        complete(status::SUCCESS)
    }

    fn rmpadjust(
        &mut self,
        vmpl: Vmpl,
        alias: Alias,
        gpa: Gpa,
        adjustment: Adjustment,
    ) -> Instruction {
        let Adjustment {
            size,
            target,
            permissions,
            vmsa,
        } = adjustment;
        let (place, entry) = match self.owned_entry(vmpl, alias, gpa, Some(size)) {
            Ok(found) => found,
            Err(refused) => return refused,
        };
        if !entry.is_validated() {
            return Instruction::NotValidated;
        }
        if is_smaller(&entry, gpa, size) {
            return complete(status::FAIL_SIZE_MISMATCH);
        }
        if !entry.permissions(vmpl).contains(permissions) {
            return complete(status::FAIL_PERMISSION);
        }
        if self.is_vmsa_in_use(gpa, size) {
            return complete(status::FAIL_IN_USE);
        }
        if !permissions.is_none() {
            let left = self.host.find_scrambled(&self.memory, &place, gpa, size);
            if let Some(line) = left {
                self.counters.violations.unscrubbed_grant += 1;
                let what = format!("{target} is granted a page that was not scrubbed at {line:#x}");
                self.refuse(vmpl, Some(gpa), what);
            }
        }
        if vmsa
            && vmpl == Vmpl::VMPL0
            && let Some(found) = self.stale.find(gpa, size.bytes())
        {
            self.count_stale(found, "becomes a VMSA");
        }
        let had = entry.permissions(target);
        self.host
            .rmp_mut()
            .set_permissions(&place, target, permissions);
        if vmpl == Vmpl::VMPL0 {
            self.host.rmp_mut().set_vmsa(&place, vmsa);
        }
        if !permissions.contains(had) {
            let cause = Cause::Instruction(vmpl);
            self.host.invalidate(gpa, size, Views::of(target), cause);
        }
        if permissions == Permissions::FULL && !vmsa {
            self.stale.restored(target, gpa, size.bytes());
        }
        complete(status::SUCCESS)
    }

    /// Counts that VMPL0 relies on a right being gone that a CPU may still use.
    pub(crate) fn count_stale(&mut self, found: Finding, what: &str) {
        self.counters.violations.stale_translation += 1;
        let text = format!(
            "a page {what} while vCPU {} may still use it as it was",
            found.holder.0
        );
        self.refuse(Vmpl::VMPL0, Some(found.gpa), text);
    }

    fn rmpquery(&mut self, vmpl: Vmpl, alias: Alias, gpa: Gpa, target: Vmpl) -> Instruction {
        let (_, entry) = match self.owned_entry(vmpl, alias, gpa, None) {
            Ok(found) => found,
            Err(refused) => return refused,
        };
        if !entry.is_validated() {
            return Instruction::NotValidated;
        }
        let permissions = snp::Permissions::from_bits_retain(entry.permissions(target).mask());
        Instruction::Complete(Completion {
            rcx: Some(u64::from(entry.size().encoding())),
            rdx: Some(RmpAdjust::new(target, permissions, entry.is_vmsa()).0),
            ..Completion::code(status::SUCCESS)
        })
    }

    fn count_pvalidate(&mut self, vmpl: Vmpl, size: PageSize, validate: bool, eax: u32, cf: bool) {
        let counters = &mut self.counters.vmpl(vmpl).pvalidate;
        let results = match (size, validate) {
            (PageSize::Size4K, true) => &mut counters.validate_4k,
            (PageSize::Size2M, true) => &mut counters.validate_2m,
            (PageSize::Size4K, false) => &mut counters.rescind_4k,
            (PageSize::Size2M, false) => &mut counters.rescind_2m,
        };
        match eax {
            status::SUCCESS if cf => results.no_change += 1,
            status::SUCCESS => results.ok += 1,
            status::FAIL_SIZE_MISMATCH => results.size_mismatch += 1,
            _ => results.fail_input += 1,
        }
    }

    fn count_rmpadjust(&mut self, vmpl: Vmpl, size: PageSize, eax: u32) {
        let counters = &mut self.counters.vmpl(vmpl).rmpadjust;
        let results = match size {
            PageSize::Size4K => &mut counters.size_4k,
            PageSize::Size2M => &mut counters.size_2m,
        };
        match eax {
            status::SUCCESS => results.ok += 1,
            status::FAIL_PERMISSION => results.fail_permission += 1,
            status::FAIL_IN_USE => results.fail_in_use += 1,
            status::FAIL_SIZE_MISMATCH => results.size_mismatch += 1,
            _ => results.fail_input += 1,
        }
    }
}

/// A 2 MiB request meets a 4 KiB entry, or a 2 MiB GVA that the guest maps to an unaligned GPA.
fn is_smaller(entry: &Entry, gpa: Gpa, size: PageSize) -> bool {
    entry.size() < size || !gpa.is_aligned(size)
}

const fn complete(eax: u32) -> Instruction {
    Instruction::Complete(Completion::code(eax))
}

#[cfg(test)]
mod tests;
