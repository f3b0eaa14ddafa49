//! What can be wrong with the files the tool is given.
//!
//! Every message is one line that says what was found, what was expected and what to do;
//! [`FileError`] puts the name of the file in front of it. The functions that work on bytes
//! return [`Error`]; only the functions that open files know names.

use std::path::{Path, PathBuf};

use crate::file::Problem;

/// A problem with the content of an input, in one line.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The paravisor would not start with these values.
    #[error("when memory is accepted: {0}")]
    Acceptance(#[source] protocols::launch::BadAcceptance),
    /// Memory is to be accepted on touch in an image without the platform that can.
    #[error(
        "touch accept: only the guest of a trust domain can have memory accepted on touch; build the image with a firmware for trust domains, too"
    )]
    TouchWithoutTd,
    /// The bytes are no ELF file the tool can use.
    #[error(
        "not a usable ELF file ({reason}); expected a static x86-64 executable, build it with `cargo xtask build`"
    )]
    NotAnElf {
        /// What the parser or the check said.
        reason: String,
    },
    /// A segment lies outside the region the image may use.
    #[error(
        "segment {start:#x}..{end:#x} lies outside {region_start:#x}..{region_end:#x}; check the linker script"
    )]
    SegmentOutsideRegion {
        /// First address of the segment.
        start: u64,
        /// Address behind the segment.
        end: u64,
        /// First address allowed.
        region_start: u64,
        /// Address behind the last one allowed.
        region_end: u64,
    },
    /// Two segments want the same page.
    #[error(
        "two segments share the page at {page:#x}; expected page-aligned segments, check the linker script"
    )]
    SegmentsOverlap {
        /// The page both segments cover.
        page: u64,
    },
    /// A segment may be written and executed.
    #[error(
        "segment {start:#x}..{end:#x} is both writable and executable; expected W^X, check the linker script"
    )]
    WritableCode {
        /// First address of the segment.
        start: u64,
        /// Address behind the segment.
        end: u64,
    },
    /// The entry point is not in an executable segment.
    #[error("entry point {entry:#x} is not in an executable segment; check the linker script")]
    EntryNotExecutable {
        /// The entry point of the ELF header.
        entry: u64,
    },
    /// No segment covers the reset vector of a trust domain.
    #[error(
        "no segment ends at 4 GiB; a trust domain starts at 0xfffffff0, check the linker script"
    )]
    NoResetVector,
    /// The ELF and what is placed behind it do not fit in the region.
    #[error(
        "needs {needed} bytes of a region of {available}; make the program smaller or the region larger"
    )]
    RegionTooSmall {
        /// Bytes needed.
        needed: u64,
        /// Bytes there are.
        available: u64,
    },
    /// A flat image has an impossible size.
    #[error(
        "flat image of {size} bytes; expected a multiple of 4096 between 4 KiB and 16 MiB, change --size"
    )]
    FlatSize {
        /// The size asked for.
        size: u64,
    },
    /// The firmware file has an impossible size.
    #[error(
        "firmware of {size} bytes; expected a multiple of 4096 up to 16 MiB, use OVMF.fd of ovmf-generic"
    )]
    FirmwareSize {
        /// Size of the file.
        size: u64,
    },
    /// The firmware has no table of GUIDs where OVMF has it.
    #[error(
        "not an OVMF image ({reason}); expected the table footer 32 bytes before the end, use OVMF.fd of ovmf-generic 2026.08 or newer"
    )]
    NotOvmf {
        /// What the parser said.
        reason: String,
    },
    /// The firmware does not say what SNP needs.
    #[error(
        "no {missing} in the firmware's table; expected an OVMF built for SEV-SNP with SVSM support, use OVMF.fd of ovmf-generic 2026.08 or newer"
    )]
    NoSevMetadata {
        /// The block that is missing.
        missing: &'static str,
    },
    /// The metadata of the firmware cannot be used.
    #[error("SEV metadata is not usable ({reason}); use OVMF.fd of ovmf-generic 2026.08 or newer")]
    BadSevMetadata {
        /// What is wrong with it.
        reason: String,
    },
    /// The firmware for trust domains cannot be used.
    #[error(
        "not a usable firmware for trust domains ({reason}); use OVMF.inteltdx.ms.fd of ovmf-inteltdx 2026.08 or newer"
    )]
    TdFirmware {
        /// What is wrong with it.
        reason: String,
    },
    /// The paravisor has no entry point for trust domains.
    #[error("no symbol {symbol} in the paravisor; build it with `cargo xtask build`")]
    NoTdStart {
        /// The symbol.
        symbol: &'static str,
    },
    /// The position of the C-bit is impossible.
    #[error("C-bit {c_bit}; expected 32 to 51, change --c-bit (51 for EPYC, 47 for the machine)")]
    CBit {
        /// The position asked for.
        c_bit: u32,
    },
    /// The IGVM file breaks a rule.
    #[error(transparent)]
    Igvm(#[from] Problem),
    /// The IGVM file could not be written.
    #[error("the image cannot be written as an IGVM file ({reason}); this is a bug of igvm-build")]
    Unwritable {
        /// What the writer said.
        reason: String,
    },
    /// The file has no directives for a platform.
    #[error("IGVM file without the platform {platform}; `igvm-build show` says which it has")]
    NoPlatform {
        /// The platform asked for.
        platform: &'static str,
    },
    /// An IGVM file has no firmware where one lies.
    #[error(
        "IGVM file without a page that ends at 4 GiB; expected a firmware, wrapped as it lies in a ROM"
    )]
    NoFirmware,
    /// The firmware takes no data from the image.
    #[error(
        "the firmware has no area for data of the image; expected OVMF 2025.11 or newer, use OVMF.fd of ovmf-generic"
    )]
    NoDataArea,
    /// Data for the firmware that cannot be handed over.
    #[error("data for the firmware: {reason}; change what --uki and the keys name")]
    BadData {
        /// What is wrong.
        reason: String,
    },
    /// What should be keys of secure boot is something else.
    #[error(
        "no list of EFI signatures (at offset {offset:#x}: {reason}); make one of a certificate with `cert-to-efi-sig-list`, of a program's hash with `hash-to-efi-sig-list`"
    )]
    NotSignatures {
        /// Where, in bytes.
        offset: usize,
        /// What is wrong there.
        reason: String,
    },
    /// What should be started by the firmware cannot be.
    #[error(
        "no EFI program for x86-64 (at offset {offset:#x}: {reason}); make a unified kernel image with `ukify build`"
    )]
    NotEfiProgram {
        /// Where, in bytes.
        offset: usize,
        /// What is wrong there.
        reason: String,
    },
    /// There is no launch policy to be signed.
    #[error("IGVM file without a launch policy for SEV-SNP; an ID block signs it with the digest")]
    NoPolicy,
    /// The bytes are no key that can sign.
    #[error(
        "not a private key on P-384 ({reason}); make one with `openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-384`"
    )]
    Key {
        /// What the parser said.
        reason: String,
    },
    /// A file asks for more than is measured.
    #[error("more than {limit} pages are launched; expected at most 4 GiB of them in an image")]
    TooManyPages {
        /// Most pages that are measured.
        limit: u64,
    },
    /// A processor is measured in its reset state, which depends on the CPU's model.
    #[error(
        "processor {processor} is measured as it is after reset, with the CPU's signature in EDX; give --vcpu-type or --vcpu-signature"
    )]
    NoSignature {
        /// The processor.
        processor: u16,
    },
}

/// An [`Error`] or an input/output error, with the file it is about.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FileError {
    /// The file could not be read.
    #[error("{}: cannot be read ({source}); expected {expected}", .file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// What it should have been and how to get it.
        expected: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file has more bytes than what it should be can have.
    #[error("{}: more than {limit} bytes{unless}; expected {expected}", .file.display())]
    TooLong {
        /// The file.
        file: PathBuf,
        /// Most bytes.
        limit: u64,
        /// What would be another limit, or nothing.
        unless: &'static str,
        /// What it should have been and how to get it.
        expected: &'static str,
    },
    /// The file could not be written.
    #[error("{}: cannot be written ({source}); check the directory given with --out", .file.display())]
    Write {
        /// The file.
        file: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The content of the file is wrong.
    #[error("{}: {source}", .file.display())]
    Content {
        /// The file.
        file: PathBuf,
        /// What is wrong.
        source: Error,
    },
}

impl FileError {
    /// Names the file an [`Error`] is about; made for `map_err`.
    pub fn content(file: &Path) -> impl FnOnce(Error) -> Self + '_ {
        move |source| Self::Content {
            file: file.to_owned(),
            source,
        }
    }
}
