//! The variable headers of an IGVM file, one after the other.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::ops::Range;

use igvm_defs::{
    IGVM_NATIVE_PLATFORM_VERSION, IGVM_SEV_SNP_PLATFORM_VERSION, IGVM_TDX_PLATFORM_VERSION,
    IGVM_VHS_GUEST_POLICY, IGVM_VHS_PAGE_DATA, IGVM_VHS_PARAMETER, IGVM_VHS_PARAMETER_AREA,
    IGVM_VHS_PARAMETER_INSERT, IGVM_VHS_REQUIRED_MEMORY, IGVM_VHS_SNP_ID_BLOCK,
    IGVM_VHS_SUPPORTED_PLATFORM, IGVM_VHS_VARIABLE_HEADER, IGVM_VHS_VP_CONTEXT,
    IGVM_VHT_RANGE_DIRECTIVE, IGVM_VHT_RANGE_INIT, IGVM_VHT_RANGE_PLATFORM, IgvmPageDataType,
    IgvmPlatformType, IgvmVariableHeaderType as Type,
};
use zerocopy::FromBytes;

use super::{Directive, File, FileError, PageKind, Parameter};
use crate::settings::PlatformKind;
use crate::tdx;
use crate::types::{Gpa, PAGE_SIZE, PageSize};

/// Largest parameter area: far more than a memory map can need.
const MAX_AREA: u64 = 1 << 20;

/// Splits off one variable header: its type, its body, and what follows its padding.
pub fn split_header(bytes: &[u8]) -> Result<(u32, &[u8], &[u8]), FileError> {
    let (header, rest) =
        IGVM_VHS_VARIABLE_HEADER::read_from_prefix(bytes).map_err(|_| FileError::Truncated)?;
    let length = header.length as usize;
    let padded = length
        .checked_next_multiple_of(8)
        .ok_or(FileError::Truncated)?;
    let body = rest.get(..length).ok_or(FileError::Truncated)?;
    let next = rest.get(padded..).ok_or(FileError::Truncated)?;
    Ok((header.typ.0, body, next))
}

/// Sections of the variable headers, in their order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Section {
    Platform,
    Initialization,
    Directive,
}

/// State of a parameter area.
enum Area {
    Declared(u64),
    Inserted,
}

/// What was read so far.
pub struct Reader<'a> {
    bytes: &'a [u8],
    /// Where the file's data begins; offsets below point into headers.
    data_start: usize,
    section: Section,
    masks_seen: u32,
    platforms_seen: Vec<IgvmPlatformType>,
    wanted: Option<PlatformKind>,
    /// The platforms of the file that this machine could be, as their headers describe them.
    platforms: Vec<(PlatformKind, IGVM_VHS_SUPPORTED_PLATFORM)>,
    /// The platform that the file is read for and its mask, from behind the platforms on.
    chosen: Option<(PlatformKind, u32)>,
    policy: Option<u64>,
    id_block: Option<Box<IGVM_VHS_SNP_ID_BLOCK>>,
    areas: BTreeMap<u32, Area>,
    launched: Vec<Range<u64>>,
    directives: Vec<Directive<'a>>,
}

impl<'a> Reader<'a> {
    /// Nothing read yet of a file whose data begins at `data_start`.
    pub fn new(bytes: &'a [u8], data_start: usize, wanted: Option<PlatformKind>) -> Self {
        Self {
            bytes,
            data_start,
            section: Section::Platform,
            masks_seen: 0,
            platforms_seen: Vec::new(),
            wanted,
            platforms: Vec::new(),
            chosen: None,
            policy: None,
            id_block: None,
            areas: BTreeMap::new(),
            launched: Vec::new(),
            directives: Vec::new(),
        }
    }

