//! What the image hands to the firmware: the keys of secure boot and a kernel.
//!
//! OVMF (2025.11 and newer) has an area in which it looks for a list of hand-off blocks, each of which names
//! data in memory: lists of signatures for PK, KEK, db and dbx, an EFI program to be started as the kernel.
//! The data is launched and measured with the image, behind the paravisor's region: first the page with the
//! list, then each piece of data from a page of its own on. The paravisor grants all of it to the guest and
//! copies the list to the firmware's area. Only on SEV-SNP: TDVF has no such area, and natively nobody
//! measures.

use protocols::addr::PAGE_SIZE;
use protocols::hob::{Header, HobType, IgvmData, IgvmDataKind};
use zerocopy::IntoBytes;

use crate::efi;
use crate::error::Error;
use crate::firmware::Firmware;
use crate::layout::REGION_END;

/// Where the list lies.
pub const DATA_GPA: u64 = REGION_END;
/// Most data, in bytes: what a guest of 1 GiB has left of it above the paravisor, with room for itself.
pub const MAX_BYTES: usize = 128 << 20;

/// One piece of data, of which the firmware can make something: signatures, or a program.
#[derive(Debug, Clone, Copy)]
pub struct Item<'a> {
    kind: IgvmDataKind,
    bytes: &'a [u8],
}

impl<'a> Item<'a> {
    /// Takes bytes for what they should be.
    ///
    /// # Errors
    ///
    /// [`Error::NotSignatures`] or [`Error::NotEfiProgram`], when they are something else; [`Error::BadData`]
    /// for more than one platform key.
    pub fn new(kind: IgvmDataKind, bytes: &'a [u8]) -> Result<Self, Error> {
        match kind {
            IgvmDataKind::SHIM | IgvmDataKind::KERNEL => efi::program(bytes)?,
            _ => {
                let count = efi::signatures(bytes)?;
                if kind == IgvmDataKind::PK && count != 1 {
                    let reason = format!("{count} platform keys; a firmware takes one");
                    return Err(Error::BadData { reason });
                }
            }
        }
        Ok(Self { kind, bytes })
    }
}

/// The pages of list and data, in order; none if there is no data.
///
/// # Errors
///
/// [`Error::NoDataArea`] when there is data and no firmware that takes it; [`Error::BadData`] when a piece
/// comes twice, or there is too much.
pub fn pages(items: &[Item<'_>], firmware: Option<&Firmware<'_>>) -> Result<Vec<Vec<u8>>, Error> {
    if items.is_empty() {
        return Ok(Vec::new());
    }
    if firmware.is_none_or(|firmware| firmware.igvm_hob_gpa() == 0) {
        return Err(Error::NoDataArea);
    }
    let name = |item: &Item<'_>| item.kind.name().unwrap_or("unknown");
    let bad = |reason: String| Err(Error::BadData { reason });
    let total: usize = items.iter().map(|item| item.bytes.len()).sum();
    if total > MAX_BYTES {
        return bad(format!("{total} bytes, at most {MAX_BYTES}"));
    }
    let mut list = Vec::new();
    let mut data = Vec::new();
    for (index, item) in items.iter().enumerate() {
        if items[..index].iter().any(|other| other.kind == item.kind) {
            return bad(format!("{} comes twice", name(item)));
        }
        // The first page is the list's; five kinds fit in it many times.
        let gpa = DATA_GPA + (1 + data.len() as u64) * PAGE_SIZE;
        let block = IgvmData::new(item.kind, gpa, item.bytes.len() as u64);
        list.extend_from_slice(block.as_bytes());
        data.extend(item.bytes.chunks(PAGE_SIZE as usize).map(<[u8]>::to_vec));
    }
    let end = Header {
        kind: HobType::END.0,
        length: size_of::<Header>() as u16,
        reserved: 0,
    };
    list.extend_from_slice(end.as_bytes());
    let mut pages = vec![list];
    pages.append(&mut data);
    Ok(pages)
}
