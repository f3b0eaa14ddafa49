//! The processors of a launch, as options.

use clap::Args;
use igvm_build::cpu;
use igvm_build::measure::snp;

/// The virtual processors that KVM measures.
#[derive(Args)]
pub struct Processors {
    /// Virtual processors that KVM measures when the launch is finished
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    vcpus: u16,
    /// Model of the CPU as QEMU calls it, such as EPYC-Milan, for processors without a state in the file
    #[arg(long, value_parser = cpu::signature_of, conflicts_with = "vcpu_signature", value_name = "MODEL")]
    vcpu_type: Option<u32>,
    /// Or what CPUID function 1 says in EAX
    #[arg(long, value_parser = parse_number, value_name = "NUMBER")]
    vcpu_signature: Option<u32>,
}

impl Processors {
    /// What is measured of them.
    pub fn measured(&self) -> snp::Processors {
        snp::Processors {
            count: self.vcpus,
            signature: self.vcpu_type.or(self.vcpu_signature),
        }
    }
}

fn parse_number(text: &str) -> Result<u32, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16),
        None => text.parse(),
    };
    parsed.map_err(|error| format!("expected a number such as 0x800f12 ({error})"))
}
