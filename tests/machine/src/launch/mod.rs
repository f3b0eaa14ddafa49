//! The launch: what a VMM and the AMD-SP do with an IGVM file before the guest runs.
//!
//! A trust domain is launched by the same steps, with the TDX module in the AMD-SP's place: pages
//! are added in the order of the file, and there is no VMSA ([`crate::tdx`]).
//!
//! The VMM (here: QEMU's rules) reads the file, finds memory for every page, fills in
//! parameters and presents page after page. The AMD-SP assigns each page immutably, writes
//! and measures it, and hands it to the guest as validated, with VMPL0 alone allowed to touch
//! it. At the end there is one VMSA to run and a launch digest over exactly the pages loaded.
//!
//! | module | owns |
//! |---|---|
//! | [`file`] | the IGVM format and everything that may be wrong with a file |
//! | [`order`] | the order in which QEMU launches |
//! | [`parameters`] | the untrusted words of the host, and its lies |
//! | [`hob`] | the same for the firmware of a trust domain |
//! | [`pages`] | the secrets and CPUID pages |
//! | [`plain`] | loading an image where nothing is confidential |
//! | [`policy`] | which guest policies are |
//! | [`vmsa`] | which processor states are taken |
//! | [`digest`] | the launch digest |
//! | [`id_block`] | whether the ID block is that of what was launched |
//!
//! Who may call: the binary, once, after all RAM was added and before any guest runs. After
//! an error nothing may be run: pages may be half launched.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use core::fmt;
use core::ops::Range;

use protocols::report::{Event, Launch, LaunchPages};
use zerocopy::IntoBytes;

use crate::amd_sp::{self, SecurityProcessor};
use crate::cpuid::Table;
use crate::layout::{self, Backing, LEGACY_HOLE, LayoutError};
use crate::memory::PhysicalMemory;
use crate::platform::Platform;
use crate::settings::PlatformKind;
use crate::tdx::measure::Mrtd;
use crate::types::{Gpa, PAGE_SIZE, PageSize, Spa, VcpuId, Vmpl};

mod crc32;
pub mod digest;
pub mod file;
pub mod hob;
pub mod id_block;
pub mod order;
pub mod pages;
pub mod parameters;
pub mod plain;
pub mod policy;
pub mod vmsa;

use digest::{Digest, LaunchDigest, Measurement, PageType};
use file::{Directive, File, FileError, PageKind, Parameter};

/// Pages without RAM may lie in the ROM window of a PC.
const ROM_WINDOW: Range<u64> = (1 << 32) - (16 << 20)..1 << 32;

/// What the loader needs from the CPU side.
pub struct Environment<'e> {
    /// Gives so many pages of the machine's own memory, contiguous; from 512 pages on aligned
    /// to 2 MiB. For pages the image wants where QEMU has no RAM.
    pub allocate: &'e mut dyn FnMut(usize) -> Option<Spa>,
    /// Gives a random number, for the keys of the secrets page.
    pub random: &'e mut dyn FnMut() -> u64,
    /// What CPUID says in an SNP guest.
    pub cpuid: &'e Table,
    /// What CPUID says in a trust domain.
    pub td_cpuid: &'e Table,
}

/// A launched image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Launched {
    /// The launch digest.
    pub digest: Digest,
    /// Launched pages by type.
    pub pages: LaunchPages,
    /// Where the VMSA of the first vCPU lies; a trust domain has none.
    pub vmsa: Option<Gpa>,
    /// What its ID block says, if it has one.
    pub identity: Option<amd_sp::Identity>,
}

