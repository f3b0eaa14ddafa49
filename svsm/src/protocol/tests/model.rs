//! A machine for the tests: pages with contents and RMP state, a registry of processors, and a
//! guest that makes calls. Single-threaded on purpose; what threads do to the engine is tested
//! there.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;

use accept::{
    AdjustFault, Backend, Block, Engine, Fault, Frame, NotFlushed, PageState, Taken, ValidateFault,
};
use protocols::addr::Gpa;
use protocols::vmsa::{SevFeatures, Vmsa};
use zerocopy::FromBytes;

use crate::protocol::{
    Debt, DeleteRefusal, Deletion, GuestMemory, Inherited, NoRoom, NotPassedOn, Place, Replaced,
    Steps, Unreachable, VcpuIndex, VcpuPages, Vcpus, VmsaClaims, VmsaPages,
};

/// Memory of the machine: 48 MiB from 0, of which the last 2 MiB have no state in the map.
pub const REGIONS: u64 = 24;
/// First address without a state.
pub const END: u64 = (REGIONS - 1) << 21;
/// Where the boot processor's VMSA and calling area are.
pub const VMSA: u64 = 0x1000;
pub const AREA: u64 = 0x2000;
/// A page of the paravisor.
pub const OWN_PAGE: u64 = 0x3000;
/// Accepted pages of the guest: this many from here on.
pub const GUEST: u64 = 0x10_0000;
pub const GUEST_PAGES: u64 = 64;
/// The processor that all calls come from.
pub const BOOT: VcpuIndex = VcpuIndex(0);
/// The list in the calling area, where guests put it.
pub const LIST: u64 = AREA + 8;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Page {
    pub validated: bool,
    pub granted: bool,
    pub vmsa: bool,
    /// Permissions were taken and nobody has flushed since.
    pub stale: bool,
}

/// What happened to the hardware, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    Validate(u64, accept::PageSize),
    Rescind(u64),
    Scrub(u64),
    Grant(u64),
    Revoke(u64),
    Flush,
    MakeVmsa(u64),
    WriteNext(u16),
}

struct Record {
    apic_id: u32,
    pages: Option<VcpuPages>,
    frame: Frame,
    startup: bool,
}

pub struct Machine {
    pages: RefCell<Vec<Page>>,
    contents: RefCell<Vec<u8>>,
    pub log: RefCell<Vec<Event>>,
    records: RefCell<Vec<Record>>,
    areas: RefCell<Vec<Option<Taken>>>,
    /// The host holds memory as large pages.
    pub large: Cell<bool>,
    /// Statuses to be returned by the next instructions that set permissions.
    pub adjust_fails: Cell<Option<u32>>,
    /// A validating instruction on this address fails.
    pub validate_fails_at: Cell<Option<u64>>,
    /// So many flushes are not certain.
    pub flush_fails: Cell<u32>,
    /// Others fill and empty places of the processor.
    pub others_are_at_it: Cell<bool>,
    /// How many VMSAs that the guest has made have room.
    pub room: Cell<usize>,
    debt: RefCell<Option<Debt>>,
    /// VMSAs that are busy on another processor.
    pub busy: RefCell<BTreeSet<u64>>,
    /// What processors are said to have done ahead of the guest.
    pub steps: Cell<Steps>,
    unchanged: Cell<u64>,
}

impl Machine {
    pub fn new() -> Self {
        Self {
            pages: RefCell::new(vec![Page::default(); (REGIONS * 512) as usize]),
            contents: RefCell::new(vec![0xcc; (REGIONS << 21) as usize]),
            log: RefCell::default(),
            records: RefCell::default(),
            areas: RefCell::new(vec![None, None]),
            large: Cell::new(true),
            adjust_fails: Cell::new(None),
            validate_fails_at: Cell::new(None),
            flush_fails: Cell::new(0),
            others_are_at_it: Cell::new(false),
            room: Cell::new(8),
            debt: RefCell::default(),
            busy: RefCell::default(),
            steps: Cell::default(),
            unchanged: Cell::default(),
        }
    }

    /// The boot processor was started from these pages.
    pub fn start_boot_processor(&self, vmsa: Frame, area: Taken) {
        self.areas.borrow_mut()[0] = Some(area);
        self.records.borrow_mut().push(Record {
            apic_id: 0,
            pages: None,
            frame: vmsa,
            startup: true,
        });
    }

    /// All pages as they are.
    pub fn pages(&self) -> Vec<Page> {
        self.pages.borrow().clone()
    }

    pub fn page(&self, gpa: u64) -> Page {
        self.pages.borrow()[(gpa >> 12) as usize]
    }

