//! The launch parameters: what the image builder tells the paravisor.
//!
//! One page, written by `igvm-build`, measured with the image and handed to the paravisor's
//! entry point in RDI. Because it is measured the paravisor may trust it as far as it trusts
//! its own code; it still checks [`LaunchParams::MAGIC`] and the version, so that a wrong
//! image ends with a reason instead of a wild access.
//!
//! All addresses are guest-physical bytes without C-bit; 0 means "none" where that is said.

use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

pub use crate::acceptance::{Acceptance, BadAcceptance, Budget, READ_AHEAD_LIMIT};
pub use crate::ovmf::SectionKind;

/// Where the paravisor's region begins (Turnstile, docs/protocol-notes.md). The ELF is linked
/// at this address and mapped one to one.
pub const REGION_GPA: u64 = 0x3000_0000;
/// Size of the paravisor's region in bytes: program, tables, parameter areas, and pages shared with the host,
/// one for each processor. With a carve-out of as much it is in the budget of 4 MiB (docs/performance.md).
pub const REGION_SIZE: u64 = 2 << 20;
/// Bytes of the parameter area that receives the host's memory map.
pub const MEMORY_MAP_SIZE: u64 = 16 << 10;
/// Offset of the number of virtual processors (u32) in the general parameter area.
pub const GENERAL_VP_COUNT_OFFSET: usize = 0;

open_enum! {
    /// When memory is accepted.
    pub struct AcceptPolicy(u32) {
        /// On request only.
        LAZY = 0,
        /// All of it before the guest starts.
        EAGER = 1,
        /// In the background, ahead of the guest.
        AHEAD = 2,
    }
}

open_enum! {
    /// What a budget counts.
    pub struct BudgetUnit(u32) {
        /// No limit; the amount is 0.
        ALL = 0,
        /// Bytes, whole regions of 2 MiB.
        BYTES = 1,
        /// Hundredths of the memory that has a state.
        PER_CENT = 2,
    }
}

open_enum! {
    /// Which memory is accepted first when it is accepted ahead of the guest.
    pub struct AcceptOrder(u32) {
        /// From address 0 up: below 4 GiB (DMA32) first.
        LOW_FIRST = 0,
        /// Above 4 GiB, then below.
        HIGH_FIRST = 1,
    }
}

open_enum! {
    /// What becomes of a guest that touches memory which it has not accepted, where the paravisor is
    /// asked: in a trust domain.
    pub struct Touch(u32) {
        /// The fault that the platform gives.
        FAULT = 0,
        /// The memory is accepted: for guests that cannot do so themselves.
        ACCEPT = 1,
    }
}

open_enum! {
    /// A deliberate fault of the paravisor's platform layer, to prove that the machine and
    /// the referee notice. Only test builds of the paravisor obey it.
    pub struct Fault(u32) {
        /// Behave.
        NONE = 0,
        /// Grant a page without having zeroed it.
        SKIP_SCRUB = 1,
        /// Record a page as accepted without having granted it.
        SKIP_GRANT = 2,
        /// Execute the validating instruction twice on one page.
        VALIDATE_TWICE = 3,
        /// Report a wrong `next` index to the guest.
        WRONG_NEXT = 4,
        /// Rescind a page before its permissions are revoked.
        WRONG_ORDER = 5,
        /// Grant a page before it is zeroed.
        GRANT_BEFORE_SCRUB = 6,
        /// Record a page as accepted without having validated it.
        SKIP_VALIDATE = 7,
        /// Do not flush at all.
        MISSING_FLUSH = 8,
        /// Flush, but do not wait until the other processors have.
        REMOTE_STALE_TRANSLATION = 9,
        /// Give back a VMSA that runs.
        IN_USE_VMSA = 10,
        /// Record a page as given back without having rescinded it.
        SKIP_RESCIND = 11,
        /// Panic at the first page that is to be accepted.
        PANIC = 32,
        /// No fault, but the control of the benches: all memory is the guest's before the guest
        /// starts, and its requests execute no instruction.
        PRE_ACCEPTED = 33,
    }
}