    /// Takes the next header.
    pub fn header(&mut self, kind: u32, body: &[u8]) -> Result<(), FileError> {
        let section = if IGVM_VHT_RANGE_PLATFORM.contains(&kind) {
            Section::Platform
        } else if IGVM_VHT_RANGE_INIT.contains(&kind) {
            Section::Initialization
        } else if IGVM_VHT_RANGE_DIRECTIVE.contains(&kind) {
            Section::Directive
        } else {
            // Also types with the "optional" bit: QEMU refuses them all the same.
            return Err(FileError::UnknownType(kind));
        };
        if section < self.section {
            return Err(FileError::Order(kind));
        }
        if self.section == Section::Platform && section != Section::Platform {
            self.chosen = Some(self.choose()?);
        }
        self.section = section;
        match Type(kind) {
            Type::IGVM_VHT_SUPPORTED_PLATFORM => self.platform(&read(kind, body)?),
            Type::IGVM_VHT_GUEST_POLICY => self.policy(&read(kind, body)?),
            Type::IGVM_VHT_PARAMETER_AREA => self.area(&read(kind, body)?),
            Type::IGVM_VHT_PAGE_DATA => self.page(&read(kind, body)?),
            Type::IGVM_VHT_PARAMETER_INSERT => self.insert(&read(kind, body)?),
            Type::IGVM_VHT_VP_CONTEXT => self.context(&read(kind, body)?),
            Type::IGVM_VHT_REQUIRED_MEMORY => self.required_memory(&read(kind, body)?),
            Type::IGVM_VHT_SNP_ID_BLOCK => self.id_block(read(kind, body)?),
            Type::IGVM_VHT_VP_COUNT_PARAMETER => self.fill(
                &read(kind, body)?,
                Parameter::VpCount,
                size_of::<u32>() as u64,
            ),
            // How much room the map needs is known when it is made.
            Type::IGVM_VHT_MEMORY_MAP => self.fill(&read(kind, body)?, Parameter::MemoryMap, 0),
            _ => Err(FileError::UnknownType(kind)),
        }
    }

    fn platform(&mut self, header: &IGVM_VHS_SUPPORTED_PLATFORM) -> Result<(), FileError> {
        let mask = header.compatibility_mask;
        if mask.count_ones() != 1
            || self.masks_seen & mask != 0
            || self.platforms_seen.contains(&header.platform_type)
        {
            return Err(FileError::Platform(mask));
        }
        self.masks_seen |= mask;
        self.platforms_seen.push(header.platform_type);
        if let Some(kind) = PlatformKind::of(header.platform_type) {
            self.platforms.push((kind, *header));
        }
        Ok(())
    }

    /// The platform that the file is read for, and its mask.
    fn choose(&self) -> Result<(PlatformKind, u32), FileError> {
        let header = |wanted| self.platforms.iter().find(|(kind, _)| *kind == wanted);
        let kind = match self.wanted {
            Some(wanted) => wanted,
            None if header(PlatformKind::Snp).is_none() && header(PlatformKind::Tdx).is_some() => {
                PlatformKind::Tdx
            }
            None => PlatformKind::Snp,
        };
        match header(kind) {
            Some((_, header)) if kind.supports(header) => Ok((kind, header.compatibility_mask)),
            _ => Err(kind.missing()),
        }
    }

    /// Whether the file is read for a trust domain.
    fn is_for_td(&self) -> bool {
        self.chosen
            .is_some_and(|(kind, _)| kind == PlatformKind::Tdx)
    }

    /// Whether a header with this mask is for the platform that the file is read for.
    fn applies(&self, mask: u32) -> bool {
        self.chosen.is_some_and(|(_, chosen)| mask & chosen != 0)
    }

    fn policy(&mut self, header: &IGVM_VHS_GUEST_POLICY) -> Result<(), FileError> {
        if header.reserved != 0 {
            return Err(FileError::Reserved(Type::IGVM_VHT_GUEST_POLICY.0));
        }
        if self.applies(header.compatibility_mask) && self.policy.replace(header.policy).is_some() {
            return Err(FileError::PolicyTwice);
        }
        Ok(())
    }

    fn id_block(&mut self, header: IGVM_VHS_SNP_ID_BLOCK) -> Result<(), FileError> {
        let keys = [&header.id_public_key, &header.author_public_key];
        if header.reserved != [0; 3] || keys.iter().any(|key| key.reserved != 0) {
            return Err(FileError::Reserved(Type::IGVM_VHT_SNP_ID_BLOCK.0));
        }
        if self.applies(header.compatibility_mask)
            && self.id_block.replace(Box::new(header)).is_some()
        {
            return Err(FileError::IdBlockTwice);
        }
        Ok(())
    }

