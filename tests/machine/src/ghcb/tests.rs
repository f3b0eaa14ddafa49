//! The GHCB protocol, request by request: `ghcb.md` §3 (MSR), §5 (page), §6 (page state
//! changes), §7 (AP creation), and the host's duties of §11.

use protocols::ghcb::page::{Field, Ghcb, ValidBitmap};
use zerocopy::FromZeros;

use super::*;
use crate::testing::{BLOCK, CPU0, FakeCpu, GHCB, Sparse, platform};
use crate::types::{Alias, PAGE_SIZE, PageSize};

const VMPL1: Vmpl = Vmpl::VMPL1;
const CODE: Field = Field::EXIT_CODE;
const I1: Field = Field::EXIT_INFO_1;
const I2: Field = Field::EXIT_INFO_2;
/// SW_SCRATCH of data at the start of the shared buffer.
const BUFFER: u64 = GHCB.get() + 0x800;

fn ready(settings: &str) -> Platform<Sparse> {
    let mut platform = platform(settings);
    platform.register_ghcb_page(VMPL1);
    platform
}

/// A request that comes back to its caller: SW_EXITINFO1, SW_EXITINFO2, the page.
fn served(platform: &mut Platform<Sparse>, fields: &[(Field, u64)]) -> (u64, u64, Ghcb) {
    let (reply, page) = platform.ask(VMPL1, fields, &[], &mut FakeCpu::default());
    assert_eq!(reply, Reply::Resume);
    (page.get(I1).unwrap(), page.get(I2).unwrap(), page)
}

fn malformed(platform: &mut Platform<Sparse>, fields: &[(Field, u64)]) -> u64 {
    let (info_1, info_2, _) = served(platform, fields);
    assert_eq!(info_1, 2, "not malformed");
    info_2
}

fn attribute(platform: &Platform<Sparse>, gpa: Gpa) -> Alias {
    platform
        .host
        .attribute(&platform.layout().place(gpa).unwrap())
}

// --- MSR protocol ---

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

#[test]
fn a_host_that_returns_early_runs_vmpl0_unasked_but_answers_first() {
    let mut platform = platform("hostile=early-return");
    platform.set_vmsa(CPU0, Vmpl::VMPL0, Some(BLOCK));
    let replies: Vec<_> = (0..16).map(|_| platform.msr(VMPL1, 0x080)).collect();
    assert!(replies.iter().all(|(_, response)| *response == 0x33081));
    let early = replies
        .iter()
        .filter(|(reply, _)| *reply == Reply::Run(Vmpl::VMPL0));
    assert_eq!(early.count(), 2);
    // The paravisor itself is never sent to itself.
    let own: Vec<_> = (0..16)
        .map(|_| platform.msr(Vmpl::VMPL0, 0x080).0)
        .collect();
    assert!(own.iter().all(|reply| *reply == Reply::Resume));
}

// --- page protocol: the frame of every request ---

#[test]
fn a_page_that_the_host_cannot_see_is_not_answered() {
    let mut platform = platform("");
    for gpa in [0, BLOCK.get(), 0xFE00_0000] {
        assert_eq!(platform.msr(VMPL1, gpa), (Reply::Resume, gpa));
    }
    assert_eq!(platform.refusals().len(), 3);
}

#[test]
fn error_1_for_a_page_that_is_not_registered() {
    let mut platform = platform("");
    platform.msr(VMPL1, 2 << 52 | GHCB.get() | 0x014);
    assert_eq!(malformed(&mut platform, &[(CODE, 0x6E)]), 1);
    // Registered by another level of the same vCPU does not count.
    platform.register_ghcb_page(Vmpl::VMPL0);
    assert_eq!(malformed(&mut platform, &[(CODE, 0x6E)]), 1);
}

#[test]
fn error_2_for_another_usage() {
    let mut platform = ready("");
    let mut page = Ghcb::new_zeroed();
    page.set(CODE, 0x6E);
    page.usage = 1;
    let (_, page) = platform.exchange(VMPL1, page, &mut FakeCpu::default());
    assert_eq!((page.get(I1), page.get(I2)), (Some(2), Some(2)));
}