open_enum! {
    /// What the image was launched on. Each platform of an image has launch parameters of its own, so
    /// the paravisor is told by its image and asks neither processor nor host.
    pub struct PlatformKind(u32) {
        /// AMD SEV-SNP.
        SEV_SNP = 0,
        /// A processor without confidential hardware; acceptance is simulated (decision 019).
        NATIVE = 1,
        /// L1 of an Intel TDX trust domain; the guest is an L2 VM (decision 023).
        TDX = 2,
    }
}

/// One area the firmware wants prepared before it starts (from its SEV metadata).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Section {
    /// First byte, page aligned.
    pub gpa: u64,
    /// Bytes, a multiple of 4 KiB.
    pub size: u64,
    /// What belongs there. In a trust domain the number is one of [`crate::tdvf::SectionKind`].
    pub kind: SectionKind,
    /// Zero.
    pub reserved: u32,
}

const _: () = assert!(size_of::<Section>() == 24);

/// The launch parameter page.
#[derive(Clone, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct LaunchParams {
    /// [`LaunchParams::MAGIC`].
    pub magic: [u8; 8],
    /// [`LaunchParams::VERSION`].
    pub version: u32,
    /// Position of the C-bit the page tables were built with; the paravisor compares it with
    /// CPUID. 0 on a platform that has none.
    pub c_bit: u32,
    /// First byte of the paravisor's region.
    pub region_gpa: u64,
    /// Bytes of the region.
    pub region_size: u64,
    /// First byte behind the last launched page of the region; from here on the paravisor has
    /// to validate memory itself.
    pub image_end: u64,
    /// Root of the page tables VMPL0 starts on.
    pub page_table_root: u64,
    /// The SNP secrets page; 0 on other platforms.
    pub secrets_gpa: u64,
    /// The SNP CPUID page; 0 on other platforms.
    pub cpuid_gpa: u64,
    /// The host's memory map: entries of [`crate::igvm_map`], untrusted.
    pub memory_map_gpa: u64,
    /// Bytes of the area at `memory_map_gpa`.
    pub memory_map_size: u64,
    /// The general parameter page: number of virtual processors at offset 0, untrusted.
    pub general_gpa: u64,
    /// When memory is accepted.
    pub accept_policy: AcceptPolicy,
    /// A deliberate fault, [`Fault::NONE`] except in tests.
    pub fault: Fault,
    /// First byte of the firmware image, which ends at 4 GiB; 0 without firmware.
    pub firmware_gpa: u64,
    /// Bytes of the firmware image; 0 without firmware.
    pub firmware_size: u64,
    /// Where the boot processor starts in the firmware, a linear address:
    /// [`crate::ovmf::RESET_VECTOR`] for every OVMF.
    pub firmware_reset_eip: u32,
    /// How many of `sections` are in use.
    pub section_count: u32,
    /// The firmware's area for IGVM parameters (its memory map); 0 if it has none.
    pub igvm_parameter_gpa: u64,
    /// The firmware's area for IGVM data HOBs; 0 if it has none.
    pub igvm_hob_gpa: u64,
    /// The firmware's areas, in the order of its metadata.
    pub sections: [Section; LaunchParams::MAX_SECTIONS],
    /// How much is accepted ahead of the guest at most, in `budget_unit`.
    pub budget: u64,
    /// What `budget` counts.
    pub budget_unit: BudgetUnit,
    /// Which memory is accepted first.
    pub accept_order: AcceptOrder,
    /// How many further regions a request for 2 MiB prepares.
    pub read_ahead: u32,
    /// What this is the page of.
    pub platform: PlatformKind,
    /// In a trust domain: where the firmware's last page lies until no processor needs the
    /// paravisor's reset vector any more ([`ResetPage`]); 0 elsewhere.
    pub firmware_last_page: u64,
    /// First page of what the image hands to the firmware: the list for its area for IGVM data HOBs
    /// ([`crate::hob::IgvmData`]), and behind it what the list names. All of it was launched; 0 if there
    /// is none.
    pub data_gpa: u64,
    /// Bytes of it, whole pages.
    pub data_size: u64,
    /// In a trust domain: what becomes of a guest that touches memory which it has not accepted;
    /// [`Touch::FAULT`] elsewhere.
    pub touch: Touch,
    /// Zero.
    pub reserved: [u8; 3140],
}

