//! Everything the firmware finds when it starts (facts: guests §2.7).
//!
//! The order is that of trust: pages launched with the image are granted, areas the firmware
//! asks for are accepted through the engine like any page of the guest's (validated, scrubbed,
//! granted, recorded), and only then filled. Nothing of the launch is validated again.

use accept::{Block, Error, Frame, OnNoChange, PageState, Role, Taken};
use log::info;
use protocols::addr::{Gpa, PAGE_SIZE, PageSize};
use protocols::cpuid::CpuidPage;
use protocols::igvm_map::MemoryMapEntry;
use protocols::launch::{Section, SectionKind};
use protocols::ovmf::IgvmParameterArea;
use protocols::secrets::SecretsPage;
use protocols::terminate::TurnstileReason;
use protocols::vmsa::{SevFeatures, Vmsa};

use super::GUEST_VMPL;
use super::secrets::{Introduction, make_guest_copy};
use crate::launch::Launch;
use crate::memory::guest_map;
use crate::memory::layout::PageRange;
use crate::memory::plan::Plan;
use crate::platform::{MappedBlock, Platform, Rights};
use crate::system::GuestEngine;

/// SEV features of the guest: those of an ordinary SNP guest, and no others.
pub const GUEST_SEV_FEATURES: SevFeatures = SevFeatures::SNP_ACTIVE;

/// What the preparation works with.
pub struct Preparation<'a, P> {
    /// The checked launch parameters.
    pub launch: &'a Launch<'a>,
    /// Where everything lies.
    pub plan: &'a Plan,
    /// The processor.
    pub platform: &'a P,
    /// The engine, knowing all that is Owned.
    pub engine: &'a GuestEngine,
}

