use super::*;
use std::string::ToString;

#[test]
fn a_native_end_is_told_as_the_machine_tells_it() {
    let value = u32::from(Outcome::Terminated.device_value());
    assert_eq!(value, crate::terminate::NATIVE_EXIT_VALUE);
}

#[test]
fn a_line_names_its_event() {
    let line = serde_json::to_string(&Event::Stage(Stage {
        name: StageName::Paravisor,
        tsc: 7,
        instructions: 9,
        validated_bytes: 11,
    }))
    .unwrap();
    assert_eq!(
        line,
        r#"{"event":"stage","name":"paravisor","tsc":7,"instructions":9,"validated_bytes":11}"#
    );
}

#[test]
fn a_report_survives_its_line() {
    let mut report = Report::new(Outcome::Terminated, "why".to_string());
    report.termination = Some(Termination {
        set: 5,
        code: 8,
        text: crate::terminate::explain(5, 8).to_string(),
        vmpl: 0,
    });
    report.counters[1]
        .vmgexits
        .insert("nae:0x80000010".to_string(), u64::MAX);
    report.counters[0].pvalidate.validate_2m.size_mismatch = 3;
    report.referee = Some(Referee {
        checked: 1 << 20,
        ..Referee::default()
    });
    report.violations.live_rescind = 2;
    report.memory.folios.large_whole = 7;
    let mut call = CallCounters {
        vmpl: 1,
        call: 1,
        name: "CORE/PVALIDATE".to_string(),
        ..CallCounters::default()
    };
    call.results.insert("SUCCESS".to_string(), 4);
    call.entries.validate_2m.done = 4;
    call.latency.buckets = std::vec![0, 3, 1];
    report.vcpus.push(VcpuCounters {
        id: 3,
        calls: std::vec![call.clone()],
        ..VcpuCounters::default()
    });
    report.calls.push(call);
    report.samples.push(Sample {
        tsc: 5,
        validated_bytes: 4096,
    });
    let event = Event::Report(Box::new(report));
    let line = serde_json::to_string(&event).unwrap();
    assert!(!line.contains('\n'));
    assert_eq!(serde_json::from_str::<Event>(&line).unwrap(), event);
}

#[test]
fn fields_that_are_missing_or_new_do_not_matter() {
    let line = r#"{"event":"report","outcome":"power-off","code":0,"reason":"","later":[1]}"#;
    let Event::Report(report) = serde_json::from_str(line).unwrap() else {
        panic!()
    };
    assert_eq!(*report, Report::new(Outcome::PowerOff, String::new()));
    assert_eq!(report.violations.total(), 0);
}

#[test]
fn exit_states_cannot_be_confused_with_those_of_qemu() {
    let all = [
        Outcome::PowerOff,
        Outcome::Reset,
        Outcome::GuestExit,
        Outcome::Terminated,
        Outcome::Halted,
        Outcome::Shutdown,
        Outcome::Refused,
        Outcome::LaunchFailed,
        Outcome::BadSettings,
        Outcome::EmulatorFault,
    ];
    for (index, outcome) in all.iter().enumerate() {
        assert!(outcome.qemu_status() > 1);
        assert!(
            all[..index]
                .iter()
                .all(|other| other.qemu_status() != outcome.qemu_status())
        );
    }
}
