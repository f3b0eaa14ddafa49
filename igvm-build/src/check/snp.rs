//! Rules of a launch on SEV-SNP, whoever launches.

use igvm_defs::IGVM_VHS_SNP_ID_BLOCK;

use super::{Found, Target};
use crate::error::Error;
use crate::file::{Content, File, Header, Rule};
use crate::id_block::{self, Refusal};
use crate::measure::quietly;
use crate::measure::snp::{Loader, Processors, launch_digest};
use crate::sidecar::hex;

/// Bit of the policy that must be one.
const MUST_BE_ONE: u64 = 1 << 17;
/// Bits of the policy that mean nothing.
const RESERVED: u64 = !0 << 26;

pub(super) fn check(file: &File<'_>, mask: u32, target: Target, found: &mut Found) {
    let policies = file.of_platform(mask).filter_map(|header| {
        let Content::Policy(policy) = &header.content else {
            return None;
        };
        Some((header, policy.policy))
    });
    for (header, policy) in policies {
        if policy & MUST_BE_ONE == 0 || policy & RESERVED != 0 {
            found.at(header, Rule::SnpPolicy, format!("policy {policy:#x}"));
        }
    }
    let blocks = file.of_platform(mask).filter_map(|header| {
        let Content::IdBlock(block) = &header.content else {
            return None;
        };
        Some((header, block))
    });
    for (index, (header, block)) in blocks.enumerate() {
        match index {
            0 => check_block(file, mask, header, block, target, found),
            1 => found.at(header, Rule::IdBlockTwice, "a second ID block"),
            _ => {}
        }
    }
}

fn check_block(
    file: &File<'_>,
    mask: u32,
    header: &Header<'_>,
    block: &IGVM_VHS_SNP_ID_BLOCK,
    target: Target,
    found: &mut Found,
) {
    if block.author_key_enabled > 1 {
        let text = format!("flag {}", block.author_key_enabled);
        found.at(header, Rule::AuthorKeyFlag, text);
    }
    if let Some(text) = other_digest(file, mask, block, target) {
        found.at(header, Rule::IdBlockDigest, text);
    }
    let policy = file.policy(mask).unwrap_or_default();
    let read = if target.qemu {
        id_block::as_qemu_reads(block)
    } else {
        *block
    };
    if let Err(refusal) = id_block::verify(&read, policy) {
        let text = match refusal {
            Refusal::Algorithm => "an algorithm other than ECDSA with P-384",
            Refusal::Key => "a key that is no point of P-384",
            Refusal::Signature => "the signature of the block",
            Refusal::AuthorSignature => "the author's signature of the ID key",
        };
        found.at(header, Rule::IdBlockSignature, text);
    }
}

/// How the digest of the block and that of the launch differ; nothing if they do not, or if other breaches
/// keep the file from being measured. These are reported as what they are.
fn other_digest(
    file: &File<'_>,
    mask: u32,
    block: &IGVM_VHS_SNP_ID_BLOCK,
    target: Target,
) -> Option<String> {
    let mut first = None;
    let mut unknown = None;
    for loader in loaders(file, mask, target) {
        match launch_digest(file, loader, &mut quietly) {
            Ok(digest) if digest == block.ld => return None,
            Ok(digest) => first = first.or(Some(digest)),
            Err(Error::NoSignature { processor }) => unknown = Some(processor),
            Err(_) => {}
        }
    }
    let found = hex(&block.ld);
    match (first, unknown) {
        (Some(digest), _) => Some(format!("{found}, the file has {}", hex(&digest))),
        (None, Some(processor)) => Some(format!(
            "{found} is not to be compared: KVM measures {} processors and the file has no state of processor {processor}, \
             so the launch depends on the CPU (give --vcpu-type or --vcpu-signature)",
            target.processors.count
        )),
        (None, None) => None,
    }
}

/// Those the block may be for: QEMU with the processors that there are. Unless it has to be QEMU, also with
/// as many as the file has states for, and those that go by the file.
fn loaders(file: &File<'_>, mask: u32, target: Target) -> Vec<Loader> {
    let mut loaders = vec![Loader::Qemu(target.processors)];
    if !target.qemu {
        let contexts = file
            .of_platform(mask)
            .filter(|header| matches!(header.content, Content::Context(_)))
            .count();
        loaders.push(Loader::Qemu(Processors {
            count: u16::try_from(contexts).unwrap_or(u16::MAX),
            signature: None,
        }));
        loaders.extend([false, true].map(|native_zeroes| Loader::AsWritten { native_zeroes }));
    }
    loaders
}
