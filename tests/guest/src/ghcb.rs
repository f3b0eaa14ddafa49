//! The guest's side of the GHCB protocol, bare enough to send anything, also nonsense.
//!
//! - [`msr_call`] is the MSR protocol: one request value, one reply value.
//! - [`Page`] is a GHCB page. A request is a list of fields; only the fields in the list are
//!   marked valid, so a case leaves one out simply by not naming it.

use protocols::addr::{Gpa, PAGE_SIZE};
use protocols::exit_code::ExitCode;
use protocols::ghcb::event::{IoDirection, IoInfo, IoWidth};
use protocols::ghcb::msr::{Request, Response as MsrResponse};
use protocols::ghcb::page::{
    Field, MalformedReason, Response, SHARED_BUFFER_OFFSET, USAGE_STANDARD, VALID_BITMAP_OFFSET,
    ValidBitmap,
};
use protocols::ghcb::{PROTOCOL_VERSION, PageOperation};
use protocols::terminate::Reason;

use crate::harness::{Finding, Verdict, expect};
use crate::insn::{self, GHCB_MSR};
use crate::memory;

/// Sends `request` through the GHCB MSR and returns what the MSR holds afterwards.
pub fn msr_call(request: u64) -> u64 {
    set_msr(request);
    insn::vmgexit();
    msr()
}

/// What the GHCB MSR holds. Never intercepted (APM 15.35.7).
pub fn msr() -> u64 {
    insn::rdmsr(GHCB_MSR).unwrap_or_else(|trap| panic!("RDMSR of the GHCB MSR: {trap:x?}"))
}

/// Writes the GHCB MSR without a request.
pub fn set_msr(value: u64) {
    insn::wrmsr(GHCB_MSR, value).unwrap_or_else(|trap| panic!("WRMSR of the GHCB MSR: {trap:x?}"));
}

/// A request through the MSR and its decoded reply.
pub fn request(request: Request) -> MsrResponse {
    MsrResponse::decode(msr_call(request.encode()))
}

/// Page state change of one 4 KiB page by MSR, which must succeed.
///
/// # Errors
///
/// A finding with the reply.
pub fn change_page_state(gpa: Gpa, operation: PageOperation) -> Verdict {
    let reply = request(Request::PageState {
        frame: gpa.frame(),
        operation,
    });
    expect(
        "reply to the page state change",
        reply,
        MsrResponse::PageState { error: 0 },
    )
}

/// Asks to run `vmpl`; returns the reply once this VMPL runs again.
pub fn run_vmpl(vmpl: u8) -> MsrResponse {
    request(Request::RunVmpl { vmpl })
}

/// Ends the run with a reason, when there is no console yet.
pub fn terminate(reason: Reason) -> ! {
    loop {
        request(Request::Terminate(reason));
    }
}

/// The reply to a request through the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply {
    /// Low half of SW_EXITINFO1.
    pub response: Response,
    /// SW_EXITINFO2.
    pub info_2: u64,
}

impl Reply {
    /// Done, nothing to tell.
    pub const DONE: Self = Self {
        response: Response::NO_ACTION,
        info_2: 0,
    };

    /// Refused as malformed.
    #[must_use]
    pub const fn malformed(reason: MalformedReason) -> Self {
        Self {
            response: Response::MALFORMED,
            info_2: reason.0,
        }
    }
}

/// A GHCB page: shared memory that belongs to the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page(Gpa);

impl Page {
    /// Uses the shared page at `gpa`.
    #[must_use]
    pub const fn at(gpa: Gpa) -> Self {
        Self(gpa)
    }

    /// Where it is.
    #[must_use]
    pub const fn gpa(self) -> Gpa {
        self.0
    }

    /// GPA of the shared buffer.
    #[must_use]
    pub const fn buffer(self) -> Gpa {
        Gpa::new(self.0.get() + SHARED_BUFFER_OFFSET as u64)
    }

    /// Registers the page with the host; the reply must echo its frame.
    ///
    /// # Errors
    ///
    /// A finding with the reply.
    pub fn register(self) -> Verdict {
        let frame = self.0.frame();
        let reply = request(Request::RegisterGhcb { frame });
        expect(
            "reply to the registration",
            reply,
            MsrResponse::RegisterGhcb { frame },
        )
    }