impl<P: Platform> Preparation<'_, P> {
    /// Grants the launched firmware to the guest.
    ///
    /// # Errors
    ///
    /// [`TurnstileReason::RMPADJUST`].
    pub fn grant_firmware(&self) -> Result<(), TurnstileReason> {
        self.grant_launched(self.launch.firmware())
    }

    /// Grants what the image hands to the firmware, and puts the list of it where the firmware looks:
    /// into an area that was filled with zeroes like any other before.
    ///
    /// # Errors
    ///
    /// [`TurnstileReason::FIRMWARE`] if data or place are not the guest's memory.
    pub fn hand_over_data(&self) -> Result<(), TurnstileReason> {
        let data = self.launch.data();
        if data.is_empty() {
            return Ok(());
        }
        let place = Gpa::new(self.launch.params().igvm_hob_gpa);
        let list = PageRange::try_from_bytes(place.get(), PAGE_SIZE);
        let is_guests = |pages| self.plan.is_guest_memory(pages, self.launch.region());
        if !is_guests(data) || !list.is_some_and(is_guests) {
            return Err(TurnstileReason::FIRMWARE);
        }
        self.grant_launched(data)?;
        let accepted = Some(PageState::Accepted);
        if self.engine.state(Frame::containing(place.get())) != accepted {
            return Err(TurnstileReason::FIRMWARE);
        }
        guest_map::copy_page(data.start(), place).map_err(|_| TurnstileReason::NOT_VALIDATED)?;
        // The firmware knows of the data that the list names, but not of the page the list came in: it
        // will accept that one like other memory.
        let list = Block::page(Frame::containing(data.start().get()));
        let rescinded =
            self.engine
                .rescind(list, OnNoChange::Fail)
                .map_err(|error| match error {
                    Error::HostLied => TurnstileReason::NOT_VALIDATED,
                    _ => TurnstileReason::PVALIDATE,
                })?;
        match rescinded.flush {
            Some(owed) => self
                .engine
                .flush(owed)
                .map_err(|_| TurnstileReason::INTERNAL),
            None => Ok(()),
        }
    }

    /// Grants launched pages to the guest, 4 KiB each: so they were launched.
    fn grant_launched(&self, pages: PageRange) -> Result<(), TurnstileReason> {
        for page in pages.frames() {
            let block = guest_map::address(page, PAGE_SIZE)
                .ok()
                .and_then(|address| MappedBlock::try_new(address, PageSize::Size4K))
                .ok_or(TurnstileReason::INTERNAL)?;
            self.platform
                .adjust(block, GUEST_VMPL, Rights::Full)
                .map_err(|_| TurnstileReason::RMPADJUST)?;
        }
        let first = Frame::containing(pages.start().get());
        self.engine
            .record_launch(first, pages.pages(), PageState::Accepted)
            .map_err(|_| TurnstileReason::INTERNAL)
    }

    /// Accepts and fills all areas of the firmware's metadata, and returns the boot
    /// processor's calling area.
    ///
    /// # Errors
    ///
    /// [`TurnstileReason::FIRMWARE`] if an area is not the guest's memory, overlaps another, has
    /// an unknown kind or a wrong size, or if one that is needed is missing; what the engine's
    /// instructions failed with.
    pub fn fill_areas(
        &self,
        secrets: &SecretsPage,
        cpuid: &CpuidPage,
    ) -> Result<Taken, TurnstileReason> {
        let calling_area = self.single_page(SectionKind::SVSM_CAA)?;
        for section in self.launch.sections() {
            self.accept_area(section)?;
            match section.kind {
                // Zero is what belongs there, and the engine has scrubbed the pages. Hashes
                // come from a host that vouches for a kernel; this image vouches for none.
                SectionKind::SEC_MEM | SectionKind::SVSM_CAA | SectionKind::KERNEL_HASHES => {}
                SectionKind::SECRETS => {
                    let mut copy = secrets.clone();
                    let introduction = Introduction {
                        region: self.launch.region(),
                        calling_area,
                        guest_vmpl: GUEST_VMPL,
                    };
                    make_guest_copy(&mut copy, &introduction);
                    fill(self.single_page(SectionKind::SECRETS)?, &copy)?;
                }
                SectionKind::CPUID => fill(self.single_page(SectionKind::CPUID)?, cpuid)?,
                _ => return Err(TurnstileReason::FIRMWARE),
            }
        }
        self.single_page(SectionKind::SECRETS)?;
        self.single_page(SectionKind::CPUID)?;
        self.engine
            .take(Frame::containing(calling_area.get()), Role::CallingArea)
            .map_err(|_| TurnstileReason::INTERNAL)
    }

    /// Shows the firmware its memory map, if it has a place for one.
    ///
    /// # Errors
    ///
    /// [`TurnstileReason::FIRMWARE`] if the place is not the guest's memory.
    pub fn fill_parameters(
        &self,
        memory_map: [MemoryMapEntry; IgvmParameterArea::MAX_ENTRIES],
        vp_count: u32,
    ) -> Result<(), TurnstileReason> {
        let gpa = Gpa::new(self.launch.params().igvm_parameter_gpa);
        if gpa.get() == 0 {
            info!("the firmware takes no memory map: it has to learn ours from the host");
            return Ok(());
        }
        let pages = PageRange::try_from_bytes(gpa.get(), PAGE_SIZE)
            .filter(|pages| self.plan.is_guest_memory(*pages, self.launch.region()))
            .ok_or(TurnstileReason::FIRMWARE)?;
        let frame = Frame::containing(gpa.get());
        if self.engine.state(frame) != Some(PageState::Accepted) {
            self.accept_pages(pages)?;
        }
        fill(
            gpa,
            &IgvmParameterArea {
                memory_map,
                vp_count,
                reserved: [0; 3],
            },
        )
    }

    /// The state the boot processor starts from: reset, at the firmware's reset vector.
    #[must_use]
    pub fn reset_state(&self) -> Vmsa {
        let mut vmsa = Vmsa::at_reset(self.launch.params().firmware_reset_eip);
        vmsa.vmpl = GUEST_VMPL.number();
        vmsa.sev_features = GUEST_SEV_FEATURES;
        vmsa
    }

    /// The page of the one area of this kind.
    fn single_page(&self, kind: SectionKind) -> Result<Gpa, TurnstileReason> {
        let mut found = self
            .launch
            .sections()
            .iter()
            .filter(|section| section.kind == kind);
        match (found.next(), found.next()) {
            (Some(section), None) if section.size == PAGE_SIZE => Ok(Gpa::new(section.gpa)),
            _ => Err(TurnstileReason::FIRMWARE),
        }
    }

    fn accept_area(&self, section: &Section) -> Result<(), TurnstileReason> {
        let pages = PageRange::try_from_bytes(section.gpa, section.size)
            .filter(|pages| self.plan.is_guest_memory(*pages, self.launch.region()))
            .ok_or(TurnstileReason::FIRMWARE)?;
        self.accept_pages(pages)
    }

    fn accept_pages(&self, pages: PageRange) -> Result<(), TurnstileReason> {
        for page in pages.frames() {
            let block = Block::page(Frame::containing(page.get()));
            // OVMF registers a page between its areas as GHCB, shared, that it has neither accepted
            // nor rescinded. It can do so only while nobody has validated that page.
            self.engine
                .leave_to_requests(block)
                .map_err(|_| TurnstileReason::FIRMWARE)?;
            match self.engine.accept(block, OnNoChange::Fail) {
                // No flush can be owed: the guest has never run.
                Ok(_) => {}
                Err(Error::HostLied) => return Err(TurnstileReason::ALREADY_VALID),
                Err(Error::Backend { .. }) => return Err(TurnstileReason::PVALIDATE),
                Err(_) => return Err(TurnstileReason::FIRMWARE),
            }
        }
        Ok(())
    }
}

/// Writes a structure into accepted guest memory.
fn fill<T: zerocopy::IntoBytes + zerocopy::Immutable>(
    gpa: Gpa,
    value: &T,
) -> Result<(), TurnstileReason> {
    guest_map::write_value(gpa, value).map_err(|_| TurnstileReason::NOT_VALIDATED)
}
