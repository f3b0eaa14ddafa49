//! Exits that are not about memory, and how the guest goes on after any: events that are delivered again.

use super::*;

/// Any leaf with any operands is answered.
#[test]
fn no_leaf_and_no_exit_can_break_the_service() {
    let (sept, model) = (Sept::default(), Model::default());
    let values = [0, 1, 0x1000, 0x20_0001, OWNED, SHARED, 1 << 52, u64::MAX];
    with(&sept, &model, Touch::FAULT, |service, vp| {
        for leaf in (0..40).chain([0xFFFF, 1 << 16 | 7, 2 << 16 | 7, 1 << 63]) {
            for value in values {
                vp.state.gprs = [value; 16];
                let _ = tdcall(service, vp, &[(RAX, leaf)]);
            }
        }
        for reason in (0..80).chain([u32::MAX, 1 << 31 | 33]) {
            for value in values {
                let exit = Exit {
                    gpa: value,
                    qualification: value,
                    idt_vectoring: value,
                    interruption: value,
                    extended: value,
                    instruction: value,
                    cs: value,
                    cpl: value,
                    ..Exit::new(ExitReason(reason))
                };
                vp.state.gprs = [value; 16];
                let _ = service.handle(vp, &exit);
            }
        }
    });
}

#[test]
fn tdcall_is_for_64_bit_code_at_level_0() {
    let (sept, model) = (Sept::default(), Model::default());
    with(&sept, &model, Touch::FAULT, |service, vp| {
        for (cpl, cs) in [(3, 1 << 29), (0, 0)] {
            vp.injection = None;
            let exit = Exit {
                cpl,
                cs,
                ..Exit::new(ExitReason::TDCALL)
            };
            assert_eq!(service.handle(vp, &exit), Next::Resume);
            assert_eq!(injected(vp), Some(GENERAL_PROTECTION));
        }
    });
}

/// Whatever exits always, without a wish of L1's, has an answer: a program of the guest's must not end the
/// machine by an instruction.
#[test]
fn what_exits_always_does_not_end_the_machine() {
    let (sept, model) = (Sept::default(), Model::default());
    let undefined = [11, 17, 50, 53, 60, 70, 76].into_iter().chain(19..=27);
    let wanted = undefined
        .map(|reason| (reason, INVALID_OPCODE))
        .chain([9, 55].map(|reason| (reason, GENERAL_PROTECTION)))
        .chain([13, 18, 65].map(|reason| (reason, VE)));
    with(&sept, &model, Touch::FAULT, |service, vp| {
        for (reason, event) in wanted {
            for cpl in [0, 3] {
                (vp.injection, vp.ve) = (None, None);
                let exit = Exit {
                    cpl,
                    instruction: 3 << 32,
                    ..Exit::new(ExitReason(reason))
                };
                assert_eq!(service.handle(vp, &exit), Next::Resume, "{reason}");
                assert_eq!(injected(vp), Some(event), "{reason}");
                assert_eq!(vp.state.rip, 0, "{reason}: the event is at the instruction");
            }
        }
    });
}

#[test]
fn cpuid_is_answered_or_raised() {
    let (sept, model) = (Sept::default(), Model::default());
    with(&sept, &model, Touch::FAULT, |service, vp| {
        let exit = Exit {
            instruction: 2 << 32,
            ..Exit::new(ExitReason::CPUID)
        };
        vp.gprs()[RAX] = 7;
        assert_eq!(service.handle(vp, &exit), Next::Resume);
        assert_eq!((vp.gprs()[RAX], vp.gprs()[RDX], vp.state.rip), (7, 3, 2));
        vp.gprs()[RAX] = 0x4000_0000;
        assert_eq!(service.handle(vp, &exit), Next::Resume);
        assert_eq!((injected(vp), vp.state.rip), (Some(VE), 2));
    });
}

/// An event whose delivery met an exit is delivered again; an exception on top of one is a double fault.
#[test]
fn an_interrupted_delivery_is_repeated() {
    let (sept, model) = (Sept::default(), Model::default());
    with(&sept, &model, Touch::ACCEPT, |service, vp| {
        let page_fault = 0x8000_0B0E;
        let exit = Exit {
            gpa: 0x5000,
            idt_vectoring: 6 << 32 | page_fault,
            extended: 6,
            ..Exit::new(ExitReason::EPT_VIOLATION)
        };
        assert_eq!(service.handle(vp, &exit), Next::Resume);
        let again = vp.injection.unwrap();
        assert_eq!((u64::from(again.information), again.error), (page_fault, 6));
        vp.injection = None;
        let exit = Exit { gpa: OWNED, ..exit };
        assert_eq!(service.handle(vp, &exit), Next::Resume);
        assert_eq!(injected(vp), Some(DOUBLE_FAULT));
    });
}

