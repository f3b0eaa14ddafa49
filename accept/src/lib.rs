//! The acceptance engine: it owns the record of which guest page is accepted, and is the only
//! way to change it.
//!
//! A confidential VM must validate every private page exactly once. Validating a page that is
//! already valid opens the remap attack: the host swaps the page behind a guest address, has the
//! fresh one validated as well, and may from then on exchange the two unseen. The instruction's
//! own "already valid" flag does not protect, because a fresh page does not raise it. What
//! protects is a record, per guest page, that is consulted *before* the instruction. This crate
//! is that record and the flows around it.
//!
//! It knows no hardware: the instructions come through [`Backend`], memory for the map and the
//! locks comes from the caller. It has no dependency but `core` and no unsafe code, so the code
//! that ships is the code that runs under host tests.
//!
//! # Rooms
//!
//! | module | what it owns |
//! |---|---|
//! | [`block`](Block) | page frames, page sizes, aligned blocks: the units of a request |
//! | `pages` | the state of one 2 MiB region, two bits per page, and sets of its pages |
//! | `map` | the ranges of memory that have a state, and the look-up of an address |
//! | `lock` | the hashed region locks with a bounded wait |
//! | `backend` | what the platform must be able to do, and how it may fail |
//! | `sweep` | the one loop that tries 2 MiB and falls back to 4 KiB |
//! | `engine`, `accepting`, `rescinding`, `withdrawing`, `owned` | the flows |
//! | `list` | small pages of one region, one after the other, under one hold of its lock |
//! | `ahead`, `given_back` | acceptance before the guest asks, and what it must keep off |
//! | `view` | what others may see of the map: the EFI table's bits, totals |
//! | `counters` | what happened, for reports |
//!
//! # Invariants
//!
//! The numbers are those of the project's design document; tests carry them in their names.
//!
//! * **I1** A state changes only under the lock of its region, and says "valid" only after the
//!   instruction said so.
//! * **I2** A page is validated only when the map says [`PageState::Unaccepted`].
//! * **I3** Accepting is validate, scrub, grant, record. Rescinding is record as leaving, revoke,
//!   invalidate, record, and a flush of the whole guest before anybody relies on it. Where only
//!   the host makes pages invalid, they are nobody's until it has ([`Engine::withdraw`]).
//! * **I4** A request never touches an [`PageState::Owned`] page.
//! * **I5** "Already valid" on a page that the map calls Unaccepted means that the host lied: the
//!   page is not granted, and the event is counted ([`Error::HostLied`]).
//! * **I8** One call handles one block of at most 2 MiB. Between the calls of a list the lock may stay
//!   held, for [`Accepting::LONGEST`] pages at most.
//! * **I9** After an error the block is as it was before, or, where that is impossible, every page
//!   is recorded as what it really is.
//! * **I12** Waiting for a lock is bounded ([`Error::Busy`]), and no lock is held across a flush.
//!   A flush that takes too long has not happened: its debt is still owed ([`FlushOwed`]). That of
//!   a flow that failed is owed by whoever gives pages back under the same lock later, for even to
//!   pages that are out already he may be told "done".
//!
//! # Example
//!
//! ```
//! use accept::{
//!     Backend, Block, Engine, Fault, Frame, Map, OnNoChange, PageSize, Range, Region, RegionLock,
//!     RegionLocks, AdjustFault, NotFlushed, ValidateFault,
//! };
//!
//! /// A platform on which everything works.
//! struct Willing;
//! impl Backend for Willing {
//!     fn validate(&self, _: Block) -> Result<(), ValidateFault> { Ok(()) }
//!     fn rescind(&self, _: Block) -> Result<(), ValidateFault> { Ok(()) }
//!     fn scrub(&self, _: Block) -> Result<(), Fault> { Ok(()) }
//!     fn grant(&self, _: Block) -> Result<(), AdjustFault> { Ok(()) }
//!     fn revoke(&self, _: Block) -> Result<(), AdjustFault> { Ok(()) }
//!     fn flush(&self) -> Result<(), NotFlushed> { Ok(()) }
//! }
//!
//! let regions = [const { Region::new() }; 2]; // 4 MiB from address 0
//! let ranges = [Range::try_new(Frame::containing(0), 1024, &regions).unwrap()];
//! let locks = [const { RegionLock::new() }; RegionLocks::MINIMUM];
//! let engine = Engine::new(
//!     Willing,
//!     Map::try_new(&ranges).unwrap(),
//!     RegionLocks::try_new(&locks).unwrap(),
//! );
//!
//! let block = Block::try_new(Frame::containing(0x20_0000), PageSize::Size2M).unwrap();
//! let done = engine.accept(block, OnNoChange::Fail).unwrap();
//! assert_eq!(done.scrubbed_bytes(), 2 << 20);
//! assert!(engine.accept(block, OnNoChange::Fail).is_err(), "never twice");
//! ```

#![cfg_attr(not(any(test, loom)), no_std)]
#![forbid(unsafe_code)]

mod accepting;
mod ahead;
mod backend;
mod block;
mod counters;
mod engine;
mod given_back;
mod list;
mod lock;
mod map;
mod owned;
mod pages;
mod rescinding;
mod shape;
mod sweep;
mod sync;
mod view;
mod withdrawing;

pub use ahead::{Order, Step, Walk};
pub use backend::{AdjustFault, Backend, Broken, Fault, NotFlushed, Operation, Run, ValidateFault};
pub use block::{Block, Frame, Misaligned, PAGES_PER_REGION, PageSize};
pub use counters::Counters;
pub use engine::{Done, Engine, Error, FlushOwed, OnNoChange, Rescinded};
pub use given_back::GivenBack;
pub use list::Accepting;
pub use lock::{BadLockCount, RegionLock, RegionLocks};
pub use map::{BadMap, BadRange, Map, Range};
pub use owned::{NotReturned, Role, Taken};
pub use pages::{PageState, Region};
pub use view::{Census, Extent};
pub use withdrawing::Withdrawn;
