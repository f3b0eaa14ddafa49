//! Why an IGVM file was not taken.

/// Why a file was not taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FileError {
    /// The fixed header is cut off, or it is not that of an IGVM file of version 1.
    Header(&'static str),
    /// The checksum does not match.
    Checksum {
        /// What the header says.
        stored: u32,
        /// What it is.
        computed: u32,
    },
    /// A variable header leaves its section.
    Truncated,
    /// The types of variable headers are not in order.
    Order(u32),
    /// QEMU's loader does not know this type.
    UnknownType(u32),
    /// The body of this type has another length.
    BodyLength(u32),
    /// A platform's mask is not one bit, or a bit or a platform comes twice.
    Platform(u32),
    /// The file is not for SEV-SNP, nor for TDX unless SEV-SNP was asked for, or not as this machine
    /// is one.
    NotForSnp,
    /// The native platform was asked for, and the file is not for it.
    NotForNative,
    /// TDX was asked for, and the file is not for it.
    NotForTdx,
    /// A processor state, which a TDX guest does not have.
    ContextForTdx,
    /// A reserved field of this header type is not zero.
    Reserved(u32),
    /// An address or size is not whole pages, or a range wraps.
    Misaligned(u64),
    /// Data lies outside the file's data.
    DataOutside(u32),
    /// A page with flags or of a type that is not supported.
    PageFlags(u64),
    /// Two launched ranges overlap here.
    Overlap(u64),
    /// A parameter area is not declared, declared twice, already inserted or too small.
    Area(u32),
    /// The launch policy comes twice.
    PolicyTwice,
    /// The ID block comes twice.
    IdBlockTwice,
}

impl core::fmt::Display for FileError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Header(what) => write!(f, "fixed header: {what}"),
            Self::Checksum { stored, computed } => {
                write!(
                    f,
                    "checksum is {computed:#010x}, the header says {stored:#010x}"
                )
            }
            Self::Truncated => write!(f, "a variable header leaves its section"),
            Self::Order(kind) => write!(f, "header type {kind:#x} is out of order"),
            Self::UnknownType(kind) => write!(f, "header type {kind:#x} is not supported"),
            Self::BodyLength(kind) => write!(f, "header type {kind:#x} has a wrong length"),
            Self::Platform(mask) => write!(f, "platform mask {mask:#x} is wrong or used twice"),
            Self::NotForSnp => write!(f, "no SEV-SNP platform"),
            Self::NotForNative => write!(f, "no native platform"),
            Self::NotForTdx => write!(f, "no TDX platform"),
            Self::ContextForTdx => write!(f, "a processor state for TDX"),
            Self::Reserved(kind) => write!(f, "header type {kind:#x} has reserved bits set"),
            Self::Misaligned(value) => write!(f, "{value:#x} is not a range of whole pages"),
            Self::DataOutside(offset) => write!(f, "data at offset {offset:#x} is outside"),
            Self::PageFlags(gpa) => write!(f, "page {gpa:#x} has unsupported flags or type"),
            Self::Overlap(gpa) => write!(f, "page {gpa:#x} is launched twice"),
            Self::Area(index) => write!(f, "parameter area {index} is used wrongly"),
            Self::PolicyTwice => write!(f, "more than one launch policy"),
            Self::IdBlockTwice => write!(f, "more than one ID block"),
        }
    }
}
