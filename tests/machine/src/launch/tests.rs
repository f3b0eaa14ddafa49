//! A small IGVM file, written byte by byte, and all the ways to spoil it.

use super::*;
use crate::cpuid::Leaf;
use crate::launch::crc32::Crc32;
use crate::rmp::Permissions;
use crate::settings::Settings;
use crate::testing::Sparse;
use proptest::prelude::*;

mod id_block;
mod plain;

/// Types and bodies of the variable headers of a file.
type Headers = Vec<(u32, Vec<u8>)>;

const REGION: u64 = 0x800_0000;
const FIRMWARE: u64 = 0xFFFF_E000;
const FIRST_DATA: u32 = 0x1000;

fn body(words: &[&[u8]]) -> Vec<u8> {
    words.concat()
}

fn page_data(gpa: u64, offset: u32, flags: u32, kind: u16) -> (u32, Vec<u8>) {
    let fields: [&[u8]; 6] = [
        &gpa.to_le_bytes(),
        &1u32.to_le_bytes(),
        &offset.to_le_bytes(),
        &flags.to_le_bytes(),
        &kind.to_le_bytes(),
        &[0, 0],
    ];
    (0x302, body(&fields))
}

fn area(index: u32, bytes: u64) -> (u32, Vec<u8>) {
    (
        0x301,
        body(&[
            &bytes.to_le_bytes(),
            &index.to_le_bytes(),
            &0u32.to_le_bytes(),
        ]),
    )
}

fn usage(kind: u32, index: u32, offset: u32) -> (u32, Vec<u8>) {
    (kind, body(&[&index.to_le_bytes(), &offset.to_le_bytes()]))
}

fn insert(index: u32, gpa: u64) -> (u32, Vec<u8>) {
    (
        0x303,
        body(&[
            &gpa.to_le_bytes(),
            &1u32.to_le_bytes(),
            &index.to_le_bytes(),
        ]),
    )
}

fn required(gpa: u64, bytes: u32) -> (u32, Vec<u8>) {
    let fields: [&[u8]; 5] = [
        &gpa.to_le_bytes(),
        &1u32.to_le_bytes(),
        &bytes.to_le_bytes(),
        &[0; 4],
        &[0; 4],
    ];
    (0x305, body(&fields))
}

fn context(gpa: u64, offset: u32) -> (u32, Vec<u8>) {
    let fields: [&[u8]; 4] = [
        &gpa.to_le_bytes(),
        &1u32.to_le_bytes(),
        &offset.to_le_bytes(),
        &[0; 4],
    ];
    (0x304, body(&fields))
}

fn platform(mask: u32, kind: u8) -> (u32, Vec<u8>) {
    (
        0x1,
        body(&[
            &mask.to_le_bytes(),
            &[0, kind],
            &1u16.to_le_bytes(),
            &0u64.to_le_bytes(),
        ]),
    )
}

fn policy(policy: u64) -> (u32, Vec<u8>) {
    (
        0x101,
        body(&[
            &policy.to_le_bytes(),
            &1u32.to_le_bytes(),
            &0u32.to_le_bytes(),
        ]),
    )
}

/// Everything a real image has, once.
fn headers() -> Headers {
    vec![
        platform(1, 2),
        policy(0x3_0000),
        area(0, 0x4000),
        area(1, 0x1000),
        usage(0x30C, 0, 0),
        usage(0x307, 1, 8),
        insert(0, REGION + 0x4000),
        insert(1, REGION + 0x8000),
        required(REGION + 0x9000, 0x7000),
        page_data(REGION, FIRST_DATA, 0, 0),
        page_data(REGION + 0x1000, 0, 0, 0),
        page_data(REGION + 0x2000, 0, 0, 1),
        page_data(REGION + 0x3000, 0, 0, 2),
        page_data(FIRMWARE, FIRST_DATA, 0, 0),
        page_data(FIRMWARE + 0x1000, FIRST_DATA, 2, 0),
        context(vmsa::VMSA_GPA.get(), FIRST_DATA + 0x1000),
    ]
}

/// The file: headers up to `FIRST_DATA`, then a page of 0xAB and a VMSA.
fn file(headers: &Headers) -> Vec<u8> {
    let mut section = Vec::new();
    for (kind, body) in headers {
        section.extend(kind.to_le_bytes());
        section.extend((body.len() as u32).to_le_bytes());
        section.extend(body);
        section.resize(section.len().next_multiple_of(8), 0);
    }
    let total = FIRST_DATA as usize + 0x2000;
    let mut bytes = b"IGVM".to_vec();
    for word in [1, 24, section.len() as u32, total as u32, 0] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend(section);
    assert!(bytes.len() <= FIRST_DATA as usize);
    bytes.resize(FIRST_DATA as usize, 0);
    bytes.resize(FIRST_DATA as usize + 0x1000, 0xAB);
    bytes.resize(total, 0);
    let vmsa = &mut bytes[FIRST_DATA as usize + 0x1000..];
    vmsa[0x3B0] = 1;
    vmsa[0xD1] = 0x10;
    seal(&mut bytes);
    bytes
}

