//! The TDX backend under the engine, in every interleaving of two vCPUs, by the model checker loom.
//!
//! The models are the engine's own (`accept/tests/interleavings`, where it is said what they explore);
//! the hardware below them is here: the module behind TDCALL, whose entries may be busy, and its host.
//! Built only with `--cfg loom`:
//!
//! ```text
//! RUSTFLAGS="--cfg loom" cargo test -p svsm --release --test interleavings
//! ```
#![cfg(loom)]

#[path = "../../../accept/tests/interleavings/ahead.rs"]
mod ahead;
mod busy;
#[path = "../../../accept/tests/interleavings/hardware.rs"]
mod hardware;
#[path = "../../../accept/tests/interleavings/lent.rs"]
mod lent;
#[path = "../../../accept/tests/interleavings/locks.rs"]
mod locks;
#[path = "../../../accept/tests/interleavings/memory.rs"]
mod memory;
mod sept;

use sept::Tdx as Hardware;
