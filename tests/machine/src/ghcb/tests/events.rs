//! `ghcb.md` §5: the events of the page protocol.

use protocols::ghcb::page::ValidBitmap;
use zerocopy::FromZeros;

use super::*;
use crate::types::PAGE_SIZE;

#[test]
fn instructions_are_served_with_their_registers() {
    let mut platform = ready("");
    let (_, _, page) = served(&mut platform, &[(CODE, 0x87)]);
    assert_eq!((page.rax, page.rdx, page.rcx), (6, 5, 7));
    let (_, _, page) = served(&mut platform, &[(CODE, 0x6F), (Field::RCX, 2)]);
    assert_eq!((page.rax, page.rdx), (9, 0));
    let (_, _, page) = served(
        &mut platform,
        &[(CODE, 0x72), (Field::RAX, 0xB), (Field::RCX, 1)],
    );
    assert_eq!((page.rax, page.rbx, page.rcx, page.rdx), (0xB, 1, 0xC, 0xD));
    let (_, _, page) = served(&mut platform, &[(CODE, 0x27)]);
    assert_eq!(page.rax, 0x400);
    let (_, _, page) = served(&mut platform, &[(CODE, 0x7C), (Field::RCX, 0x10)]);
    assert_eq!((page.rax, page.rdx), (0x3333_4444, 0x1111_2222));
    let mut bitmap = Ghcb::new_zeroed();
    bitmap.set(CODE, 0x81);
    bitmap.set(I1, 0);
    bitmap.set(I2, 0);
    bitmap.set(Field::RAX, 5);
    bitmap.valid_bitmap.insert_bit(ValidBitmap::CPL_BIT);
    let (_, page) = platform.exchange(VMPL1, bitmap, &mut FakeCpu::default());
    assert_eq!(page.get(Field::RAX), Some(-1000i64 as u64));
}

#[test]
fn writes_reach_the_cpu() {
    let mut platform = ready("");
    let mut cpu = FakeCpu::default();
    let write = [
        (CODE, 0x7C),
        (I1, 1),
        (Field::RCX, 0x10),
        (Field::RAX, 2),
        (Field::RDX, 1),
    ];
    platform.ask(VMPL1, &write, &[], &mut cpu);
    platform.ask(VMPL1, &[(CODE, 0x37), (Field::RAX, 0x455)], &[], &mut cpu);
    platform.ask(VMPL1, &[(CODE, 0x76)], &[], &mut cpu);
    platform.ask(
        VMPL1,
        &[
            (CODE, 0x7B),
            (I1, 0x3F8 << 16 | 1 << 4),
            (Field::RAX, 0xABCD),
        ],
        &[],
        &mut cpu,
    );
    let expected = [
        ("msr", 0x10, 8, 0x1_0000_0002),
        ("dr7", 0, 8, 0x455),
        ("wbinvd", 0, 0, 0),
        ("port", 0x3F8, 1, 0xCD),
    ];
    assert_eq!(cpu.writes, expected);
}

#[test]
fn faulting_registers_become_general_protection() {
    let mut platform = ready("");
    let requests: [&[(Field, u64)]; 4] = [
        &[(CODE, 0x7C), (Field::RCX, 0xBAD)],
        &[
            (CODE, 0x7C),
            (I1, 1),
            (Field::RCX, 0xBAD),
            (Field::RAX, 0),
            (Field::RDX, 0),
        ],
        &[(CODE, 0x6F), (Field::RCX, 99)],
        &[(CODE, 0x37), (Field::RAX, 1 << 32)],
    ];
    for fields in requests {
        let (info_1, info_2, _) = served(&mut platform, fields);
        assert_eq!((info_1, info_2), (1, 0x8000_0B0D), "{fields:x?}");
    }
    assert_eq!(
        malformed(&mut platform, &[(CODE, 0x7C), (I1, 2), (Field::RCX, 0x10)]),
        5
    );
}

#[test]
fn a_port_read_fills_its_width_only() {
    let mut platform = ready("");
    for (width, expected) in [(1, 0x01), (2, 0xCC01), (4, 0xAABB_CC01)] {
        let (_, _, page) = served(
            &mut platform,
            &[(CODE, 0x7B), (I1, 0x71 << 16 | width << 4 | 1)],
        );
        assert_eq!(page.get(Field::RAX), Some(expected));
    }
    assert_eq!(
        malformed(
            &mut platform,
            &[(CODE, 0x7B), (I1, 0x71 << 16 | 3 << 4 | 1)]
        ),
        5
    );
}

#[test]
fn string_ports_use_the_shared_buffer() {
    let mut platform = ready("");
    let mut cpu = FakeCpu::default();
    let input = 0x511 << 16 | 1 << 9 | 1 << 4 | 1 << 3 | 1 << 2 | 1;
    let fields = [
        (CODE, 0x7B),
        (I1, input),
        (I2, 3),
        (Field::SCRATCH, BUFFER + 8),
    ];
    let (_, page) = platform.ask(VMPL1, &fields, &[0xFF; 16], &mut cpu);
    assert_eq!(page.shared_buffer[7..12], [0xFF, 1, 2, 3, 0xFF]);
    let output = 0x402 << 16 | 1 << 9 | 2 << 4 | 1 << 3 | 1 << 2;
    let fields = [
        (CODE, 0x7B),
        (I1, output),
        (I2, 2),
        (Field::SCRATCH, BUFFER),
    ];
    platform.ask(VMPL1, &fields, &[1, 2, 3, 4], &mut cpu);
    assert_eq!(
        cpu.writes,
        [("port", 0x402, 2, 0x201), ("port", 0x402, 2, 0x403)]
    );
    for (count, scratch) in [
        (2033, BUFFER),
        (1, BUFFER - 1),
        (1, BUFFER + 2032),
        (u64::MAX, BUFFER),
    ] {
        let fields = [
            (CODE, 0x7B),
            (I1, input),
            (I2, count),
            (Field::SCRATCH, scratch),
        ];
        let error = malformed(&mut platform, &fields);
        assert_eq!(error, 3, "{count:#x} at {scratch:#x}");
    }
}