    fn area(&mut self, header: &IGVM_VHS_PARAMETER_AREA) -> Result<(), FileError> {
        let (index, bytes) = (header.parameter_area_index, header.number_of_bytes);
        if !bytes.is_multiple_of(PAGE_SIZE) {
            return Err(FileError::Misaligned(bytes));
        }
        let usable = bytes != 0 && bytes <= MAX_AREA && header.file_offset == 0;
        if !usable || self.areas.insert(index, Area::Declared(bytes)).is_some() {
            return Err(FileError::Area(index));
        }
        self.directives.push(Directive::Area { index, bytes });
        Ok(())
    }

    fn fill(
        &mut self,
        header: &IGVM_VHS_PARAMETER,
        parameter: Parameter,
        needed: u64,
    ) -> Result<(), FileError> {
        let (index, offset) = (header.parameter_area_index, header.byte_offset);
        // QEMU writes the memory map to the start of the area, whatever the offset says.
        let honoured = parameter != Parameter::MemoryMap || offset == 0;
        match self.areas.get(&index) {
            Some(&Area::Declared(bytes)) if honoured && u64::from(offset) + needed <= bytes => {
                self.directives.push(Directive::Fill {
                    index,
                    offset,
                    parameter,
                });
                Ok(())
            }
            _ => Err(FileError::Area(index)),
        }
    }

    fn insert(&mut self, header: &IGVM_VHS_PARAMETER_INSERT) -> Result<(), FileError> {
        if !self.applies(header.compatibility_mask) {
            return Ok(());
        }
        let index = header.parameter_area_index;
        let Some(&Area::Declared(bytes)) = self.areas.get(&index) else {
            return Err(FileError::Area(index));
        };
        self.areas.insert(index, Area::Inserted);
        let gpa = self.launch_range(header.gpa, bytes)?;
        self.directives.push(Directive::Insert { gpa, index });
        Ok(())
    }

    fn required_memory(&mut self, header: &IGVM_VHS_REQUIRED_MEMORY) -> Result<(), FileError> {
        if header.reserved != 0 || header.flags.reserved() != 0 {
            return Err(FileError::Reserved(Type::IGVM_VHT_REQUIRED_MEMORY.0));
        }
        let bytes = u64::from(header.number_of_bytes);
        let range = page_range(header.gpa, bytes)?;
        if self.applies(header.compatibility_mask) {
            let gpa = Gpa::new(range.start);
            self.directives
                .push(Directive::RequiredMemory { gpa, bytes });
        }
        Ok(())
    }

    fn page(&mut self, header: &IGVM_VHS_PAGE_DATA) -> Result<(), FileError> {
        let flags = header.flags;
        if header.reserved != 0 || flags.reserved() != 0 {
            return Err(FileError::Reserved(Type::IGVM_VHT_PAGE_DATA.0));
        }
        if flags.is_2mb_page() || flags.shared() {
            return Err(FileError::PageFlags(header.gpa));
        }
        let data = match header.file_offset {
            0 => None,
            offset => Some(self.data(offset)?),
        };
        let kind = match header.data_type {
            IgvmPageDataType::NORMAL if flags.unmeasured() => PageKind::Unmeasured(data),
            IgvmPageDataType::NORMAL => PageKind::Normal(data),
            IgvmPageDataType::SECRETS => PageKind::Secrets,
            IgvmPageDataType::CPUID_DATA | IgvmPageDataType::CPUID_XF => PageKind::Cpuid,
            _ => return Err(FileError::PageFlags(header.gpa)),
        };
        if self.applies(header.compatibility_mask) {
            // The AMD-SP fills those; a trust domain has no such pages.
            let special = matches!(kind, PageKind::Secrets | PageKind::Cpuid);
            if special && self.is_for_td() {
                return Err(FileError::PageFlags(header.gpa));
            }
            let gpa = self.launch_range(header.gpa, PAGE_SIZE)?;
            self.directives.push(Directive::Page { gpa, kind });
        }
        Ok(())
    }

