//! Gives the bare-metal binary its linker script; a host build needs none.

use std::env;

fn main() {
    println!("cargo::rerun-if-changed=machine.ld");
    if env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("none") {
        let dir = env::var("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR");
        println!("cargo::rustc-link-arg-bins=-T{dir}/machine.ld");
        // The image is linked for one address: it needs no relocation at run time.
        println!("cargo::rustc-link-arg-bins=--no-pie");
    }
}