#[test]
fn mmio_goes_to_devices_and_shared_memory_only() {
    let mut platform = ready("");
    let mut cpu = FakeCpu::default();
    let read = |gpa, len| {
        [
            (CODE, 0x8000_0001),
            (I1, gpa),
            (I2, len),
            (Field::SCRATCH, BUFFER),
        ]
    };
    let (_, page) = platform.ask(VMPL1, &read(0xFEC0_0000, 4), &[0xEE; 8], &mut cpu);
    assert_eq!(page.shared_buffer[..5], [0x11, 0x22, 0x33, 0x44, 0xEE]);
    let write = [
        (CODE, 0x8000_0002),
        (I1, 0xFEC0_0010),
        (I2, 2),
        (Field::SCRATCH, BUFFER),
    ];
    platform.ask(VMPL1, &write, &[0x34, 0x12], &mut cpu);
    assert_eq!(cpu.writes, [("mmio", 0xFEC0_0010, 2, 0x1234)]);
    // Shared memory, through the host's emulator.
    let (_, page) = platform.ask(VMPL1, &read(GHCB.get() + 0x398, 8), &[0xEE; 8], &mut cpu);
    assert_eq!(
        page.shared_buffer[..8],
        GHCB.get().wrapping_add(0x398).to_le_bytes()
    );
    for (gpa, len) in [
        (BLOCK.get(), 4),
        (0xFEC0_0000, 3),
        (0xFEC0_0000, 16),
        (0xFEC0_0FFE, 4),
    ] {
        assert_eq!(malformed(&mut platform, &read(gpa, len)), 5);
    }
}

#[test]
fn a_processor_waits_until_it_is_released() {
    let mut platform = ready("");
    let (reply, _) = platform.ask(VMPL1, &[(CODE, 0x8000_0004)], &[], &mut FakeCpu::default());
    assert_eq!(reply, Reply::Hold);
    platform.release_hold(CPU0, VMPL1, true);
    let spa = platform.spa_of(GHCB).unwrap();
    assert_eq!(platform.memory().read_u64(spa.plus(0x3A0)), 1);
}

#[test]
fn the_rest_of_the_table() {
    let mut platform = ready("");
    let (info_1, _, _) = served(&mut platform, &[(CODE, 0x8000_0003)]);
    assert_eq!(info_1, 0, "NMI complete");
    served(&mut platform, &[(CODE, 0x8000_0005), (I2, 0x9000)]);
    let (_, info_2, _) = served(&mut platform, &[(CODE, 0x8000_0005), (I1, 1)]);
    assert_eq!(info_2, 0x9000, "AP jump table");
    let (_, info_2, _) = served(&mut platform, &[(CODE, 0x8000_FFFD)]);
    assert_eq!(info_2, 0x33, "features");
    let end = |platform: &mut Platform<Sparse>, fields: &[(Field, u64)]| {
        platform.ask(VMPL1, fields, &[], &mut FakeCpu::default()).0
    };
    let reply = end(&mut platform, &[(CODE, 0x8000_FFFE), (I1, 0x121)]);
    assert_eq!(reply, Reply::Terminate { set: 1, code: 0x12 });
    let reply = end(&mut platform, &[(CODE, 0x8000_FFFF), (I1, 0x99)]);
    assert!(matches!(reply, Reply::Refused(why) if why.contains("0x99")));
    platform.set_vmsa(CPU0, Vmpl::VMPL0, Some(BLOCK));
    assert_eq!(
        end(&mut platform, &[(CODE, 0x8000_0018)]),
        Reply::Run(Vmpl::VMPL0)
    );
    assert_eq!(malformed(&mut platform, &[(CODE, 0x8000_0018), (I1, 2)]), 5);
}

#[test]
fn apic_ids_are_counted_first_and_listed_then() {
    let mut platform = ready("");
    let (_, _, page) = served(&mut platform, &[(CODE, 0x8000_0017), (Field::RAX, 0)]);
    assert_eq!(page.get(Field::RAX), Some(1));
    let list = GHCB.get() + PAGE_SIZE;
    let fields = [(CODE, 0x8000_0017), (I1, list), (Field::RAX, 1)];
    assert_eq!(malformed(&mut platform, &fields), 5, "private page");
    platform.msr(VMPL1, 2 << 52 | list | 0x014);
    served(&mut platform, &fields);
    let mut words = [0; 12];
    platform
        .memory()
        .read(platform.spa_of(Gpa::new(list)).unwrap(), &mut words);
    assert_eq!(words, [2, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]);
}