/// Why an image was not launched.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LaunchError {
    /// The file is not good.
    File(FileError),
    /// The policy lacks the bit that must be one, or has bits that mean nothing.
    Policy(u64),
    /// The policy asks for this version of the firmware's ABI, and the firmware is older.
    Abi(policy::AbiVersion),
    /// The ID block is not that of what was launched, or nobody vouches for it.
    IdBlock(id_block::Refusal),
    /// There is no RAM at this address and none can be put there.
    NoMemory(Gpa),
    /// The machine has not enough memory of its own to stand in for missing RAM.
    OutOfMemory {
        /// Pages wanted.
        pages: u64,
    },
    /// The host's memory could not be extended.
    Layout(LayoutError),
    /// The page could not be assigned to the guest.
    Assign(Gpa),
    /// The memory map does not fit in its area.
    MapTooLarge {
        /// Bytes of the map.
        needed: usize,
        /// Bytes of the area.
        room: usize,
    },
    /// The VMSA has this address instead of the one KVM uses.
    VmsaAddress(Gpa),
    /// The VMSA sets this field (offset in bytes) to what is not supported.
    VmsaField(usize),
    /// A context for another vCPU than the first.
    VpIndex(u16),
    /// Not exactly one context for the first vCPU.
    Contexts(usize),
    /// A page that only a confidential guest has.
    NotPlain(Gpa),
    /// The native context has something where it must be zero.
    Context,
    /// The settings want hand-off blocks here, and the image has no parameter area for them.
    NoHobArea(Gpa),
    /// The settings want the native platform, which is loaded and not launched.
    NotConfidential,
}

impl From<FileError> for LaunchError {
    fn from(error: FileError) -> Self {
        Self::File(error)
    }
}

impl fmt::Display for LaunchError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(error) => write!(f, "IGVM file: {error}"),
            Self::Policy(policy) => write!(
                f,
                "policy {policy:#x}: bit 17 must be one and bits 63:26 zero for SEV-SNP, bits 63:3 zero for TDX"
            ),
            Self::Abi(asked) => write!(
                f,
                "policy: asks for firmware ABI {asked}, and this is {}: SNP_LAUNCH_START gives POLICY_FAILURE (0x07)",
                policy::AbiVersion::OWN
            ),
            Self::IdBlock(refusal) => write!(f, "ID block: SNP_LAUNCH_FINISH gives {refusal}"),
            Self::NoMemory(gpa) => write!(f, "the image wants memory at {gpa:#x}; there is none"),
            Self::OutOfMemory { pages } => {
                write!(
                    f,
                    "the machine has no {pages} pages of its own left; use more memory"
                )
            }
            Self::Layout(error) => write!(f, "memory of the image: {error:?}"),
            Self::Assign(gpa) => write!(f, "page {gpa:#x} cannot be assigned"),
            Self::MapTooLarge { needed, room } => {
                write!(
                    f,
                    "the memory map needs {needed} bytes of an area of {room}"
                )
            }
            Self::VmsaAddress(gpa) => {
                write!(
                    f,
                    "VMSA at {gpa:#x}; KVM launches it at {:#x}",
                    vmsa::VMSA_GPA
                )
            }
            Self::VmsaField(offset) => write!(f, "VMSA field at {offset:#x} is not supported"),
            Self::VpIndex(index) => write!(f, "VMSA for vCPU {index}; only vCPU 0 is launched"),
            Self::Contexts(count) => write!(f, "{count} VMSAs; expected one"),
            Self::NotPlain(gpa) => write!(f, "page {gpa:#x} is for confidential guests only"),
            Self::Context => write!(f, "the native context has reserved bits set"),
            Self::NoHobArea(gpa) => write!(
                f,
                "the image has no parameter area at {gpa:#x} for hand-off blocks"
            ),
            Self::NotConfidential => write!(f, "the native platform is not launched"),
        }
    }
}

/// The bytes of a page.
type Page = [u8; PAGE_SIZE as usize];

/// What is known while the launch goes on.
struct InProgress {
    digest: Measurement,
    /// The secrets page, and the keys in it.
    secrets: (Option<Gpa>, [[u8; 32]; Vmpl::COUNT]),
    pages: LaunchPages,
    areas: BTreeMap<u32, Vec<u8>>,
    /// Where the image's pages lie, ascending.
    launched: Vec<Range<u64>>,
}