const _: () = {
    use core::mem::offset_of;
    assert!(size_of::<LaunchParams>() == 4096);
    assert!(offset_of!(LaunchParams, region_gpa) == 0x10);
    assert!(offset_of!(LaunchParams, secrets_gpa) == 0x30);
    assert!(offset_of!(LaunchParams, accept_policy) == 0x58);
    assert!(offset_of!(LaunchParams, firmware_gpa) == 0x60);
    assert!(offset_of!(LaunchParams, igvm_parameter_gpa) == 0x78);
    assert!(offset_of!(LaunchParams, sections) == 0x88);
    assert!(offset_of!(LaunchParams, budget) == 0x388);
    assert!(offset_of!(LaunchParams, read_ahead) == 0x398);
    assert!(offset_of!(LaunchParams, platform) == 0x39C);
    assert!(offset_of!(LaunchParams, firmware_last_page) == 0x3A0);
    assert!(offset_of!(LaunchParams, data_gpa) == 0x3A8);
    assert!(offset_of!(LaunchParams, touch) == 0x3B8);
    assert!(offset_of!(LaunchParams, reserved) == 0x3BC);
};

/// The page with the reset vector of a trust domain, as `igvm-build` makes it.
///
/// All processors of a trust domain start at [`ResetPage::VECTOR`], in 32-bit mode without paging and
/// with nothing but their number. The page tells the paravisor's first code, which lies in its region,
/// what elsewhere a measured processor state tells.
#[derive(Clone, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ResetPage {
    /// Root of the page tables, below 4 GiB.
    pub page_table_root: u32,
    /// The launch parameters, below 4 GiB.
    pub params: u32,
    /// Zero.
    pub unused: [u8; 0xFF0 - 8],
    /// The reset vector: [`ResetPage::JUMP`] and the distance to the first code.
    pub jump: [u8; 5],
    /// Zero.
    pub rest: [u8; 11],
}

const _: () = {
    use core::mem::offset_of;
    assert!(size_of::<ResetPage>() == 4096);
    assert!(offset_of!(ResetPage, page_table_root) == ResetPage::ROOT_OFFSET as usize);
    assert!(offset_of!(ResetPage, params) == ResetPage::PARAMS_OFFSET as usize);
    assert!(offset_of!(ResetPage, jump) as u32 == ResetPage::VECTOR & 0xFFF);
};

impl ResetPage {
    /// Address of the page.
    pub const GPA: u64 = (1 << 32) - 4096;
    /// Where processors start.
    pub const VECTOR: u32 = 0xFFFF_FFF0;
    /// Offset of `page_table_root`.
    pub const ROOT_OFFSET: u32 = 0;
    /// Offset of `params`.
    pub const PARAMS_OFFSET: u32 = 4;
    /// JMP rel32 (SDM volume 2, JMP): the distance follows, from the next instruction.
    pub const JUMP: u8 = 0xE9;
    /// Name of the paravisor's first code, for `igvm-build`.
    pub const SYMBOL: &str = "turnstile_td_start";

    /// The page for these addresses; `start` is where the first code lies.
    #[must_use]
    pub fn new(page_table_root: u32, params: u32, start: u32) -> Self {
        let mut page = Self::new_zeroed();
        page.page_table_root = page_table_root;
        page.params = params;
        let next = Self::VECTOR.wrapping_add(page.jump.len() as u32);
        let [a, b, c, d] = start.wrapping_sub(next).to_le_bytes();
        page.jump = [Self::JUMP, a, b, c, d];
        page
    }
}

impl LaunchParams {
    /// First bytes of the page.
    pub const MAGIC: [u8; 8] = *b"TSLAUNCH";
    /// Version of the layout above.
    pub const VERSION: u32 = 3;
    /// Room for firmware areas.
    pub const MAX_SECTIONS: usize = 32;

    /// A page with magic and version set and everything else zero ("none").
    #[must_use]
    pub fn new() -> Self {
        let mut params = Self::new_zeroed();
        params.magic = Self::MAGIC;
        params.version = Self::VERSION;
        params
    }

