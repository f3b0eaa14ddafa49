//! Requests in words, for the trace: of a guest to the host, and of a guest to the paravisor.
//! Changes nothing and counts nothing.

use alloc::format;
use alloc::string::String;

use protocols::exit_code::ExitCode;
use protocols::ghcb::msr::Request;
use protocols::ghcb::page::{Field, Ghcb};
use protocols::svsm::{CallId, CoreCall, Protocol, ResultCode};
use zerocopy::{FromZeros, IntoBytes};

use crate::memory::PhysicalMemory;
use crate::platform::Platform;
use crate::types::{Gpa, VcpuId, Vmpl};

/// Exit codes behind this one are requests to the host; up to it they are instructions that the
/// guest's #VC handler passes on (GHCB, list of non-automatic events).
const LAST_INSTRUCTION: ExitCode = ExitCode::MMIO_WRITE;

/// What a VMGEXIT asks for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Description {
    /// For humans.
    pub text: String,
    /// Whether it is a request of its own, not an instruction that is passed on.
    pub is_request: bool,
}

/// The call of the paravisor that RAX asks for (SVSM 5).
pub fn call(rax: u64) -> String {
    let id = CallId::decode(rax);
    let name = match id.protocol {
        Protocol::CORE => CoreCall(id.call).name(),
        _ => None,
    };
    match (id.protocol.name(), name) {
        (Some(protocol), Some(call)) => format!("{protocol}/{call}"),
        (Some(protocol), None) => format!("{protocol}/{:#x}", id.call),
        (None, _) => format!("{:#x}/{:#x}", id.protocol.0, id.call),
    }
}

/// The result of a call in RAX (SVSM 5).
pub fn result(rax: u64) -> String {
    let code = ResultCode::decode(rax);
    code.name()
        .map_or_else(|| format!("{:#x}", code.0), String::from)
}

impl<P: PhysicalMemory> Platform<P> {
    /// What the VMGEXIT that `vmpl` is about to make on `vcpu` asks for.
    pub fn describe_vmgexit(&self, vcpu: VcpuId, vmpl: Vmpl) -> Description {
        let value = self.ghcb_msr(vcpu, vmpl);
        match Request::decode(value) {
            Request::GhcbPage { gpa } => self.describe_ghcb(Gpa::new(gpa)),
            request => Description {
                text: format!("MSR {request:x?}"),
                is_request: !matches!(request, Request::Cpuid { .. }),
            },
        }
    }

    fn describe_ghcb(&self, gpa: Gpa) -> Description {
        let Some(spa) = self.shared_page(gpa) else {
            return Description {
                text: format!("GHCB {gpa}, which is not shared"),
                is_request: true,
            };
        };
        let mut page = Ghcb::new_zeroed();
        self.memory.read(spa, page.as_mut_bytes());
        let field = |field| {
            page.get(field)
                .map_or_else(|| "-".into(), |value: u64| format!("{value:#x}"))
        };
        let code = page.get(Field::EXIT_CODE).map(ExitCode);
        let name = match code {
            Some(code) => code
                .name()
                .map_or_else(|| format!("{:#x}", code.0), String::from),
            None => "no exit code".into(),
        };
        let (info_1, info_2) = (field(Field::EXIT_INFO_1), field(Field::EXIT_INFO_2));
        Description {
            text: format!("{name} {info_1} {info_2}"),
            is_request: code.is_none_or(|code| code > LAST_INSTRUCTION),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::platform;
    use crate::testing::{CPU0, GHCB};

    /// The description of a request by page with `code`, or by MSR with `value`.
    fn described(code: Option<u64>, value: u64) -> Description {
        let mut platform = platform("");
        platform.register_ghcb_page(Vmpl::VMPL1);
        if let Some(code) = code {
            let mut page = Ghcb::new_zeroed();
            page.set(Field::EXIT_CODE, code);
            page.set(Field::EXIT_INFO_1, 0x10);
            let spa = platform.shared_page(GHCB).unwrap();
            platform.memory.write(spa, page.as_bytes());
        }
        platform.set_ghcb_msr(CPU0, Vmpl::VMPL1, value);
        platform.describe_vmgexit(CPU0, Vmpl::VMPL1)
    }

    #[test]
    fn requests_are_told_from_instructions() {
        let run = described(Some(0x8000_0018), GHCB.get());
        assert_eq!(
            (run.text.as_str(), run.is_request),
            ("RUN_VMPL 0x10 -", true)
        );
        let port = described(Some(0x7B), GHCB.get());
        assert_eq!(
            (port.text.as_str(), port.is_request),
            ("IOIO 0x10 -", false)
        );
        assert!(!described(Some(0x8000_0002), GHCB.get()).is_request);
        assert_eq!(described(Some(0xABC), GHCB.get()).text, "0xabc 0x10 -");
        let run = described(None, 0x016);
        assert_eq!(
            (run.text.as_str(), run.is_request),
            ("MSR RunVmpl { vmpl: 0 }", true)
        );
        assert!(!described(None, 0x004).is_request);
    }

    #[test]
    fn calls_and_results_have_names_or_numbers() {
        assert_eq!(call(1), "CORE/PVALIDATE");
        assert_eq!(call(0x63), "CORE/0x63");
        assert_eq!(call(2 << 32 | 1), "VTPM/0x1");
        assert_eq!(call(9 << 32), "0x9/0x0");
        assert_eq!(result(0), "SUCCESS");
        assert_eq!(result(0x8000_0007), "BUSY");
        assert_eq!(result(0x123), "0x123");
    }

    #[test]
    fn a_ghcb_nobody_can_read_is_no_obstacle() {
        assert!(described(None, 0xFE00_0000).text.contains("not shared"));
    }
}
