//! The TDX personality: what an Intel TDX module and a host below it do for one trust domain.
//!
//! A trust domain stands on the same memory as an SNP guest: the same layout, folios, conversions
//! and contents, one table that says whose each page is. What the table's entries mean is the
//! personality's ([`sept`]). L1 takes the place of VMPL0 and the L2 VMs those of VMPL1 to 3, in the
//! table and in everything that is counted by level.
//!
//! | module | owns |
//! |---|---|
//! | [`sept`] | the states of secure EPT entries, and what the host does when it is asked |
//! | [`tdcall`] | the instruction: which leaf, which operands, where results go |
//! | `page` | TDG.MEM.PAGE.ACCEPT, ATTR.RD, ATTR.WR |
//! | `metadata` | TDG.VM.RD and its like, TDG.VP.INFO, CPUIDVE.SET, VEINFO.GET |
//! | `report` | TDG.MR.RTMR.EXTEND, TDG.MR.REPORT |
//! | [`l2`] | TD partitioning: the L2 VMs, their entry and exits |
//! | `vmcall` | the host's answers to TDG.VP.VMCALL |
//! | `timer` | the clock of the APIC's timer |
//! | [`ve`] | which events become #VE, with what information |
//! | [`measure`] | the measurement of the launch |
//! | `launch` | TDH.MEM.PAGE.ADD, TDH.MR.EXTEND, the processors' first state |
//!
//! Numbers of rows refer to the fact sheet `tdx.md`. What is not modelled (migration, service trust
//! domains) is listed in `docs/machine.md`.

pub mod l2;
mod launch;
pub mod measure;
mod metadata;
mod page;
mod report;
pub mod sept;
pub mod tdcall;
#[cfg(test)]
mod tests;
mod timer;
pub mod ve;
pub(crate) mod vmcall;

use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec::Vec;

use protocols::tdx::l2::Exit;
use protocols::tdx::metadata::TdControls;
use protocols::tdx::report::{Digest, RTMR_COUNT};
use protocols::tdx::ve::VeInfo;
use protocols::tdx::{L2Vm, TdAttributes};

use self::l2::{Inside, L2};
use self::timer::Timer;
use crate::memory::PhysicalMemory;
use crate::platform::{End, Platform};
use crate::settings::PlatformKind;
use crate::types::{Alias, Gpa, Kind, PAGE_SIZE, Spa, VcpuId, Vmpl};
use crate::vcpu::C_BIT;

/// Bits of guest-physical addresses. The highest says that an address is shared, where SNP has the
/// C-bit: the two halves of a four-level nested table.
pub const GPA_WIDTH: u32 = C_BIT as u32 + 1;
/// The shared bit.
pub const SHARED: u64 = protocols::tdx::shared_bit(GPA_WIDTH);

/// What the platform is.
pub(crate) enum Personality {
    /// SEV-SNP.
    Snp,
    /// A trust domain.
    Td(Box<Td>),
    /// Nothing confidential: the guest is served by nested tables of its own, and nothing here is
    /// asked about its memory.
    Plain,
}

/// A trust domain: its control structure (TDCS) and those of its processors (TDVPS).
pub(crate) struct Td {
    attributes: TdAttributes,
    controls: TdControls,
    notify_enables: u64,
    /// The page whose entry in the secure EPT the host keeps busy.
    held: Option<Gpa>,
    mrtd: Digest,
    rtmr: [Digest; RTMR_COUNT],
    /// Of the processor, for reports.
    mac_key: [u8; 32],
    vps: Vec<Vp>,
    /// A page for each level of each processor in the machine's own memory: the registers of L1 and
    /// of the L2 VMs while they do not run.
    states: Spa,
}

/// One processor.
#[derive(Clone, Default)]
struct Vp {
    /// The information of a #VE that has not been asked for yet.
    ve: Option<VeInfo>,
    /// Every CPUID raises #VE in supervisor mode, in user mode.
    cpuid_ve: [bool; 2],
    timer: Timer,
    l2: [L2; L2Vm::ALL.len()],
    /// The L2 VM that L1 has entered.
    inside: Option<Inside>,
    /// Why it stopped, until L1 hears of it.
    exit: Option<Exit>,
}

impl Td {
    fn vp(&mut self, vcpu: VcpuId) -> Option<&mut Vp> {
        self.vps.get_mut(vcpu.index())
    }

    /// Whether an access to a page that is not accepted is the host's business.
    pub(crate) const fn pending_goes_to_host(&self) -> bool {
        self.controls.contains(TdControls::PENDING_VE_DISABLE)
    }

    /// Where the registers of a level of `vcpu` are.
    pub(crate) fn state_of(&self, vcpu: VcpuId, vmpl: Vmpl) -> Option<Spa> {
        let index = u64::from(vcpu.0) * Vmpl::COUNT as u64 + vmpl.index() as u64;
        (vcpu.index() < self.vps.len()).then(|| self.states.plus(index * PAGE_SIZE))
    }
}

/// Why a leaf does not complete as the guest's software sees it complete.
#[derive(Debug)]
enum Stop {
    /// An operand lies in a page that is not accepted.
    Pending(Gpa),
    /// The host ends the run.
    End(End),
    /// The machine does not go on.
    Refused(String),
}

impl<P: PhysicalMemory> Platform<P> {
    /// What the platform is. SEV-SNP until an image was launched.
    pub const fn kind(&self) -> PlatformKind {
        match self.personality {
            Personality::Snp => PlatformKind::Snp,
            Personality::Td(_) => PlatformKind::Tdx,
            Personality::Plain => PlatformKind::Native,
        }
    }

    pub(crate) const fn td(&self) -> Option<&Td> {
        match &self.personality {
            Personality::Snp | Personality::Plain => None,
            Personality::Td(td) => Some(td),
        }
    }

    const fn td_mut(&mut self) -> Option<&mut Td> {
        match &mut self.personality {
            Personality::Snp | Personality::Plain => None,
            Personality::Td(td) => Some(td),
        }
    }

    /// What the bit of an address that tells the aliases apart says.
    pub const fn alias_of_bit(&self, set: bool) -> Alias {
        match (self.kind(), set) {
            (PlatformKind::Snp, true) | (PlatformKind::Tdx, false) => Alias::Private,
            (PlatformKind::Snp, false) | (PlatformKind::Tdx, true) => Alias::Shared,
            // There is one alias, and no host that could take it away.
            (PlatformKind::Native, _) => Alias::Private,
        }
    }

    /// The half of the address space an access is checked in. An SNP guest fetches and walks
    /// privately whatever its C-bit says; in a trust domain the bit always counts.
    pub const fn effective_alias(&self, kind: Kind, alias: Alias) -> Alias {
        match self.kind() {
            PlatformKind::Snp => kind.effective_alias(alias),
            PlatformKind::Tdx | PlatformKind::Native => alias,
        }
    }
}
