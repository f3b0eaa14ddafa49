//! Hands each bare-metal program its linker script. All run at fixed addresses; the host
//! build of this crate (unit tests of the library) needs none of it.

use std::env;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let bare_metal = env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os == "none");
    let directory = env::var("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR");
    for (program, script) in [
        ("isa_cases", "isa_cases"),
        ("svsm_cases", "svsm_cases"),
        ("svsm_counts", "svsm_cases"),
        ("svsm_evidence", "svsm_cases"),
        ("tdx_cases", "tdx_cases"),
        ("l2_cases", "l2_cases"),
        ("l2_counts", "l2_cases"),
    ] {
        let script = format!("{directory}/{script}.ld");
        println!("cargo::rerun-if-changed={script}");
        if bare_metal {
            println!("cargo::rustc-link-arg-bin={program}=-T{script}");
            // The target links position-independent programs unless told otherwise.
            println!("cargo::rustc-link-arg-bin={program}=--no-pie");
        }
    }
}
