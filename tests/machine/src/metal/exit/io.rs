//! IN, OUT and their string forms at a direct level.
//!
//! Only the watched ports come here (see [`ports`](crate::metal::ports)); of the string forms
//! only INS from a fw_cfg port is used by firmware, but all are carried out.

use machine::guest::walk::Access;
use machine::guest::{GuestMemory, walk};
use machine::settings::PlatformKind;
use machine::types::Alias;
use protocols::exit_code::ExitCode;

use crate::metal::guest_memory::View;
use crate::metal::memory::DirectMap;
use crate::metal::shared::{self, Machine};
use crate::metal::svm::seg;
use crate::metal::vcpu::{Flow, Vcpu};
use machine::memory::PhysicalMemory;

/// EXITINFO1 of an IOIO exit (APM 15.10.2).
#[derive(Clone, Copy)]
pub(super) struct Info(pub u64);

impl Info {
    pub fn is_input(self) -> bool {
        self.0 & 1 != 0
    }
    pub fn is_string(self) -> bool {
        self.0 & 1 << 2 != 0
    }
    pub fn is_repeated(self) -> bool {
        self.0 & 1 << 3 != 0
    }
    pub fn bytes(self) -> u8 {
        (self.0 >> 4 & 7) as u8
    }
    pub fn port(self) -> u16 {
        (self.0 >> 16) as u16
    }
}

/// Elements of one string instruction that are done before the guest is entered again, so that
/// interrupts get in between.
const BATCH: u64 = 4096;

/// An exit by port access.
pub fn access(vcpu: &mut Vcpu) -> Flow {
    if vcpu.strict {
        return vcpu.vc(ExitCode::IOIO);
    }
    let info = Info(vcpu.vmcb().control.exit_info1);
    let next = vcpu.vmcb().control.exit_info2;
    if info.is_string() {
        return string(vcpu, info, next);
    }
    let bytes = info.bytes();
    let mask = u64::MAX >> (64 - 8 * u32::from(bytes));
    let rax = vcpu.save().rax;
    let mut machine = shared::lock(vcpu.rip());
    if info.is_input() {
        let value = u64::from(machine.ports.input(info.port(), bytes)) & mask;
        drop(machine);
        // A 32-bit result clears the upper half, smaller ones keep the rest.
        let kept = if bytes == 4 { 0 } else { rax & !mask };
        vcpu.save_mut().rax = kept | value;
    } else if let Some(end) = machine
        .ports
        .output(info.port(), bytes, (rax & mask) as u32)
    {
        return Flow::End(end);
    }
    vcpu.resume_at(next)
}

/// INS or OUTS. Address size is taken from the mode, as TCG does not report it; ES and DS have
/// base 0 in every guest that uses these with 64-bit code.
fn string(vcpu: &mut Vcpu, info: Info, next: u64) -> Flow {
    const DIRECTION: u64 = 1 << 10;
    let address_mask = if vcpu.is_64_bit() {
        u64::MAX
    } else {
        0xFFFF_FFFF
    };
    let width = u64::from(info.bytes());
    let step = if vcpu.save().rflags & DIRECTION != 0 {
        width.wrapping_neg()
    } else {
        width
    };
    let segment = if info.is_input() { seg::ES } else { seg::DS };
    let base = if vcpu.is_64_bit() {
        0
    } else {
        vcpu.save().segments[segment].base
    };
    let count = if info.is_repeated() {
        vcpu.registers.rcx & address_mask
    } else {
        1
    };
    let now = count.min(BATCH);
    for _ in 0..now {
        let index = if info.is_input() {
            vcpu.registers.rdi
        } else {
            vcpu.registers.rsi
        };
        let address = base.wrapping_add(index & address_mask);
        match element(vcpu, info, address) {
            Element::Done => {}
            Element::Fault(code) => return vcpu.page_fault(address, code),
            Element::End(flow) => return flow,
        }
        let moved = index.wrapping_add(step) & address_mask;
        if info.is_input() {
            vcpu.registers.rdi = moved;
        } else {
            vcpu.registers.rsi = moved;
        }
        if info.is_repeated() {
            vcpu.registers.rcx = vcpu.registers.rcx.wrapping_sub(1) & address_mask;
        }
    }
    if now < count {
        Flow::Resume
    } else {
        vcpu.resume_at(next)
    }
}

enum Element {
    Done,
    Fault(u32),
    End(Flow),
}

fn element(vcpu: &Vcpu, info: Info, address: u64) -> Element {
    let mut machine = shared::lock(vcpu.rip());
    let access = Access {
        write: info.is_input(),
        user: vcpu.cpl() == 3,
        execute: false,
    };
    let to = {
        let view = View::new(&machine.platform, vcpu.vmpl);
        match vcpu.paging().translate(&view, address, access) {
            Ok(to) => to,
            Err(walk::PageFault { code }) => return Element::Fault(code),
        }
    };
    let bytes = info.bytes();
    let width = usize::from(bytes);
    if info.is_input() {
        let value = machine.ports.input(info.port(), bytes).to_le_bytes();
        write(&mut machine, vcpu, to, &value[..width]);
        return Element::Done;
    }
    let mut value = [0; 4];
    View::new(&machine.platform, vcpu.vmpl).read(to.gpa, &mut value[..width]);
    match machine
        .ports
        .output(info.port(), bytes, u32::from_le_bytes(value))
    {
        Some(end) => Element::End(Flow::End(end)),
        None => Element::Done,
    }
}

fn write(machine: &mut Machine, vcpu: &Vcpu, to: walk::Translation, data: &[u8]) {
    match to.alias {
        // In plain mode there are no aliases, and the C-bit is never set.
        _ if machine.platform.kind() == PlatformKind::Native => {
            View::new(&machine.platform, vcpu.vmpl).write(to.gpa, data);
        }
        Alias::Private => {
            View::new(&machine.platform, vcpu.vmpl).write(to.gpa, data);
        }
        Alias::Shared => {
            if let Some(mapping) = machine.platform.peek(vcpu.vmpl, Alias::Shared, to.gpa) {
                DirectMap.write(mapping.spa.plus(to.gpa.offset_in_page()), data);
            }
        }
    }
}
