//! For each rule there is a file that breaks this one and no other.

#[path = "support/raw.rs"]
mod raw;

use std::collections::BTreeSet;

use igvm_build::check::{Target, check, loads};
use igvm_build::file::{File, Problem, Rule, Weight, edit};
use igvm_build::id_block::{Identity, Keys, Signed, SigningKey, put_into, sign, sign_image};
use igvm_build::measure::quietly;
use igvm_build::measure::snp::{Loader, Processors, launch_digest};
use igvm_defs::{IGVM_VHS_SNP_ID_BLOCK, IgvmVariableHeaderType as Type};
use p384::ecdsa::Signature;
use p384::ecdsa::signature::Signer;
use raw::{
    DATA, LAUNCH, REGION, Raw, VMSA, area, context, kind, manifest, page, platform, policy, usage,
};
use zerocopy::IntoBytes;

const POLICY: u64 = 0x3_0000;
const LOADER: Loader = Loader::Qemu(ONE);
const ONE: Processors = Processors {
    count: 1,
    signature: None,
};
/// The rules of the format alone.
const ANY: Target = Target {
    qemu: false,
    processors: ONE,
};

fn keys() -> Keys {
    let key = |seed| SigningKey::from_slice(&[seed; 48]).unwrap();
    Keys {
        id: key(1),
        author: Some(key(2)),
    }
}

/// The good file with an ID block, before or after the block was changed.
fn with_block(change: impl Fn(&mut IGVM_VHS_SNP_ID_BLOCK)) -> Vec<u8> {
    let bytes = Raw::snp().bytes();
    let file = File::read(&bytes).unwrap();
    let digest = launch_digest(&file, LOADER, &mut quietly).unwrap();
    let mut signed: Signed = sign(&digest, POLICY, 1, &Identity::default(), &keys());
    change(&mut signed.header);
    put_into(&file, &signed.header).unwrap()
}

/// An ID block of version 2, signed as such.
fn version_2(header: &mut IGVM_VHS_SNP_ID_BLOCK) {
    header.version = 2;
    let message = Signed {
        header: *header,
        policy: POLICY,
    };
    let signature: Signature = keys().id.sign(&message.for_qemu().0);
    let (mut r, mut s) = signature.split_bytes();
    r.reverse();
    s.reverse();
    header.id_key_signature.r_comp[..48].copy_from_slice(&r);
    header.id_key_signature.s_comp[..48].copy_from_slice(&s);
}

