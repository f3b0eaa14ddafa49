//! The oracle: questions a test guest may ask the emulated machine.
//!
//! Only answered when the machine's settings say `oracle=on`; without that the instruction
//! raises #UD as on a platform without hypercalls. The instruction is a plain VMMCALL
//! (0F 01 D9, no prefix) with RAX = [`CALL_BASE`] + call; arguments and results are named at
//! each constant of [`Call`]. No real platform has this: it exists so that a test can prove
//! that a refused request changed nothing.

use bitflags::bitflags;

/// RAX of call number 0.
pub const CALL_BASE: u64 = 0x5453_0000;

open_enum! {
    /// Number of a call; RAX = [`CALL_BASE`] + number.
    pub struct Call(u64) {
        /// RCX = GPA. RAX = [`PageFlags`], RDX = permission masks, byte n for VMPL n.
        PAGE = 1,
        /// RCX = [`Counter`]. RAX = its value.
        COUNTER = 2,
        /// Runs the referee. RAX = number of disagreements.
        REFEREE = 3,
        /// RCX = GPA, RDX = [`HostAct`]. RAX = 0 done, 1 not possible.
        HOST_ACT = 4,
        /// RCX = [`HostAct`]. RAX = 1 if this host is one that does it, 0 if not.
        HOST_WOULD = 5,
        /// RAX = [`Table`].
        TABLE = 6,
    }
}

open_enum! {
    /// Which of its tables of cases a test guest goes through, where it cannot see for itself what it is
    /// run for (settings key `table`).
    pub struct Table(u64) {
        /// That for any image.
        ANY = 0,
        /// That for memory which is accepted before the guest starts.
        EAGER = 1,
        /// That for memory which is accepted in the background.
        AHEAD = 2,
        /// That for memory which is accepted on touch.
        TOUCH = 3,
    }
}

impl Call {
    /// The value of RAX that makes this call.
    #[must_use]
    pub const fn rax(self) -> u64 {
        CALL_BASE + self.0
    }

    /// Which call a value of RAX makes; known calls only.
    #[must_use]
    pub const fn from_rax(rax: u64) -> Option<Self> {
        match rax.checked_sub(CALL_BASE) {
            Some(number) if Self(number).is_known() => Some(Self(number)),
            _ => None,
        }
    }
}

bitflags! {
    /// What the machine knows about a page (answer of [`Call::PAGE`]).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct PageFlags: u64 {
        /// Assigned to the guest in the RMP.
        const ASSIGNED = 1 << 0;
        /// Validated.
        const VALIDATED = 1 << 1;
        /// The RMP entry covers 2 MiB.
        const SIZE_2M = 1 << 2;
        /// Marked as a VMSA.
        const VMSA = 1 << 3;
        /// Immutable.
        const IMMUTABLE = 1 << 4;
        /// The host's memory attribute says private.
        const HOST_PRIVATE = 1 << 5;
    }
}

