//! The launch digest of an OVMF image that QEMU launches on SEV-SNP by itself, without IGVM.
//!
//! The image's pages come first, ascending; then the areas of its SEV metadata in their order; then a VMSA
//! for each processor (QEMU `target/i386/sev.c`, KVM `snp_launch_update_vmsa`).

use protocols::addr::PAGE_SIZE;
use protocols::measure::{Digest, PageType};
use protocols::ovmf::{Metadata, RESET_VECTOR, SectionKind};
use protocols::vmsa::{LAUNCH_GPA, SevFeatures};
use zerocopy::IntoBytes;

use super::snp::{Processors, reset_state};
use super::{Explain, Told};
use crate::error::Error;
use crate::firmware;
use crate::flat::FLAT_END;

/// The launch digest of `image`; `explain` is told each step.
///
/// # Errors
///
/// When the image is no OVMF image with SEV metadata, or the signature of the processors is not given.
pub fn launch_digest(
    image: &[u8],
    processors: Processors,
    explain: Explain<'_>,
) -> Result<Digest, Error> {
    firmware::check_size(image)?;
    let metadata = firmware::metadata(image)?;
    let signature = processors
        .signature
        .ok_or(Error::NoSignature { processor: 0 })?;
    let mut digest = Told::new(explain);
    let start = FLAT_END - image.len() as u64;
    for (gpa, page) in (start..)
        .step_by(PAGE_SIZE as usize)
        .zip(image.chunks(PAGE_SIZE as usize))
    {
        digest.add(None, PageType::NORMAL, gpa, page)?;
    }
    add_areas(&mut digest, &metadata)?;
    let further = metadata.ap_reset_eip.ok_or(Error::NoSevMetadata {
        missing: "reset vector for further processors",
    })?;
    for index in 0..processors.count {
        let eip = if index == 0 { RESET_VECTOR } else { further };
        let vmsa = reset_state(eip, signature, SevFeatures::SNP_ACTIVE);
        digest.add(None, PageType::VMSA, LAUNCH_GPA, vmsa.as_bytes())?;
    }
    Ok(digest.digest)
}

fn add_areas(digest: &mut Told<'_>, metadata: &Metadata<'_>) -> Result<(), Error> {
    for area in metadata.sections {
        let page_type = match area.section_kind() {
            SectionKind::SECRETS => PageType::SECRETS,
            SectionKind::CPUID => PageType::CPUID,
            // Hashes of a kernel are not given here, so QEMU leaves their page zero as well.
            _ => PageType::ZERO,
        };
        let (gpa, size) = (u64::from(area.gpa.get()), u64::from(area.size.get()));
        for gpa in (gpa..gpa + size).step_by(PAGE_SIZE as usize) {
            digest.add(None, page_type, gpa, &[])?;
        }
    }
    Ok(())
}
