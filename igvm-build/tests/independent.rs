//! What others compute, and what others write.
//!
//! The measurements are those of sev-snp-measure 0.0.13 (a Python package) for OVMF images that QEMU launches
//! by itself, and of the `igvm` crate for IGVM files. The values of the former were recorded, with the commands
//! in docs/images.md; scenario `image/sev-snp-measure` (`--full`) runs it. `files/igvm-wrap-0.2.6.igvm` was
//! written by igvm-wrap of virtfw-igvm-tools 0.2.6 (`--snp`) from the firmware of `support`.

#[path = "support/raw.rs"]
mod raw;
mod support;

use igvm::IgvmFile;
use igvm::measurement::{generate_snp_measurement, generate_tdx_measurement};
use igvm_build::check::{Target, check, loads};
use igvm_build::cpu::signature_of;
use igvm_build::elf::Program;
use igvm_build::file::{File, Rule};
use igvm_build::firmware::{self, Firmware};
use igvm_build::id_block::{Identity, Keys, Refusal, SigningKey, sign, verify};
use igvm_build::image::{self, Options};
use igvm_build::measure::snp::{Loader, Processors, launch_digest};
use igvm_build::measure::{plain, quietly, tdx};
use igvm_build::show::show;
use igvm_build::sidecar::hex;
use igvm_defs::IgvmPlatformType;
use raw::Raw;
use support::{AREAS, ovmf, paravisor};

/// A file of another builder.
const WRAPPED: &[u8] = include_bytes!("files/igvm-wrap-0.2.6.igvm");

/// `sev-snp-measure --mode snp --vcpus N --vcpu-type MODEL --ovmf small.fd` of the firmware of `support`.
#[test]
fn sev_snp_measure_says_the_same_of_plain_launches() {
    let image = ovmf(Some(&AREAS));
    for (count, model, expected) in [
        (
            1,
            "EPYC-v4",
            "f78948507571486ec503d65bdbbf1ccab1d1558a24a04d46bf19549b04c06b8d974923357630865789d020b27fc30efa",
        ),
        (
            4,
            "EPYC-v4",
            "dbbd21ef8df42753d337f3ba9ab9cde8b881e6e3073f9125600b83b82c5cb57d3ab09731e6294891761b3921ac2787eb",
        ),
        (
            2,
            "EPYC-Milan",
            "facdebbe2c3df97d3e32a7f5612a491c6a07154cfda3e051bce9fe6aa1d3f7c04c76b010ed3322a9c9d92d8b8dc4dc2f",
        ),
        (
            64,
            "EPYC-Genoa",
            "6a4853e428ccfd46b9af3338b4882c4c17d71acdc8005642dafba88b96a23d6e62fb1599fb96fc7c0d352e8ef37ec18b",
        ),
        (
            1,
            "EPYC-Turin",
            "97fbc36a1b6c8d400e2f29e5dc1da752c0e1787fb5bf8e4b332a9971857967a1d2cd0b9db190837cb6d1797356ac4bd1",
        ),
    ] {
        let processors = Processors {
            count,
            signature: Some(signature_of(model).unwrap()),
        };
        let digest = plain::launch_digest(&image, processors, &mut quietly).unwrap();
        assert_eq!(hex(&digest), expected, "{count} {model}");
    }
}

/// Images for SEV-SNP: ours, with and without firmware and for another loader, and one of another builder.
fn images() -> Vec<(&'static str, Vec<u8>)> {
    let (elf, firmware) = (paravisor(), ovmf(Some(&AREAS)));
    let program = Program::parse(&elf).unwrap();
    let firmware = Firmware::parse(&firmware).unwrap();
    let build = |firmware, target| {
        let options = Options {
            target,
            ..Options::default()
        };
        image::build(&program, firmware, None, &options)
            .unwrap()
            .bytes
    };
    use igvm_build::target::Target::{HyperV, Qemu};
    vec![
        ("with firmware", build(Some(&firmware), Qemu)),
        ("without firmware", build(None, Qemu)),
        ("for Hyper-V", build(Some(&firmware), HyperV)),
        ("of igvm-wrap", WRAPPED.to_vec()),
        ("by hand", Raw::snp().bytes()),
    ]
}

