//! An IGVM file as it lies there: its fixed header and each variable header, with the offset of each.
//!
//! The `igvm` crate writes our images; it does not read what others hand us. It reads what it will
//! load, says nothing of offsets, and asserts where a file lies
//! ([decision 028](../../../docs/decisions/028-the-tool-reads-igvm-itself.md)). [`File::read`] takes any
//! file whose headers can be told apart, so that it can be shown; what else is wrong with it is
//! [`crate::check`]'s to say, and what stops a measurement [`crate::measure`]'s.
//!
//! Invariants of a [`File`]:
//!
//! 1. its headers are disjoint, in the order of the file, and each has the length of its type;
//! 2. it holds no memory but its headers, whose number the file's length bounds; data is borrowed;
//! 3. nothing that a header says about the file, such as where data lies, has been believed: ask
//!    [`File::data`].

use std::ops::Range;

use igvm_defs::{
    IGVM_FIXED_HEADER, IGVM_FIXED_HEADER_V2, IGVM_FORMAT_VERSION_1, IGVM_FORMAT_VERSION_2,
    IGVM_MAGIC_VALUE, IGVM_VHS_CORIM_DATA, IGVM_VHS_ERROR_RANGE, IGVM_VHS_GUEST_POLICY,
    IGVM_VHS_PAGE_DATA, IGVM_VHS_PAGE_TABLE_RELOCATION, IGVM_VHS_PARAMETER,
    IGVM_VHS_PARAMETER_AREA, IGVM_VHS_PARAMETER_INSERT, IGVM_VHS_RELOCATABLE_REGION,
    IGVM_VHS_REQUIRED_MEMORY, IGVM_VHS_SNP_ID_BLOCK, IGVM_VHS_SUPPORTED_PLATFORM,
    IGVM_VHS_VARIABLE_HEADER, IGVM_VHS_VP_CONTEXT, IgvmPlatformType,
    IgvmVariableHeaderType as Type,
};
use protocols::addr::PAGE_SIZE;
use zerocopy::{FromBytes, IntoBytes};

pub mod edit;
pub mod names;
pub mod rule;

pub use rule::{Problem, Rule, Weight};

/// The fixed header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fixed {
    /// Version of the format: 1 or 2.
    pub version: u32,
    /// Where the variable headers lie.
    pub headers: (usize, usize),
    /// How long the file says it is, in bytes.
    pub file_size: u32,
    /// The checksum in the file.
    pub checksum: u32,
    /// The checksum of what is there.
    pub computed_checksum: u32,
    /// Architecture and page size, from version 2 on.
    pub machine: Option<(u32, u32)>,
}

/// A variable header.
#[derive(Debug, Clone)]
pub struct Header<'a> {
    /// Where in the file.
    pub offset: usize,
    /// Its type.
    pub kind: Type,
    /// What the type says is in it.
    pub body: &'a [u8],
    /// The same, understood.
    pub content: Content,
}

/// What a variable header says.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Content {
    /// A platform that the file is for.
    Platform(IGVM_VHS_SUPPORTED_PLATFORM),
    /// The launch policy.
    Policy(IGVM_VHS_GUEST_POLICY),
    /// A region that may be moved.
    Relocation(IGVM_VHS_RELOCATABLE_REGION),
    /// Page tables to be changed when a region is moved.
    TableRelocation(IGVM_VHS_PAGE_TABLE_RELOCATION),
    /// A manifest of the platform (CoRIM), or its signature.
    Manifest(IGVM_VHS_CORIM_DATA),
    /// Memory for parameters.
    Area(IGVM_VHS_PARAMETER_AREA),
    /// A page.
    Page(IGVM_VHS_PAGE_DATA),
    /// Puts a parameter area into memory.
    Insert(IGVM_VHS_PARAMETER_INSERT),
    /// The state of a processor.
    Context(IGVM_VHS_VP_CONTEXT),
    /// Memory that has to be there.
    RequiredMemory(IGVM_VHS_REQUIRED_MEMORY),
    /// The ID block of SEV-SNP.
    IdBlock(Box<IGVM_VHS_SNP_ID_BLOCK>),
    /// Memory for reports of errors.
    ErrorRange(IGVM_VHS_ERROR_RANGE),
    /// A parameter that the host writes into an area; the type says which.
    Parameter(IGVM_VHS_PARAMETER),
    /// Something else.
    Other,
}

