//! Access to the page that a call's arguments lie in.
//!
//! A guest may pass arguments in its own calling area or in any page of its own. An
//! [`ArgumentPage`] is the claim "this is such a page"; [`ArgumentPage::read_u64`] and
//! [`ArgumentPage::write_u16`] turn it into accesses.
//!
//! * The caller's calling area is Owned and stays so during the call.
//! * Any other page is touched only under the lock of its region and while it is Accepted. To look
//!   at its state first and to write later would hand the guest its paravisor: one processor
//!   passes a list in page P; once P is found good, another processor makes P a VMSA, which is
//!   inspected and found good as well; then the first call ends, and its result is written into
//!   the VMSA, at an offset that the guest chose.

use accept::{Backend, Engine, Frame};
use protocols::addr::Gpa;
use protocols::svsm::ResultCode;
use protocols::terminate::TurnstileReason;

use super::environment::{GuestMemory, Unreachable};
use super::{LOST, Stop, stop_for};

/// How often a result is tried to be written although another processor holds the lock. A call
/// whose progress cannot be reported would make the guest repeat what is done.
const WRITE_TRIES: u32 = 64;

/// A page that the guest passes arguments in.
pub(super) struct ArgumentPage<'a, B, M> {
    engine: &'a Engine<'a, B>,
    memory: &'a M,
    frame: Frame,
    /// The page is the caller's calling area.
    own_area: bool,
}

impl<'a, B: Backend, M: GuestMemory> ArgumentPage<'a, B, M> {
    /// The page around `gpa`, for a caller whose calling area is `area`. Nothing is checked yet.
    pub(super) fn around(
        engine: &'a Engine<'a, B>,
        memory: &'a M,
        area: Option<Frame>,
        gpa: Gpa,
    ) -> Self {
        let frame = Frame::containing(gpa.get());
        Self {
            engine,
            memory,
            frame,
            own_area: area == Some(frame),
        }
    }

    /// Whether an access takes a lock of the engine: its caller must hold none.
    pub(super) const fn takes_lock(&self) -> bool {
        !self.own_area
    }

    /// Reads the word at `offset` in the page, once.
    pub(super) fn read_u64(&self, offset: u64) -> Result<u64, Stop> {
        self.access(|| self.memory.read_u64(self.gpa(offset)))
    }

    /// Writes the half word at `offset` in the page.
    pub(super) fn write_u16(&self, offset: u64, value: u16) -> Result<(), Stop> {
        self.write(|| self.memory.write_u16(self.gpa(offset), value))
    }

    /// Reads what is at `offset` in the page, and does not leave it; each byte once.
    pub(super) fn read_bytes(&self, offset: u64, bytes: &mut [u8]) -> Result<(), Stop> {
        self.access(|| self.memory.read_bytes(self.gpa(offset), bytes))
    }

    /// Writes to `offset` in the page, and does not leave it.
    pub(super) fn write_bytes(&self, offset: u64, bytes: &[u8]) -> Result<(), Stop> {
        self.write(|| self.memory.write_bytes(self.gpa(offset), bytes))
    }

    /// Checks that the page is one that may be accessed, now.
    pub(super) fn check(&self) -> Result<(), Stop> {
        self.access(|| Ok(()))
    }

    fn write(&self, write: impl Fn() -> Result<(), Unreachable>) -> Result<(), Stop> {
        for _ in 1..WRITE_TRIES {
            match self.access(&write) {
                Err(Stop::Result(ResultCode::BUSY)) => {}
                ended => return ended,
            }
        }
        Err(ResultCode::INVALID_ADDRESS.into())
    }

    fn gpa(&self, offset: u64) -> Gpa {
        Gpa::new(self.frame.gpa() + offset)
    }

    fn access<T>(&self, access: impl FnOnce() -> Result<T, Unreachable>) -> Result<T, Stop> {
        if !self.takes_lock() {
            return access().map_err(|Unreachable| LOST);
        }
        self.engine
            .while_accepted(self.frame, access)
            // No lie can show up here: no instruction is executed.
            .map_err(|error| stop_for(error, TurnstileReason::NOT_VALIDATED))?
            // The map says that the page is the guest's, but it is gone: the guest can bring that
            // about itself (by touching it as shared memory), so it is the guest's error (I6).
            .map_err(|Unreachable| ResultCode::INVALID_ADDRESS.into())
    }
}
