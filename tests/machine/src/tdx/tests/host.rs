//! TDG.VP.VMCALL: what the host answers.

use super::*;

/// §4: what RCX may name, what is returned, and what stays.
#[test]
fn the_host_sees_and_changes_what_is_passed() {
    let mut td = td("");
    for rcx in [1, 2, 1 << 4, 1 << 32] {
        let gprs = td.call(Leaf::VP_VMCALL, &[(RCX, rcx), (R10, 0), (R11, 0x0A)]);
        assert_eq!(gprs[RAX], Operand::RCX.invalid());
    }
    let operands = [(RCX, 0x3C00), (R10, 0), (R11, 0x0A), (R12, 1), (R13, 2)];
    let gprs = td.call(Leaf::VP_VMCALL, &operands);
    // FakeCpu answers leaf, subleaf, 0xC, 0xD; R14 and R15 were not passed.
    assert_eq!((gprs[RAX], gprs[R10], gprs[R12], gprs[R13]), (OK, 0, 1, 2));
    assert_eq!((gprs[R14], gprs[R15]), ([0x1111_1111_1111_1111; 2]).into());
    // R10 is no sub-function of the interface.
    let gprs = td.call(Leaf::VP_VMCALL, &[(RCX, ALL), (R10, 5), (R11, 1)]);
    assert_eq!(gprs[R10].cast_signed(), -1000);
    let unknown = td.host_call(SubFunction(0x1_0FFF), &[]);
    assert_eq!(unknown[R10], HostStatus::SUBFUNCTION_UNSUPPORTED.0);
}

/// §4: ports, registers, devices, and their refusals.
#[test]
fn instructions_by_request() {
    let mut td = td("");
    let io = |td: &mut Platform<Sparse>, bytes, direction: u64, port| {
        let operands = [(R12, bytes), (R13, direction), (R14, port), (R15, 7)];
        let gprs = td.host_call(SubFunction::IO, &operands);
        (gprs[R10], gprs[R11])
    };
    assert_eq!(io(&mut td, 2, Direction::READ.0, 0x60), (0, 0xCC01));
    assert_eq!(io(&mut td, 1, Direction::WRITE.0, 0x60).0, 0);
    let invalid = HostStatus::INVALID_OPERAND.0;
    for (bytes, direction, port) in [(3, 0, 0x60), (8, 0, 0x60), (1, 2, 0x60), (1, 0, 0x1_0000)] {
        assert_eq!(io(&mut td, bytes, direction, port).0, invalid);
    }
    let msr = |td: &mut Platform<Sparse>, function, number| {
        let gprs = td.host_call(function, &[(R12, number), (R13, 1)]);
        (gprs[R10], gprs[R11])
    };
    assert_eq!(
        msr(&mut td, SubFunction::RDMSR, 0x802),
        (0, 0x1111_2222_3333_4444)
    );
    assert_eq!(msr(&mut td, SubFunction::RDMSR, 0xBAD).0, invalid);
    assert_eq!(msr(&mut td, SubFunction::WRMSR, 0x830).0, 0);
    assert_eq!(msr(&mut td, SubFunction::WRMSR, 0xBAD).0, invalid);
    let device = 0xFEE0_0000 | SHARED;
    let mmio = |td: &mut Platform<Sparse>, bytes, address| {
        let operands = [(R12, bytes), (R13, 0), (R14, address)];
        let gprs = td.host_call(SubFunction::MMIO, &operands);
        (gprs[R10], gprs[R11])
    };
    assert_eq!(mmio(&mut td, 4, device), (0, 0x4433_2211));
    for (bytes, address) in [(4, 0xFEE0_0000), (3, device), (4, device + 2), (4, SHARED)] {
        assert_eq!(mmio(&mut td, bytes, address).0, invalid, "{address:#x}");
    }
    for (r12, want) in [(0, 0), (1, invalid)] {
        let gprs = td.host_call(SubFunction::GET_TD_VMCALL_INFO, &[(R12, r12)]);
        assert_eq!(gprs[R10], want);
    }
    let quote = |td: &mut Platform<Sparse>, address| {
        td.host_call(SubFunction::GET_QUOTE, &[(R12, address), (R13, 0x1000)])[R10]
    };
    assert_eq!(
        quote(&mut td, SHARED),
        HostStatus::SUBFUNCTION_UNSUPPORTED.0
    );
    assert_eq!(quote(&mut td, 0x1000), invalid);
}