impl Content {
    /// Understands the body of a header; nothing if it has not the length of its type.
    fn of(kind: Type, body: &[u8]) -> Option<Self> {
        fn read<T: FromBytes>(body: &[u8], content: fn(T) -> Content) -> Option<Content> {
            T::read_from_bytes(body).ok().map(content)
        }
        match kind {
            Type::IGVM_VHT_SUPPORTED_PLATFORM => read(body, Self::Platform),
            Type::IGVM_VHT_GUEST_POLICY => read(body, Self::Policy),
            Type::IGVM_VHT_RELOCATABLE_REGION => read(body, Self::Relocation),
            Type::IGVM_VHT_PAGE_TABLE_RELOCATION_REGION => read(body, Self::TableRelocation),
            Type::IGVM_VHT_CORIM_DOCUMENT | Type::IGVM_VHT_CORIM_SIGNATURE => {
                read(body, Self::Manifest)
            }
            Type::IGVM_VHT_PARAMETER_AREA => read(body, Self::Area),
            Type::IGVM_VHT_PAGE_DATA => read(body, Self::Page),
            Type::IGVM_VHT_PARAMETER_INSERT => read(body, Self::Insert),
            Type::IGVM_VHT_VP_CONTEXT => read(body, Self::Context),
            Type::IGVM_VHT_REQUIRED_MEMORY => read(body, Self::RequiredMemory),
            Type::IGVM_VHT_SNP_ID_BLOCK => read(body, |block| Self::IdBlock(Box::new(block))),
            Type::IGVM_VHT_ERROR_RANGE => read(body, Self::ErrorRange),
            kind if names::is_parameter(kind) => read(body, Self::Parameter),
            _ => Some(Self::Other),
        }
    }

    /// The platforms it is for; nothing if it is for all.
    #[must_use]
    pub fn mask(&self) -> Option<u32> {
        match self {
            Self::Policy(header) => Some(header.compatibility_mask),
            Self::Relocation(header) => Some(header.compatibility_mask),
            Self::TableRelocation(header) => Some(header.compatibility_mask),
            Self::Manifest(header) => Some(header.compatibility_mask),
            Self::Page(header) => Some(header.compatibility_mask),
            Self::Insert(header) => Some(header.compatibility_mask),
            Self::Context(header) => Some(header.compatibility_mask),
            Self::RequiredMemory(header) => Some(header.compatibility_mask),
            Self::IdBlock(header) => Some(header.compatibility_mask),
            Self::ErrorRange(header) => Some(header.compatibility_mask),
            Self::Platform(_) | Self::Area(_) | Self::Parameter(_) | Self::Other => None,
        }
    }
}

/// A file.
#[derive(Debug, Clone)]
pub struct File<'a> {
    bytes: &'a [u8],
    /// The fixed header.
    pub fixed: Fixed,
    /// All variable headers.
    pub headers: Vec<Header<'a>>,
}

impl<'a> File<'a> {
    /// Reads the headers of a file.
    ///
    /// # Errors
    ///
    /// The first breach behind which headers cannot be told apart.
    pub fn read(bytes: &'a [u8]) -> Result<Self, Problem> {
        let fixed = Fixed::read(bytes)?;
        let (start, end) = fixed.headers;
        let mut headers = Vec::new();
        let mut at = start;
        while at < end {
            let (header, next) = Header::read(bytes, at, end)?;
            headers.push(header);
            at = next;
        }
        Ok(Self {
            bytes,
            fixed,
            headers,
        })
    }

    /// The whole file.
    #[must_use]
    pub const fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// `length` bytes of data that `header` says are at `offset`.
    ///
    /// # Errors
    ///
    /// When they are not all behind the headers and inside the file.
    pub fn data(&self, header: &Header<'_>, offset: u32, length: u64) -> Result<&'a [u8], Problem> {
        let range = usize::try_from(length)
            .ok()
            .and_then(|length| Some(offset as usize..(offset as usize).checked_add(length)?))
            .filter(|range| range.start >= self.fixed.headers.1);
        range
            .and_then(|range| self.bytes.get(range))
            .ok_or_else(|| {
                let found = format!(
                    "{length} bytes at {offset:#x} of data from {:#x} to {:#x}",
                    self.fixed.headers.1,
                    self.bytes.len()
                );
                Problem::new(header.offset, Rule::DataRange, found)
            })
    }

    /// The data of a page; nothing if the file leaves it out because it is zero.
    ///
    /// # Errors
    ///
    /// As [`File::data`]; and for a page of 2 MiB.
    pub fn page_data(
        &self,
        header: &Header<'_>,
        page: &IGVM_VHS_PAGE_DATA,
    ) -> Result<Option<&'a [u8]>, Problem> {
        if page.flags.is_2mb_page() {
            let found = format!("page {:#x} is flagged as 2 MiB", page.gpa);
            return Err(Problem::new(header.offset, Rule::PageSize, found));
        }
        match page.file_offset {
            0 => Ok(None),
            offset => self.data(header, offset, PAGE_SIZE).map(Some),
        }
    }

    /// The platforms of the file, each with its header.
    pub fn platforms(&self) -> impl Iterator<Item = (&Header<'a>, &IGVM_VHS_SUPPORTED_PLATFORM)> {
        self.headers
            .iter()
            .filter_map(|header| match &header.content {
                Content::Platform(platform) => Some((header, platform)),
                _ => None,
            })
    }

    /// The bit of a platform in masks, if the file is for it.
    #[must_use]
    pub fn mask_of(&self, kind: IgvmPlatformType) -> Option<u32> {
        self.platforms()
            .find(|(_, platform)| platform.platform_type == kind)
            .map(|(_, platform)| platform.compatibility_mask)
    }

