//! Whatever a guest sends: the host answers by the protocol and stays in one piece.

use proptest::prelude::*;
use protocols::ghcb::page::{SHARED_BUFFER_OFFSET, ValidBitmap};
use zerocopy::{FromBytes, IntoBytes};

use super::*;

/// Exit codes that mean something, mixed with any others.
fn exit_code() -> impl Strategy<Value = u64> {
    let known = vec![
        0x27,
        0x37,
        0x6E,
        0x6F,
        0x72,
        0x76,
        0x7B,
        0x7C,
        0x81,
        0x87,
        0x89,
        0x8A,
        0x8B,
        0x8000_0001,
        0x8000_0002,
        0x8000_0003,
        0x8000_0004,
        0x8000_0005,
        0x8000_0010,
        0x8000_0011,
        0x8000_0012,
        0x8000_0013,
        0x8000_0017,
        0x8000_0018,
        0x8000_FFFD,
        0x8000_FFFE,
        0x8000_FFFF,
    ];
    prop_oneof![prop::sample::select(known), any::<u64>()]
}

/// Numbers that are likely to hit an edge.
fn word() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        0..16u64,
        (0..0x1010u64).prop_map(|offset| GHCB.get() + offset),
        Just(GHCB.get() + SHARED_BUFFER_OFFSET as u64),
        Just(BLOCK.get()),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn any_page_is_answered_by_the_protocol(
        code in exit_code(),
        words in [word(), word(), word(), word(), word(), word(), word()],
        bitmap: [u64; 2],
        all_valid: bool,
        buffer in prop::collection::vec(any::<u8>(), 64),
        seed: u8,
    ) {
        let mut platform = ready("");
        let mut page = Ghcb::read_from_bytes(&[seed; 4096]).unwrap();
        page.usage = 0;
        page.shared_buffer[..buffer.len()].copy_from_slice(&buffer);
        let fields = [
            I1, I2, Field::RAX, Field::RBX, Field::RCX, Field::RDX, Field::SCRATCH,
        ];
        for (field, value) in fields.into_iter().zip(words) {
            page.set(field, value);
        }
        page.set(CODE, code);
        page.valid_bitmap = ValidBitmap(if all_valid { [u64::MAX; 2] } else { bitmap });
        let before = page.as_bytes().to_vec();
        let (reply, after) = platform.exchange(VMPL1, page, &mut FakeCpu::default());
        if matches!(reply, Reply::Refused(_)) {
            prop_assert_eq!(after.as_bytes(), before);
        } else {
            prop_assert!(matches!(after.get(I1), Some(0..=2)));
            prop_assert!(after.get(I2).is_some());
        }
    }

    #[test]
    fn any_msr_value_is_answered_or_left(value: u64, code in 0..0x101u64) {
        let mut platform = ready("");
        let value = value & !0xFFF | code;
        let (_, after) = platform.msr(VMPL1, value);
        let (info, answer) = (value & 0xFFF, after & 0xFFF);
        prop_assert!(after == value || answer == info + 1, "{value:#x} became {after:#x}");
    }
}