/// A file that breaks the rule.
fn breaking(rule: Rule) -> Vec<u8> {
    let good = Raw::snp;
    let tdx_beside = || good().before(kind::POLICY, platform(2, 3));
    let cut = |length| {
        let mut bytes = good().bytes();
        bytes.truncate(length);
        bytes
    };
    let byte = |at: usize, value: u8| {
        let mut bytes = good().bytes();
        bytes[at] = value;
        bytes
    };
    let second = || Raw {
        version: 2,
        ..good()
    };
    let far = u64::MAX - 0xFFF;
    match rule {
        Rule::TooShort => cut(23),
        Rule::Magic => byte(0, b'i'),
        Rule::Version => byte(4, 3),
        Rule::HeaderSection => byte(8, 25),
        Rule::HeaderCut => byte(12, good().bytes()[12] - 8),
        Rule::BodyLength => good().and((kind::CONTEXT, vec![0; 24])).bytes(),
        Rule::FileLength => good().spoiled(|bytes| bytes[16] += 1),
        Rule::Checksum => byte(20, good().bytes()[20] ^ 1),
        Rule::Architecture => second().spoiled(|bytes| bytes[24] = 1),
        Rule::PageSizeField => second().spoiled(|bytes| bytes[29] = 0x20),
        Rule::NoData => {
            let raw = Raw::tdx().with(kind::PAGE, 12, &[0; 4]);
            raw.spoiled(|bytes| {
                let end = File::read(bytes).unwrap().fixed.headers.1;
                bytes.truncate(end);
                bytes[16..20].copy_from_slice(&(end as u32).to_le_bytes());
            })
        }
        Rule::Padding => good().spoiled(|bytes| {
            let end = File::read(bytes).unwrap().fixed.headers.1;
            // The last header is a context, which has four bytes of it.
            bytes[end - 1] = 1;
        }),
        Rule::Order => good().last(kind::POLICY).bytes(),
        Rule::UnknownType => good().and((0x3FF, vec![0; 8])).bytes(),
        Rule::Reserved => good().with(kind::PAGE, 22, &[1]).bytes(),
        Rule::NoPlatform => good().without(kind::PLATFORM).bytes(),
        Rule::PlatformMask => good().before(kind::POLICY, platform(6, 3)).bytes(),
        Rule::PlatformTwice => good().before(kind::POLICY, platform(2, 2)).bytes(),
        Rule::PlatformType => good().before(kind::POLICY, platform(2, 9)).bytes(),
        Rule::PlatformVersion => good().with(kind::PLATFORM, 6, &[2]).bytes(),
        Rule::HighestVtl => good().with(kind::PLATFORM, 4, &[1]).bytes(),
        Rule::Boundary => Raw::native().with(kind::PLATFORM, 8, &[1]).natively(0, 0),
        Rule::StrayMask => good().with(kind::PAGE, 8, &[3]).bytes(),
        Rule::PolicyTwice => good().before(kind::AREA, policy(1, POLICY)).bytes(),
        Rule::PageAlignment => good().with(kind::PAGE, 0, &[1]).bytes(),
        Rule::PageSize => good().with(kind::PAGE, 16, &[1]).bytes(),
        Rule::PageType => good().with(kind::PAGE, 20, &[7]).bytes(),
        Rule::Wrap => good().with(kind::PAGE, 0, &far.to_le_bytes()).bytes(),
        Rule::Overlap => good()
            .before(kind::CONTEXT, page(1, REGION + 0x8000, DATA, 0))
            .bytes(),
        Rule::DataRange => good().with(kind::PAGE, 12, &[24, 0]).bytes(),
        Rule::AreaSize => good().before(kind::AREA, area(9, 0x1001)).bytes(),
        Rule::AreaTwice => good().before(kind::MEMORY_MAP, area(0, 0x4000)).bytes(),
        Rule::AreaUnknown => good()
            .before(kind::MEMORY_MAP, usage(kind::VP_COUNT, 9, 0))
            .bytes(),
        Rule::AreaGone => good()
            .before(kind::PAGE, usage(kind::VP_COUNT, 1, 0))
            .bytes(),
        Rule::AreaOverrun => good().with(kind::VP_COUNT, 4, &[0, 0x10]).bytes(),
        Rule::ContextTwice => good().and(context(1, LAUNCH, 0)).bytes(),
        Rule::ContextMask => good()
            .before(kind::POLICY, platform(2, 0))
            .with(kind::CONTEXT, 8, &[3])
            .bytes(),
        Rule::NativeContext => good()
            .before(kind::POLICY, platform(2, 0))
            .and(context(2, 0, 0))
            .bytes(),
        // Bit 8 of the code segment's.
        Rule::NativeAttributes => Raw::native().natively(0xAB, 1),
        Rule::ContextForTdx => tdx_beside().and(context(2, LAUNCH, 0)).bytes(),
        Rule::SnpPolicy => good().with(kind::POLICY, 0, &[0, 0, 1]).bytes(),
        Rule::SecretsOutsideSnp => tdx_beside()
            .before(kind::CONTEXT, page(2, REGION, 0, 1))
            .bytes(),
        Rule::IdBlockTwice => {
            let bytes = with_block(|_| {});
            let file = File::read(&bytes).unwrap();
            let block = file.headers.last().unwrap();
            let again = Some((Type::IGVM_VHT_SNP_ID_BLOCK, block.body));
            edit::replace(&file, |_| false, again).unwrap()
        }
        Rule::IdBlockDigest => {
            let bytes = Raw::snp().bytes();
            let file = File::read(&bytes).unwrap();
            let signed = sign(&[7; 48], POLICY, 1, &Identity::default(), &keys());
            put_into(&file, &signed.header).unwrap()
        }
        Rule::IdBlockSignature => with_block(|header| header.id_key_signature.s_comp[0] ^= 1),
        Rule::AuthorKeyFlag => with_block(|header| header.author_key_enabled = 2),
        Rule::QemuPlatform => Raw::tdx().bytes(),
        Rule::QemuType => good()
            .before(kind::INSERT, usage(kind::SRAT, 1, 0x100))
            .bytes(),
        Rule::QemuVmsaAddress => good()
            .with(kind::CONTEXT, 0, &0x5000u64.to_le_bytes())
            .bytes(),
        Rule::QemuVmsaField => good().spoiled(|bytes| bytes[VMSA + 0x140] = 1),
        Rule::QemuSevFeatures => good().spoiled(|bytes| bytes[VMSA + 0x3B0] |= 1 << 3),
        Rule::QemuProcessor => good().and(context(1, LAUNCH, 1)).bytes(),
        Rule::QemuNoContext => good().without(kind::CONTEXT).bytes(),
        Rule::QemuInsertOrder => good().last(kind::INSERT).last(kind::CONTEXT).bytes(),
        Rule::KvmVmsaOrder => good().last(kind::PAGE).bytes(),
        Rule::QemuShared => good().with(kind::PAGE, 16, &[4]).bytes(),
        Rule::QemuAreaData => {
            let raw = good().without(kind::AREA);
            let mut initial = area(0, 0x1000);
            initial.1[12..].copy_from_slice(&DATA.to_le_bytes());
            raw.before(kind::AREA, initial).bytes()
        }
        Rule::QemuOffset => good().with(kind::MEMORY_MAP, 4, &[8]).bytes(),
        Rule::QemuGsBase => Raw::native().natively(0xC0, 1),
        Rule::QemuAuthorKey => with_block(|header| header.author_key_enabled = 0),
        Rule::QemuIdVersion => with_block(version_2),
        Rule::QemuBoundary => good().with(kind::PLATFORM, 13, &[0x40]).bytes(),
    }
}