/// §4: HLT and ReportFatalError do not simply return.
#[test]
fn requests_that_stop_the_processor() {
    let mut td = td("");
    let mut call = |function: SubFunction, r12, text: u64| {
        let mut gprs = [0; COUNT];
        (gprs[RCX], gprs[R11], gprs[R12], gprs[R14]) = (ALL, function.0, r12, text);
        td.tdcall(CPU0, KERNEL, &mut gprs, &mut FakeCpu::default())
    };
    for (r12, blocked) in [(0, false), (1, true)] {
        assert_eq!(call(SubFunction::HLT, r12, 0), Outcome::Halt { blocked });
    }
    let text = u64::from_le_bytes(*b"lost\x01it\0");
    let Outcome::End(End::FatalError { code, text, .. }) =
        call(SubFunction::REPORT_FATAL_ERROR, 5, text)
    else {
        panic!()
    };
    assert_eq!((code, text.as_str()), (5, "lost.it"));
}

/// §2 row 5: an entry that the host works on is busy, for leaves on the page and on its block.
#[test]
fn a_held_entry_is_busy() {
    let mut td = td("backing=2m");
    let page = Gpa::new(BLOCK.get() + 0x5000);
    let busy = Status::OPERAND_BUSY.with(1);
    assert_eq!(td.hold(page), Some(()));
    assert_eq!(td.hold(BLOCK), None, "one at a time");
    assert_eq!(td.accept_td(page, PageSize::Size4K), busy);
    assert_eq!(td.accept_td(BLOCK, PageSize::Size2M), busy);
    let full = full(L2Vm::Vm1);
    let written = td.write_attributes(page, PageSize::Size4K, full, full);
    assert_eq!(written[RAX], busy);
    assert_eq!(td.accept_td(BLOCK, PageSize::Size4K), OK);
    assert_eq!(td.hold(page), Some(()));
    assert_eq!(td.accept_td(page, PageSize::Size4K), OK);
    assert_eq!(td.counters.violations.total(), 0);
}

/// Who accepts a shared page has the host make it private: no data is lost by that.
#[test]
fn an_accept_of_a_shared_page_is_no_violation() {
    let mut td = td("backing=2m");
    let shared = BLOCK.get() | SHARED;
    td.host_call(SubFunction::MAP_GPA, &[(R12, shared), (R13, 0x1000)]);
    assert_eq!(td.accept_td(BLOCK, PageSize::Size4K), OK);
    assert_eq!(td.counters.violations.total(), 0);
}

/// §4 MapGPA: both ways, a bounded part at a time, and its refusals.
#[test]
fn map_gpa_converts() {
    let mut td = td("backing=2m");
    td.accept_td(BLOCK, PageSize::Size2M);
    let map = |td: &mut Platform<Sparse>, start, bytes| {
        let gprs = td.host_call(SubFunction::MAP_GPA, &[(R12, start), (R13, bytes)]);
        (gprs[R10], gprs[R11])
    };
    let (private, shared) = (BLOCK.get(), BLOCK.get() | SHARED);
    assert_eq!(map(&mut td, shared, 0x20_0000).0, 0);
    assert_eq!(td.state(BLOCK).0, State::Free);
    assert_eq!(td.counters.validated_bytes, 0);
    assert!(td.peek(L1, Alias::Shared, BLOCK).is_some());
    assert_eq!(map(&mut td, private, 0x20_0000).0, 0);
    assert_eq!(
        td.access(L1, Alias::Private, BLOCK, Kind::Read),
        Verdict::NotValidated
    );
    let invalid = HostStatus::INVALID_OPERAND.0;
    for (start, bytes, want) in [
        (private, 0, invalid),
        (private, u64::MAX, invalid),
        (SHARED - 0x1000, 0x2000, invalid),
        (shared + 8, 0x1000, HostStatus::ALIGN_ERROR.0),
        (shared, 0x800, HostStatus::ALIGN_ERROR.0),
    ] {
        assert_eq!(map(&mut td, start, bytes).0, want, "{start:#x} {bytes:#x}");
    }
    // The memory of this platform ends at 16 MiB.
    assert_eq!(map(&mut td, 0xFF_F000, 0x2000), (invalid, 0x100_0000));
    let mut lying = td_with("hostile=map-gpa-retry", 0);
    let answer = map(&mut lying, shared, 0x1000);
    assert_eq!(answer, (HostStatus::RETRY.0, shared));
    assert_eq!(lying.state(BLOCK).0, State::Free);
}