/// Makes the checksum right again.
fn seal(bytes: &mut [u8]) {
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    let section = (word(8), word(12));
    bytes[20..24].fill(0);
    let mut crc = Crc32::new();
    crc.update(&bytes[..24]);
    crc.update(&bytes[section.0 as usize..(section.0 + section.1) as usize]);
    let checksum = crc.finish().to_le_bytes();
    bytes[20..24].copy_from_slice(&checksum);
}

fn run(settings: &str, bytes: &[u8]) -> (Platform<Sparse>, Result<Launched, LaunchError>) {
    let settings = Settings::parse(settings).unwrap();
    let mut platform = Platform::new(Sparse::default(), settings, 2, || 0);
    platform.add_ram(Gpa::new(0), 0x1000_0000).unwrap();
    let table = Table::build(
        &|leaf, _| Leaf {
            eax: leaf | 0x20,
            ..Leaf::default()
        },
        2,
    );
    let mut next = 0x1000_0000;
    let mut environment = Environment {
        allocate: &mut |pages| {
            let spa = Spa::new(next);
            next += pages as u64 * PAGE_SIZE;
            Some(spa)
        },
        random: &mut || 0x5555_5555_5555_5555,
        cpuid: &table,
        td_cpuid: &table,
    };
    let result = platform.launch(bytes, &mut environment);
    (platform, result)
}

fn read(platform: &Platform<Sparse>, gpa: u64) -> [u8; 4096] {
    let mut page = [0; 4096];
    platform
        .memory()
        .read(platform.spa_of(Gpa::new(gpa)).unwrap(), &mut page);
    page
}

#[test]
fn an_image_is_launched() {
    let (mut platform, launched) = run("", &file(&headers()));
    let launched = launched.unwrap();
    assert_eq!(
        launched.pages,
        LaunchPages {
            normal: 3,
            vmsa: 1,
            zero: 0,
            unmeasured: 6,
            secrets: 1,
            cpuid: 1
        }
    );
    // Contents are where they belong.
    assert_eq!(read(&platform, REGION), [0xAB; 4096]);
    assert_eq!(read(&platform, REGION + 0x1000), [0; 4096]);
    assert_eq!(read(&platform, REGION + 0x2000)[0x20..0xA0], [0x55; 0x80]);
    assert_ne!(read(&platform, REGION + 0x3000)[0], 0);
    assert_eq!(
        read(&platform, REGION + 0x4000)[8..16],
        0x1_0000u64.to_le_bytes()
    );
    assert_eq!(read(&platform, REGION + 0x8000)[8..12], 2u32.to_le_bytes());
    assert_eq!(read(&platform, FIRMWARE), [0xAB; 4096]);
    // The host knows where to start, and says what it launched.
    assert_eq!(
        platform.context(VcpuId(0), Vmpl::VMPL0).unwrap().vmsa,
        Some(vmsa::VMSA_GPA)
    );
    assert!(platform.enter(VcpuId(0), Vmpl::VMPL0).is_ok());
    let events = platform.take_events();
    let Some(Event::Launch(event)) = events.first() else {
        panic!("{events:?}")
    };
    assert_eq!(event.digest, hex(&launched.digest));
}

/// `snp-launch.md` §1: Guest-Valid, VMPL0 only.
#[test]
fn launched_pages_are_valid_and_vmpl0s_alone() {
    let (platform, _) = run("", &file(&headers()));
    let entry = |gpa: u64| {
        let place = platform.layout().place(Gpa::new(gpa)).unwrap();
        platform.host.rmp().entry(&place)
    };
    for gpa in [REGION, REGION + 0x7000, REGION + 0x8000, FIRMWARE + 0x1000] {
        let entry = entry(gpa);
        assert!(entry.is_assigned() && entry.is_validated());
        assert!(!entry.is_immutable() && !entry.is_vmsa() && !entry.has_lower_permissions());
        assert_eq!(entry.permissions(Vmpl::VMPL0), Permissions::FULL);
    }
    assert!(entry(vmsa::VMSA_GPA.get()).is_vmsa());
    // Required memory is there, but neither launched nor validated.
    assert!(!entry(REGION + 0x9000).is_validated());
}

