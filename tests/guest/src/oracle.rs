//! Questions to the machine (see [`protocols::oracle`]): what it knows about a page, how often
//! something happened, whether the paravisor's map agrees with the RMP.
//!
//! The answers come from the machine alone, so they can prove that a refused request changed
//! nothing.

use protocols::addr::Gpa;
use protocols::oracle::{Call, Counter, HOST_ACT_DONE, HostAct, PageFlags, Table};

use crate::harness::{Finding, Verdict, expect};
use crate::insn;

/// What the machine knows about a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page {
    /// State in the RMP and of the host.
    pub flags: PageFlags,
    /// Permission masks of VMPL0 to VMPL3.
    pub permissions: [u8; 4],
}

fn ask(call: Call, rcx: u64, rdx: u64) -> (u64, u64) {
    match insn::vmmcall(call.rax(), rcx, rdx) {
        Ok(answer) => answer,
        Err(trap) => panic!("the machine answers no oracle calls ({trap:x?}): is oracle=on set?"),
    }
}

/// The state of the page at `gpa`.
pub fn page(gpa: Gpa) -> Page {
    let (flags, permissions) = ask(Call::PAGE, gpa.get(), 0);
    Page {
        flags: PageFlags::from_bits_retain(flags),
        permissions: (permissions as u32).to_le_bytes(),
    }
}

/// The value of a counter.
pub fn counter(counter: Counter) -> u64 {
    ask(Call::COUNTER, counter.0, 0).0
}

/// On how many pages the paravisor's map and the RMP disagree.
pub fn disagreements() -> u64 {
    ask(Call::REFEREE, 0, 0).0
}

/// Makes the host do something to the page at `gpa`.
///
/// # Errors
///
/// A finding when the state of the page does not allow it.
pub fn host_act(gpa: Gpa, act: HostAct) -> Verdict {
    let answer = ask(Call::HOST_ACT, gpa.get(), act.0).0;
    if answer == HOST_ACT_DONE {
        Ok(())
    } else {
        Err(Finding::new(format_args!(
            "host act {act:?} at {:#x} was not possible",
            gpa.get()
        )))
    }
}

/// Whether the host of this run does such things at all.
pub fn host_would(act: HostAct) -> bool {
    ask(Call::HOST_WOULD, act.0, 0).0 == 1
}

/// Which table of cases is to be gone through.
pub fn table() -> Table {
    Table(ask(Call::TABLE, 0, 0).0)
}

/// Demands that the flags in `mask` of the page at `gpa` are exactly `want`.
///
/// # Errors
///
/// A finding when they are not.
pub fn expect_flags(gpa: Gpa, mask: PageFlags, want: PageFlags) -> Verdict {
    expect("RMP flags of the page", page(gpa).flags & mask, want)
}

/// Demands that the page at `gpa` is validated, or that it is not.
///
/// # Errors
///
/// A finding when it is otherwise.
pub fn expect_validated(gpa: Gpa, validated: bool) -> Verdict {
    expect(
        "validated",
        page(gpa).flags.contains(PageFlags::VALIDATED),
        validated,
    )
}

/// How often the paravisor (or the probe) executed PVALIDATE, of any size and direction.
pub fn pvalidates() -> u64 {
    [
        Counter::PVALIDATE_4K_VALIDATE,
        Counter::PVALIDATE_2M_VALIDATE,
        Counter::PVALIDATE_4K_RESCIND,
        Counter::PVALIDATE_2M_RESCIND,
    ]
    .into_iter()
    .map(counter)
    .sum()
}
