//! What all CPUs share, behind one lock: the platform, the nested tables, the ports.
//!
//! Invariant: whoever changed the platform leaves through [`Guard`]'s drop, which withdraws
//! stale mappings and prints the platform's events. So no guest ever runs on a mapping that the
//! host has taken back, and one that VMPL0 has withdrawn is either gone or on record.

use core::ops::{Deref, DerefMut};

use machine::access::{Mapping, Region};
use machine::cpuid::Table;
use machine::platform::{Cause, Invalidation};
use machine::settings::PlatformKind;
use machine::types::{Alias, Gpa, Kind, PageSize, Spa, VcpuId, Vmpl};
use machine::{Platform, Verdict};
use protocols::report::Event;
use spin::Once;
use spin::mutex::{Mutex, MutexGuard};

use super::cpu::Wait;
use super::memory::DirectMap;
use super::npt::{C_BIT, Mode, Slot, Tables};
use super::ports::Ports;
use super::{console, cpu, smp};

/// Everything behind the lock.
pub struct Machine {
    /// The emulated platform.
    pub platform: Platform<DirectMap>,
    /// Nested page tables.
    pub tables: Tables,
    /// Ports that mean something to the machine.
    pub ports: Ports,
    /// What CPUID answers.
    pub cpuid: Table,
}

static MACHINE: Once<Mutex<Machine>> = Once::new();

/// Makes the machine. Called once, before any guest runs.
pub fn init(machine: Machine) {
    MACHINE.call_once(|| Mutex::new(machine));
}

/// The lock, held. `rip` is where the guest is, for refusals.
pub struct Guard {
    inner: MutexGuard<'static, Machine>,
    rip: u64,
}

/// Takes the lock.
pub fn lock(rip: u64) -> Guard {
    let machine = MACHINE.get().expect("init ran before any guest");
    let mut wait = Wait::default();
    let inner = loop {
        match machine.try_lock() {
            Some(inner) => break inner,
            None => wait.turn(),
        }
    };
    Guard { inner, rip }
}

impl Deref for Guard {
    type Target = Machine;
    fn deref(&self) -> &Machine {
        &self.inner
    }
}

impl DerefMut for Guard {
    fn deref_mut(&mut self) -> &mut Machine {
        &mut self.inner
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if self.inner.platform.has_news() {
            self.inner.settle(self.rip);
        }
    }
}

/// The CPU that runs this: its x2APIC id.
fn this_cpu() -> VcpuId {
    VcpuId(cpu::rdmsr(cpu::msr::X2APIC_ID) as u32)
}

/// Splits a nested address as the view of `mode` means it. What cannot express an SNP guest's C-bit
/// is private; what cannot express a shared bit is private as well, because it has none.
pub fn split(platform: &Platform<DirectMap>, address: u64, mode: Mode) -> (Gpa, Alias) {
    let gpa = Gpa::new(address & !C_BIT & !0xFFF);
    let alias = match (platform.kind(), mode) {
        (PlatformKind::Snp, Mode::Flat) => Alias::Private,
        _ => platform.alias_of_bit(address & C_BIT != 0),
    };
    (gpa, alias)
}

impl Machine {
    /// Withdraws what is stale and prints what there is to tell.
    pub fn settle(&mut self, rip: u64) {
        let stale = self.platform.take_invalidations();
        if !stale.is_empty() {
            self.withdraw(&stale);
        }
        for mut event in self.platform.take_events() {
            if let Event::Refusal(refusal) = &mut event {
                refusal.rip = rip;
            }
            console::event(&event);
        }
    }

