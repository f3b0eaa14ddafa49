//! `ghcb.md` §7: AP creation.

use super::*;
use crate::types::PAGE_SIZE;

/// Makes a page a VMSA of `vmpl` that passes VMRUN's checks.
fn make_vmsa(platform: &mut Platform<Sparse>, gpa: Gpa, vmpl: u8) {
    platform.accept(gpa, 1 << 16 | 1);
    let spa = platform.spa_of(gpa).unwrap();
    platform.memory().write(spa.plus(0xCA), &[vmpl]);
    platform.memory().write_u64(spa.plus(0xD0), 0x1000);
    platform.memory().write_u64(spa.plus(0x3B0), 1);
}

fn creation(apic: u64, vmpl: u64, request: u64, vmsa: Gpa) -> [(Field, u64); 4] {
    let info_1 = apic << 32 | vmpl << 16 | request;
    [
        (CODE, 0x8000_0013),
        (I1, info_1),
        (I2, vmsa.get()),
        (Field::RAX, 1),
    ]
}

#[test]
fn a_vmsa_is_taken_replaced_and_given_up() {
    let mut platform = ready("");
    let vmsa = Gpa::new(BLOCK.get() + PAGE_SIZE);
    make_vmsa(&mut platform, vmsa, 1);
    let ask = |platform: &mut Platform<Sparse>, fields: [(Field, u64); 4]| {
        platform.ask(VMPL1, &fields, &[], &mut FakeCpu::default()).0
    };
    let target = VcpuId(1);
    let start = Reply::Ap(ApAction {
        target,
        vmpl: VMPL1,
        kind: ApKind::Start,
    });
    assert_eq!(ask(&mut platform, creation(1, 1, 1, vmsa)), start);
    assert_eq!(
        ask(&mut platform, creation(1, 1, 1, vmsa)),
        start,
        "a second one replaces it"
    );
    assert_eq!(platform.context(target, VMPL1).unwrap().vmsa, Some(vmsa));
    assert!(platform.enter(target, VMPL1).is_ok());
    let stop = Reply::Ap(ApAction {
        target,
        vmpl: VMPL1,
        kind: ApKind::Stop,
    });
    assert_eq!(ask(&mut platform, creation(1, 1, 2, Gpa::new(0))), stop);
    assert!(platform.enter(target, VMPL1).is_err());
    assert_eq!(
        ask(&mut platform, creation(0, 1, 0, vmsa)),
        Reply::Resume,
        "on INIT"
    );
}

#[test]
fn a_bad_vmsa_is_malformed() {
    let mut platform = ready("");
    let vmsa = Gpa::new(BLOCK.get() + PAGE_SIZE);
    make_vmsa(&mut platform, vmsa, 1);
    let plain = Gpa::new(BLOCK.get() + 2 * PAGE_SIZE);
    platform.accept(plain, 0xF01);
    platform.accept(BLOCK, 1 << 16 | 1);
    let cases = [
        creation(9, 1, 1, vmsa),                     // no such vCPU
        creation(1, 0, 1, vmsa),                     // a level above the caller
        creation(1, 7, 1, vmsa),                     // no such level
        creation(1, 1, 5, vmsa),                     // no such request
        creation(1, 1, 1, plain),                    // no VMSA
        creation(1, 1, 1, BLOCK),                    // 2 MiB aligned
        creation(1, 1, 1, Gpa::new(vmsa.get() + 8)), // misaligned
        creation(1, 1, 1, Gpa::new(0xFE00_1000)),    // no memory
    ];
    for fields in cases {
        assert_eq!(malformed(&mut platform, &fields), 5, "{fields:x?}");
    }
    let mut features = creation(1, 1, 1, vmsa);
    features[3].1 = 0x11;
    assert_eq!(malformed(&mut platform, &features), 5, "features");
    assert_eq!(
        malformed(&mut platform, &creation(1, 1, 1, vmsa)[..3]),
        4,
        "no RAX"
    );
    assert!(platform.context(VcpuId(1), VMPL1).unwrap().vmsa.is_none());
}