impl<P: PhysicalMemory> Platform<P> {
    /// Launches the IGVM file `bytes` and gives the first vCPU its VMSA.
    pub fn launch(
        &mut self,
        bytes: &[u8],
        environment: &mut Environment<'_>,
    ) -> Result<Launched, LaunchError> {
        let file = File::parse(bytes, self.settings.platform)?;
        let is_td = match file.platform {
            PlatformKind::Snp => false,
            PlatformKind::Tdx => true,
            PlatformKind::Native => return Err(LaunchError::NotConfidential),
        };
        if !is_td && let Some(policy) = file.policy {
            policy::check(policy)?;
        }
        let contexts = file
            .directives
            .iter()
            .filter(|d| matches!(d, Directive::Context { .. }))
            .count();
        if contexts != usize::from(!is_td) {
            return Err(LaunchError::Contexts(contexts));
        }
        if let Some(wanted) = self.settings.td_hob
            && !file
                .directives
                .iter()
                .any(|d| matches!(d, Directive::Insert { gpa, .. } if *gpa == wanted))
        {
            return Err(LaunchError::NoHobArea(wanted));
        }
        if is_td && self.layout().place(Gpa::new(LEGACY_HOLE.start)).is_none() {
            self.fill_legacy_hole(environment)?;
        }
        self.find_memory(&file.directives, environment)?;
        let launched = launched_ranges(&file.directives);
        let own = self.own_range(&launched);

        let mut state = InProgress {
            digest: if is_td {
                Measurement::Td(Mrtd::before_first_page())
            } else {
                Measurement::Snp(LaunchDigest::before_first_page())
            },
            secrets: (None, [[0; 32]; Vmpl::COUNT]),
            pages: LaunchPages::default(),
            areas: BTreeMap::new(),
            launched,
        };
        let directives = if is_td {
            file.directives
        } else {
            order::launch_order(&file.directives)
        };
        for directive in directives {
            self.perform(&directive, &own, &mut state, environment)?;
        }
        let digest = state.digest.value();
        // Trust domains have no such thing.
        let identity = match file.id_block.filter(|_| !is_td) {
            Some(block) => {
                let policy = file.policy.unwrap_or(policy::DEFAULT);
                Some(id_block::check(&block, &digest, policy).map_err(LaunchError::IdBlock)?)
            }
            None => None,
        };
        let vmsa = (!is_td).then_some(vmsa::VMSA_GPA);
        match vmsa {
            Some(_) => {
                self.set_vmsa(VcpuId(0), Vmpl::VMPL0, vmsa);
                let guest = amd_sp::Guest {
                    measurement: digest,
                    policy: file.policy.unwrap_or(policy::DEFAULT),
                    identity: identity.unwrap_or_default(),
                    vmpck: state.secrets.1,
                    secrets_page: state.secrets.0,
                    cpuid_fms: environment.cpuid.family_model_stepping(),
                };
                let processor =
                    SecurityProcessor::new(guest, self.chip.clone(), environment.random);
                self.security_processor = Some(processor);
            }
            None => self.finish_td(file.policy.unwrap_or(0), digest, environment)?,
        }
        let launched = Launched {
            digest,
            pages: state.pages,
            vmsa,
            identity,
        };
        self.events.push(Event::Launch(Launch {
            digest: hex(&launched.digest),
            pages: launched.pages,
            vmsa_gpa: launched.vmsa.map_or(0, Gpa::get),
        }));
        Ok(launched)
    }

    /// The RAM that QEMU tells a trust domain of has no hole below 1 MiB: OVMF accepts it, and Linux
    /// looks there for ROMs with private accesses.
    fn fill_legacy_hole(&mut self, environment: &mut Environment<'_>) -> Result<(), LaunchError> {
        let pages = (LEGACY_HOLE.end - LEGACY_HOLE.start) / PAGE_SIZE;
        let spa =
            (environment.allocate)(pages as usize).ok_or(LaunchError::OutOfMemory { pages })?;
        self.add_legacy(spa).map_err(LaunchError::Layout)
    }

