//! Both reports: how they are asked for, and how they come out.

use core::fmt::Write;
use core::mem::offset_of;

use base64ct::{Base64, Encoding as _};
use guest::amd_sp::{Key, open, seal};
use guest::console;
use guest::ghcb::{self, change_page_state};
use guest::harness::{Finding, Verdict, expect};
use guest::memory::{self, page_of, shared};
use guest::svsm::{self, Outcome, Registers, call};
use protocols::addr::{Gpa, PAGE_SIZE, PageSize};
use protocols::amd_sp::certificates::extent;
use protocols::amd_sp::message::{MessageHeader, MessageType};
use protocols::amd_sp::report::{AttestationReport, KeySelect, ReportRequest, ReportResponse};
use protocols::amd_sp::{FirmwareStatus, GuestRequestOutcome};
use protocols::exit_code::ExitCode;
use protocols::ghcb::PageOperation;
use protocols::ghcb::page::{Field, Response};
use protocols::secrets::SecretsPage;
use protocols::svsm::attestation::{AttestationCall, Buffer, NONCE_SIZE, ServicesOperation};
use protocols::svsm::{PvalidateAction, PvalidateEntry, ResultCode};
use spin::Once;
use zerocopy::{FromZeros, IntoBytes};

use crate::reset;

/// Pages for certificates.
const ROOM: u64 = 4;
const ROOM_BYTES: usize = ROOM as usize * PAGE_SIZE as usize;
/// The level that the guest runs at, whose key it has.
const OWN_LEVEL: u8 = 1;

/// The GHCB page, by which everything here is said to the host.
static GHCB: Once<ghcb::Page> = Once::new();

/// Asks for both and writes them to `out`, which is attached first.
pub fn all(out: &mut dyn Write) -> Verdict {
    let messages = Messages::new()?;
    open_console(messages.ghcb)?;
    services(out)?;
    own(out, messages)
}

/// What reports are to be about.
fn nonce() -> [u8; NONCE_SIZE as usize] {
    core::array::from_fn(|index| index as u8)
}

/// Pages that are shared with the host.
#[derive(Clone, Copy)]
struct Messages {
    ghcb: ghcb::Page,
    request: Gpa,
    response: Gpa,
    /// The first of [`ROOM`].
    certificates: Gpa,
}

impl Messages {
    fn new() -> Result<Self, Finding> {
        const PAGES: u64 = 3 + ROOM;
        let region = memory::fresh_region();
        // Nobody has asked for them, but they may have been made ready ahead: who shares a page rescinds it.
        let rescind = |index| {
            let page = page_of(region, index as u64);
            PvalidateEntry::new(page, PageSize::Size4K, PvalidateAction::Rescind, true)
        };
        pvalidate(&core::array::from_fn::<_, { PAGES as usize }, _>(rescind))?;
        for index in 0..PAGES {
            change_page_state(page_of(region, index), PageOperation::SHARED)?;
        }
        Ok(Self {
            ghcb: ghcb::Page::at(region),
            request: page_of(region, 1),
            response: page_of(region, 2),
            certificates: page_of(region, 3),
        })
    }
}

fn pvalidate(entries: &[PvalidateEntry]) -> Verdict {
    let done = Outcome {
        result: ResultCode::SUCCESS,
        next: entries.len() as u16,
    };
    expect("PVALIDATE", svsm::pvalidate(entries)?, done)
}

fn open_console(page: ghcb::Page) -> Verdict {
    page.register()?;
    GHCB.call_once(|| page);
    console::attach(|port, width, value| {
        if let Some(page) = GHCB.get() {
            page.port_out(port, width, value);
        }
    });
    Ok(())
}

