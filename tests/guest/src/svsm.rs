//! The guest's side of the SVSM protocol (svsm.md §2), bare enough to make any call, also a
//! wrong one, and to see all that comes back.

#![expect(unsafe_code, reason = "calls with all registers under control")]

use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering};

use protocols::addr::Gpa;
use protocols::exit_code::ExitCode;
use protocols::ghcb::msr::{Request, Response};
use protocols::svsm::{CallId, CallingArea, CoreCall, PvalidateAction, PvalidateEntry, ResultCode};

use crate::ghcb;
use crate::harness::{Finding, Verdict, expect};
use crate::insn::vmgexit_with;
use crate::memory;

/// The calling area in use; set by the program, changed by a remap that succeeded.
static CALLING_AREA: AtomicU64 = AtomicU64::new(0);

/// The calling area in use.
pub fn calling_area() -> Gpa {
    Gpa::new(CALLING_AREA.load(Ordering::Relaxed))
}

/// Uses the calling area at `gpa` from now on.
pub fn use_calling_area(gpa: Gpa) {
    CALLING_AREA.store(gpa.get(), Ordering::Relaxed);
}

/// Where the guest's own bytes of the calling area begin.
pub fn buffer() -> Gpa {
    Gpa::new(calling_area().get() + CallingArea::BUFFER_OFFSET as u64)
}

/// Registers that carry arguments and results: RCX, RDX, R8, R9.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Registers {
    /// RCX.
    pub rcx: u64,
    /// RDX.
    pub rdx: u64,
    /// R8.
    pub r8: u64,
    /// R9.
    pub r9: u64,
}

impl Registers {
    /// Only RCX.
    #[must_use]
    pub const fn rcx(rcx: u64) -> Self {
        Self {
            rcx,
            rdx: 0,
            r8: 0,
            r9: 0,
        }
    }
}

/// What came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// RAX, all 64 bits.
    pub rax: u64,
    /// The other registers.
    pub registers: Registers,
    /// `call_pending` as the guest's exchange found it: 0 if the call was taken.
    pub pending: u8,
}

impl Answer {
    /// The result code.
    #[must_use]
    pub const fn result(&self) -> ResultCode {
        ResultCode::decode(self.rax)
    }
}

/// VMGEXIT with the registers of a call.
fn exit_with(rax: u64, registers: Registers) -> (u64, Registers) {
    let (mut rax, mut back) = (rax, registers);
    // SAFETY: the request is prepared; the paravisor changes RAX, RCX, RDX, R8 and R9 only,
    // which `registers_are_kept` of the cases checks.
    unsafe {
        vmgexit_with!(
            inout("rax") rax,
            inout("rcx") back.rcx,
            inout("rdx") back.rdx,
            inout("r8") back.r8,
            inout("r9") back.r9,
            options(nostack),
        );
    }
    (rax, back)
}

/// Atomically takes `call_pending` and leaves 0 (svsm.md §2 step 7).
fn take_pending() -> u8 {
    take_pending_of(calling_area())
}

fn take_pending_of(area: Gpa) -> u8 {
    let address = memory::private(area) + CallingArea::CALL_PENDING_OFFSET as u64;
    let mut value = 0_u8;
    // SAFETY: the calling area is the guest's memory and holds no Rust object.
    unsafe {
        asm!("xchg byte ptr [{address}], {value}", address = in(reg) address,
            value = inout(reg_byte) value, options(nostack));
    }
    value
}

fn set_pending(value: u8) {
    set_pending_of(calling_area(), value);
}

fn set_pending_of(area: Gpa, value: u8) {
    let address = memory::private(area) + CallingArea::CALL_PENDING_OFFSET as u64;
    // SAFETY: as in `take_pending`.
    unsafe { (address as *mut u8).write_volatile(value) };
}

/// A processor that calls through a calling area of its own, at the same time as others.
///
/// It uses nothing that processors share: neither the calling area in use nor the exceptions
/// that are kept as values.
#[derive(Clone, Copy, Debug)]
pub struct Caller(pub Gpa);

impl Caller {
    /// Makes a call, again and again while it is answered BUSY or INCOMPLETE.
    ///
    /// # Errors
    ///
    /// A finding when the call was not taken.
    pub fn call(self, call: CoreCall, registers: Registers) -> Result<ResultCode, Finding> {
        loop {
            match self.call_once(call, registers)? {
                ResultCode::BUSY | ResultCode::INCOMPLETE => {}
                code => return Ok(code),
            }
        }
    }

