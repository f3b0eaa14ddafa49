//! What a firmware is handed, looked at before it is launched: lists of signatures, and programs.
//!
//! A firmware that cannot read its keys says so to nobody and starts whatever it is told to. So what is no
//! list of signatures as EDK2 takes one (`CheckSignatureListFormat`, of its authenticated variables), or no
//! program for the processor, is refused when the image is built.

use object::LittleEndian as LE;
use object::pe;
use object::read::pe::ImageNtHeaders as _;
use protocols::guid::Guid;
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned, little_endian::U32};

use crate::error::Error;

/// Head of a list (UEFI, "EFI_SIGNATURE_LIST"). Behind it comes a header that no type has, then the
/// signatures, all of the same size.
#[derive(FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct ListHead {
    kind: Guid,
    /// Of all of it, in bytes.
    list_size: U32,
    header_size: U32,
    /// Of each signature, with the GUID of its owner in front of it.
    signature_size: U32,
}

/// Bytes of the owner of a signature.
const OWNER: usize = size_of::<Guid>();

/// Kinds of signatures (UEFI, "EFI_SIGNATURE_DATA"), with the bytes of one if they do not vary.
const KINDS: [(Guid, Option<usize>); 12] = [
    (X509, None),
    // SHA-256, SHA-1, SHA-224, SHA-384, SHA-512.
    (
        Guid::from_text("c1c41626-504c-4092-aca9-41f936934328"),
        Some(32),
    ),
    (
        Guid::from_text("826ca512-cf10-4ac9-b187-be01496631bd"),
        Some(20),
    ),
    (
        Guid::from_text("0b6e5233-a65c-44c9-9407-d9ab83bfc8bd"),
        Some(28),
    ),
    (
        Guid::from_text("ff3e5307-9fd0-48c9-85f1-8ad56c701e01"),
        Some(48),
    ),
    (
        Guid::from_text("093e0fae-a6c4-4f50-9f1b-d41e2b89c19a"),
        Some(64),
    ),
    // RSA-2048: a key, a signature over SHA-256, over SHA-1.
    (
        Guid::from_text("3c5766e8-269c-4e34-aa14-ed776e85b3b6"),
        Some(256),
    ),
    (
        Guid::from_text("e2b36190-879b-4a3d-ad8d-f2e7bba32784"),
        Some(256),
    ),
    (
        Guid::from_text("67f8444f-8743-48f1-a328-1eaab8736080"),
        Some(256),
    ),
    // Hashes of certificates, with a time: SHA-256, SHA-384, SHA-512.
    (
        Guid::from_text("3bd2a492-96c0-4079-b420-fcf98ef103ed"),
        Some(48),
    ),
    (
        Guid::from_text("7076876e-80c2-4ee6-aad2-28b349a6865b"),
        Some(64),
    ),
    (
        Guid::from_text("446dbf63-2502-4cda-bcfa-2465d2b0fe9d"),
        Some(80),
    ),
];
/// A certificate.
const X509: Guid = Guid::from_text("a5c059a1-94e4-4aa7-87b5-ab155c2bf072");
/// What a certificate begins with: a SEQUENCE in DER.
const SEQUENCE: u8 = 0x30;

/// Checks lists of signatures, one behind the other; how many signatures there are.
///
/// # Errors
///
/// [`Error::NotSignatures`].
pub fn signatures(bytes: &[u8]) -> Result<usize, Error> {
    if let Some(reason) = slip(bytes) {
        return Err(bad(0, reason));
    }
    let mut count = 0;
    let mut at = 0;
    while at < bytes.len() || at == 0 {
        let (found, end) = list(bytes, at)?;
        count += found;
        at = end;
    }
    Ok(count)
}

/// The list at `at`: its signatures, and where it ends.
fn list(bytes: &[u8], at: usize) -> Result<(usize, usize), Error> {
    let rest = bytes.get(at..).unwrap_or_default();
    let (head, _) = ListHead::ref_from_prefix(rest).map_err(|_| {
        let head = size_of::<ListHead>();
        bad(
            at,
            format!("{} bytes, a list begins with {head}", rest.len()),
        )
    })?;
    let Some((_, fixed)) = KINDS.iter().find(|(kind, _)| *kind == head.kind) else {
        return Err(bad(
            at,
            format!("unknown kind of signature {:?}", head.kind),
        ));
    };
    let [list_size, header_size, size] =
        [head.list_size, head.header_size, head.signature_size].map(|size| size.get() as usize);
    let first = size_of::<ListHead>();
    let entries = rest.get(first..list_size).ok_or_else(|| {
        let text = format!("a list of {list_size} bytes, {} are left", rest.len());
        bad(at + 16, text)
    })?;
    if header_size != 0 {
        return Err(bad(at + 20, format!("a header of {header_size} bytes")));
    }
    let fits = match fixed {
        Some(fixed) => size == OWNER + fixed,
        None => size > OWNER,
    };
    if !fits || entries.is_empty() || !entries.len().is_multiple_of(size) {
        let text = format!("signatures of {size} bytes in {}", entries.len());
        return Err(bad(at + 24, text));
    }
    for (index, entry) in entries.chunks_exact(size).enumerate() {
        if head.kind == X509 && entry.get(OWNER) != Some(&SEQUENCE) {
            let text = "a certificate that is not in DER".to_owned();
            return Err(bad(at + first + index * size + OWNER, text));
        }
    }
    Ok((entries.len() / size, at + list_size))
}

/// What is likely to be named in place of a list.
fn slip(bytes: &[u8]) -> Option<String> {
    /// Where an update of a variable has the revision and type of its certificate, and which (UEFI,
    /// "EFI_VARIABLE_AUTHENTICATION_2": a time and a length come first).
    const UPDATE: (std::ops::Range<usize>, [u8; 4]) = (20..24, [0x00, 0x02, 0xF1, 0x0E]);
    let what = if bytes.starts_with(b"-----BEGIN") {
        "a certificate or key in PEM"
    } else if bytes.starts_with(&[SEQUENCE, 0x82]) {
        "a certificate by itself, in DER"
    } else if bytes.get(UPDATE.0) == Some(&UPDATE.1) {
        "a signed update of a variable (.auth)"
    } else {
        return None;
    };
    Some(what.to_owned())
}

fn bad(offset: usize, reason: String) -> Error {
    Error::NotSignatures { offset, reason }
}

/// Checks a program: one in PE for x86-64 that a firmware starts as an application.
///
/// # Errors
///
/// [`Error::NotEfiProgram`].
pub fn program(bytes: &[u8]) -> Result<(), Error> {
    let bad = |offset: usize, reason: String| Err(Error::NotEfiProgram { offset, reason });
    let Ok(dos) = pe::ImageDosHeader::parse(bytes) else {
        return bad(0, "expected the bytes MZ and a header of 64".to_owned());
    };
    let at = dos.nt_headers_offset();
    let mut next = u64::from(at);
    let at = at as usize;
    let nt = match pe::ImageNtHeaders64::parse(bytes, &mut next) {
        Ok((nt, _)) => nt,
        Err(error) => return bad(at, error.to_string()),
    };
    let machine = nt.file_header.machine.get(LE);
    if machine != pe::IMAGE_FILE_MACHINE_AMD64 {
        return bad(at + 4, format!("for the machine {machine:#x}"));
    }
    let subsystem = nt.optional_header.subsystem.get(LE);
    if subsystem != pe::IMAGE_SUBSYSTEM_EFI_APPLICATION {
        return bad(at + 24 + 68, format!("for the subsystem {subsystem}"));
    }
    Ok(())
}
