//! Lists of small pages.
//!
//! A guest asks for small pages in lists of hundreds, most of them neighbours. To take the lock of
//! their region for each would cost a locked instruction a page, which waits until the fill of the
//! page before it has left the processor; and two vCPUs that work in one region would pull lock and
//! state words to and fro for each page.
//!
//! Invariants:
//! * At most one lock is held, as in every other flow, and for at most [`Accepting::LONGEST`] pages
//!   in a row, so that who waits for it waits a bounded time (I12).
//! * Each request is a flow of its own, with its own answer: tested under the lock, recorded before
//!   the next begins.
//! * A refusal or a failure ends the hold: what it owes is paid before the caller hears of it.

use crate::backend::Backend;
use crate::block::{Block, PageSize};
use crate::engine::{Done, Engine, Error, Held, OnNoChange};

/// Requests to accept, one after the other. The region of the last small page stays locked until
/// another region's turn comes, or until [`Accepting::release`] or the end of the list.
///
/// While a list is under way its vCPU uses the engine through the list only: any other call could
/// wait, in vain and then be told [`Error::Busy`], for the lock that the list holds.
pub struct Accepting<'e, 'm, B: Backend> {
    engine: &'e Engine<'m, B>,
    /// Owes nothing: a failure ends the hold. So to drop it is to release the lock, and no more.
    kept: Option<Kept<'m>>,
}

/// A lock that stays held between two requests.
struct Kept<'m> {
    held: Held<'m>,
    /// Requests that it may still serve, one at least.
    left: u32,
}

impl<'m, B: Backend> Engine<'m, B> {
    /// Starts a list of requests to accept.
    #[must_use]
    pub const fn accepting(&self) -> Accepting<'_, 'm, B> {
        Accepting {
            engine: self,
            kept: None,
        }
    }
}

impl<'e, 'm, B: Backend> Accepting<'e, 'm, B> {
    /// The most pages for which one lock stays held: an eighth of what a request for 2 MiB may cost
    /// where the platform holds it as small pages.
    pub const LONGEST: u32 = 64;

    /// As [`Engine::accept`].
    ///
    /// # Errors
    /// Those of [`Engine::accept`].
    pub fn accept(&mut self, block: Block, on_no_change: OnNoChange) -> Result<Done, Error> {
        if block.size() == PageSize::Size2M {
            return self.engine().accept(block, on_no_change);
        }
        let Kept { held, left } = match &mut self.kept {
            Some(kept) if kept.held.has(block) => kept,
            _ => {
                let engine = self.engine();
                let glance = engine.look(block)?;
                if let Some(answer) = glance.answer(on_no_change) {
                    return answer;
                }
                self.kept.insert(Kept {
                    held: engine.hold_seen(glance)?,
                    left: Self::LONGEST,
                })
            }
        };
        let result = match self.engine.accept_usual(held, block) {
            Some(result) => result,
            None => self.engine.accept_mixed(held, block, on_no_change),
        };
        *left -= 1;
        if (*left == 0 || result.is_err())
            && let Some(Kept { held, .. }) = self.kept.take()
        {
            self.engine.end(held);
        }
        result
    }

    /// Gives the lock up: before anything that could take a lock, or wait, by another way than this.
    pub fn release(&mut self) {
        self.kept = None;
    }

    /// The engine, for any other call: no lock is held.
    pub fn engine(&mut self) -> &'e Engine<'m, B> {
        self.release();
        self.engine
    }
}
