//! What only TDX has: a module that answers BUSY while the host is at work nearby.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::hardware::{NEIGHBOURS, accept, explore_bounded, page, rescind};

/// The engine's lock is free while the host removes a page, so other pages of the region are asked
/// for meanwhile: the module is asked again until it answers, and nobody loses.
#[test]
fn i12_an_accept_meets_the_host_at_work_on_its_neighbour() {
    let met = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&met);
    explore_bounded(
        Some(3),
        NEIGHBOURS,
        |engine| accept(engine, page(0, 0)).expect("accepted"),
        |engine| rescind(engine, page(0, 0)),
        |engine| accept(engine, page(0, 1)),
        move |shared, rescinded, accepted| {
            assert_eq!((rescinded, accepted), (Ok(()), Ok(())));
            seen.fetch_or(shared.hardware.has_met_busy(), Ordering::Relaxed);
        },
    );
    assert!(met.load(Ordering::Relaxed), "they never met");
}