    /// Makes a call once.
    ///
    /// # Errors
    ///
    /// A finding when the call was not taken.
    pub fn call_once(self, call: CoreCall, registers: Registers) -> Result<ResultCode, Finding> {
        self.call_of(CallId::core(call), registers)
            .map(|(code, _)| code)
    }

    /// Makes a call of any protocol once.
    ///
    /// # Errors
    ///
    /// A finding when the call was not taken.
    pub fn call_of(
        self,
        id: CallId,
        registers: Registers,
    ) -> Result<(ResultCode, Registers), Finding> {
        set_pending_of(self.0, 1);
        ghcb::set_msr(Request::RunVmpl { vmpl: 0 }.encode());
        let (rax, registers) = exit_with(id.encode(), registers);
        expect("call_pending", take_pending_of(self.0), 0)?;
        Ok((ResultCode::decode(rax), registers))
    }

    /// PVALIDATE of a list in the calling area.
    ///
    /// # Errors
    ///
    /// A finding when the call was not taken.
    pub fn pvalidate(self, entries: &[PvalidateEntry]) -> Result<ResultCode, Finding> {
        let list = List::at(Gpa::new(self.0.get() + CallingArea::BUFFER_OFFSET as u64));
        list.put_entries(entries)?;
        list.put_head(entries.len() as u16, 0)?;
        self.call(CoreCall::PVALIDATE, Registers::rcx(list.0.get()))
    }
}

/// Makes a call with the given `call_pending`, through the GHCB MSR.
///
/// # Errors
///
/// A finding when the host did not run VMPL0.
pub fn call_with_pending(pending: u8, rax: u64, registers: Registers) -> Result<Answer, Finding> {
    set_pending(pending);
    ghcb::set_msr(Request::RunVmpl { vmpl: 0 }.encode());
    let (rax, registers) = exit_with(rax, registers);
    let reply = Response::decode(ghcb::msr());
    expect("reply to run VMPL0", reply, Response::RunVmpl { error: 0 })?;
    Ok(Answer {
        rax,
        registers,
        pending: take_pending(),
    })
}

/// Makes a call; `call_pending` must have been taken.
///
/// # Errors
///
/// A finding when the host did not run VMPL0 or the call was not taken.
pub fn call(id: CallId, registers: Registers) -> Result<Answer, Finding> {
    let answer = call_with_pending(1, id.encode(), registers)?;
    expect("call_pending after the call", answer.pending, 0)?;
    Ok(answer)
}

/// Makes a call through a GHCB page instead of the MSR.
///
/// # Errors
///
/// A finding when the host did not run VMPL0 or the call was not taken.
pub fn call_through_page(
    page: ghcb::Page,
    id: CallId,
    registers: Registers,
) -> Result<Answer, Finding> {
    set_pending(1);
    page.prepare_event(ExitCode::RUN_VMPL, [0, 0], &[]);
    ghcb::set_msr(page.gpa().get());
    let (rax, registers) = exit_with(id.encode(), registers);
    let answer = Answer {
        rax,
        registers,
        pending: take_pending(),
    };
    expect("reply to run VMPL0", page.reply(), ghcb::Reply::DONE)?;
    expect("call_pending after the call", answer.pending, 0)?;
    Ok(answer)
}

/// The registers a call must not change, in the order R10 to R15, RSI, RDI.
pub const KEPT: [u64; 8] = [0x10, 0x11, 0x12, 0x13, 0x14, 0x15, 0x51, 0xD1];

/// Makes a call with known values in the registers that are nobody's; returns what they hold
/// afterwards, in the order of [`KEPT`].
///
/// # Errors
///
/// A finding when the call was not taken.
pub fn kept_registers(id: CallId, rcx: u64) -> Result<[u64; 8], Finding> {
    set_pending(1);
    ghcb::set_msr(Request::RunVmpl { vmpl: 0 }.encode());
    let [
        mut r10,
        mut r11,
        mut r12,
        mut r13,
        mut r14,
        mut r15,
        mut rsi,
        mut rdi,
    ] = KEPT;
    // SAFETY: as in `exit_with`. RBX and RBP cannot be operands: if they changed, this
    // function's own frame would be lost.
    unsafe {
        vmgexit_with!(
            inout("rax") id.encode() => _,
            inout("rcx") rcx => _,
            out("rdx") _,
            out("r8") _,
            out("r9") _,
            inout("r10") r10,
            inout("r11") r11,
            inout("r12") r12,
            inout("r13") r13,
            inout("r14") r14,
            inout("r15") r15,
            inout("rsi") rsi,
            inout("rdi") rdi,
            options(nostack),
        );
    }
    expect("call_pending after the call", take_pending(), 0)?;
    Ok([r10, r11, r12, r13, r14, r15, rsi, rdi])
}

