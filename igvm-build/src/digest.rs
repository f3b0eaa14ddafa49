//! The measurements of a list of directives: launch digest of SEV-SNP, MRTD of a trust domain.
//!
//! The launch digest is computed from the directives alone, in the order in which QEMU and KVM measure them:
//! the order of the file, except that VMSAs come last (KVM measures them when the launch is
//! finished). That the rest is measured in file order holds for files that put parameter
//! inserts before pages, as ours do (see [`crate::image`]). MRTD is computed in the order of the file.

use std::collections::HashMap;

use igvm::IgvmDirectiveHeader as Directive;
use igvm_defs::IgvmPageDataType;
use protocols::addr::PAGE_SIZE;
use protocols::measure::{Digest, LaunchDigest, Mrtd, PageType};
use zerocopy::IntoBytes;

use crate::error::Error;

/// The launch digest of the directives that apply to the platform with the bit `mask`.
///
/// # Errors
///
/// When an inserted parameter area was not declared.
pub fn launch_digest(directives: &[Directive], mask: u32) -> Result<Digest, Error> {
    let mut digest = LaunchDigest::new();
    let mut contexts = Vec::new();
    let mut areas = HashMap::new();
    let applies = |directive: &&Directive| {
        directive
            .compatibility_mask()
            .is_none_or(|applies_to| applies_to & mask != 0)
    };
    for directive in directives.iter().filter(applies) {
        match directive {
            Directive::ParameterArea {
                number_of_bytes,
                parameter_area_index,
                ..
            } => {
                areas.insert(*parameter_area_index, *number_of_bytes);
            }
            Directive::ParameterInsert(insert) => {
                let index = insert.parameter_area_index;
                let bytes = areas.get(&index).ok_or_else(|| Error::NotIgvm {
                    reason: format!("parameter area {index} is inserted but not declared"),
                })?;
                for page in 0..bytes / PAGE_SIZE {
                    let gpa = insert.gpa.wrapping_add(page * PAGE_SIZE);
                    digest.add_page(PageType::UNMEASURED, gpa, &whole_page(&[]));
                }
            }
            // Shared pages are not part of the guest's private memory.
            Directive::PageData { flags, .. } if flags.shared() => {}
            Directive::PageData {
                gpa,
                flags,
                data_type,
                data,
                ..
            } => {
                let page_type = match *data_type {
                    IgvmPageDataType::SECRETS => PageType::SECRETS,
                    IgvmPageDataType::CPUID_DATA | IgvmPageDataType::CPUID_XF => PageType::CPUID,
                    _ if flags.unmeasured() => PageType::UNMEASURED,
                    _ => PageType::NORMAL,
                };
                digest.add_page(page_type, *gpa, &whole_page(data));
            }
            Directive::SnpVpContext { gpa, vmsa, .. } => contexts.push((*gpa, vmsa)),
            _ => {}
        }
    }
    for (gpa, vmsa) in contexts {
        digest.add_page(PageType::VMSA, gpa, &whole_page(vmsa.as_bytes()));
    }
    Ok(digest.value())
}

/// The measurement of the trust domain that the directives with the bit `mask` make: each page is added,
/// those that are measured are extended (IGVM, platform TDX).
///
/// # Errors
///
/// When an inserted parameter area was not declared.
pub fn mrtd(directives: &[Directive], mask: u32) -> Result<Digest, Error> {
    let mut mrtd = Mrtd::new();
    let mut areas = HashMap::new();
    let applies = |directive: &&Directive| {
        directive
            .compatibility_mask()
            .is_none_or(|applies_to| applies_to & mask != 0)
    };
    for directive in directives.iter().filter(applies) {
        match directive {
            Directive::ParameterArea {
                number_of_bytes,
                parameter_area_index,
                ..
            } => {
                areas.insert(*parameter_area_index, *number_of_bytes);
            }
            Directive::ParameterInsert(insert) => {
                let index = insert.parameter_area_index;
                let bytes = areas.get(&index).ok_or_else(|| Error::NotIgvm {
                    reason: format!("parameter area {index} is inserted but not declared"),
                })?;
                for page in 0..bytes / PAGE_SIZE {
                    mrtd.add_page(insert.gpa.wrapping_add(page * PAGE_SIZE), None);
                }
            }
            // Shared pages are not part of the trust domain.
            Directive::PageData { flags, .. } if flags.shared() => {}
            Directive::PageData {
                gpa, flags, data, ..
            } => {
                let page = whole_page(data);
                mrtd.add_page(*gpa, (!flags.unmeasured()).then_some(&page));
            }
            _ => {}
        }
    }
    Ok(mrtd.value())
}

/// `data` with the zeroes that the format leaves out.
fn whole_page(data: &[u8]) -> [u8; PAGE_SIZE as usize] {
    let mut page = [0; PAGE_SIZE as usize];
    for (to, from) in page.iter_mut().zip(data) {
        *to = *from;
    }
    page
}
