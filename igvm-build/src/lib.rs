//! Builds, inspects and measures the IGVM images of Turnstile.
#![forbid(unsafe_code)]

pub mod elf;
pub mod error;
pub mod flat;
