//! Links the bare-metal paravisor with its own memory layout (`svsm.ld`).

use std::env;

fn main() {
    println!("cargo::rerun-if-changed=svsm.ld");
    let bare = env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os == "none");
    if bare {
        let root = env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
        println!("cargo::rustc-link-arg-bins=-T{root}/svsm.ld");
        println!("cargo::rustc-link-arg-bins=--no-dynamic-linker");
        println!("cargo::rustc-link-arg-bins=-no-pie");
        println!("cargo::rustc-link-arg-bins=-zseparate-code");
        println!("cargo::rustc-link-arg-bins=-znostart-stop-gc");
    }
}