    /// Whether magic, version and section count are those of this layout.
    #[must_use]
    pub fn is_understood(&self) -> bool {
        self.magic == Self::MAGIC
            && self.version == Self::VERSION
            && self.section_count as usize <= Self::MAX_SECTIONS
    }

    /// The sections in use; never more than there are.
    #[must_use]
    pub fn sections(&self) -> &[Section] {
        let count = (self.section_count as usize).min(Self::MAX_SECTIONS);
        self.sections.get(..count).unwrap_or_default()
    }

    /// Adds a section; false if there is no room.
    #[must_use]
    pub fn push_section(&mut self, section: Section) -> bool {
        match self.sections.get_mut(self.section_count as usize) {
            Some(slot) => {
                *slot = section;
                self.section_count += 1;
                true
            }
            None => false,
        }
    }
}

impl LaunchParams {
    /// How memory is to be accepted. Not checked: see [`Acceptance::check`].
    #[must_use]
    pub const fn acceptance(&self) -> Acceptance {
        Acceptance {
            policy: self.accept_policy,
            order: self.accept_order,
            budget: Budget {
                unit: self.budget_unit,
                amount: self.budget,
            },
            read_ahead: self.read_ahead,
            touch: self.touch,
        }
    }

    /// Sets how memory is to be accepted.
    pub const fn set_acceptance(&mut self, acceptance: Acceptance) {
        self.accept_policy = acceptance.policy;
        self.accept_order = acceptance.order;
        self.budget_unit = acceptance.budget.unit;
        self.budget = acceptance.budget.amount;
        self.read_ahead = acceptance.read_ahead;
        self.touch = acceptance.touch;
    }
}

impl Default for LaunchParams {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECTION: Section = Section {
        gpa: 0x80_0000,
        size: 0x9000,
        kind: SectionKind::SEC_MEM,
        reserved: 0,
    };

    #[test]
    fn a_page_survives_its_bytes() {
        let mut params = LaunchParams::new();
        params.c_bit = 47;
        params.fault = Fault::SKIP_GRANT;
        let acceptance = Acceptance {
            policy: AcceptPolicy::AHEAD,
            order: AcceptOrder::HIGH_FIRST,
            budget: Budget {
                unit: BudgetUnit::PER_CENT,
                amount: 50,
            },
            read_ahead: 3,
            touch: Touch::ACCEPT,
        };
        params.set_acceptance(acceptance);
        assert!(params.push_section(SECTION));
        let read = LaunchParams::read_from_bytes(params.as_bytes()).unwrap();
        assert_eq!(read, params);
        assert!(read.is_understood());
        assert_eq!(read.sections(), [SECTION]);
        assert_eq!(read.acceptance(), acceptance);
    }

    #[test]
    fn sections_never_leave_the_page() {
        let mut params = LaunchParams::new();
        for _ in 0..LaunchParams::MAX_SECTIONS {
            assert!(params.push_section(SECTION));
        }
        assert!(!params.push_section(SECTION));
        params.section_count = u32::MAX;
        assert_eq!(params.sections().len(), LaunchParams::MAX_SECTIONS);
        assert!(!params.is_understood());
    }

    #[test]
    fn the_reset_vector_jumps_to_the_first_code() {
        let page = ResetPage::new(0x3000_1000, 0x3000_2000, 0x3000_0040);
        assert_eq!(page.jump[0], 0xE9);
        let distance = u32::from_le_bytes(page.jump[1..].try_into().unwrap());
        // From the instruction behind the jump, around the end of the address space.
        assert_eq!(0xFFFF_FFF5u32.wrapping_add(distance), 0x3000_0040);
        assert_eq!(page.as_bytes()[..8], [0, 0x10, 0, 0x30, 0, 0x20, 0, 0x30]);
    }

    #[test]
    fn other_pages_are_not_understood() {
        assert!(!LaunchParams::new_zeroed().is_understood());
        let mut params = LaunchParams::new();
        params.version += 1;
        assert!(!params.is_understood());
    }
}
