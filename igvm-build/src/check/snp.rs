//! Rules of a launch on SEV-SNP, whoever launches.

use protocols::measure::Digest;

use super::Found;
use crate::file::{Content, File, Rule};
use crate::id_block::{self, Refusal};
use crate::measure::quietly;
use crate::measure::snp::{Loader, Processors, launch_digest};
use crate::sidecar::hex;

/// Bit of the policy that must be one.
const MUST_BE_ONE: u64 = 1 << 17;
/// Bits of the policy that mean nothing.
const RESERVED: u64 = !0 << 26;

pub(super) fn check(file: &File<'_>, mask: u32, qemu: bool, found: &mut Found) {
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
        if index == 1 {
            found.at(header, Rule::IdBlockTwice, "a second ID block");
        }
        if index != 0 {
            continue;
        }
        // Other breaches may keep the file from being measured; they are reported as what they are.
        let digests: Vec<Digest> = loaders(file, mask, qemu)
            .into_iter()
            .filter_map(|loader| launch_digest(file, loader, &mut quietly).ok())
            .collect();
        if let Some(digest) = digests.first()
            && !digests.contains(&block.ld)
        {
            let text = format!("{}, the file has {}", hex(&block.ld), hex(digest));
            found.at(header, Rule::IdBlockDigest, text);
        }
        let policy = file.policy(mask).unwrap_or_default();
        if let Err(refusal) = id_block::verify(block, policy) {
            let text = match refusal {
                Refusal::Algorithm => "an algorithm other than ECDSA with P-384",
                Refusal::Key => "a key that is no point of P-384",
                Refusal::Signature => "the signature of the block",
                Refusal::AuthorSignature => "the author's signature of the ID key",
            };
            found.at(header, Rule::IdBlockSignature, text);
        }
    }
}

/// Those the block may be for: QEMU, with as many processors as the file has states for, and unless it has
/// to be QEMU, those that go by the file.
fn loaders(file: &File<'_>, mask: u32, qemu: bool) -> Vec<Loader> {
    let contexts = file
        .of_platform(mask)
        .filter(|header| matches!(header.content, Content::Context(_)))
        .count();
    let mut loaders = vec![Loader::Qemu(Processors {
        count: u16::try_from(contexts).unwrap_or(u16::MAX),
        signature: None,
    })];
    if !qemu {
        loaders.extend([false, true].map(|native_zeroes| Loader::AsWritten { native_zeroes }));
    }
    loaders
}
