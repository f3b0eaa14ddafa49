//! The start: first state, hand-off blocks, the second processor.

use core::sync::atomic::{AtomicU64, Ordering};

use guest::harness::{Case, Finding, Verdict, case, expect};
use guest::tdcall::call;
use protocols::tdx::Leaf;
use protocols::tdx::vmcall::register::{R8, R9, R11, RAX, RCX};

use crate::reset;

pub const CASES: &[Case] = &[
    case("first_state", "tdx.md §8", first_state),
    case("vp_info", "tdx.md §1 leaf 1", vp_info),
    case("second_processor", "tdx.md §8", second_processor),
];

/// What the second processor says it is, plus one.
static SECOND: AtomicU64 = AtomicU64::new(0);

pub fn second(index: u64) {
    SECOND.store(index + 1, Ordering::SeqCst);
}

fn first_state() -> Verdict {
    let found = reset::first();
    let [_, ecx, _, ebx, _, _, esi, _] = found.gprs;
    expect("EBX, ESI", [ebx, esi], [48, 0])?;
    // Nobody gives a value of his own; the list of hand-off blocks is where the metadata has it.
    expect("ECX", ecx, reset::HOB)?;
    let [cr0, cr4, efer] = found.control;
    // ET is always set in a processor, whatever the VMCS has.
    const ET: u32 = 1 << 4;
    expect(
        "CR0, CR4, EFER",
        [cr0 & !ET, cr4, efer],
        [0x21, 0x40, 0x901],
    )
}

fn vp_info() -> Verdict {
    let after = call(Leaf::VP_INFO, &[])?;
    expect("RAX", after[RAX], 0)?;
    expect("width", after[RCX] & 0x3F, 48)?;
    expect("processors", after[R8] as u32, 2)?;
    expect("index", after[R9], 0)?;
    expect("R11", after[R11], 0)
}

fn second_processor() -> Verdict {
    for _ in 0..1_000_000 {
        if SECOND.load(Ordering::SeqCst) != 0 {
            return expect("its number", SECOND.load(Ordering::SeqCst) - 1, 1);
        }
        core::hint::spin_loop();
    }
    Err(Finding::new(format_args!("it never came")))
}
