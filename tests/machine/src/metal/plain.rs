//! Plain mode: the image's native platform in a guest without SEV-SNP.
//!
//! The guest has all of memory, one to one, but for the machine's own, and the windows where the image
//! wanted memory that QEMU does not have. It sees a processor without SEV and without SVM. What stays
//! between it and QEMU is what keeps the machine: its memory is not there, not on any map, and the ways
//! to end a run end in a report. Everything else (interrupts, HLT, devices) is the guest's.
//!
//! Invariant: a nested leaf never shows the machine's memory, except the windows it gave away.

#![expect(unsafe_code, reason = "nested tables are raw memory; VMRUN")]

use alloc::format;
use alloc::vec::Vec;
use core::ops::Range as Bytes;

use igvm_defs::IgvmNativeVpContextX64;
use machine::layout::Backing;
use machine::platform::End;
use machine::types::Vmpl;
use protocols::exit_code::ExitCode;
use protocols::vmsa::{Efer, Segment, SegmentAttributes, Vmsa};

use super::cpu::{self, msr};
use super::memory::{Layout, OwnPages};
use super::svm::{Registers, seg};
use super::vcpu::{Flow, Vcpu};
use super::{exit, finish, shared};

/// The row of the report that the guest's exits are counted in: no level of SEV-SNP, but there is one
/// guest, and the machine serves it as directly as one at this level.
const COUNTED_AS: Vmpl = Vmpl::VMPL1;

/// Runs the guest from `start` until the run ends.
pub fn run(vcpu: &mut Vcpu, start: &IgvmNativeVpContextX64, layout: &Layout) -> ! {
    vcpu.vmpl = COUNTED_AS;
    vcpu.strict = false;
    vcpu.init_control();
    // There are no new instructions whose #UD means something.
    vcpu.vmcb_mut().control.intercept_exceptions = 0;
    load(vcpu, start);
    let mut tables = Tables::new(layout);
    loop {
        // SAFETY: (1) is the invariant of `Tables`; (2) `init_control` was called above.
        unsafe { vcpu.enter_on(tables.root.physical()) };
        let flow = match ExitCode(vcpu.vmcb().control.exit_code) {
            ExitCode::NPF => tables.fault(vcpu),
            ExitCode::MSR => access_msr(vcpu),
            ExitCode::VMMCALL => vcpu.undefined_opcode(),
            _ => exit::handle(vcpu),
        };
        match flow {
            Flow::Resume => {}
            Flow::End(end) => finish::end(end, vcpu.rip()),
            Flow::Run(..) | Flow::Hold(_) | Flow::Idle(_) => {
                let why = format!(
                    "a plain guest at {:#x} asked for a level or to wait",
                    vcpu.rip()
                );
                finish::end(End::Refused(why), vcpu.rip());
            }
        }
    }
}

/// Attributes of a descriptor from its bit 40 on, as a VMCB has them: without the limit's bits.
fn attributes(descriptor: u16) -> SegmentAttributes {
    SegmentAttributes(descriptor & 0xFF | descriptor >> 4 & 0xF00)
}

/// Takes the state of the native context into the CPU.
fn load(vcpu: &mut Vcpu, start: &IgvmNativeVpContextX64) {
    let reset = Vmsa::at_reset(0);
    let code = Segment {
        selector: start.code_selector,
        attributes: attributes(start.code_attributes),
        limit: start.code_limit,
        base: start.code_base.into(),
    };
    let data = Segment {
        selector: start.data_selector,
        attributes: attributes(start.data_attributes),
        limit: start.data_limit,
        base: start.data_base.into(),
    };
    let table = |limit: u16, base| Segment {
        selector: 0,
        attributes: SegmentAttributes::default(),
        limit: limit.into(),
        base,
    };
    let save = vcpu.save_mut();
    for index in [seg::ES, seg::SS, seg::DS, seg::FS, seg::GS] {
        save.segments[index] = data;
    }
    save.segments[seg::CS] = code;
    save.segments[seg::GDTR] = table(start.gdtr_limit, start.gdtr_base);
    save.segments[seg::IDTR] = table(start.idtr_limit, start.idtr_base);
    save.segments[seg::LDTR] = reset.ldtr;
    save.segments[seg::TR] = reset.tr;
    save.cpl = 0;
    save.efer = start.efer | Efer::SVME.bits();
    save.cr4 = start.cr4;
    save.cr3 = start.cr3;
    save.cr0 = start.cr0;
    save.dr7 = reset.dr7;
    save.dr6 = reset.dr6;
    save.rflags = start.rflags;
    save.rip = start.rip;
    save.rsp = start.rsp;
    save.rax = start.rax;
    save.cr2 = 0;
    save.g_pat = reset.g_pat;
    vcpu.registers = Registers {
        rbx: start.rbx,
        rcx: start.rcx,
        rdx: start.rdx,
        rsi: start.rsi,
        rdi: start.rdi,
        rbp: start.rbp,
        r8_15: [
            start.r8, start.r9, start.r10, start.r11, start.r12, start.r13, start.r14, start.r15,
        ],
    };
    vcpu.load_hidden_state();
    cpu::wrmsr(msr::PAT, reset.g_pat);
}

