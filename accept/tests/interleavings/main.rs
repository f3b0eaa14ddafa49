//! The engine's real code under every interleaving of two vCPUs, by the model checker loom.
//!
//! Built only with `--cfg loom` (`cargo xtask test` does so in its job `unit/interleavings`):
//!
//! ```text
//! RUSTFLAGS="--cfg loom" cargo test -p accept --release --test interleavings
//! ```
//!
//! The hardware below is that of SEV-SNP; the paravisor's crate runs the same models on its TDX backend
//! (`svsm/tests/interleavings`).
//!
//! Each model runs until loom has tried every order in which the threads' atomic operations and
//! instructions can happen, and every value that a load may return under the memory model. Preemptions
//! are not bounded, but in the model of two lists (`locks`, four). What is not explored: more than two threads, waiting for longer than
//! [`hardware::LOOKS`], and the counters, which decide nothing.
#![cfg(loom)]

mod ahead;
mod hardware;
mod lent;
mod locks;
mod memory;
mod rmp;

use rmp::Rmp as Hardware;