/// The paravisor's report.
fn services(out: &mut dyn Write) -> Verdict {
    let region = memory::fresh_region();
    let (size, action) = (PageSize::Size2M, PvalidateAction::Validate);
    pvalidate(&[PvalidateEntry::new(region, size, action, false)])?;
    let buffer = |index, size: usize| Buffer {
        gpa: page_of(region, index).get(),
        size: size as u32,
        reserved: 0,
    };
    let operation = ServicesOperation {
        nonce: buffer(0, nonce().len()),
        report: buffer(1, PAGE_SIZE as usize),
        manifest: buffer(2, PAGE_SIZE as usize),
        certificates: buffer(3, ROOM_BYTES),
    };
    memory::put_bytes(operation.nonce.gpa, &nonce())?;
    memory::put_bytes(svsm::buffer().get(), operation.as_bytes())?;
    let registers = Registers::rcx(svsm::buffer().get());
    let answer = call(AttestationCall::SERVICES.id(), registers)?;
    expect("ATTEST_SERVICES", answer.result(), ResultCode::SUCCESS)?;
    let Registers { rcx, rdx, r8, .. } = answer.registers;
    for (blob, buffer, size) in [
        ("outblob", operation.report, r8),
        ("auxblob", operation.certificates, rdx),
        ("manifestblob", operation.manifest, rcx),
    ] {
        let mut bytes = [0; ROOM_BYTES];
        memory::take_bytes(
            buffer.gpa,
            bytes.get_mut(..buffer.size as usize).unwrap_or_default(),
        )?;
        let told = bytes.get(..size as usize).unwrap_or_default();
        tell(out, ("services", blob), told);
    }
    Ok(())
}

/// The guest's own report, by an extended request, which brings certificates.
fn own(out: &mut dyn Write, pages: Messages) -> Verdict {
    let mut key = Key::default();
    let keys = reset::SECRETS + offset_of!(SecretsPage, vmpck) as u64;
    memory::take_bytes(
        keys + u64::from(OWN_LEVEL) * size_of::<Key>() as u64,
        &mut key,
    )?;
    let mut request = ReportRequest {
        report_data: nonce(),
        vmpl: u32::from(OWN_LEVEL),
        key_select: KeySelect::ANY,
        reserved: [0; 24],
    };
    let (kind, size) = (MessageType::REPORT_REQUEST, size_of::<ReportRequest>());
    // The first message with this key.
    let header = MessageHeader::new(kind, size as u16, OWN_LEVEL, 1);
    let header = seal(&key, header, request.as_mut_bytes());
    let at = shared(pages.request);
    memory::put_bytes(at, header.as_bytes())?;
    memory::put_bytes(at + MessageHeader::SIZE as u64, request.as_bytes())?;

    let infos = [pages.request.get(), pages.response.get()];
    let room = [(Field::RAX, pages.certificates.get()), (Field::RBX, ROOM)];
    let reply = pages
        .ghcb
        .call(ExitCode::EXTENDED_GUEST_REQUEST, infos, &room);
    expect("guest request", reply.response, Response::NO_ACTION)?;
    let outcome = GuestRequestOutcome::decode(reply.info_2);
    expect("outcome of the request", outcome, GuestRequestOutcome::OK)?;

    let at = shared(pages.response);
    let (mut header, mut response) = (MessageHeader::new_zeroed(), ReportResponse::new_zeroed());
    memory::take_bytes(at, header.as_mut_bytes())?;
    memory::take_bytes(at + MessageHeader::SIZE as u64, response.as_mut_bytes())?;
    let authentic = open(&key, &header, response.as_mut_bytes());
    expect("the answer authenticates", authentic, true)?;
    let ReportResponse { header, report } = response;
    expect("status", header.status, FirmwareStatus::SUCCESS)?;
    expect("size", header.report_size as usize, AttestationReport::SIZE)?;
    tell(out, ("own", "outblob"), report.as_bytes());
    let mut table = [0; ROOM_BYTES];
    memory::take_bytes(shared(pages.certificates), &mut table)?;
    let told = extent(&table).and_then(|size| table.get(..size));
    let told = told.ok_or_else(|| Finding::new(format_args!("no table of certificates")))?;
    tell(out, ("own", "auxblob"), told);
    Ok(())
}

/// Writes the line of that entry and blob.
fn tell(out: &mut dyn Write, (entry, blob): (&str, &str), bytes: &[u8]) {
    // A multiple of three bytes, so that the pieces make one text. The port cannot fail.
    const PIECE: usize = 48;
    let _ = write!(out, "{entry} {blob} ");
    for piece in bytes.chunks(PIECE) {
        let mut text = [0; PIECE / 3 * 4];
        let _ = out.write_str(Base64::encode(piece, &mut text).unwrap_or_default());
    }
    let _ = out.write_char('\n');
}