/// An interrupt whose delivery ends in #VE has been taken from its source: it waits again.
#[test]
fn an_interrupt_that_an_exception_displaces_waits_again() {
    let (sept, model) = (Sept::default(), Model::default());
    with(&sept, &model, Touch::FAULT, |service, vp| {
        vp.post(0x61).unwrap();
        vp.post(0x45).unwrap();
        // As the processor leaves it when it has delivered the first.
        vp.state.interrupt_status = 0x6145;
        let exit = Exit {
            gpa: 0x5000,
            idt_vectoring: 0x8000_0061,
            extended: 6,
            ..Exit::new(ExitReason::EPT_VIOLATION)
        };
        assert_eq!(service.handle(vp, &exit), Next::Resume);
        assert_eq!(injected(vp), Some(VE));
        assert_eq!(vp.state.interrupt_status, 0x0061);
        assert!(vp.is_interrupted());
    });
}

/// Where nothing else is due it is delivered again, with an interrupt of L1's as well; INT n with the
/// length of its instruction, and bits that an entry does not take are left out.
#[test]
fn interrupts_are_delivered_again_after_any_exit() {
    let (sept, model) = (Sept::default(), Model::default());
    with(&sept, &model, Touch::FAULT, |service, vp| {
        for (status, vectoring, information, length) in [
            (Status::SUCCESS, 0x8000_1061, 0x8000_0061, 0),
            (
                Status::L2_EXIT_PENDING_INTERRUPT,
                0x8000_0061,
                0x8000_0061,
                0,
            ),
            (
                Status::L2_EXIT_HOST_ROUTED_ASYNC,
                0x8000_0480,
                0x8000_0480,
                2,
            ),
        ] {
            vp.injection = None;
            let exit = Exit {
                status,
                idt_vectoring: vectoring,
                instruction: 2 << 32,
                ..Exit::new(ExitReason::EXTERNAL_INTERRUPT)
            };
            assert_eq!(service.handle(vp, &exit), Next::Resume);
            let again = vp.injection.unwrap();
            assert_eq!((again.information, again.length), (information, length));
        }
    });
}

/// VP.ENTER that was refused because of an interrupt says nothing else, and what is due stays due.
#[test]
fn an_entry_that_was_refused_changes_nothing() {
    let (sept, model) = (Sept::default(), Model::default());
    with(&sept, &model, Touch::FAULT, |service, vp| {
        vp.undefined_opcode();
        let due = vp.injection;
        let exit = Exit {
            status: Status::PENDING_INTERRUPT,
            idt_vectoring: 0x8000_0061,
            ..Exit::new(ExitReason::CPUID)
        };
        assert_eq!(service.handle(vp, &exit), Next::Resume);
        assert_eq!((vp.injection, vp.state.rip), (due, 0));
    });
}

/// Processors are called out by the vector that the guest has chosen for interrupts that say nothing.
#[test]
fn the_guests_choice_of_a_spurious_vector_is_known() {
    let (sept, model) = (Sept::default(), Model::default());
    with(&sept, &model, Touch::FAULT, |service, vp| {
        for (function, number, value, noted) in [
            (SubFunction::WRMSR, 0x832, 0x155, 0x1FF),
            (SubFunction::RDMSR, 0x80F, 0x1EE, 0x1FF),
            (SubFunction::WRMSR, 0x80F, 0x1EE, 0x1EE),
            (SubFunction::WRMSR, 0x80F, 0xEE, 0xEE),
        ] {
            assert!(ask(service, vp, function, [number, value]).is_ok());
            assert_eq!(vp.spurious, noted, "{function:?} {number:#x}");
        }
    });
    let model = Model {
        answer: (HostStatus::INVALID_OPERAND, 0),
        ..Model::default()
    };
    with(&sept, &model, Touch::FAULT, |service, vp| {
        assert!(ask(service, vp, SubFunction::WRMSR, [0x80F, 0x1EE]).is_ok());
        assert_eq!(vp.spurious, 0x1FF, "the host did not take it");
    });
}
