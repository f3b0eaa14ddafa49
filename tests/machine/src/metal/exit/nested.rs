//! Nested page faults: the platform's verdict on an access becomes a mapping, a #VC, or the end
//! of the run.

use machine::Verdict;
use machine::access::{Denial, Mapping};
use machine::settings::PlatformKind;
use machine::types::{Alias, Gpa, Kind, Spa};
use protocols::exit_code::ExitCode;
use protocols::snp::NestedFault;

use crate::metal::npt::Mode;
use crate::metal::shared;
use crate::metal::vcpu::{Flow, Vcpu};

use super::td;

/// A nested page fault.
pub fn fault(vcpu: &mut Vcpu) -> Flow {
    let control = &vcpu.vmcb().control;
    let why = NestedFault::from_bits_retain(control.exit_info1);
    let address = control.exit_info2 & !0xFFF;
    let kind = if why.contains(NestedFault::GUEST_WALK) {
        Kind::Walk
    } else if why.contains(NestedFault::FETCH) {
        Kind::Execute
    } else if why.contains(NestedFault::WRITE) {
        Kind::Write
    } else {
        Kind::Read
    };
    // The mode may have changed since the entry: the same address then belongs to the other
    // view, which the next entry takes.
    let mode = vcpu.mode();
    let mut machine = vcpu.lock();
    let (gpa, alias) = shared::split(&machine.platform, address, mode);
    machine.platform.counters().vmpl(vcpu.vmpl).npf += 1;
    if vcpu.is_l2() && alias == Alias::Shared && !vcpu.l2.may_share() {
        drop(machine);
        return super::l2::no_shared_memory(vcpu, gpa, kind);
    }
    let verdict = machine.access(vcpu.vmpl, mode, alias, gpa, kind);
    match verdict {
        Verdict::Map(mapping) => {
            let seen_as = if mode == Mode::Flat {
                alias
            } else {
                machine.platform.effective_alias(kind, alias)
            };
            // Stale leaves go first, so that none of them survives next to the new one.
            machine.settle(vcpu.rip());
            machine.map(vcpu.vmpl, mode, address, mapping, seen_as);
            Flow::Resume
        }
        // Hardware reflects nested faults with the reserved bit, which is how hosts mark devices
        // (APM 15.35.4). A ROM is mapped, as on KVM.
        Verdict::Mmio(_)
            if (vcpu.strict || vcpu.is_l2()) && machine.platform.spa_of(gpa).is_none() =>
        {
            drop(machine);
            let exact = Gpa::new(gpa.get() | vcpu.vmcb().control.exit_info2 & 0xFFF);
            match vcpu.kind {
                PlatformKind::Tdx if vcpu.is_l2() => super::l2::device(vcpu, exact, kind),
                PlatformKind::Tdx => td::device(vcpu, exact, kind),
                PlatformKind::Snp | PlatformKind::Native => vcpu.vc(ExitCode::NPF),
            }
        }
        Verdict::Mmio(spa) => {
            machine.settle(vcpu.rip());
            map_device(&mut machine, vcpu, mode, address, spa);
            Flow::Resume
        }
        Verdict::NotValidated => {
            drop(machine);
            let exact = Gpa::new(gpa.get() | vcpu.vmcb().control.exit_info2 & 0xFFF);
            match vcpu.kind {
                PlatformKind::Tdx if vcpu.is_l2() => super::l2::pending(vcpu, exact, kind),
                PlatformKind::Tdx => td::pending(vcpu, exact, kind),
                PlatformKind::Snp | PlatformKind::Native => not_validated(vcpu, exact, kind),
            }
        }
        Verdict::Denied(Denial::Permissions(_)) if vcpu.is_l2() => {
            drop(machine);
            let exact = Gpa::new(gpa.get() | vcpu.vmcb().control.exit_info2 & 0xFFF);
            super::l2::not_given(vcpu, exact, kind)
        }
        Verdict::Denied(denial) => {
            drop(machine);
            vcpu.trace(format_args!("{kind:?} {alias:?} {gpa}: {denial}"));
            super::refused(vcpu, format_args!("{kind:?} of {gpa}"), denial)
        }
    }
}

/// Devices are mapped one to one; nobody fetches instructions from them.
fn map_device(machine: &mut shared::Machine, vcpu: &Vcpu, mode: Mode, address: u64, spa: Spa) {
    let mapping = Mapping {
        spa,
        write: true,
        execute: false,
    };
    machine.map(vcpu.vmpl, mode, address, mapping, Alias::Shared);
}

/// #VC 0x404, with the virtual address in CR2.
fn not_validated(vcpu: &mut Vcpu, gpa: Gpa, kind: Kind) -> Flow {
    vcpu.trace(format_args!("{kind:?} of {gpa}, which is not validated"));
    let address = vcpu.faulting_address(gpa, kind);
    vcpu.save_mut().cr2 = address;
    vcpu.vc(ExitCode::PAGE_NOT_VALIDATED)
}