    pub fn set_page(&self, gpa: u64, page: Page) {
        self.pages.borrow_mut()[(gpa >> 12) as usize] = page;
    }

    /// The host takes the page away.
    pub fn remove(&self, gpa: u64) {
        self.large.set(false);
        self.set_page(gpa, Page::default());
    }

    pub fn bytes(&self, gpa: u64, length: usize) -> Vec<u8> {
        self.contents.borrow()[gpa as usize..gpa as usize + length].to_vec()
    }

    pub fn fill(&self, gpa: u64, data: &[u8]) {
        self.contents.borrow_mut()[gpa as usize..gpa as usize + data.len()].copy_from_slice(data);
    }

    /// Every byte of the block is `value`.
    pub fn holds(&self, gpa: u64, length: u64, value: u8) -> bool {
        self.bytes(gpa, length as usize)
            .iter()
            .all(|byte| *byte == value)
    }

    pub fn take_log(&self) -> Vec<Event> {
        self.log.take()
    }

    /// SVME of the VMSA in this page.
    pub fn svme(&self, vmsa: Frame) -> bool {
        self.bytes(vmsa.gpa() + Vmsa::EFER_OFFSET as u64 + 1, 1)[0] & 0x10 != 0
    }

    fn set_svme(&self, vmsa: Frame, set: bool) {
        let at = vmsa.gpa() + Vmsa::EFER_OFFSET as u64 + 1;
        let byte = self.bytes(at, 1)[0] & !0x10 | if set { 0x10 } else { 0 };
        self.fill(at, &[byte]);
    }

    fn note(&self, event: Event) {
        self.log.borrow_mut().push(event);
    }

    fn for_pages<E>(
        &self,
        block: Block,
        mismatch: E,
        change: impl Fn(&mut Page) -> Result<(), E>,
    ) -> Result<(), E> {
        if block.size() == accept::PageSize::Size2M && !self.large.get() {
            return Err(mismatch);
        }
        let first = block.first().number() as usize;
        let mut pages = self.pages.borrow_mut();
        pages[first..first + block.size().pages() as usize]
            .iter_mut()
            .try_for_each(change)
    }

    fn reach(&self, gpa: Gpa) -> Result<usize, Unreachable> {
        let page = self.pages.borrow().get((gpa.get() >> 12) as usize).copied();
        match page {
            Some(Page {
                validated: true, ..
            }) => Ok(gpa.get() as usize),
            _ => Err(Unreachable),
        }
    }

    /// Map and hardware agree on every page, and nothing is left unflushed.
    pub fn assert_agrees(&self, engine: &Engine<'_, &Machine>) {
        for number in 0..(END >> 12) {
            let page = self.page(number << 12);
            let state = engine.state(Frame::try_new(number).unwrap()).unwrap();
            let agrees = match state {
                PageState::Unaccepted => !page.validated && !page.granted,
                PageState::Ahead => page.validated && !page.granted,
                PageState::Accepted => page.validated && page.granted && !page.vmsa,
                PageState::Owned => page.validated && !(page.vmsa && page.granted),
            };
            assert!(agrees, "page {number:#x}: {state:?}, {page:?}");
            assert!(!page.stale, "page {number:#x} was never flushed");
        }
    }
}

impl Backend for &Machine {
    fn validate(&self, block: Block) -> Result<(), ValidateFault> {
        self.note(Event::Validate(block.gpa(), block.size()));
        if self.validate_fails_at.get() == Some(block.gpa()) {
            return Err(ValidateFault::Failed(2));
        }
        self.for_pages(block, ValidateFault::SizeMismatch, |page| {
            if page.validated {
                return Err(ValidateFault::AlreadyDone);
            }
            page.validated = true;
            Ok(())
        })
    }

    fn rescind(&self, block: Block) -> Result<(), ValidateFault> {
        self.note(Event::Rescind(block.gpa()));
        self.for_pages(block, ValidateFault::SizeMismatch, |page| {
            assert!(!page.granted, "rescinded under the guest's hands");
            if !page.validated {
                return Err(ValidateFault::AlreadyDone);
            }
            page.validated = false;
            Ok(())
        })
    }

    fn scrub(&self, block: Block) -> Result<(), Fault> {
        self.note(Event::Scrub(block.gpa()));
        let start = block.gpa() as usize;
        self.contents.borrow_mut()[start..start + block.size().bytes() as usize].fill(0);
        Ok(())
    }