/// Further ways to break a rule, and whether QEMU's rules are asked for.
fn also_breaking() -> Vec<(Rule, bool, Vec<u8>)> {
    let good = Raw::snp;
    let corim = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut header = manifest(kind::MANIFEST, 1, DATA, 0x2000);
        change(&mut header.1);
        good().before(kind::AREA, header).bytes()
    };
    let end = DATA + 0x2000;
    vec![
        // The number of processors is four bytes, an entry of the map 24.
        (
            Rule::AreaOverrun,
            true,
            good().with(kind::VP_COUNT, 4, &[0xFD, 0x0F]).bytes(),
        ),
        (
            Rule::AreaOverrun,
            false,
            good().with(kind::MEMORY_MAP, 4, &[0xE9, 0x3F]).bytes(),
        ),
        (Rule::Reserved, true, Raw::native().natively(0x9A, 1)),
        (Rule::Reserved, true, Raw::native().natively(0x9D, 1)),
        // Bit 11 of the data segments'.
        (
            Rule::NativeAttributes,
            true,
            Raw::native().natively(0xB7, 8),
        ),
        (Rule::DataRange, false, corim(&|body| body[8] = 1)),
        (
            Rule::DataRange,
            false,
            corim(&|body| body[4..8].copy_from_slice(&end.to_le_bytes())),
        ),
        (Rule::DataRange, false, corim(&|body| body[4] = 8)),
        (Rule::Reserved, false, corim(&|body| body[15] = 1)),
        (Rule::StrayMask, false, corim(&|body| body[0] = 3)),
        (Rule::BodyLength, false, corim(&|body| body.truncate(12))),
        (Rule::QemuType, true, corim(&|_| {})),
    ]
}

fn rules(problems: &[Problem]) -> Vec<Rule> {
    problems.iter().map(|problem| problem.rule).collect()
}

#[test]
fn each_rule_is_broken_by_a_file_that_breaks_no_other() {
    for &rule in Rule::ALL {
        let bytes = breaking(rule);
        // A file for TDX alone breaks a rule of QEMU's whatever else it does.
        let target = Target {
            qemu: rule != Rule::NoData,
            ..Target::default()
        };
        let problems = check(&bytes, target);
        assert_eq!(rules(&problems), [rule], "{problems:#?}");
        assert_eq!(loads(&problems), rule.weight() == Weight::Warning, "{rule}");
        let text = problems[0].to_string();
        assert!(!text.contains('\n'), "{text}");
        assert!(
            text.contains("at offset 0x") && text.contains(rule.name()),
            "{text}"
        );
    }
}

#[test]
fn other_ways_to_break_a_rule_break_no_other_either() {
    for (rule, qemu, bytes) in also_breaking() {
        let problems = check(&bytes, Target { qemu, ..ANY });
        assert_eq!(rules(&problems), [rule], "{problems:#?}");
    }
}

#[test]
fn good_files_break_no_rule() {
    assert_eq!(check(&Raw::snp().bytes(), Target::default()), []);
    assert_eq!(check(&Raw::tdx().bytes(), ANY), []);
    assert_eq!(check(&Raw::native().natively(0, 1), Target::default()), []);
    let ends_where_the_area_does = Raw::snp().with(kind::VP_COUNT, 4, &[0xFC, 0x0F]);
    assert_eq!(
        check(&ends_where_the_area_does.bytes(), Target::default()),
        []
    );
    let manifests = [0x104, 0x105].map(|kind| manifest(kind, 1, DATA, 0x2000));
    let with_manifests = manifests
        .into_iter()
        .fold(Raw::snp(), |file, header| file.before(kind::AREA, header));
    assert_eq!(check(&with_manifests.bytes(), ANY), []);
    assert_eq!(check(&with_block(|_| {}), Target::default()), []);
    let signed = sign_image(&Raw::snp().bytes(), LOADER, &Identity::default(), &keys());
    assert_eq!(check(&signed.unwrap().0, Target::default()), []);
}