/// The crate goes by the file, VMSAs included.
#[test]
fn the_igvm_crate_says_the_same_of_igvm_files() {
    let as_written = Loader::AsWritten {
        native_zeroes: false,
    };
    for (name, bytes) in images() {
        let file = File::read(&bytes).unwrap();
        let ours = launch_digest(&file, as_written, &mut quietly).unwrap();
        let mask = file.mask_of(IgvmPlatformType::SEV_SNP).unwrap();
        let parsed = IgvmFile::new_from_binary(&bytes, None).unwrap();
        let theirs =
            generate_snp_measurement(parsed.initializations(), parsed.directives(), mask).unwrap();
        assert_eq!(hex(&ours), hex(&theirs), "{name}");
        // Our images are the same in either order; igvm-wrap puts the VMSA first.
        let qemu = Loader::Qemu(Processors::default());
        let on_qemu = launch_digest(&file, qemu, &mut quietly).unwrap();
        let ordered = !["of igvm-wrap", "for Hyper-V"].contains(&name);
        assert_eq!(on_qemu == ours, ordered, "{name}");
    }
    let bytes = Raw::tdx().bytes();
    let file = File::read(&bytes).unwrap();
    let parsed = IgvmFile::new_from_binary(&bytes, None).unwrap();
    let theirs = generate_tdx_measurement(parsed.directives(), 4).unwrap();
    assert_eq!(tdx::mrtd(&file, &mut quietly).unwrap(), theirs);
}

#[test]
fn a_file_of_another_builder_is_shown_checked_and_used() {
    let text = show(WRAPPED).unwrap();
    for expected in [
        "IGVM version 2, 83 headers",
        "native, mask 0x1, highest VTL 2",
        "SEV-SNP, mask 0x2, highest VTL 2, shared from 0x0, policy 0x30000",
        "rip 0xfff0",
        "0x00000080d000..0x00000080e000      1 × 4 KiB  secrets  [SEV-SNP]",
    ] {
        assert!(text.contains(expected), "{expected} in\n{text}");
    }
    let problems = check(WRAPPED, Target::default());
    let rules: Vec<Rule> = problems.iter().map(|problem| problem.rule).collect();
    // Natively it starts in the reset state, on purpose.
    assert_eq!(rules, [Rule::QemuNoContext, Rule::KvmVmsaOrder]);
    assert!(loads(&problems));
    assert_eq!(firmware::of_igvm(WRAPPED).unwrap(), ovmf(Some(&AREAS)));
}

/// Bytes of hexadecimal digits, last one first, as the format has numbers.
fn number(digits: &str) -> [u8; 72] {
    let mut field = [0; 72];
    for (index, byte) in field.iter_mut().take(48).enumerate() {
        let at = digits.len() - 2 * (index + 1);
        *byte = u8::from_str_radix(&digits[at..at + 2], 16).unwrap();
    }
    field
}

/// `snp-create-id-block` of the same package, with keys whose bytes are all 1 and all 2 and a digest whose
/// bytes are all 7: the same block and digests of keys; its signatures, which are different every time, hold.
#[test]
fn snp_create_id_block_makes_the_same_block() {
    let key = |seed| SigningKey::from_slice(&[seed; 48]).unwrap();
    let keys = Keys {
        id: key(1),
        author: Some(key(2)),
    };
    let mut signed = sign(&[7; 48], 0x3_0000, 1, &Identity::default(), &keys);
    let block = [
        "07".repeat(48),
        "00".repeat(32),
        "0100000000000000".into(),
        "0000030000000000".into(),
    ];
    assert_eq!(hex(&signed.for_qemu().0), block.concat());
    let (id, author) = signed.key_digests();
    assert_eq!(
        hex(&id),
        "070fb0a1cdfa094726c80f5a9cb4a5d0a8bb5195225d026f6102e04f6e676bbbc214e4c477f8ade7c2b37d0a470a33dd"
    );
    assert_eq!(
        hex(&author.unwrap()),
        "88e72344ccbedcafc0468a2fa0d26bf8b76595347a4620fe597169f2451298b7d0b92d917ff81bf380ffbf325a216a64"
    );
    let header = &mut signed.header;
    assert_eq!(verify(header, 0x3_0000), Ok(()));
    header.id_key_signature.r_comp = number(
        "bdbd3684292a157975a988613cd76a61029a51633f30a75e903c708f84769b685d8462c9a359d3799fde161a7282fc68",
    );
    header.id_key_signature.s_comp = number(
        "6060d0cdb94c60ac6cd4eec0ef634ae51554b619a45889d74fa0a4a3f959f47e4e4b00828425eab0765ce7a8b4a304a1",
    );
    header.author_key_signature.r_comp = number(
        "6a9dc044c623ea073bd8e73cb0e832b26d68b9c328ce7c64f66340998f4c790dc3bde45479e6cbd272edc48ce07c887f",
    );
    header.author_key_signature.s_comp = number(
        "481a71b17995297ca1432fa53375a32d4c3493bc8d1a1d3631a156231319ad5a0c3c7c35db04d2a301a4f40400ea6de9",
    );
    assert_eq!(verify(header, 0x3_0000), Ok(()));
    assert_eq!(verify(header, 0x3_0001), Err(Refusal::Signature));
    header.author_key_signature.s_comp[0] ^= 1;
    assert_eq!(verify(header, 0x3_0000), Err(Refusal::AuthorSignature));
}