#[test]
fn error_4_for_each_missing_field() {
    let mut platform = ready("");
    for missing in [CODE, I1, I2] {
        let mut page = Ghcb::new_zeroed();
        for field in [CODE, I1, I2] {
            if field != missing {
                page.set(field, if field == CODE { 0x6E } else { 0 });
            }
        }
        let (_, page) = platform.exchange(VMPL1, page, &mut FakeCpu::default());
        assert_eq!((page.get(I1), page.get(I2)), (Some(2), Some(4)));
    }
    let requests: [&[(Field, u64)]; 14] = [
        &[(CODE, 0x37)],
        &[(CODE, 0x6F)],
        &[(CODE, 0x72), (Field::RAX, 1)],
        &[(CODE, 0x72), (Field::RCX, 0)],
        &[(CODE, 0x72), (Field::RAX, 0xD), (Field::RCX, 0)],
        &[
            (CODE, 0x72),
            (Field::RAX, 0xD),
            (Field::RCX, 1),
            (Field::XCR0, 1),
        ],
        &[(CODE, 0x7B), (I1, 0x80 << 16 | 1 << 4)],
        &[(CODE, 0x7C)],
        &[(CODE, 0x7C), (I1, 1), (Field::RCX, 0x10), (Field::RAX, 0)],
        &[(CODE, 0x81), (Field::RAX, 0)],
        &[(CODE, 0x8A), (Field::RAX, 0)],
        &[(CODE, 0x8000_0001), (I2, 4)],
        &[(CODE, 0x8000_0010)],
        &[(CODE, 0x8000_0017)],
    ];
    for fields in requests {
        assert_eq!(malformed(&mut platform, fields), 4, "{fields:x?}");
    }
}

#[test]
fn error_6_for_unknown_events_and_features_not_offered() {
    let mut platform = ready("");
    for code in [0x1234, 0x8000_0014, 0x8000_0015, 0x8000_0016, 0x8000_001A] {
        assert_eq!(malformed(&mut platform, &[(CODE, code)]), 6);
    }
}

#[test]
fn only_documented_outputs_are_marked_valid() {
    let mut platform = ready("");
    let valid = |page: &Ghcb, fields: &[Field]| {
        let mut expected = ValidBitmap::default();
        for &field in [I1, I2].iter().chain(fields) {
            expected.insert(field);
        }
        assert_eq!(page.valid_bitmap, expected);
    };
    let (_, _, page) = served(&mut platform, &[(CODE, 0x6E)]);
    valid(&page, &[Field::RAX, Field::RDX]);
    let (_, _, page) = served(&mut platform, &[(CODE, 0x87)]);
    valid(&page, &[Field::RAX, Field::RDX, Field::RCX]);
    let (_, _, page) = served(
        &mut platform,
        &[(CODE, 0x72), (Field::RAX, 1), (Field::RCX, 0)],
    );
    valid(&page, &[Field::RAX, Field::RBX, Field::RCX, Field::RDX]);
    let (_, _, page) = served(&mut platform, &[(CODE, 0x89), (Field::RAX, 1)]);
    valid(&page, &[]);
}