/// QEMU refuses what a loader may otherwise skip.
#[test]
fn an_optional_header_is_good_for_all_but_qemu() {
    let bytes = Raw::snp().and((0x8000_0315, vec![0; 8])).bytes();
    assert_eq!(rules(&check(&bytes, Target::default())), [Rule::QemuType]);
    assert_eq!(check(&bytes, ANY), []);
}

/// On VSM a context is a list of registers, and each VTL of a processor has one.
#[test]
fn contexts_for_vsm_are_no_pages() {
    let mut file = Raw::snp().before(kind::POLICY, platform(2, 1));
    for _ in 0..2 {
        let (kind, mut body) = context(2, 0, 0);
        let end = (VMSA as u32 + 0x1000 - 4).to_le_bytes();
        body[12..16].copy_from_slice(&end);
        file = file.and((kind, body));
    }
    assert_eq!(check(&file.bytes(), Target::default()), []);
}

#[test]
fn more_processors_have_more_contexts() {
    let bytes = Raw::snp().and(context(1, LAUNCH, 1)).bytes();
    assert_eq!(check(&bytes, with_processors(2, None)), []);
}

fn with_processors(count: u16, signature: Option<u32>) -> Target {
    Target {
        qemu: true,
        processors: Processors { count, signature },
    }
}

/// KVM measures every processor, so a block is for one number of them and, beyond the file's states, for one
/// model.
#[test]
fn an_id_block_is_for_one_number_of_processors() {
    const MILAN: Option<u32> = Some(0xA0_0F11);
    let broken = |bytes: &[u8], target| {
        let problems = check(bytes, target);
        let text = problems.first().map(ToString::to_string);
        (rules(&problems), text.unwrap_or_default())
    };
    let for_one = with_block(|_| {});
    assert_eq!(check(&for_one, with_processors(1, None)), []);
    let (rules, text) = broken(&for_one, with_processors(4, None));
    assert_eq!(rules, [Rule::IdBlockDigest]);
    assert!(
        text.contains("processor 1") && text.contains("--vcpu-type"),
        "{text}"
    );
    let (rules, text) = broken(&for_one, with_processors(4, MILAN));
    assert_eq!(rules, [Rule::IdBlockDigest]);
    assert!(text.contains("the file has"), "{text}");

    let four = with_processors(4, MILAN);
    let loader = Loader::Qemu(four.processors);
    let signed = sign_image(&Raw::snp().bytes(), loader, &Identity::default(), &keys());
    let for_four = signed.unwrap().0;
    assert_eq!(check(&for_four, four), []);
    for other in [
        with_processors(1, None),
        with_processors(3, MILAN),
        with_processors(4, None),
        with_processors(4, Some(0x80_0F12)),
    ] {
        assert_eq!(broken(&for_four, other).0, [Rule::IdBlockDigest]);
    }
    // Without a block there is nothing to be wrong.
    assert_eq!(check(&Raw::snp().bytes(), with_processors(4, None)), []);
}

/// QEMU has the author's signature checked where the flag says that there is no author.
#[test]
fn an_author_that_qemu_turns_on_has_to_have_signed() {
    let bytes = with_block(|header| {
        header.author_key_enabled = 0;
        header.author_key_signature.s_comp[0] ^= 1;
    });
    let problems = check(&bytes, Target::default());
    assert_eq!(
        rules(&problems),
        [Rule::IdBlockSignature, Rule::QemuAuthorKey]
    );
    assert!(!loads(&problems));
    assert_eq!(check(&bytes, ANY), []);
}

#[test]
fn names_of_rules_are_unique_and_reasons_are_one_line() {
    let names: BTreeSet<&str> = Rule::ALL.iter().map(|rule| rule.name()).collect();
    assert_eq!(names.len(), Rule::ALL.len());
    for rule in Rule::ALL {
        assert!(!rule.reason().contains('\n') && !rule.reason().ends_with('.'));
    }
}

/// The block is the last header, as `edit` puts it there.
#[test]
fn an_id_block_moves_data_and_changes_nothing_else() {
    let before = Raw::snp().bytes();
    let after = with_block(|_| {});
    let (first, second) = (File::read(&before).unwrap(), File::read(&after).unwrap());
    assert_eq!(
        after.len() - before.len(),
        8 + size_of::<IGVM_VHS_SNP_ID_BLOCK>()
    );
    assert_eq!(second.headers.len(), first.headers.len() + 1);
    assert_eq!(
        before[before.len() - 0x2000..],
        after[after.len() - 0x2000..]
    );
    let digest = |file| launch_digest(file, LOADER, &mut quietly).unwrap();
    assert_eq!(digest(&first), digest(&second));
    // And taken out again, the file is what it was.
    let kind = Type::IGVM_VHT_SNP_ID_BLOCK;
    let restored = edit::replace(&second, |header| header.kind == kind, None).unwrap();
    assert_eq!(restored.as_bytes(), before.as_bytes());
}
