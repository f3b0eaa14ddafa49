//! Where the stress program lies in a guest that has it, and how it is run.

/// The program (`tests/stress`), relative to the root of the initramfs.
pub const PROGRAM: &str = "turnstile/stress";
/// Its kernel module.
pub const MODULE: &str = "turnstile/convert.ko";

/// The shell command that does `cycles` cycles.
pub fn command(cycles: u64) -> String {
    format!("insmod /{MODULE} && /{PROGRAM} --cycles {cycles}")
}