    /// The headers that are for the platform with the bit `mask`, in the order of the file.
    pub fn of_platform(&self, mask: u32) -> impl Iterator<Item = &Header<'a>> {
        self.headers
            .iter()
            .filter(move |header| header.content.mask().is_none_or(|own| own & mask != 0))
    }

    /// The launch policy of a platform.
    #[must_use]
    pub fn policy(&self, mask: u32) -> Option<u64> {
        self.of_platform(mask)
            .find_map(|header| match &header.content {
                Content::Policy(policy) => Some(policy.policy),
                _ => None,
            })
    }
}

impl Fixed {
    fn read(bytes: &[u8]) -> Result<Self, Problem> {
        let broken = |offset, rule, found: String| Problem::new(offset, rule, found);
        let too_short = || broken(0, Rule::TooShort, format!("{} bytes", bytes.len()));
        let (first, _) = IGVM_FIXED_HEADER::read_from_prefix(bytes).map_err(|_| too_short())?;
        if first.magic != IGVM_MAGIC_VALUE {
            return Err(broken(0, Rule::Magic, format!("{:#010x}", first.magic)));
        }
        let (size, machine, zeroed) = match first.format_version {
            IGVM_FORMAT_VERSION_1 => {
                let zeroed = IGVM_FIXED_HEADER {
                    checksum: 0,
                    ..first
                };
                (
                    size_of::<IGVM_FIXED_HEADER>(),
                    None,
                    zeroed.as_bytes().to_vec(),
                )
            }
            IGVM_FORMAT_VERSION_2 => {
                let (second, _) =
                    IGVM_FIXED_HEADER_V2::read_from_prefix(bytes).map_err(|_| too_short())?;
                let zeroed = IGVM_FIXED_HEADER_V2 {
                    checksum: 0,
                    ..second
                };
                let machine = (second.architecture.0, second.page_size);
                (
                    size_of::<IGVM_FIXED_HEADER_V2>(),
                    Some(machine),
                    zeroed.as_bytes().to_vec(),
                )
            }
            version => return Err(broken(4, Rule::Version, format!("version {version}"))),
        };
        let start = first.variable_header_offset as usize;
        let end = start.saturating_add(first.variable_header_size as usize);
        let section = bytes
            .get(start..end)
            .filter(|_| start >= size && start.is_multiple_of(8))
            .ok_or_else(|| {
                let found = format!("{start:#x}..{end:#x} of {:#x}", bytes.len());
                broken(8, Rule::HeaderSection, found)
            })?;
        let mut checksum = crc32fast::Hasher::new();
        checksum.update(&zeroed);
        checksum.update(section);
        Ok(Self {
            version: first.format_version,
            headers: (start, end),
            file_size: first.total_file_size,
            checksum: first.checksum,
            computed_checksum: checksum.finalize(),
            machine,
        })
    }
}

impl<'a> Header<'a> {
    /// Reads the header at `at`, in a section that ends at `end`; gives where the next one is.
    fn read(bytes: &'a [u8], at: usize, end: usize) -> Result<(Self, usize), Problem> {
        let section = bytes.get(at..end).unwrap_or_default();
        let cut = |found: String| Problem::new(at, Rule::HeaderCut, found);
        let (head, rest) = IGVM_VHS_VARIABLE_HEADER::read_from_prefix(section)
            .map_err(|_| cut(format!("{} bytes are left", section.len())))?;
        let length = head.length as usize;
        let padded = length.checked_next_multiple_of(8);
        let body = rest
            .get(..length)
            .filter(|_| padded.is_some_and(|padded| padded <= rest.len()));
        let (Some(body), Some(padded)) = (body, padded) else {
            return Err(cut(format!(
                "{} of {length} bytes, {} are left",
                names::header(head.typ),
                rest.len()
            )));
        };
        let content = Content::of(head.typ, body).ok_or_else(|| {
            let found = format!("{} of {length} bytes", names::header(head.typ));
            Problem::new(at, Rule::BodyLength, found)
        })?;
        let header = Self {
            offset: at,
            kind: head.typ,
            body,
            content,
        };
        Ok((header, at + size_of::<IGVM_VHS_VARIABLE_HEADER>() + padded))
    }

    /// The addresses that it says, from a whole page on.
    ///
    /// # Errors
    ///
    /// When they do not begin with a page, or do not end below 2^64.
    pub fn range(&self, gpa: u64, bytes: u64) -> Result<Range<u64>, Problem> {
        if !gpa.is_multiple_of(PAGE_SIZE) {
            let found = format!("address {gpa:#x}");
            return Err(Problem::new(self.offset, Rule::PageAlignment, found));
        }
        let end = gpa.checked_add(bytes).ok_or_else(|| {
            let found = format!("{bytes:#x} bytes from {gpa:#x} on");
            Problem::new(self.offset, Rule::Wrap, found)
        })?;
        Ok(gpa..end)
    }

    /// The bytes between the body and the next header.
    #[must_use]
    pub fn padding(&self) -> Range<usize> {
        let end = self.offset + size_of::<IGVM_VHS_VARIABLE_HEADER>() + self.body.len();
        end..end.next_multiple_of(8)
    }
}
