//! The synchronisation primitives the crate is built on, in one place, so that a model checker's
//! own atomics can stand in for `core`'s without touching the code under test.

pub(crate) use core::hint::spin_loop;
pub(crate) use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