    /// Puts memory of the machine where the image wants pages and there is no RAM, as QEMU
    /// does, but only where a PC has ROM, and for the VMSA.
    fn find_memory(
        &mut self,
        directives: &[Directive<'_>],
        environment: &mut Environment<'_>,
    ) -> Result<(), LaunchError> {
        let mut missing: Vec<u64> = directives
            .iter()
            .filter_map(launched_range(directives))
            .flat_map(|range| range.step_by(PAGE_SIZE as usize))
            .filter(|&gpa| self.layout().place(Gpa::new(gpa)).is_none())
            .collect();
        let allowed = |gpa: u64| ROM_WINDOW.contains(&gpa) || gpa == vmsa::VMSA_GPA.get();
        if let Some(&gpa) = missing.iter().find(|&&gpa| !allowed(gpa)) {
            return Err(LaunchError::NoMemory(Gpa::new(gpa)));
        }
        missing.sort_unstable();
        for run in runs(&missing) {
            let pages = (run.end - run.start) / PAGE_SIZE;
            let spa =
                (environment.allocate)(pages as usize).ok_or(LaunchError::OutOfMemory { pages })?;
            self.add_window(Gpa::new(run.start), run.end - run.start, spa)
                .map_err(LaunchError::Layout)?;
        }
        Ok(())
    }

    /// The part of RAM that the image takes: from its first page in RAM to its last.
    fn own_range(&self, launched: &[Range<u64>]) -> Range<u64> {
        let in_ram = |range: &Range<u64>| {
            self.layout()
                .range(Gpa::new(range.start))
                .is_some_and(|known| known.backing == Backing::Ram)
        };
        launched
            .iter()
            .filter(|range| in_ram(range))
            .cloned()
            .reduce(|all, next| all.start.min(next.start)..all.end.max(next.end))
            .unwrap_or(0..0)
    }

    fn perform(
        &mut self,
        directive: &Directive<'_>,
        own: &Range<u64>,
        state: &mut InProgress,
        environment: &mut Environment<'_>,
    ) -> Result<(), LaunchError> {
        match *directive {
            Directive::Area { index, bytes } => {
                state.areas.insert(index, vec![0; bytes as usize]);
                Ok(())
            }
            Directive::Fill {
                index,
                offset,
                parameter,
            } => {
                let room = state.areas.get(&index).map_or(0, Vec::len);
                let value = self.parameter(parameter, own, room);
                fill(&mut state.areas, index, offset as usize, &value)
            }
            Directive::Insert { gpa, index } => {
                let mut area = state.areas.remove(&index).unwrap_or_default();
                if self.settings.td_hob == Some(gpa) {
                    let list = hob::list(gpa.get(), self.layout(), &state.launched);
                    write_into(&mut area, 0, &list)?;
                }
                for (page, data) in area.chunks_exact(PAGE_SIZE as usize).enumerate() {
                    let gpa = Gpa::new(gpa.get() + page as u64 * PAGE_SIZE);
                    self.launch_page(state, PageType::Unmeasured, gpa, &whole_page(Some(data)))?;
                }
                Ok(())
            }
            Directive::RequiredMemory { gpa, bytes } => (gpa.get()..gpa.get() + bytes)
                .step_by(PAGE_SIZE as usize)
                .map(Gpa::new)
                .find(|&gpa| self.layout().place(gpa).is_none())
                .map_or(Ok(()), |gpa| Err(LaunchError::NoMemory(gpa))),
            Directive::Page { gpa, kind } => {
                let (kind, page) = match kind {
                    PageKind::Normal(data) => (PageType::Normal, whole_page(data)),
                    PageKind::Unmeasured(data) => (PageType::Unmeasured, whole_page(data)),
                    PageKind::Secrets => {
                        let page = pages::secrets(environment.random);
                        state.secrets = (Some(gpa), page.vmpck);
                        (PageType::Secrets, whole_page(Some(page.as_bytes())))
                    }
                    PageKind::Cpuid => {
                        let page = pages::cpuid(environment.cpuid, &self.settings);
                        (PageType::Cpuid, whole_page(Some(page.as_bytes())))
                    }
                };
                self.launch_page(state, kind, gpa, &page)
            }
            Directive::Context {
                gpa,
                vp_index,
                vmsa,
            } => {
                let page = whole_page(Some(vmsa));
                vmsa::check(gpa, vp_index, &page)?;
                self.launch_page(state, PageType::Vmsa, gpa, &page)
            }
        }
    }

    /// The bytes of a parameter; its area has `room`.
    fn parameter(&self, parameter: Parameter, own: &Range<u64>, room: usize) -> Vec<u8> {
        match parameter {
            Parameter::MemoryMap => {
                parameters::memory_map(self.layout(), own.clone(), room, &self.settings)
            }
            Parameter::VpCount => parameters::vp_count(self.vcpu_count(), &self.settings)
                .to_le_bytes()
                .to_vec(),
        }
    }

    /// What the AMD-SP does with one page: it is assigned immutably, written, measured, and
    /// becomes a validated page of the guest.
    fn launch_page(
        &mut self,
        state: &mut InProgress,
        kind: PageType,
        gpa: Gpa,
        contents: &Page,
    ) -> Result<(), LaunchError> {
        let place = self.layout().place(gpa).ok_or(LaunchError::NoMemory(gpa))?;
        self.host
            .assign_for_launch(&place, gpa)
            .map_err(|_| LaunchError::Assign(gpa))?;
        self.memory.write(place.spa, contents);
        state.digest.extend(kind, gpa, contents);
        self.host
            .rmp_mut()
            .finish_launch(&place, kind == PageType::Vmsa);
        // What was launched is valid: nobody has to validate it a second time.
        self.host.note_validation(&place, PageSize::Size4K, true);
        let count = match kind {
            PageType::Normal => &mut state.pages.normal,
            PageType::Vmsa => &mut state.pages.vmsa,
            PageType::Unmeasured => &mut state.pages.unmeasured,
            PageType::Secrets => &mut state.pages.secrets,
            PageType::Cpuid => &mut state.pages.cpuid,
        };
        *count += 1;
        Ok(())
    }
}

/// Gives for a directive the range of bytes it launches, if it launches any.
fn launched_range<'d>(
    all: &'d [Directive<'_>],
) -> impl Fn(&Directive<'_>) -> Option<Range<u64>> + use<'d> {
    let areas: BTreeMap<u32, u64> = all
        .iter()
        .filter_map(|directive| match *directive {
            Directive::Area { index, bytes } => Some((index, bytes)),
            _ => None,
        })
        .collect();
    // Neither sum wraps: invariant 2 of `File`.
    move |directive| match *directive {
        Directive::Insert { gpa, index } => {
            Some(gpa.get()..gpa.get() + areas.get(&index).copied().unwrap_or(0))
        }
        Directive::Page { gpa, .. } | Directive::Context { gpa, .. } => {
            Some(gpa.get()..gpa.get() + PAGE_SIZE)
        }
        Directive::Area { .. } | Directive::Fill { .. } | Directive::RequiredMemory { .. } => None,
    }
}

/// What all of them launch, ascending; neighbours are one range.
fn launched_ranges(directives: &[Directive<'_>]) -> Vec<Range<u64>> {
    let mut all: Vec<_> = directives
        .iter()
        .filter_map(launched_range(directives))
        .collect();
    layout::join(&mut all);
    all
}

/// Joins ascending page addresses into ranges.
fn runs(pages: &[u64]) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for &page in pages {
        match runs.last_mut() {
            Some(run) if run.end == page => run.end += PAGE_SIZE,
            _ => runs.push(page..page + PAGE_SIZE),
        }
    }
    runs
}

/// Writes a parameter into its area.
fn fill(
    areas: &mut BTreeMap<u32, Vec<u8>>,
    index: u32,
    offset: usize,
    value: &[u8],
) -> Result<(), LaunchError> {
    let area = areas
        .get_mut(&index)
        .ok_or(LaunchError::File(FileError::Area(index)))?;
    write_into(area, offset, value)
}

/// Writes what the host says into a part of an area.
fn write_into(area: &mut [u8], offset: usize, value: &[u8]) -> Result<(), LaunchError> {
    let room = area.len().saturating_sub(offset);
    area.get_mut(offset..)
        .and_then(|area| area.get_mut(..value.len()))
        .ok_or(LaunchError::MapTooLarge {
            needed: value.len(),
            room,
        })?
        .copy_from_slice(value);
    Ok(())
}

/// A copy of a page's data; what is missing is zero.
fn whole_page(data: Option<&[u8]>) -> Box<Page> {
    let mut page = Box::new([0; PAGE_SIZE as usize]);
    for (to, from) in page.iter_mut().zip(data.unwrap_or_default()) {
        *to = *from;
    }
    page
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests;
