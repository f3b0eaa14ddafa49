//! Loading the native platform of a file that is for both.

use super::*;
use crate::settings::PlatformKind;

/// A native context's RIP and RFLAGS, by their offsets.
const RIP: usize = 0x80;
const RFLAGS: usize = 0x88;
const CODE_ATTRIBUTES: usize = 0xAA;

/// Makes a header one of the platforms in `mask`.
fn of(mask: u32, (kind, mut body): (u32, Vec<u8>)) -> (u32, Vec<u8>) {
    body[8..12].copy_from_slice(&mask.to_le_bytes());
    (kind, body)
}

/// The file of the other tests, for the native platform as well: the page at REGION is for both, the
/// next one holds zeros on SEV-SNP and 0xAB natively, the last two are zero natively.
fn both() -> Headers {
    vec![
        platform(1, 2),
        platform(2, 0),
        policy(0x3_0000),
        area(0, 0x4000),
        area(1, 0x1000),
        usage(0x30C, 0, 0),
        usage(0x307, 1, 8),
        of(3, insert(0, REGION + 0x4000)),
        of(3, insert(1, REGION + 0x8000)),
        of(3, required(REGION + 0x9000, 0x7000)),
        of(3, page_data(REGION, FIRST_DATA, 0, 0)),
        page_data(REGION + 0x1000, 0, 0, 0),
        page_data(REGION + 0x2000, 0, 0, 1),
        page_data(REGION + 0x3000, 0, 0, 2),
        of(2, page_data(REGION + 0x1000, FIRST_DATA, 0, 0)),
        of(2, page_data(REGION + 0x2000, 0, 0, 0)),
        of(2, page_data(REGION + 0x3000, 0, 0, 0)),
        of(3, page_data(FIRMWARE, FIRST_DATA, 0, 0)),
        of(3, page_data(FIRMWARE + 0x1000, FIRST_DATA, 0, 0)),
        of(2, context(0, FIRST_DATA + 0x1000)),
    ]
}

/// The file with a trust domain's platform besides, whose page at REGION holds zeros.
fn all_three() -> Headers {
    let mut headers = both();
    headers.insert(2, platform(4, 3));
    headers.push(of(4, page_data(REGION, 0, 0, 0)));
    headers
}

#[test]
fn each_platform_of_a_file_is_read_by_itself() {
    use PlatformKind::{Native, Snp, Tdx};
    let bytes = native_file(&all_three());
    let read = |wanted| File::parse(&bytes, wanted);
    for kind in [Snp, Tdx, Native] {
        assert_eq!(read(Some(kind)).unwrap().platform, kind);
    }
    assert_eq!(read(None).unwrap().platform, Snp);
    let pages = |wanted| {
        let file = read(Some(wanted)).unwrap();
        let page = |directive: &&Directive<'_>| matches!(directive, Directive::Page { .. });
        file.directives.iter().filter(page).count()
    };
    assert_eq!((pages(Snp), pages(Tdx), pages(Native)), (6, 1, 6));
    // A platform that this machine is none of matters only to those who want it.
    let mut vtom = all_three();
    vtom[0].1[8..16].copy_from_slice(&(1u64 << 46).to_le_bytes());
    let bytes = native_file(&vtom);
    assert!(File::parse(&bytes, Some(Tdx)).is_ok());
    for wanted in [None, Some(Snp)] {
        assert_eq!(
            File::parse(&bytes, wanted).map(drop),
            Err(FileError::NotForSnp)
        );
    }
}

#[test]
fn the_native_platform_is_not_launched() {
    let (_, launched) = run("platform=native", &native_file(&both()));
    assert_eq!(launched, Err(LaunchError::NotConfidential));
}

/// The file with a native context where the other tests have a VMSA.
fn native_file(headers: &Headers) -> Vec<u8> {
    let mut bytes = file(headers);
    let context = &mut bytes[FIRST_DATA as usize + 0x1000..];
    context.fill(0);
    context[RIP..][..8].copy_from_slice(&REGION.to_le_bytes());
    context[RFLAGS] = 2;
    bytes
}