    fn context(&mut self, header: &IGVM_VHS_VP_CONTEXT) -> Result<(), FileError> {
        if header.reserved != 0 {
            return Err(FileError::Reserved(Type::IGVM_VHT_VP_CONTEXT.0));
        }
        if !self.applies(header.compatibility_mask) {
            return Ok(());
        }
        if self.is_for_td() {
            return Err(FileError::ContextForTdx);
        }
        let vmsa = self.data(header.file_offset)?;
        let range = page_range(header.gpa.get(), PAGE_SIZE)?;
        let gpa = Gpa::new(range.start);
        self.directives.push(Directive::Context {
            gpa,
            vp_index: header.vp_index,
            vmsa,
        });
        Ok(())
    }

    /// One page of the file's data.
    fn data(&self, offset: u32) -> Result<&'a [u8], FileError> {
        let start = offset as usize;
        if start < self.data_start {
            return Err(FileError::DataOutside(offset));
        }
        start
            .checked_add(PAGE_SIZE as usize)
            .and_then(|end| self.bytes.get(start..end))
            .ok_or(FileError::DataOutside(offset))
    }

    /// Books a range as launched and gives its address.
    fn launch_range(&mut self, gpa: u64, bytes: u64) -> Result<Gpa, FileError> {
        let range = page_range(gpa, bytes)?;
        self.launched.push(range.clone());
        Ok(Gpa::new(range.start))
    }

    /// The file, if nothing is wrong with it as a whole.
    pub fn finish(mut self) -> Result<File<'a>, FileError> {
        let platform = match self.chosen {
            Some((platform, _)) => platform,
            // Nothing but platforms.
            None => self.choose()?.0,
        };
        self.launched.sort_by_key(|range| range.start);
        for pair in self.launched.windows(2) {
            if let [first, second] = pair
                && second.start < first.end
            {
                return Err(FileError::Overlap(second.start));
            }
        }
        Ok(File {
            platform,
            policy: self.policy,
            id_block: self.id_block,
            directives: self.directives,
        })
    }
}

/// Reads a body that must have exactly the size of `T`.
fn read<T: FromBytes>(kind: u32, body: &[u8]) -> Result<T, FileError> {
    T::read_from_bytes(body).map_err(|_| FileError::BodyLength(kind))
}

/// A range of whole pages that does not wrap.
fn page_range(gpa: u64, bytes: u64) -> Result<Range<u64>, FileError> {
    if !Gpa::new(gpa).is_aligned(PageSize::Size4K) || !bytes.is_multiple_of(PAGE_SIZE) {
        return Err(FileError::Misaligned(gpa));
    }
    let end = gpa.checked_add(bytes).ok_or(FileError::Misaligned(gpa))?;
    Ok(gpa..end)
}

impl PlatformKind {
    /// The platform of a header, if this machine can be one.
    fn of(kind: IgvmPlatformType) -> Option<Self> {
        match kind {
            IgvmPlatformType::SEV_SNP => Some(Self::Snp),
            IgvmPlatformType::TDX => Some(Self::Tdx),
            IgvmPlatformType::NATIVE => Some(Self::Native),
            _ => None,
        }
    }

    /// Whether the machine is one as this header describes it.
    fn supports(self, header: &IGVM_VHS_SUPPORTED_PLATFORM) -> bool {
        let (version, boundary) = (header.platform_version, header.shared_gpa_boundary);
        match self {
            // The machine has a C-bit, no vTOM, and one set of VTLs.
            Self::Snp => {
                version == IGVM_SEV_SNP_PLATFORM_VERSION && boundary == 0 && header.highest_vtl == 0
            }
            // Some builders leave the boundary open; VTLs are the L2 VMs that there may be.
            Self::Tdx => {
                version == IGVM_TDX_PLATFORM_VERSION
                    && matches!(boundary, 0 | tdx::SHARED)
                    && header.highest_vtl <= 2
            }
            Self::Native => {
                version == IGVM_NATIVE_PLATFORM_VERSION && boundary == 0 && header.highest_vtl == 0
            }
        }
    }

    const fn missing(self) -> FileError {
        match self {
            Self::Snp => FileError::NotForSnp,
            Self::Tdx => FileError::NotForTdx,
            Self::Native => FileError::NotForNative,
        }
    }
}
