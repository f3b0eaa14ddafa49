//! The GHCB page: requests too large for a register (GHCB 4).
//!
//! One page per processor, shared with the host, so its contents may change at any moment. It
//! is only touched by volatile accesses of single fields; there is no reference to it. Fields of
//! a reply count only if the host marked them valid.
//!
//! Getting one: the page was never validated, so there is nothing to rescind. The host makes it
//! shared, the mapping loses its C-bit, the page is zeroed, its address registered.
#![expect(unsafe_code, reason = "volatile access to a page shared with the host")]

use core::ptr;

use protocols::addr::{Gpa, PAGE_SIZE, PageSize, Vmpl};
use protocols::amd_sp::GuestRequestOutcome;
use protocols::exit_code::ExitCode;
use protocols::ghcb::event::{ApCreation, ApRequest, IoDirection, IoInfo, IoWidth};
use protocols::ghcb::page::{self, Field, Ghcb as GhcbPage, Response, USAGE_STANDARD, ValidBitmap};
use protocols::ghcb::{PROTOCOL_VERSION, PageOperation, psc};
use protocols::terminate::TurnstileReason;

use super::{Hypervisor, Start, VcpuRequest, msr};
use crate::memory::page_tables::{self, Alias};
use crate::platform::snp;

/// How often the host may be asked to go on with one list of page state changes: it may stop when
/// it likes.
const PSC_TRIES: usize = 16 * psc::MAX_ENTRIES;

/// The channel of one processor.
#[derive(Debug)]
pub struct Ghcb {
    /// Where the page is, in both address spaces (it lies in the region, mapped one to one).
    gpa: Gpa,
}

/// Turns a page of the region into zeroed memory that the host reads and writes, too.
///
/// # Errors
///
/// One of the GHCB reasons: the host refused or lied.
///
/// # Safety
///
/// `gpa` is a page of the region that was never validated and is nobody else's.
pub unsafe fn share(gpa: Gpa) -> Result<(), TurnstileReason> {
    msr::share_page(gpa)?;
    page_tables::set_alias(gpa, Alias::Shared)?;
    // SAFETY: the page is mapped writable and, by the contract, nobody else's.
    unsafe { ptr::write_bytes(gpa.get() as *mut u8, 0, PAGE_SIZE as usize) };
    Ok(())
}

/// Where a host may write its certificates.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    /// The first of the shared pages.
    pub gpa: Gpa,
    /// How many there are.
    pub pages: u64,
}

impl Ghcb {
    /// Has the host carry the message in the shared page `request` to the security processor, and the answer
    /// into the shared page `response`; with `certificates`, to have those written as well. Returns what the
    /// host says came of it.
    ///
    /// # Errors
    ///
    /// One of the GHCB reasons.
    pub fn guest_request(
        &self,
        request: Gpa,
        response: Gpa,
        certificates: Option<Room>,
    ) -> Result<GuestRequestOutcome, TurnstileReason> {
        let refused = TurnstileReason::GHCB_MALFORMED;
        let (info_1, info_2) = (request.get(), response.get());
        match certificates {
            None => self.request(ExitCode::GUEST_REQUEST, info_1, info_2, &[], refused)?,
            Some(Room { gpa, pages }) => self.request(
                ExitCode::EXTENDED_GUEST_REQUEST,
                info_1,
                info_2,
                &[(Field::RAX, gpa.get()), (Field::RBX, pages)],
                refused,
            )?,
        }
        if !ValidBitmap(self.read(page::VALID_BITMAP_OFFSET)).contains(Field::EXIT_INFO_2) {
            return Err(TurnstileReason::GHCB_REPLY);
        }
        let info_2 = self.read(Field::EXIT_INFO_2.offset());
        Ok(GuestRequestOutcome::decode(info_2))
    }

    /// Turns a page of the region into the running processor's GHCB.
    ///
    /// # Errors
    ///
    /// One of the GHCB reasons: the host refused or lied.
    ///
    /// # Safety
    ///
    /// `gpa` is a page of the region that was never validated and is nobody else's.
    pub unsafe fn establish(gpa: Gpa) -> Result<Self, TurnstileReason> {
        // SAFETY: the caller's promise.
        unsafe { share(gpa) }?;
        msr::register_ghcb(gpa)?;
        let ghcb = Self { gpa };
        ghcb.select();
        Ok(ghcb)
    }

    /// Puts the page's address into the MSR, where requests of the MSR protocol removed it.
    fn select(&self) {
        snp::write_ghcb_msr(self.gpa.get());
    }

    /// Writes a value of the page.
    fn write<T: zerocopy::IntoBytes>(&self, offset: usize, value: T) {
        debug_assert!(offset + size_of::<T>() <= PAGE_SIZE as usize);
        // SAFETY: every offset comes from the layout of the page, which is mapped for ever.
        unsafe { ((self.gpa.get() as usize + offset) as *mut T).write_volatile(value) }
    }

    /// Reads a value of the page, once.
    fn read<T: zerocopy::FromBytes>(&self, offset: usize) -> T {
        debug_assert!(offset + size_of::<T>() <= PAGE_SIZE as usize);
        // SAFETY: every offset comes from the layout of the page, which is mapped for ever; any
        // bytes are a value of T.
        unsafe { ((self.gpa.get() as usize + offset) as *const T).read_volatile() }
    }