// --- page protocol: events ---

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
fn guest_requests_reach_firmware_that_does_not_support_them() {
    let mut platform = ready("");
    let response = GHCB.get() + PAGE_SIZE;
    let request = response + PAGE_SIZE;
    for gpa in [response, request] {
        platform.msr(VMPL1, 2 << 52 | gpa | 0x014);
    }
    let fields = |a, b| [(CODE, 0x8000_0011), (I1, a), (I2, b)];
    let (info_1, info_2, _) = served(&mut platform, &fields(request, response));
    assert_eq!((info_1, info_2), (0, 0x15));
    for (a, b) in [
        (request, request),
        (BLOCK.get(), response),
        (request + 8, response),
    ] {
        assert_eq!(malformed(&mut platform, &fields(a, b)), 5);
    }
    let extended = [(CODE, 0x8000_0012), (I1, request), (I2, response)];
    assert_eq!(malformed(&mut platform, &extended), 4);
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

// --- page state changes by list ---

/// Sends a list; returns SW_EXITINFO2 and the list as it came back.
fn change(platform: &mut Platform<Sparse>, header: u64, entries: &[u64]) -> (u64, Vec<u64>) {
    let words: Vec<u8> = [header]
        .iter()
        .chain(entries)
        .flat_map(|word| word.to_le_bytes())
        .collect();
    let fields = [(CODE, 0x8000_0010), (Field::SCRATCH, BUFFER)];
    let (reply, page) = platform.ask(VMPL1, &fields, &words, &mut FakeCpu::default());
    assert_eq!(
        (reply, page.get(I1)),
        (Reply::Resume, Some(0)),
        "errors are in exit info 2"
    );
    let back = page.shared_buffer.chunks_exact(8).take(1 + entries.len());
    let back = back
        .map(|word| u64::from_le_bytes(word.try_into().unwrap()))
        .collect();
    (page.get(I2).unwrap(), back)
}

const SHARE: u64 = 2 << 52;
const LARGE: u64 = 1 << 56;

#[test]
fn a_list_is_worked_to_its_last_entry() {
    let mut platform = ready("");
    let entries = [BLOCK.get() | SHARE | LARGE, 0x30_4000 | SHARE];
    let (error, back) = change(&mut platform, 1 << 16, &entries);
    assert_eq!(error, 0);
    assert_eq!(back, [1 << 16 | 2, entries[0] | 512, entries[1] | 1]);
    for gpa in [BLOCK.get(), BLOCK.get() + 511 * PAGE_SIZE, 0x30_4000] {
        assert_eq!(attribute(&platform, Gpa::new(gpa)), Alias::Shared);
    }
    // Again: tolerated, nothing left to do.
    assert_eq!(change(&mut platform, 1 << 16, &entries).0, 0);
}

/// OVMF does not clear the header's reserved word.
#[test]
fn a_list_may_lie_in_a_used_buffer() {
    let mut platform = ready("");
    let (error, back) = change(&mut platform, 0x8082 << 32, &[BLOCK.get() | SHARE]);
    assert_eq!((error, back[0]), (0, 0x8082 << 32 | 1));
}

#[test]
fn a_block_that_was_begun_is_finished_page_by_page() {
    let mut platform = ready("");
    change(&mut platform, 0, &[BLOCK.get() | SHARE | LARGE | 510]);
    assert_eq!(
        attribute(&platform, Gpa::new(BLOCK.get() + 509 * PAGE_SIZE)),
        Alias::Private
    );
    assert_eq!(
        attribute(&platform, Gpa::new(BLOCK.get() + 510 * PAGE_SIZE)),
        Alias::Shared
    );
}

#[test]
fn a_block_with_a_hole_is_changed_where_there_is_memory() {
    let mut platform = ready("");
    assert_eq!(change(&mut platform, 0, &[SHARE | LARGE]).0, 0);
    assert_eq!(attribute(&platform, Gpa::new(0x9_F000)), Alias::Shared);
    assert_eq!(attribute(&platform, Gpa::new(0x10_0000)), Alias::Shared);
}

#[test]
fn bad_lists_and_entries_stop_where_they_are() {
    let mut platform = ready("");
    let (error, _) = change(&mut platform, 253 << 16, &[BLOCK.get() | SHARE]);
    assert_eq!(error, 1 << 32 | 1);
    assert_eq!(attribute(&platform, BLOCK), Alias::Private);
    let bad = [
        BLOCK.get() | SHARE | LARGE | PAGE_SIZE, // frame not aligned to the size
        BLOCK.get() | SHARE | 2,                 // more done than there is
        BLOCK.get() | SHARE | 1 << 60,           // reserved
        BLOCK.get() | 9 << 52,                   // no such operation
    ];
    for entry in bad {
        let (error, back) = change(&mut platform, 2 << 16, &[0x30_4000 | SHARE, entry, SHARE]);
        assert_eq!(error, 1 << 32 | 2, "{entry:#x}");
        assert_eq!(back[0], 2 << 16 | 1, "current entry names the bad one");
        assert_eq!(back[2], entry);
    }
    let (error, _) = change(&mut platform, 0, &[0xFE00_0000 | 1 << 52]);
    assert_eq!(error, 0x100 << 32);
    let mut refusing = platform_with_ghcb("hostile=ghcb-psc");
    assert_eq!(
        change(&mut refusing, 0, &[BLOCK.get() | SHARE]).0,
        0x100 << 32
    );
}

/// A registered GHCB on a host that refuses page state changes.
fn platform_with_ghcb(settings: &str) -> Platform<Sparse> {
    let mut platform = platform(settings);
    let place = platform.layout().place(GHCB).unwrap();
    let host = &mut platform.host;
    host.convert(
        &platform.memory,
        &place,
        GHCB,
        PageSize::Size4K,
        Alias::Shared,
    )
    .unwrap();
    platform.msr(VMPL1, GHCB.get() | 0x012);
    platform
}

#[test]
fn hints_are_taken_as_done() {
    let mut platform = ready("backing=2m");
    platform.pval(BLOCK, PageSize::Size2M, true);
    assert_eq!(
        change(&mut platform, 0, &[BLOCK.get() | 3 << 52 | LARGE]).0,
        0
    );
    assert_eq!(platform.host.psmashes(), 0);
}

#[test]
fn a_page_shared_without_a_rescind_is_a_violation() {
    let mut platform = ready("");
    platform.pval(BLOCK, PageSize::Size4K, true);
    change(&mut platform, 0, &[BLOCK.get() | SHARE]);
    assert_eq!(platform.counters.violations.unrescinded_share, 1);
    let mut platform = ready("");
    platform.pval(BLOCK, PageSize::Size4K, true);
    platform.pval(BLOCK, PageSize::Size4K, false);
    change(&mut platform, 0, &[BLOCK.get() | SHARE]);
    assert_eq!(platform.counters.violations.unrescinded_share, 0);
}

#[test]
fn sharing_one_page_of_a_large_entry_splits_it_and_takes_just_that_page() {
    let mut platform = ready("backing=2m");
    platform.pval(BLOCK, PageSize::Size2M, true);
    platform.pval(BLOCK, PageSize::Size4K, false);
    let before = platform.host.rmp().count(crate::rmp::Entry::is_assigned);
    change(&mut platform, 0, &[BLOCK.get() | SHARE]);
    let after = platform.host.rmp().count(crate::rmp::Entry::is_assigned);
    assert_eq!(before - after, 1);
}

// --- AP creation ---

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