    fn put(self, offset: usize, value: u64) {
        let address = memory::shared(self.0) + offset as u64;
        insn::store(address, value).unwrap_or_else(|trap| panic!("GHCB page: {trap:x?}"));
    }

    fn take(self, offset: usize) -> u64 {
        let address = memory::shared(self.0) + offset as u64;
        insn::load(address).unwrap_or_else(|trap| panic!("GHCB page: {trap:x?}"))
    }

    /// Writes eight bytes of the shared buffer.
    pub fn put_buffer(self, offset: usize, value: u64) {
        self.put(SHARED_BUFFER_OFFSET + offset, value);
    }

    /// Reads eight bytes of the shared buffer.
    #[must_use]
    pub fn take_buffer(self, offset: usize) -> u64 {
        self.take(SHARED_BUFFER_OFFSET + offset)
    }

    /// Prepares a request of exactly `fields` without sending it.
    pub fn prepare(self, usage: u32, fields: &[(Field, u64)]) {
        let mut valid = ValidBitmap::default();
        for &(field, value) in fields {
            self.put(field.offset(), value);
            valid.insert(field);
        }
        self.put(VALID_BITMAP_OFFSET, valid.0[0]);
        self.put(VALID_BITMAP_OFFSET + 8, valid.0[1]);
        // The last quadword: two reserved bytes, u16 version, u32 usage.
        self.put(
            PAGE_SIZE as usize - 8,
            u64::from(PROTOCOL_VERSION) << 16 | u64::from(usage) << 32,
        );
    }

    /// Sends what [`Self::prepare`] left in the page.
    pub fn send(self) -> Reply {
        set_msr(self.0.get());
        insn::vmgexit();
        self.reply()
    }

    /// What the host left in the two information fields.
    #[must_use]
    pub fn reply(self) -> Reply {
        Reply {
            response: Response(self.take(Field::EXIT_INFO_1.offset()) as u32),
            info_2: self.take(Field::EXIT_INFO_2.offset()),
        }
    }

    /// An event with its two information fields and further fields.
    pub fn call(self, event: ExitCode, infos: [u64; 2], fields: &[(Field, u64)]) -> Reply {
        self.prepare_event(event, infos, fields);
        self.send()
    }

    /// The first half of [`Self::call`].
    pub fn prepare_event(self, event: ExitCode, infos: [u64; 2], fields: &[(Field, u64)]) {
        const MAX: usize = 16;
        let mut all = [(Field::EXIT_CODE, event.0); MAX];
        all[1] = (Field::EXIT_INFO_1, infos[0]);
        all[2] = (Field::EXIT_INFO_2, infos[1]);
        assert!(
            fields.len() <= MAX - 3,
            "a request names at most {} more fields",
            MAX - 3
        );
        all[3..3 + fields.len()].copy_from_slice(fields);
        self.prepare(USAGE_STANDARD, &all[..3 + fields.len()]);
    }

    /// OUT. Whether the host obeyed is not looked at: consoles use this, and have no other way
    /// to complain.
    pub fn port_out(self, port: u16, width: IoWidth, value: u32) {
        let info = IoInfo::single(port, IoDirection::Out, width);
        self.call(
            ExitCode::IOIO,
            [info.0, 0],
            &[(Field::RAX, u64::from(value))],
        );
    }

    /// The value of a field of the reply.
    ///
    /// # Errors
    ///
    /// A finding when the host did not mark the field valid.
    pub fn output(self, field: Field) -> Result<u64, Finding> {
        if self.valid().contains(field) {
            Ok(self.take(field.offset()))
        } else {
            Err(Finding::new(format_args!(
                "output {field:?} is not marked valid"
            )))
        }
    }

    /// The valid bitmap as it stands in the page.
    #[must_use]
    pub fn valid(self) -> ValidBitmap {
        ValidBitmap([
            self.take(VALID_BITMAP_OFFSET),
            self.take(VALID_BITMAP_OFFSET + 8),
        ])
    }
}