    /// Sends an event with these fields and checks the general part of the reply. `refused` is
    /// the reason when the host calls the request malformed.
    fn request(
        &self,
        event: ExitCode,
        info_1: u64,
        info_2: u64,
        arguments: &[(Field, u64)],
        refused: TurnstileReason,
    ) -> Result<(), TurnstileReason> {
        let mut valid = ValidBitmap::default();
        let mut put = |field: Field, value: u64| {
            self.write(field.offset(), value);
            valid.insert(field);
        };
        put(Field::EXIT_CODE, event.0);
        put(Field::EXIT_INFO_1, info_1);
        put(Field::EXIT_INFO_2, info_2);
        for &(field, value) in arguments {
            put(field, value);
        }
        self.write(page::VALID_BITMAP_OFFSET, valid.0);
        self.write(page::PROTOCOL_VERSION_OFFSET, PROTOCOL_VERSION);
        self.write(page::USAGE_OFFSET, USAGE_STANDARD);
        self.select();
        // SAFETY: the MSR holds the address of this page, which was just filled.
        unsafe { snp::vmgexit() };

        let valid = ValidBitmap(self.read(page::VALID_BITMAP_OFFSET));
        if !valid.contains(Field::EXIT_INFO_1) {
            return Err(TurnstileReason::GHCB_REPLY);
        }
        let info_1: u64 = self.read(Field::EXIT_INFO_1.offset());
        match Response(info_1 as u32) {
            Response::NO_ACTION => Ok(()),
            Response::EXCEPTION => Err(TurnstileReason::GHCB_MALFORMED),
            Response::MALFORMED => Err(refused),
            _ => Err(TurnstileReason::GHCB_REPLY),
        }
    }
}

const _: () = assert!(size_of::<GhcbPage>() == PAGE_SIZE as usize);

impl Hypervisor for Ghcb {
    fn run_vmpl(&self, vmpl: Vmpl) -> Result<(), TurnstileReason> {
        let number = u64::from(vmpl.number());
        self.request(
            ExitCode::RUN_VMPL,
            number,
            0,
            &[],
            TurnstileReason::RUN_VMPL,
        )
    }

    fn create_vcpu(&self, request: VcpuRequest) -> Result<(), TurnstileReason> {
        let kind = match request.start {
            Start::Later => ApRequest::CREATE_ON_INIT,
            Start::Now => ApRequest::CREATE,
        };
        let info_1 = ApCreation {
            request: kind,
            vmpl: request.vmpl,
            apic_id: request.apic_id,
        }
        .encode();
        self.request(
            ExitCode::AP_CREATION,
            info_1,
            request.vmsa.get(),
            &[(Field::RAX, request.sev_features)],
            TurnstileReason::AP_CREATION,
        )
    }

    fn list_apic_ids(&self, list: Gpa) -> Result<(), TurnstileReason> {
        let pages = 1;
        self.request(
            ExitCode::GET_APIC_IDS,
            list.get(),
            0,
            &[(Field::RAX, pages)],
            TurnstileReason::APIC_IDS,
        )?;
        // The host answers with the number of pages that it needs.
        if self.read::<u64>(Field::RAX.offset()) == pages {
            Ok(())
        } else {
            Err(TurnstileReason::APIC_IDS)
        }
    }

    fn make_private(&self, blocks: &[Gpa]) -> Result<(), TurnstileReason> {
        let count = blocks.len();
        let end = match count.checked_sub(1) {
            None => return Ok(()),
            Some(last) if count <= psc::MAX_ENTRIES => last as u16,
            Some(_) => return Err(TurnstileReason::INTERNAL),
        };
        let entries = (psc::FIRST_ENTRY_OFFSET..).step_by(size_of::<psc::Entry>());
        for (offset, block) in entries.zip(blocks) {
            let (frame, size) = (block.frame(), PageSize::Size2M);
            let entry = psc::Entry::new(frame, PageOperation::PRIVATE, size);
            self.write(page::SHARED_BUFFER_OFFSET + offset, entry);
        }
        let header = psc::Header {
            end,
            ..psc::Header::default()
        };
        self.write(page::SHARED_BUFFER_OFFSET, header);
        let mut done = 0;
        for _ in 0..PSC_TRIES {
            self.request(
                ExitCode::PAGE_STATE_CHANGE,
                0,
                0,
                &[(
                    Field::SCRATCH,
                    self.gpa.get() + page::SHARED_BUFFER_OFFSET as u64,
                )],
                TurnstileReason::GHCB_PAGE_STATE,
            )?;
            let outcome = psc::Outcome(self.read(Field::EXIT_INFO_2.offset()));
            let header: psc::Header = self.read(page::SHARED_BUFFER_OFFSET);
            let sane = header.current >= done && header.end == end;
            if outcome != psc::Outcome::OK || !sane {
                return Err(TurnstileReason::GHCB_PAGE_STATE);
            }
            done = header.current;
            if done > end {
                return Ok(());
            }
        }
        Err(TurnstileReason::GHCB_PAGE_STATE)
    }

    fn write_port(&self, port: u16, value: u8) -> Result<(), TurnstileReason> {
        let IoInfo(info_1) = IoInfo::single(port, IoDirection::Out, IoWidth::Byte);
        self.request(
            ExitCode::IOIO,
            info_1,
            0,
            &[(Field::RAX, value.into())],
            TurnstileReason::GHCB_MALFORMED,
        )
    }
}