/// The MSRs of SEV do not exist, and SVM is off.
fn access_msr(vcpu: &mut Vcpu) -> Flow {
    let write = vcpu.vmcb().control.exit_info1 & 1 != 0;
    match vcpu.registers.rcx as u32 {
        msr::GHCB | msr::SEV_STATUS | msr::SVSM_CAA | msr::VM_HSAVE_PA => vcpu.general_protection(),
        msr::EFER if !write => {
            let flow = exit::msr::access(vcpu);
            vcpu.save_mut().rax &= !Efer::SVME.bits();
            flow
        }
        _ => exit::msr::access(vcpu),
    }
}

mod bits {
    /// Present, writable, user (nested walks are user accesses), accessed.
    pub const TABLE: u64 = 0b10_0111;
    /// And dirty.
    pub const LEAF: u64 = TABLE | 1 << 6;
    pub const PRESENT: u64 = 1;
    pub const LARGE: u64 = 1 << 7;
    pub const ADDRESS: u64 = 0x000F_FFFF_FFFF_F000;
}

/// Sizes of leaves: level 3 to 1.
const GIB: u64 = 1 << 30;
const LARGE: u64 = 1 << 21;
const PAGE: u64 = 1 << 12;

/// Addresses end here: the guest is told of 46 bits.
const END: u64 = 1 << 46;

/// The nested tables: leaves as large as they can be, made when they are touched.
struct Tables {
    root: OwnPages,
    /// The machine's memory.
    reserved: Bytes<u64>,
    /// (guest-physical, where it is): windows.
    windows: Vec<(Bytes<u64>, u64)>,
}

impl Tables {
    fn new(layout: &Layout) -> Self {
        let machine = shared::lock(0);
        let windows = machine
            .platform
            .layout()
            .ranges()
            .iter()
            .filter(|range| range.backing == Backing::Window)
            .filter_map(|range| {
                let start = range.gpa.get();
                let spa = machine.platform.spa_of(range.gpa)?;
                Some((start..start + range.pages as u64 * PAGE, spa.get()))
            })
            .collect();
        Self {
            root: OwnPages::new(1),
            reserved: layout.reserved.start..layout.reserved.end,
            windows,
        }
    }

    /// A nested page fault: a leaf that was not made yet, or an access that leads nowhere.
    fn fault(&mut self, vcpu: &Vcpu) -> Flow {
        let address = vcpu.vmcb().control.exit_info2;
        if self.reserved.contains(&address) || address >= END {
            return Flow::End(End::Refused(format!(
                "plain guest at {:#x}: access to {address:#x}, where nothing is",
                vcpu.rip()
            )));
        }
        let (leaf, to) = self.leaf_around(address);
        self.map(leaf, to);
        Flow::Resume
    }

    /// The largest leaf at `address` that is of one kind, and where it leads.
    fn leaf_around(&self, address: u64) -> (Bytes<u64>, u64) {
        let window = self
            .windows
            .iter()
            .find(|(range, _)| range.contains(&address));
        for size in [GIB, LARGE] {
            let start = address & !(size - 1);
            let leaf = start..start + size;
            let meets = |other: &Bytes<u64>| leaf.start < other.end && other.start < leaf.end;
            let inside = |other: &Bytes<u64>| other.start <= leaf.start && leaf.end <= other.end;
            match window {
                Some((range, spa)) => {
                    let to = spa.wrapping_add(leaf.start.wrapping_sub(range.start));
                    if inside(range) && to.is_multiple_of(size) {
                        return (leaf, to);
                    }
                }
                None if !meets(&self.reserved)
                    && !self.windows.iter().any(|(range, _)| meets(range)) =>
                {
                    return (leaf.clone(), leaf.start);
                }
                None => {}
            }
        }
        let start = address & !(PAGE - 1);
        let to = window.map_or(start, |(range, spa)| spa + (start - range.start));
        (start..start + PAGE, to)
    }

    fn map(&mut self, leaf: Bytes<u64>, to: u64) {
        let (level, large) = match leaf.end - leaf.start {
            GIB => (3, bits::LARGE),
            LARGE => (2, bits::LARGE),
            _ => (1, 0),
        };
        let mut table: *mut u64 = self.root.pointer();
        for above in (level + 1..=4).rev() {
            let index = leaf.start >> (12 + 9 * (above - 1)) & 0x1FF;
            // SAFETY: `table` is a page of 512 entries that this structure made, and the processor only
            // reads it.
            let entry = unsafe { &mut *table.add(index as usize) };
            if *entry & bits::PRESENT == 0 {
                *entry = OwnPages::new(1).physical() | bits::TABLE;
            }
            table = super::memory::virt(*entry & bits::ADDRESS).cast();
        }
        let index = leaf.start >> (12 + 9 * (level - 1)) & 0x1FF;
        // SAFETY: as above.
        unsafe {
            table
                .add(index as usize)
                .write_volatile(to | bits::LEAF | large)
        };
    }
}