open_enum! {
    /// A counter of the machine; instructions are those executed at VMPL0.
    pub struct Counter(u64) {
        /// PVALIDATE of 4 KiB with the validate bit.
        PVALIDATE_4K_VALIDATE = 0,
        /// PVALIDATE of 2 MiB with the validate bit.
        PVALIDATE_2M_VALIDATE = 1,
        /// PVALIDATE of 4 KiB without the validate bit.
        PVALIDATE_4K_RESCIND = 2,
        /// PVALIDATE of 2 MiB without the validate bit.
        PVALIDATE_2M_RESCIND = 3,
        /// RMPADJUST of any size.
        RMPADJUST = 4,
        /// Changes between VMPLs on any virtual processor.
        WORLD_SWITCHES = 5,
        /// Validations of a page that was already validated.
        DOUBLE_VALIDATION = 6,
        /// Grants of a page that still held the scramble pattern.
        UNSCRUBBED_GRANT = 7,
        /// Rescinds of a page a lower VMPL still had permissions on.
        LIVE_RESCIND = 8,
        /// Conversions the host made because an access used the wrong alias.
        IMPLICIT_CONVERSION = 9,
        /// Rights relied on being gone that another virtual processor could still use.
        STALE_TRANSLATION = 10,
        /// Rescinds of a VMSA that runs.
        IN_USE_RESCIND = 11,
        /// Instructions executed, if they are counted; else 0.
        INSTRUCTIONS = 12,
        /// The same at VMPL1.
        INSTRUCTIONS_OF_GUEST = 13,
        /// TDG.MEM.PAGE.ACCEPT of 4 KiB by L1, any result.
        ACCEPT_4K = 14,
        /// TDG.MEM.PAGE.ACCEPT of 2 MiB by L1, any result.
        ACCEPT_2M = 15,
        /// Requests to start a level below VMPL0 that came while VMPL0 ran on that processor.
        AWAITED_STARTS = 20,
        /// Keys (VMPCK0 to 3) that are still where the launch put them: in its secrets page.
        KEYS_IN_LAUNCH_PAGE = 19,
        /// Exits of a trust domain to its host that the module made in the midst of an instruction
        /// of L1's.
        TD_EXIT = 16,
        /// TDCALLs of L1, VP.ENTER and requests to the host among them.
        TDCALL = 17,
        /// TDG.MEM.PAGE.ATTR.WR by L1.
        ATTR_WR = 18,
    }
}

open_enum! {
    /// Something the host does on request (argument of [`Call::HOST_ACT`]).
    pub struct HostAct(u64) {
        /// Backs the 2 MiB around the address by one large folio; needs it unassigned.
        BACK_BY_2M = 0,
        /// Takes the page away: unassigned in the RMP, still private to the host.
        TAKE_AWAY = 1,
        /// Converts the page to shared.
        CONVERT_TO_SHARED = 2,
        /// Puts another page at the address: the first time one that was just assigned, from then
        /// on the one that was there before. Only with `hostile=remap`.
        EXCHANGE = 3,
        /// Removes the page from the RMP and adds it again. Only with `hostile=re-add`.
        RE_ADD = 4,
        /// The same with the 2 MiB around the address. Only with `hostile=re-add`.
        RE_ADD_2M = 5,
        /// Blocks the page's entry in the secure EPT of a trust domain.
        BLOCK = 6,
        /// The next guest request gets the answer to an earlier one; the address counts for nothing, here and
        /// below. Only with `hostile=messages-replayed`.
        REPLAY_ANSWER = 7,
        /// The next guest request gets its answer with a bit changed. Only with `hostile=messages-tampered`.
        TAMPER_ANSWER = 8,
        /// The next guest request is answered, and the answer does not come back. Only with
        /// `hostile=messages-lost`.
        LOSE_ANSWER = 9,
        /// The next guest request does not get to the firmware. This and the rest with each of the three.
        DROP_MESSAGE = 10,
        /// The next guest request is put off.
        SAY_BUSY = 11,
        /// The next extended guest request meets a host that wants more room than there is.
        TOO_MANY_CERTIFICATES = 12,
        /// The next guest request is said to have failed in the firmware, which was not asked.
        SAY_FAILED = 13,
        /// Keeps the page's entry in the secure EPT of a trust domain busy; asked again, lets go of it.
        HOLD = 14,
    }
}

/// RAX of [`Call::HOST_ACT`] when it was done.
pub const HOST_ACT_DONE: u64 = 0;
/// RAX of [`Call::HOST_ACT`] when the page's state does not allow it.
pub const HOST_ACT_NOT_POSSIBLE: u64 = 1;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_and_registers_match() {
        assert_eq!(Call::PAGE.rax(), 0x5453_0001);
        assert_eq!(Call::from_rax(0x5453_0004), Some(Call::HOST_ACT));
        assert_eq!(Call::from_rax(0x5453_0000), None);
        assert_eq!(Call::from_rax(0x5453_0007), None);
        assert_eq!(Call::from_rax(3), None);
    }
}