/// Recomputed with `protocols::measure`, which the launch does not use.
#[test]
fn the_digest_is_that_of_the_pages_in_order() {
    use protocols::measure::{LaunchDigest, PageType};
    let (platform, launched) = run("", &file(&headers()));
    let mut digest = LaunchDigest::new();
    let mut add = |kind, gpa| digest.add_page(kind, gpa, &read(&platform, gpa));
    for page in 4..9 {
        add(PageType::UNMEASURED, REGION + page * PAGE_SIZE);
    }
    add(PageType::NORMAL, REGION);
    add(PageType::NORMAL, REGION + 0x1000);
    add(PageType::SECRETS, REGION + 0x2000);
    add(PageType::CPUID, REGION + 0x3000);
    add(PageType::NORMAL, FIRMWARE);
    add(PageType::UNMEASURED, FIRMWARE + 0x1000);
    add(PageType::VMSA, vmsa::VMSA_GPA.get());
    assert_eq!(launched.unwrap().digest, digest.value());
}

/// A small image for a trust domain, with a parameter area.
fn td_headers() -> Headers {
    vec![
        platform(1, 3),
        policy(2),
        area(1, 0x1000),
        usage(0x307, 1, 8),
        insert(1, REGION + 0x8000),
        page_data(REGION, FIRST_DATA, 0, 0),
        page_data(REGION + 0x1000, 0, 2, 0),
        page_data(FIRMWARE, 0, 0, 0),
    ]
}

/// `tdx.md` §11: added in the order of the file, measured pages extended; recomputed with
/// `protocols::measure`.
#[test]
fn a_trust_domain_is_launched() {
    use crate::settings::PlatformKind;
    let (mut platform, launched) = run("", &file(&td_headers()));
    let launched = launched.unwrap();
    assert_eq!(platform.kind(), PlatformKind::Tdx);
    assert_eq!(launched.vmsa, None);
    assert_eq!((launched.pages.normal, launched.pages.unmeasured), (2, 2));
    let mut mrtd = protocols::measure::Mrtd::new();
    mrtd.add_page(REGION + 0x8000, None);
    mrtd.add_page(REGION, Some(&read(&platform, REGION)));
    mrtd.add_page(REGION + 0x1000, None);
    mrtd.add_page(FIRMWARE, Some(&read(&platform, FIRMWARE)));
    assert_eq!(launched.digest, mrtd.value());
    assert_eq!(read(&platform, REGION), [0xAB; 4096]);
    for gpa in [REGION, REGION + 0x8000, FIRMWARE] {
        let place = platform.layout().place(Gpa::new(gpa)).unwrap();
        let entry = platform.host.rmp().entry(&place);
        assert!(entry.is_validated() && !entry.is_immutable() && !entry.has_lower_permissions());
    }
    assert!(platform.enter(VcpuId(1), Vmpl::VMPL0).is_ok());
}

/// `tdx.md` §10: the host writes the hand-off blocks where it is told, and into a parameter area only.
#[test]
fn hand_off_blocks_go_into_their_area() {
    let area = REGION + 0x8000;
    let (platform, launched) = run(&format!("td-hob={area:#x}"), &file(&td_headers()));
    let (_, plain) = run("", &file(&td_headers()));
    assert_eq!(
        launched.unwrap().digest,
        plain.unwrap().digest,
        "not measured"
    );
    let first: [u8; 12] = *read(&platform, area).first_chunk().unwrap();
    assert_eq!(
        first,
        [1, 0, 56, 0, 0, 0, 0, 0, 9, 0, 0, 0],
        "handoff, version 9"
    );
    let elsewhere = run(&format!("td-hob={REGION:#x}"), &file(&td_headers()));
    assert_eq!(
        elsewhere.1.unwrap_err(),
        LaunchError::NoHobArea(Gpa::new(REGION))
    );
}