    /// Takes stale ranges out of the nested tables. What the host changed is gone from every CPU
    /// when this returns; what an instruction withdrew stays in the translations of CPUs that
    /// are inside the guest, and that goes on record.
    fn withdraw(&mut self, stale: &[Invalidation]) {
        let this = this_cpu();
        let mut lost = [false; Vmpl::COUNT];
        for range in stale {
            let platform = &self.platform;
            let changed = self.tables.forget(range, |vmpl, mode, address| {
                let (gpa, alias) = split(platform, address, mode);
                platform.peek(vmpl, alias, gpa)
            });
            match range.cause {
                Cause::Host => {
                    lost = core::array::from_fn(|level| lost[level] || changed[level]);
                }
                // VMPL0 on another CPU has no business with the page; what it still holds is
                // dropped with its next instruction of this kind.
                Cause::Instruction(Vmpl::VMPL0) => {
                    let book = self.platform.stale();
                    book.withdrawn(this, range.gpa, range.bytes);
                    for (stay, level) in smp::inside(this) {
                        if level != Vmpl::VMPL0.index() && changed[level] {
                            let book = self.platform.stale();
                            book.note(this, stay, range.gpa, range.bytes);
                        }
                    }
                }
                Cause::Instruction(_) | Cause::Split => {}
            }
        }
        let taken = || stale.iter().filter(|range| range.cause == Cause::Host);
        if taken().next().is_none() {
            return;
        }
        // A mapping that an instruction withdrew before is in no table any more, but may be in
        // use all the same.
        let book = self.platform.stale();
        smp::shoot_down(this, |cpu, level| {
            lost[level] || taken().any(|range| book.is_held_by(cpu, range.gpa, range.bytes))
        });
    }

    /// Brings the record of stale translations up to date: who has left holds none.
    pub fn update_stale(&mut self) {
        let book = self.platform.stale();
        if !book.is_empty() {
            book.forget_those_who_left(smp::is_inside);
        }
    }

    /// Makes sure that the next fault finds tables to grow with.
    pub fn reserve_tables(&mut self) {
        if self.tables.is_exhausted() {
            smp::shoot_down(this_cpu(), |_, _| true);
            self.tables.recycle();
        }
    }

    /// Installs the leaf for one fault, and what can be had with it: a large leaf for a uniform
    /// block, or a whole table of what needs nothing done.
    ///
    /// `seen_as` is the alias the platform granted, which for fetches and table walks is not
    /// that of the address.
    pub fn map(&mut self, vmpl: Vmpl, mode: Mode, address: u64, mapping: Mapping, seen_as: Alias) {
        let (gpa, alias) = split(&self.platform, address, mode);
        if alias == seen_as
            && let Region::Uniform(block) = self.platform.peek_region(vmpl, alias, gpa)
        {
            self.tables
                .map_large(this_cpu(), vmpl, mode, address, block);
            return;
        }
        if !matches!(self.tables.slot(vmpl, mode, address), Slot::Table(_)) {
            let table = self.tables.grow(vmpl, mode, address);
            let block = address & !(PageSize::Size2M.bytes() - 1);
            for page in (0..PageSize::Size2M.bytes())
                .step_by(4096)
                .map(|offset| block + offset)
            {
                let (gpa, alias) = split(&self.platform, page, mode);
                table.set(page, self.platform.peek(vmpl, alias, gpa));
            }
        }
        self.tables
            .grow(vmpl, mode, address)
            .set(address, Some(mapping));
    }

    /// After an instruction that gives rights to a page: lets the tables that exist show it, so
    /// that its first use does not fault.
    pub fn show(&mut self, vmpl: Vmpl, gpa: Gpa) {
        let private_is_set = self.platform.alias_of_bit(true) == Alias::Private;
        let address = gpa.get() | if private_is_set { C_BIT } else { 0 };
        if let Slot::Table(table) = self.tables.slot(vmpl, Mode::Long, address)
            && let Some(mapping) = self.platform.peek(vmpl, Alias::Private, gpa)
        {
            table.set(address, Some(mapping));
        }
    }

    /// The verdict on an access. Where an SNP guest cannot express its C-bit there is private
    /// memory, or a device where there is none.
    pub fn access(
        &mut self,
        vmpl: Vmpl,
        mode: Mode,
        alias: Alias,
        gpa: Gpa,
        kind: Kind,
    ) -> Verdict {
        let cannot_say = self.platform.kind() == PlatformKind::Snp && mode == Mode::Flat;
        if cannot_say && self.platform.spa_of(gpa).is_none() {
            return Verdict::Mmio(Spa::new(gpa.get()));
        }
        self.platform.access(vmpl, alias, gpa, kind)
    }
}
