//! For the guests that count: whether the machine counts right.

#![expect(unsafe_code, reason = "code of known length")]

use core::arch::asm;
use core::fmt::Write;

use protocols::oracle::Counter;

use crate::oracle;

/// Says how many instructions the machine counts for code of known length: a line `check nops`.
pub fn check_counter(out: &mut dyn Write) {
    const NOPS: u64 = 1000;
    let before = oracle::counter(Counter::INSTRUCTIONS_OF_GUEST);
    let between = oracle::counter(Counter::INSTRUCTIONS_OF_GUEST);
    // SAFETY: instructions without effect.
    unsafe { asm!(".rept {nops}", "nop", ".endr", nops = const NOPS, options(nomem, nostack)) };
    let after = oracle::counter(Counter::INSTRUCTIONS_OF_GUEST);
    let want = if after == before { 0 } else { NOPS };
    let got = (after - between).wrapping_sub(between - before);
    // The port cannot fail.
    let _ = writeln!(out, "check nops got={got} want={want}");
}