/// `igvm.md` §1, §4: which platform is taken, and what a trust domain's file may not have.
#[test]
fn the_platform_is_the_images_or_the_settings() {
    use crate::settings::PlatformKind;
    let mut both = headers();
    both.insert(1, platform(2, 3));
    let kind = |settings, headers: &Headers| {
        let (platform, launched) = run(settings, &file(headers));
        launched.map(|_| platform.kind())
    };
    assert_eq!(kind("", &both), Ok(PlatformKind::Snp));
    assert_eq!(kind("platform=snp", &both), Ok(PlatformKind::Snp));
    // Nothing of this file has the second platform's bit.
    assert_eq!(kind("platform=tdx", &both), Ok(PlatformKind::Tdx));
    let error = |settings, headers: &Headers| kind(settings, headers).unwrap_err();
    let file_error = LaunchError::File;
    assert_eq!(
        error("platform=tdx", &headers()),
        file_error(FileError::NotForTdx)
    );
    assert_eq!(
        error("platform=snp", &td_headers()),
        file_error(FileError::NotForSnp)
    );
    let with = |extra| {
        let mut headers = td_headers();
        headers.push(extra);
        error("", &headers)
    };
    let secrets = page_data(REGION + 0x2000, 0, 0, 1);
    assert_eq!(
        with(secrets),
        file_error(FileError::PageFlags(REGION + 0x2000))
    );
    let state = context(REGION + 0x3000, FIRST_DATA);
    assert_eq!(with(state), file_error(FileError::ContextForTdx));
    let mut odd = td_headers();
    odd[1] = policy(0x3_0000);
    assert_eq!(error("", &odd), LaunchError::Policy(0x3_0000));
}

#[test]
fn lies_do_not_change_the_digest() {
    let honest = run("", &file(&headers())).1.unwrap();
    for lie in ["map-overlap", "cpuid-count", "vp-count-huge"] {
        let told = run(&format!("hostile={lie}"), &file(&headers())).1.unwrap();
        assert_eq!(told.digest, honest.digest, "{lie}");
    }
}

/// Each row spoils the good file in one way.
#[test]
fn hostile_files_are_refused_by_name() {
    type Spoil = fn(&mut Headers);
    let rows: &[(Spoil, FileError)] = &[
        (|h| h[0] = platform(3, 2), FileError::Platform(3)),
        (|h| h.insert(1, platform(1, 0)), FileError::Platform(1)),
        (|h| h.insert(1, platform(2, 2)), FileError::Platform(2)),
        (|h| h[0] = platform(1, 1), FileError::NotForSnp),
        (|h| h[1].1[12] = 1, FileError::Reserved(0x101)),
        (|h| h.insert(2, policy(0x3_0000)), FileError::PolicyTwice),
        (|h| h.swap(1, 2), FileError::Order(0x101)),
        (|h| h[2] = area(0, 0x1001), FileError::Misaligned(0x1001)),
        (|h| h[2] = area(0, 0), FileError::Area(0)),
        (|h| h[2] = area(0, 1 << 40), FileError::Area(0)),
        (|h| h[3] = area(0, 0x1000), FileError::Area(0)),
        (|h| h[5] = usage(0x307, 1, 0xFFD), FileError::Area(1)),
        (|h| h[5] = usage(0x307, 1, u32::MAX), FileError::Area(1)),
        (|h| h[5] = usage(0x307, 7, 0), FileError::Area(7)),
        (|h| h[4] = usage(0x30C, 0, 8), FileError::Area(0)),
        (|h| h[7] = insert(0, REGION + 0x8000), FileError::Area(0)),
        (|h| h.swap(4, 6), FileError::Area(0)),
        (|h| h[6] = insert(0, 1), FileError::Misaligned(1)),
        (|h| h[6] = insert(0, !0xFFF), FileError::Misaligned(!0xFFF)),
        (|h| h[6] = insert(0, REGION), FileError::Overlap(REGION)),
        (
            |h| h[8] = required(REGION, 0x800),
            FileError::Misaligned(REGION),
        ),
        (|h| h[8].1[20] = 1, FileError::Reserved(0x305)),
        (
            |h| h[9] = page_data(REGION + 1, 0, 0, 0),
            FileError::Misaligned(REGION + 1),
        ),
        (
            |h| h[10] = page_data(REGION, 0, 0, 0),
            FileError::Overlap(REGION),
        ),
        (
            |h| h[9] = page_data(REGION, 0, 1, 0),
            FileError::PageFlags(REGION),
        ),
        (
            |h| h[9] = page_data(REGION, 0, 4, 0),
            FileError::PageFlags(REGION),
        ),
        (
            |h| h[9] = page_data(REGION, 0, 8, 0),
            FileError::Reserved(0x302),
        ),
        (
            |h| h[9] = page_data(REGION, 0, 0, 9),
            FileError::PageFlags(REGION),
        ),
        (
            |h| h[9] = page_data(REGION, 8, 0, 0),
            FileError::DataOutside(8),
        ),
        (
            |h| h[9] = page_data(REGION, 0x2001, 0, 0),
            FileError::DataOutside(0x2001),
        ),
        (
            |h| h[9] = page_data(REGION, !0, 0, 0),
            FileError::DataOutside(!0),
        ),
        (|h| h[9].1.truncate(23), FileError::BodyLength(0x302)),
        (
            |h| h[15] = context(!0xFFF, 0x2000),
            FileError::Misaligned(!0xFFF),
        ),
        (
            |h| h.push(usage(0x309, 1, 0)),
            FileError::UnknownType(0x309),
        ),
        (
            |h| h.push((1 << 31 | 0x320, vec![])),
            FileError::UnknownType(1 << 31 | 0x320),
        ),
        (|h| h.push((0x200, vec![])), FileError::Order(0x200)),
    ];
    for (spoil, expected) in rows {
        let mut headers = headers();
        spoil(&mut headers);
        assert_eq!(File::parse(&file(&headers), None).map(drop), Err(*expected));
    }
}

