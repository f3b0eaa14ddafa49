//! Adds a header to a file, or takes headers out, and changes nothing else.
//!
//! What lies behind the headers moves, so every offset into the file's data is moved with it; length
//! and checksum are computed anew. All other bytes stay as whoever built the file wrote them.

use std::mem::offset_of;
use std::ops::Range;

use igvm_defs::{
    IGVM_FIXED_HEADER, IGVM_VHS_CORIM_DATA, IGVM_VHS_PAGE_DATA, IGVM_VHS_PARAMETER_AREA,
    IGVM_VHS_VARIABLE_HEADER, IGVM_VHS_VP_CONTEXT, IgvmVariableHeaderType as Type,
};
use zerocopy::IntoBytes;

use super::{File, Header, Problem, Rule, names};

/// The file without the headers that `unwanted` chooses, and with `added` (type and body) as its last one.
///
/// # Errors
///
/// When a header has offsets that this tool does not know, or the file grows beyond 4 GiB.
pub fn replace(
    file: &File<'_>,
    unwanted: impl Fn(&Header<'_>) -> bool,
    added: Option<(Type, &[u8])>,
) -> Result<Vec<u8>, Problem> {
    let (start, end) = file.fixed.headers;
    let mut section = Vec::with_capacity(end - start + 1024);
    let mut offsets = Vec::new();
    for header in file.headers.iter().filter(|header| !unwanted(header)) {
        let at = section.len();
        section.extend_from_slice(whole(file, header));
        if let Some(offset) = data_offset(header)? {
            let body = at + size_of::<IGVM_VHS_VARIABLE_HEADER>();
            offsets.push((header.offset, body + offset..body + offset + 4));
        }
    }
    if let Some((typ, body)) = added {
        let length = body.len() as u32;
        section.extend_from_slice(IGVM_VHS_VARIABLE_HEADER { typ, length }.as_bytes());
        section.extend_from_slice(body);
        section.resize(section.len().next_multiple_of(8), 0);
    }
    for (header, place) in offsets {
        move_offset(&mut section, header, place, end, start)?;
    }
    let data = file.bytes.get(end..).unwrap_or_default();
    let mut bytes = file.bytes.get(..start).unwrap_or_default().to_vec();
    bytes.extend_from_slice(&section);
    bytes.extend_from_slice(data);
    let too_long = || Problem::new(16, Rule::FileLength, format!("{} bytes", bytes.len()));
    let size = u32::try_from(bytes.len()).map_err(|_| too_long())?;
    put(
        &mut bytes,
        offset_of!(IGVM_FIXED_HEADER, variable_header_size),
        section.len() as u32,
    );
    put(
        &mut bytes,
        offset_of!(IGVM_FIXED_HEADER, total_file_size),
        size,
    );
    seal(&mut bytes)?;
    Ok(bytes)
}

/// Puts the right checksum into a file.
///
/// # Errors
///
/// When it cannot be read.
pub fn seal(bytes: &mut [u8]) -> Result<(), Problem> {
    let checksum = File::read(bytes)?.fixed.computed_checksum;
    put(bytes, offset_of!(IGVM_FIXED_HEADER, checksum), checksum);
    Ok(())
}

/// The bytes of a header with its head and padding.
fn whole<'a>(file: &File<'a>, header: &Header<'_>) -> &'a [u8] {
    // `File::read` found all of it inside the file.
    let range = header.offset..header.padding().end;
    file.bytes.get(range).unwrap_or_default()
}

/// Where in its body a header has an offset into the file.
fn data_offset(header: &Header<'_>) -> Result<Option<usize>, Problem> {
    match header.kind {
        Type::IGVM_VHT_PAGE_DATA => Ok(Some(offset_of!(IGVM_VHS_PAGE_DATA, file_offset))),
        Type::IGVM_VHT_PARAMETER_AREA => Ok(Some(offset_of!(IGVM_VHS_PARAMETER_AREA, file_offset))),
        Type::IGVM_VHT_VP_CONTEXT => Ok(Some(offset_of!(IGVM_VHS_VP_CONTEXT, file_offset))),
        Type::IGVM_VHT_CORIM_DOCUMENT | Type::IGVM_VHT_CORIM_SIGNATURE => {
            Ok(Some(offset_of!(IGVM_VHS_CORIM_DATA, file_offset)))
        }
        kind if names::is_defined(kind) => Ok(None),
        kind => {
            let found = format!(
                "{}, which may have offsets to be moved",
                names::header(kind)
            );
            Err(Problem::new(header.offset, Rule::UnknownType, found))
        }
    }
}

/// Moves one offset from data behind `old_end` to data behind the new section.
fn move_offset(
    section: &mut [u8],
    header: usize,
    place: Range<usize>,
    old_end: usize,
    start: usize,
) -> Result<(), Problem> {
    let new_end = start + section.len();
    let Some(word) = section.get_mut(place) else {
        return Ok(());
    };
    let old = word
        .iter()
        .rev()
        .fold(0, |all, &byte| all << 8 | usize::from(byte));
    // Zero means that there is no data.
    if old == 0 {
        return Ok(());
    }
    let new = old
        .checked_sub(old_end)
        .and_then(|behind| u32::try_from(new_end.checked_add(behind)?).ok())
        .ok_or_else(|| Problem::new(header, Rule::DataRange, format!("data at {old:#x}")))?;
    word.copy_from_slice(&new.to_le_bytes());
    Ok(())
}

/// Writes a word into the fixed header.
fn put(bytes: &mut [u8], at: usize, value: u32) {
    if let Some(word) = bytes.get_mut(at..at + 4) {
        word.copy_from_slice(&value.to_le_bytes());
    }
}