    fn grant(&self, block: Block) -> Result<(), AdjustFault> {
        self.note(Event::Grant(block.gpa()));
        if let Some(status) = self.adjust_fails.take() {
            return Err(AdjustFault::Failed(status));
        }
        self.for_pages(block, AdjustFault::SizeMismatch, |page| {
            if !page.validated {
                return Err(AdjustFault::NotValidated);
            }
            (page.granted, page.vmsa) = (true, false);
            Ok(())
        })
    }

    fn revoke(&self, block: Block) -> Result<(), AdjustFault> {
        self.note(Event::Revoke(block.gpa()));
        self.for_pages(block, AdjustFault::SizeMismatch, |page| {
            if !page.validated {
                return Err(AdjustFault::NotValidated);
            }
            (page.granted, page.stale) = (false, true);
            Ok(())
        })
    }

    fn flush(&self) -> Result<(), NotFlushed> {
        self.note(Event::Flush);
        if let Some(more) = self.flush_fails.get().checked_sub(1) {
            self.flush_fails.set(more);
            return Err(NotFlushed);
        }
        self.pages
            .borrow_mut()
            .iter_mut()
            .for_each(|page| page.stale = false);
        Ok(())
    }
}

impl GuestMemory for &Machine {
    fn read_u8(&self, gpa: Gpa) -> Result<u8, Unreachable> {
        Ok(self.contents.borrow()[self.reach(gpa)?])
    }

    fn read_u64(&self, gpa: Gpa) -> Result<u64, Unreachable> {
        assert!(gpa.get().is_multiple_of(8));
        let start = self.reach(gpa)?;
        Ok(u64::read_from_bytes(&self.contents.borrow()[start..start + 8]).unwrap())
    }

    fn write_u8(&self, gpa: Gpa, value: u8) -> Result<(), Unreachable> {
        let start = self.reach(gpa)?;
        self.contents.borrow_mut()[start] = value;
        Ok(())
    }

    fn write_u16(&self, gpa: Gpa, value: u16) -> Result<(), Unreachable> {
        let start = self.reach(gpa)?;
        self.note(Event::WriteNext(value));
        self.contents.borrow_mut()[start..start + 2].copy_from_slice(&value.to_le_bytes());
        Ok(())
    }

    fn read_bytes(&self, gpa: Gpa, bytes: &mut [u8]) -> Result<(), Unreachable> {
        assert!(
            gpa.offset_in_page() + bytes.len() as u64 <= 4096,
            "leaves the page"
        );
        let start = self.reach(gpa)?;
        bytes.copy_from_slice(&self.contents.borrow()[start..start + bytes.len()]);
        Ok(())
    }

    fn write_bytes(&self, gpa: Gpa, bytes: &[u8]) -> Result<(), Unreachable> {
        assert!(
            gpa.offset_in_page() + bytes.len() as u64 <= 4096,
            "leaves the page"
        );
        let start = self.reach(gpa)?;
        self.contents.borrow_mut()[start..start + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }
}

impl Vcpus for &Machine {
    fn steps(&self) -> Steps {
        self.steps.get()
    }

    fn count_unchanged(&self, _: VcpuIndex) {
        self.unchanged.set(self.unchanged.get() + 1);
    }

    fn unchanged(&self) -> u64 {
        self.unchanged.get()
    }

    fn has_apic_id(&self, apic_id: u32) -> bool {
        apic_id < 2
    }

    fn startup_features(&self) -> SevFeatures {
        SevFeatures::SNP_ACTIVE
    }

    fn calling_area(&self, vcpu: VcpuIndex) -> Option<Frame> {
        self.areas.borrow().get(vcpu.0)?.as_ref().map(Taken::frame)
    }

    fn exchange_calling_area(&self, vcpu: VcpuIndex, new: Taken) -> Option<Taken> {
        self.areas.borrow_mut()[vcpu.0].replace(new)
    }

    fn register(&self, apic_id: u32, pages: VcpuPages) -> Result<(), NoRoom> {
        let frame = pages.vmsa.frame();
        assert!(!self.svme(frame), "runnable before it is on record");
        if self.records.borrow().len() > self.room.get() {
            return Err(NoRoom(pages));
        }
        self.set_svme(frame, true);
        let record = Record {
            apic_id,
            pages: Some(pages),
            frame,
            startup: false,
        };
        self.records.borrow_mut().push(record);
        Ok(())
    }

