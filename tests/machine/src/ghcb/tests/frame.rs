//! `ghcb.md` §5 and §11: what every request through the page has in common.

use protocols::ghcb::page::ValidBitmap;
use zerocopy::FromZeros;

use super::*;

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
