//! Everything the tool does with an IGVM file, on whatever the fuzzer comes up with.
//!
//! What is tried is the same as in the test `hostile`. A checksum would keep the fuzzer out, so each input is
//! tried a second time with the right one.

#![no_main]

#[path = "../../tests/support/everything.rs"]
mod everything;

use igvm_build::file::edit::seal;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _ = everything::everything(bytes);
    let mut sealed = bytes.to_vec();
    if seal(&mut sealed).is_ok() {
        let _ = everything::everything_and_sign(&sealed);
    }
});