fn load(bytes: &[u8]) -> (Platform<Sparse>, Result<u64, LaunchError>) {
    let mut platform = Platform::new(Sparse::default(), Settings::default(), 2, || 0);
    platform.add_ram(Gpa::new(0), 0x1000_0000).unwrap();
    let table = Table::build(&|_, _| Leaf::default(), 2);
    let mut environment = Environment {
        allocate: &mut |_| Some(Spa::new(0x1000_0000)),
        random: &mut || panic!("nothing is secret"),
        cpuid: &table,
        td_cpuid: &table,
    };
    let start = platform.load_plain(bytes, &mut environment);
    (platform, start.map(|context| context.rip))
}

#[test]
fn pages_are_copied_and_parameters_filled() {
    let (mut platform, start) = load(&native_file(&both()));
    assert_eq!(start, Ok(REGION));
    assert_eq!(read(&platform, REGION), [0xAB; 4096]);
    assert_eq!(read(&platform, REGION + 0x1000), [0xAB; 4096]);
    assert_eq!(read(&platform, REGION + 0x2000), [0; 4096]);
    assert_eq!(read(&platform, FIRMWARE + 0x1000), [0xAB; 4096]);
    assert_eq!(
        read(&platform, REGION + 0x4000)[8..16],
        0x1_0000u64.to_le_bytes()
    );
    assert_eq!(read(&platform, REGION + 0x8000)[8..12], 2u32.to_le_bytes());
    assert_eq!(platform.kind(), PlatformKind::Native);
    // Nothing is the guest's as SEV-SNP means it, and no launch is told.
    let place = platform.layout().place(Gpa::new(REGION)).unwrap();
    assert!(!platform.host.rmp().entry(&place).is_assigned());
    let events = platform.take_events();
    assert!(!events.iter().any(|event| matches!(event, Event::Launch(_))));
}

#[test]
fn sev_snp_is_launched_from_the_same_file() {
    let mut headers = both();
    headers.push(context(vmsa::VMSA_GPA.get(), FIRST_DATA + 0x1000));
    let (platform, launched) = run("", &file(&headers));
    assert_eq!(launched.unwrap().pages.normal, 4);
    assert_eq!(read(&platform, REGION + 0x1000), [0; 4096]);
}

#[test]
fn what_only_confidential_guests_have_is_refused() {
    let mut headers = both();
    headers[12] = of(3, headers[12].clone());
    headers.remove(15);
    let secrets = Gpa::new(REGION + 0x2000);
    assert_eq!(
        load(&native_file(&headers)).1,
        Err(LaunchError::NotPlain(secrets))
    );
}

#[test]
fn a_context_has_to_be_one_and_clean() {
    // A VMSA is no native context: there is something behind it.
    assert_eq!(load(&file(&both())).1, Err(LaunchError::Context));
    let mut bytes = native_file(&both());
    bytes[FIRST_DATA as usize + 0x1000 + CODE_ATTRIBUTES + 1] = 1;
    assert_eq!(load(&bytes).1, Err(LaunchError::Context));
    let mut headers = both();
    headers.push(headers[19].clone());
    assert_eq!(
        load(&native_file(&headers)).1,
        Err(LaunchError::Contexts(2))
    );
    headers.truncate(19);
    assert_eq!(
        load(&native_file(&headers)).1,
        Err(LaunchError::Contexts(0))
    );
}

#[test]
fn a_file_needs_the_platform() {
    assert_eq!(
        load(&file(&headers())).1,
        Err(LaunchError::File(FileError::NotForNative))
    );
    let mut only_native = both();
    only_native.remove(0);
    let bytes = native_file(&only_native);
    assert!(File::parse(&bytes, Some(PlatformKind::Native)).is_ok());
    assert_eq!(
        File::parse(&bytes, None).map(drop),
        Err(FileError::NotForSnp)
    );
}
