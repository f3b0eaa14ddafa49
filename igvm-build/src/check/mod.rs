//! Will a file load, and as what it says? Every rule of [`Rule`], for each platform of the file.
//!
//! | module | rules |
//! |---|---|
//! | `format` | of the file alone: headers, order, reserved fields |
//! | `platform` | of what one platform is launched with: addresses, data, parameter areas, contexts |
//! | `snp` | of SEV-SNP: policy, ID block, VMSA |
//! | `qemu` | of QEMU (10.1 and newer) with KVM |
//!
//! A breach is reported where it is and does not keep others from being found, except that where headers
//! cannot be told apart ([`File::read`]) nothing else can be said.

use igvm_defs::IgvmPlatformType;

use crate::file::{File, Header, Problem, Rule, Weight};
use crate::measure::snp::Processors;

mod format;
mod platform;
mod qemu;
mod snp;

/// What the file is checked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    /// Whether the rules of QEMU and KVM are asked for, besides those of the format.
    pub qemu: bool,
    /// The virtual processors that there are. Without a signature nothing can be said of the digest in an
    /// ID block if the file has states for fewer, and that is a breach.
    pub processors: Processors,
}

impl Default for Target {
    fn default() -> Self {
        Self {
            qemu: true,
            processors: Processors::default(),
        }
    }
}

/// All breaches in `bytes`, in the order of the file.
#[must_use]
pub fn check(bytes: &[u8], target: Target) -> Vec<Problem> {
    let file = match File::read(bytes) {
        Ok(file) => file,
        Err(problem) => return vec![problem],
    };
    let mut found = Found(Vec::new());
    format::check(&file, &mut found);
    for (_, header) in file.platforms() {
        platform::check(&file, header, &mut found);
        if header.platform_type == IgvmPlatformType::SEV_SNP {
            snp::check(&file, header.compatibility_mask, target, &mut found);
        }
    }
    if target.qemu {
        qemu::check(&file, target.processors.count, &mut found);
    }
    let mut problems = found.0;
    problems.sort_by_key(|problem| (problem.offset, problem.rule));
    // What is wrong for two platforms is wrong once.
    problems.dedup();
    problems
}

/// Whether a file with these breaches is loaded.
#[must_use]
pub fn loads(problems: &[Problem]) -> bool {
    problems
        .iter()
        .all(|problem| problem.rule.weight() == Weight::Warning)
}

/// Takes breaches as they are found.
struct Found(Vec<Problem>);

impl Found {
    /// A breach by a header.
    fn at(&mut self, header: &Header<'_>, rule: Rule, found: impl Into<String>) {
        self.0.push(Problem::new(header.offset, rule, found));
    }

    /// A breach by what is at `offset`.
    fn offset(&mut self, offset: usize, rule: Rule, found: impl Into<String>) {
        self.0.push(Problem::new(offset, rule, found));
    }

    /// Takes over the breach of something that could not be done.
    fn take<T>(&mut self, result: Result<T, Problem>) -> Option<T> {
        result.map_err(|problem| self.0.push(problem)).ok()
    }
}
