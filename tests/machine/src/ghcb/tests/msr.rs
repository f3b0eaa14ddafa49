//! `ghcb.md` §3: the MSR protocol, and the hosts that lie in it.

use super::*;

#[test]
fn msr_002_and_the_reset_value_are_the_version_range_and_c_bit() {
    let mut platform = platform("");
    let expected = 0x0002_0001_2F00_0001;
    assert_eq!(platform.ghcb_msr(CPU0, VMPL1), expected);
    assert_eq!(platform.msr(VMPL1, 0x002), (Reply::Resume, expected));
}

#[test]
fn msr_004_answers_one_register_of_subleaf_0() {
    let mut platform = platform("");
    let (_, value) = platform.msr(VMPL1, 0x8000_001F_0000_0004);
    assert_eq!(value, 0x8000_001F_0000_0005);
    let (_, value) = platform.msr(VMPL1, 0x8000_001F_C000_0004);
    assert_eq!(value, 0x0000_000D_C000_0005);
}

#[test]
fn msr_006_waits_for_a_start_up_ipi() {
    let mut platform = platform("");
    assert_eq!(platform.msr(VMPL1, 0x006).0, Reply::Hold);
    assert!(platform.release_hold(CPU0, VMPL1, true));
    assert_eq!(platform.ghcb_msr(CPU0, VMPL1), 0x1007);
    assert!(
        !platform.release_hold(CPU0, VMPL1, true),
        "it waits no longer"
    );
}

#[test]
fn msr_010_has_no_preferred_page() {
    assert_eq!(platform("").msr(VMPL1, 0x010).1, 0xFFFF_FFFF_FFFF_F011);
}

#[test]
fn msr_012_registers_memory_that_is_not_in_private_use() {
    let mut platform = platform("");
    platform.accept(GHCB, 0xF01);
    let private = GHCB.get() | 0x012;
    assert_eq!(platform.msr(VMPL1, private).1, 0xFFFF_FFFF_FFFF_F013);
    assert_eq!(platform.msr(VMPL1, 0xFE00_0012).1, 0xFFFF_FFFF_FFFF_F013);
    assert_eq!(platform.refusals().len(), 2);
    // OVMF registers its first page before anything has made it shared.
    let untouched = BLOCK.get() | 0x012;
    assert_eq!(platform.msr(VMPL1, untouched).1, BLOCK.get() | 0x013);
    platform.register_ghcb_page(VMPL1);
    // The registration is the context's own.
    assert!(
        platform
            .context(CPU0, Vmpl::VMPL0)
            .unwrap()
            .registered
            .is_none()
    );
}

#[test]
fn msr_014_changes_one_page() {
    let mut platform = platform("");
    assert_eq!(platform.msr(VMPL1, 2 << 52 | BLOCK.get() | 0x014).1, 0x015);
    assert_eq!(attribute(&platform, BLOCK), Alias::Shared);
    assert_eq!(platform.msr(VMPL1, 1 << 52 | BLOCK.get() | 0x014).1, 0x015);
    assert_eq!(attribute(&platform, BLOCK), Alias::Private);
    // Unknown operation; private where there is no memory: an error, bit 63.
    for request in [7 << 52 | BLOCK.get() | 0x014, 1 << 52 | 0xFE00_0000 | 0x014] {
        assert_eq!(platform.msr(VMPL1, request).1, 1 << 63 | 0x015);
    }
    // A device is shared already.
    assert_eq!(platform.msr(VMPL1, 2 << 52 | 0xFE00_0000 | 0x014).1, 0x015);
}

#[test]
fn msr_016_runs_a_level_that_has_a_vmsa() {
    let mut platform = platform("");
    assert_eq!(platform.msr(VMPL1, 0x016), (Reply::Resume, 1 << 32 | 0x017));
    platform.set_vmsa(CPU0, Vmpl::VMPL0, Some(BLOCK));
    // The answer is in place before the switch.
    assert_eq!(platform.msr(VMPL1, 0x016), (Reply::Run(Vmpl::VMPL0), 0x017));
    assert_eq!(platform.msr(VMPL1, 9 << 32 | 0x016).1, 1 << 32 | 0x017);
}

#[test]
fn msr_080_offers_snp_ap_creation_apic_ids_and_vmpls() {
    assert_eq!(platform("").msr(VMPL1, 0x080).1, 0x33081);
}

#[test]
fn msr_100_terminates() {
    let reply = platform("").msr(VMPL1, 0x08_5100).0;
    assert_eq!(reply, Reply::Terminate { set: 5, code: 8 });
}

#[test]
fn msr_unknown_requests_are_left_as_they_are() {
    let mut platform = platform("");
    for value in [0xEEE, 0x018, 0x1002, 0xF00] {
        assert_eq!(platform.msr(VMPL1, value), (Reply::Resume, value));
    }
    assert_eq!(platform.refusals().len(), 4);
}

#[test]
fn hostile_hosts_lie_as_their_names_say() {
    assert_eq!(
        platform("hostile=ghcb-version").msr(VMPL1, 0x002).1,
        0x0003_0003_2F00_0001
    );
    assert_eq!(
        platform("hostile=ghcb-features").msr(VMPL1, 0x080).1,
        0x13081
    );
    assert_eq!(platform("hostile=ghcb-unknown").msr(VMPL1, 0x080).1, 0xEEE);
    let mut lying = platform("hostile=ghcb-register");
    lying.msr(VMPL1, 2 << 52 | GHCB.get() | 0x014);
    let (_, response) = lying.msr(VMPL1, GHCB.get() | 0x012);
    assert_eq!(
        (response & 0xFFF, response >> 12),
        (0x013, GHCB.frame() ^ 1)
    );
    let mut refusing = platform("hostile=ghcb-psc");
    assert_eq!(
        refusing.msr(VMPL1, 2 << 52 | BLOCK.get() | 0x014).1,
        1 << 63 | 0x015
    );
    // Nobody can be kept from terminating.
    let reply = platform("hostile=ghcb-unknown").msr(VMPL1, 0x100).0;
    assert_eq!(reply, Reply::Terminate { set: 0, code: 0 });
}