    fn pass_on_area(
        &self,
        _: VcpuIndex,
        apic_id: u32,
        area: Frame,
    ) -> Result<Inherited, NotPassedOn> {
        let mut records = self.records.borrow_mut();
        for record in records.iter_mut().filter(|r| r.apic_id == apic_id) {
            let lent = record.pages.as_mut().map(|pages| &mut pages.calling_area);
            let Some(lent) = lent.filter(|l| l.as_ref().is_some_and(|a| a.frame() == area)) else {
                continue;
            };
            if self.busy.borrow().contains(&record.frame.gpa()) {
                return Err(NotPassedOn::Busy);
            }
            let from = Place(record.frame.number() as usize);
            let area = lent.take().expect("it has it");
            return Ok(Inherited { from, area });
        }
        Err(NotPassedOn::NotThere)
    }

    fn return_area(&self, Inherited { from, area }: Inherited) -> Option<Taken> {
        let mut records = self.records.borrow_mut();
        let had_it = |r: &&mut Record| r.frame.number() as usize == from.0;
        match records
            .iter_mut()
            .find(had_it)
            .and_then(|r| r.pages.as_mut())
        {
            Some(pages) => pages.calling_area.replace(area),
            None => Some(area),
        }
    }

    fn replaced(&self, apic_id: u32, nth: usize) -> Replaced {
        let records = self.records.borrow();
        let of_it: Vec<_> = records
            .iter()
            .filter(|r| r.apic_id == apic_id && !r.startup)
            .collect();
        let older = of_it.split_last().map_or(&[][..], |(_, older)| older);
        let absent = if self.others_are_at_it.get() {
            Replaced::NotNow
        } else {
            Replaced::None
        };
        older.get(nth).map_or(absent, |r| Replaced::Here(r.frame))
    }

    fn begin_delete(&self, _: VcpuIndex, vmsa: Frame) -> Result<Deletion, DeleteRefusal> {
        let mut records = self.records.borrow_mut();
        let record = records
            .iter_mut()
            .find(|record| record.frame == vmsa)
            .ok_or(DeleteRefusal::Unknown)?;
        if record.startup {
            return Err(DeleteRefusal::Startup);
        }
        if self.busy.borrow().contains(&vmsa.gpa()) {
            return Err(DeleteRefusal::InUse);
        }
        let pages = record.pages.take().ok_or(DeleteRefusal::InUse)?;
        let place = Place(vmsa.number() as usize);
        Ok(Deletion { place, pages })
    }

    fn end_delete(&self, Place(number): Place) {
        self.records
            .borrow_mut()
            .retain(|record| record.frame.number() as usize != number);
    }

    fn undo_delete(&self, _: VcpuIndex, Deletion { pages, .. }: Deletion) {
        let mut records = self.records.borrow_mut();
        let record = records
            .iter_mut()
            .find(|record| record.frame == pages.vmsa.frame());
        record.expect("on record").pages = Some(pages);
    }

    fn runs_from(&self, vcpu: VcpuIndex, vmsa: Frame) -> bool {
        let records = self.records.borrow();
        records
            .iter()
            .any(|r| r.frame == vmsa && r.apic_id as usize == vcpu.0)
    }

    fn take_debt(&self, _: VcpuIndex) -> Option<Debt> {
        self.debt.take()
    }

    fn put_debt(&self, _: VcpuIndex, debt: Debt) {
        assert_eq!(self.debt.replace(Some(debt)), None, "a debt is forgotten");
    }
}

impl VmsaPages for &Machine {
    fn guest_vmpl(&self) -> u8 {
        1
    }

    fn claims(&self, vmsa: Frame) -> Result<VmsaClaims, Unreachable> {
        let start = self.reach(Gpa::new(vmsa.gpa()))?;
        let page = self.page(vmsa.gpa());
        assert!(
            !page.granted && !page.stale,
            "looked at before the guest was shut out"
        );
        let contents = self.contents.borrow();
        let vmsa = Vmsa::read_from_bytes(&contents[start..start + 4096]).unwrap();
        Ok(VmsaClaims {
            vmpl: vmsa.vmpl,
            efer: vmsa.efer,
            sev_features: vmsa.sev_features,
        })
    }

    fn make_vmsa(&self, vmsa: Frame) -> Result<(), AdjustFault> {
        self.note(Event::MakeVmsa(vmsa.gpa()));
        if let Some(status) = self.adjust_fails.take() {
            return Err(AdjustFault::Failed(status));
        }
        self.set_svme(vmsa, false);
        self.pages.borrow_mut()[vmsa.number() as usize].vmsa = true;
        Ok(())
    }

    fn unmake_vmsa(&self, vmsa: Frame) -> Result<(), AdjustFault> {
        self.pages.borrow_mut()[vmsa.number() as usize].vmsa = false;
        self.set_svme(vmsa, true);
        Ok(())
    }
}