#[test]
fn launches_that_no_host_could_do_are_refused() {
    type Spoil = fn(&mut Headers);
    let elsewhere = Gpa::new(0x1_0000_0000);
    let rows: &[(Spoil, LaunchError)] = &[
        (|h| h[1] = policy(1 << 16), LaunchError::Policy(1 << 16)),
        (
            |h| h[1] = policy(0x3_FFFF),
            LaunchError::Abi(policy::AbiVersion {
                major: 255,
                minor: 255,
            }),
        ),
        (
            |h| h[9] = page_data(0x1_0000_0000, 0, 0, 0),
            LaunchError::NoMemory(elsewhere),
        ),
        (
            |h| h[8] = required(0x1_0000_0000, 0x1000),
            LaunchError::NoMemory(elsewhere),
        ),
        (|h| h[2] = area(0, 0x1000), LaunchError::Contexts(0)),
        (|h| h[15] = context(REGION + 0xA000, 0x2000), {
            LaunchError::VmsaAddress(Gpa::new(REGION + 0xA000))
        }),
        (
            |h| h[15] = context(vmsa::VMSA_GPA.get(), 0x1000),
            LaunchError::VmsaField(0xA0),
        ),
        (
            |h| h.push(context(vmsa::VMSA_GPA.get(), 0x2000)),
            LaunchError::Contexts(2),
        ),
    ];
    for (index, (spoil, expected)) in rows.iter().enumerate() {
        let mut headers = headers();
        spoil(&mut headers);
        if matches!(expected, LaunchError::Contexts(0)) {
            headers.truncate(15);
        }
        assert_eq!(run("", &file(&headers)).1, Err(*expected), "row {index}");
    }
}

#[test]
fn fixed_headers_are_checked() {
    let good = file(&headers());
    assert!(File::parse(&good, None).is_ok());
    let spoilt = |at: usize, value: u32| {
        let mut bytes = good.clone();
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        File::parse(&bytes, None).unwrap_err()
    };
    for (at, value) in [
        (0, 0),
        (4, 2),
        (8, 20),
        (8, 25),
        (8, !7),
        (12, !0),
        (16, 0x1000),
    ] {
        assert!(
            matches!(spoilt(at, value), FileError::Header(_)),
            "{value:#x} at {at}"
        );
    }
    assert!(matches!(
        spoilt(20, 0),
        FileError::Checksum { stored: 0, .. }
    ));
    assert!(matches!(spoilt(40, 0xFF), FileError::Checksum { .. }));
}

#[test]
fn every_truncation_is_refused() {
    let good = file(&headers());
    for length in (0..good.len()).step_by(7) {
        assert!(File::parse(&good[..length], None).is_err());
        // Also when header and checksum are made to agree with the shorter file.
        let mut cut = good[..length].to_vec();
        if length > 1200 {
            cut[16..20].copy_from_slice(&(length as u32).to_le_bytes());
            seal(&mut cut);
            assert!(File::parse(&cut, None).is_err(), "{length}");
        }
    }
}

proptest! {
    #[test]
    fn noise_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(File::parse(&bytes, None).is_err());
    }

    /// Damaged headers with a right checksum: refused or launched, never a panic, and never a
    /// page outside of the memory there is.
    #[test]
    fn damaged_files_never_panic(
        damage in proptest::collection::vec((24usize..700, any::<u8>()), 1..6),
    ) {
        let mut bytes = file(&headers());
        for (at, value) in damage {
            bytes[at] = value;
        }
        seal(&mut bytes);
        if let (platform, Ok(launched)) = run("", &bytes) {
            prop_assert_eq!(launched.pages.vmsa, 1);
            prop_assert!(launched.vmsa.is_some_and(|gpa| platform.spa_of(gpa).is_some()));
        }
    }
}
