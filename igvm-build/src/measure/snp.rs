//! The launch digest of an IGVM file on SEV-SNP.

use std::collections::BTreeMap;

use igvm_defs::{IgvmPageDataType, IgvmPlatformType};
use protocols::addr::PAGE_SIZE;
use protocols::measure::{Digest, PageType};
use protocols::ovmf::RESET_VECTOR;
use protocols::vmsa::{LAUNCH_GPA, SevFeatures, Vmsa};
use zerocopy::{FromBytes, IntoBytes};

use super::areas::Areas;
use super::order::launch_order;
use super::{Explain, Told};
use crate::error::Error;
use crate::file::{Content, File, Header, Problem, Rule};

/// The virtual processors of a launch by KVM, which measures the state of each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Processors {
    /// How many there are when the launch is finished.
    pub count: u16,
    /// What CPUID says of family, model and stepping: what a processor has in EDX after reset. Needed for
    /// processors that the file has no state for.
    pub signature: Option<u32>,
}

impl Default for Processors {
    /// One: what the guest starts itself is not measured.
    fn default() -> Self {
        Self {
            count: 1,
            signature: None,
        }
    }
}

/// Who launches, and in which order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loader {
    /// QEMU and KVM: pages in QEMU's order, VMSAs last and at KVM's address.
    Qemu(Processors),
    /// One that goes by the file, VMSAs included, and has the security processor fill pages of zeroes
    /// if `native_zeroes` is set.
    AsWritten {
        /// Whether a page without data is launched as [`PageType::ZERO`].
        native_zeroes: bool,
    },
}

/// The launch digest of `file`; `explain` is told each step.
///
/// # Errors
///
/// When the file is not for SEV-SNP, or something that is measured is not where the file says.
pub fn launch_digest(
    file: &File<'_>,
    loader: Loader,
    explain: Explain<'_>,
) -> Result<Digest, Error> {
    let mask = file
        .mask_of(IgvmPlatformType::SEV_SNP)
        .ok_or(Error::NoPlatform {
            platform: "SEV-SNP",
        })?;
    let applying: Vec<(usize, &Header<'_>)> = file
        .headers
        .iter()
        .enumerate()
        .filter(|(_, header)| header.content.mask().is_none_or(|own| own & mask != 0))
        .collect();
    let native_zeroes = matches!(
        loader,
        Loader::AsWritten {
            native_zeroes: true
        }
    );
    let ordered = match loader {
        Loader::Qemu(_) => launch_order(&applying),
        Loader::AsWritten { .. } => applying.into_iter().map(|(_, header)| header).collect(),
    };
    let mut areas = Areas::default();
    let mut digest = Told::new(explain);
    let mut contexts: BTreeMap<u16, (usize, &[u8])> = BTreeMap::new();
    for header in ordered {
        let offset = Some(header.offset);
        match &header.content {
            Content::Area(area) => areas.declare(header, area)?,
            Content::Parameter(parameter) => areas.write(header, parameter)?,
            Content::Insert(insert) => {
                let bytes = areas.insert(header, insert.parameter_area_index)?;
                for gpa in header.range(insert.gpa, bytes)?.step_by(PAGE_SIZE as usize) {
                    digest.add(offset, PageType::UNMEASURED, gpa, &[])?;
                }
            }
            Content::Page(page) => {
                let data = file.page_data(header, page)?;
                header.range(page.gpa, PAGE_SIZE)?;
                let page_type = match page.data_type {
                    // A page of the host's; QEMU knows no such thing and launches it.
                    _ if page.flags.shared() && !matches!(loader, Loader::Qemu(_)) => continue,
                    IgvmPageDataType::SECRETS => PageType::SECRETS,
                    IgvmPageDataType::CPUID_DATA | IgvmPageDataType::CPUID_XF => PageType::CPUID,
                    _ if page.flags.unmeasured() => PageType::UNMEASURED,
                    _ if native_zeroes && data.is_none() => PageType::ZERO,
                    _ => PageType::NORMAL,
                };
                digest.add(offset, page_type, page.gpa, data.unwrap_or_default())?;
            }
            Content::Context(context) => {
                let vmsa = file.data(header, context.file_offset, PAGE_SIZE)?;
                if let Loader::AsWritten { .. } = loader {
                    digest.add(offset, PageType::VMSA, context.gpa.get(), vmsa)?;
                } else if contexts
                    .insert(context.vp_index, (header.offset, vmsa))
                    .is_some()
                {
                    let found = format!("processor {} a second time", context.vp_index);
                    return Err(Problem::new(header.offset, Rule::ContextTwice, found).into());
                }
            }
            _ => {}
        }
    }
    if let Loader::Qemu(processors) = loader {
        add_vmsas(&mut digest, &contexts, processors)?;
    }
    Ok(digest.digest)
}

/// What KVM does when the launch is finished: each processor that there is, in order.
fn add_vmsas(
    digest: &mut Told<'_>,
    contexts: &BTreeMap<u16, (usize, &[u8])>,
    processors: Processors,
) -> Result<(), Error> {
    if let Some((index, (offset, _))) = contexts
        .last_key_value()
        .filter(|(index, _)| **index >= processors.count)
    {
        let found = format!("processor {index} of {}", processors.count);
        return Err(Problem::new(*offset, Rule::QemuProcessor, found).into());
    }
    // KVM has one set of features for all, the first processor's.
    let features = contexts
        .get(&0)
        .and_then(|(_, page)| Vmsa::read_from_bytes(page).ok())
        .map_or(SevFeatures::SNP_ACTIVE, |vmsa| vmsa.sev_features);
    for index in 0..processors.count {
        match contexts.get(&index) {
            Some((offset, page)) => digest.add(Some(*offset), PageType::VMSA, LAUNCH_GPA, page)?,
            None => {
                let signature = processors
                    .signature
                    .ok_or(Error::NoSignature { processor: index })?;
                let vmsa = reset_state(RESET_VECTOR, signature, features);
                digest.add(None, PageType::VMSA, LAUNCH_GPA, vmsa.as_bytes())?;
            }
        }
    }
    Ok(())
}

/// The state that QEMU gives a processor at reset, as KVM writes it into a VMSA (QEMU's `x86_cpu_reset`,
/// KVM's `sev_es_sync_vmsa`).
pub(super) fn reset_state(eip: u32, signature: u32, features: SevFeatures) -> Vmsa {
    let mut vmsa = Vmsa::at_reset(eip);
    // KVM turns the caches on, and machine checks for a guest with encrypted state.
    vmsa.cr0 = 0x10;
    vmsa.cr4 = 0x40;
    vmsa.rdx = signature.into();
    vmsa.sev_features = features;
    vmsa
}
