//! The GHCB protocol, request by request, each test with the row of `ghcb.md` it checks.

mod ap;
mod events;
mod frame;
mod fuzz;
mod guest_request;
mod msr;
mod psc;

use protocols::ghcb::page::{Field, Ghcb};

use super::*;
use crate::testing::{BLOCK, CPU0, FakeCpu, GHCB, Sparse, platform};
use crate::types::Alias;

const VMPL1: Vmpl = Vmpl::VMPL1;
const CODE: Field = Field::EXIT_CODE;
const I1: Field = Field::EXIT_INFO_1;
const I2: Field = Field::EXIT_INFO_2;
/// SW_SCRATCH of data at the start of the shared buffer.
const BUFFER: u64 = GHCB.get() + 0x800;

fn ready(settings: &str) -> Platform<Sparse> {
    let mut platform = platform(settings);
    platform.register_ghcb_page(VMPL1);
    platform
}

/// A request that comes back to its caller: SW_EXITINFO1, SW_EXITINFO2, the page.
fn served(platform: &mut Platform<Sparse>, fields: &[(Field, u64)]) -> (u64, u64, Ghcb) {
    let (reply, page) = platform.ask(VMPL1, fields, &[], &mut FakeCpu::default());
    assert_eq!(reply, Reply::Resume);
    (page.get(I1).unwrap(), page.get(I2).unwrap(), page)
}

fn malformed(platform: &mut Platform<Sparse>, fields: &[(Field, u64)]) -> u64 {
    let (info_1, info_2, _) = served(platform, fields);
    assert_eq!(info_1, 2, "not malformed");
    info_2
}

fn attribute(platform: &Platform<Sparse>, gpa: Gpa) -> Alias {
    platform
        .host
        .attribute(&platform.layout().place(gpa).unwrap())
}