/// A PVALIDATE list in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct List(Gpa);

impl List {
    /// The list whose head is at `gpa`, which need not be a sensible address.
    #[must_use]
    pub const fn at(gpa: Gpa) -> Self {
        Self(gpa)
    }

    /// The list in the buffer of the calling area.
    #[must_use]
    pub fn in_calling_area() -> Self {
        Self(buffer())
    }

    /// Writes the head: a claimed number of entries and the index to start at.
    ///
    /// # Errors
    ///
    /// A finding when the memory cannot be written.
    pub fn put_head(self, entries: u16, next: u16) -> Verdict {
        memory::write(self.0.get(), u64::from(entries) | u64::from(next) << 16)
    }

    /// Writes the entries.
    ///
    /// # Errors
    ///
    /// A finding when the memory cannot be written.
    pub fn put_entries(self, entries: &[PvalidateEntry]) -> Verdict {
        for (index, entry) in entries.iter().enumerate() {
            memory::write(self.0.get() + 8 + index as u64 * 8, entry.0)?;
        }
        Ok(())
    }

    /// The head as it stands in memory: number of entries, next index.
    ///
    /// # Errors
    ///
    /// A finding when the memory cannot be read.
    pub fn head(self) -> Result<(u16, u16), Finding> {
        let head = memory::read(self.0.get())?;
        Ok((head as u16, (head >> 16) as u16))
    }

    /// Calls PVALIDATE once.
    ///
    /// # Errors
    ///
    /// A finding when the call was not taken.
    pub fn submit(self) -> Result<ResultCode, Finding> {
        let id = CallId::core(CoreCall::PVALIDATE);
        let answer = call(id, Registers::rcx(self.0.get()))?;
        expect("RCX after PVALIDATE", answer.registers.rcx, self.0.get())?;
        Ok(answer.result())
    }
}

/// What PVALIDATE said, and where `next` stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The result code.
    pub result: ResultCode,
    /// The index in the list's head.
    pub next: u16,
}

/// Puts `entries` into the calling area and calls PVALIDATE once, from index `next`.
///
/// # Errors
///
/// A finding when the call was not taken.
pub fn pvalidate_from(next: u16, entries: &[PvalidateEntry]) -> Result<Outcome, Finding> {
    let list = List::in_calling_area();
    list.put_entries(entries)?;
    list.put_head(entries.len() as u16, next)?;
    let result = list.submit()?;
    let (count, next) = list.head()?;
    expect(
        "number of entries in the head",
        usize::from(count),
        entries.len(),
    )?;
    Ok(Outcome { result, next })
}

/// Puts `entries` into the calling area and calls PVALIDATE until it is no longer INCOMPLETE.
///
/// # Errors
///
/// A finding when the call was not taken or an INCOMPLETE brought no progress. Only while a flush is owed that
/// other processors delay is there none, so where pages are given back it may take some calls.
pub fn pvalidate(entries: &[PvalidateEntry]) -> Result<Outcome, Finding> {
    let gives_back = |entry: &PvalidateEntry| {
        let request = entry.decode();
        request.is_ok_and(|request| request.action == PvalidateAction::Rescind)
    };
    let patience = if entries.iter().any(gives_back) {
        1000
    } else {
        0
    };
    let mut waited = 0;
    let mut outcome = pvalidate_from(0, entries)?;
    while outcome.result == ResultCode::INCOMPLETE {
        let before = outcome.next;
        let list = List::in_calling_area();
        outcome = Outcome {
            result: list.submit()?,
            next: list.head()?.1,
        };
        let stays = outcome.result == ResultCode::INCOMPLETE && outcome.next <= before;
        waited = if stays { waited + 1 } else { 0 };
        if waited > patience || outcome.next < before {
            return Err(Finding::new(format_args!(
                "INCOMPLETE without progress at {before}"
            )));
        }
    }
    Ok(outcome)
}
