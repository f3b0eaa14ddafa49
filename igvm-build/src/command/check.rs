//! `igvm-build check`.

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, ValueEnum};
use igvm_build::check::{self, Target};
use igvm_build::file::{Rule, Weight};

use super::processors::Processors;
use super::{Answer, Input, print, print_json};

/// Whose rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Loader {
    /// Those of the format, and of QEMU 10.1 and newer with KVM
    Qemu,
    /// Those of the format alone
    Any,
}

#[derive(Args)]
pub struct Check {
    /// The IGVM file
    #[arg(required_unless_present = "rules")]
    file: Option<PathBuf>,
    /// Whose rules
    #[arg(long, value_enum, default_value_t = Loader::Qemu)]
    loader: Loader,
    #[command(flatten)]
    processors: Processors,
    /// As JSON
    #[arg(long)]
    json: bool,
    /// Instead, print all rules and why they are there
    #[arg(long)]
    rules: bool,
}

impl Check {
    pub fn run(&self) -> Result<Answer> {
        let Some(file) = self.file.as_ref().filter(|_| !self.rules) else {
            for rule in Rule::ALL {
                print(&format!(
                    "{:8} {:20} {}\n",
                    weight(rule.weight()),
                    rule.name(),
                    rule.reason()
                ))?;
            }
            return Ok(Answer::Yes);
        };
        let bytes = Input::IGVM.read(file)?;
        let target = Target {
            qemu: self.loader == Loader::Qemu,
            processors: self.processors.measured(),
        };
        let problems = check::check(&bytes, target);
        if self.json {
            print_json(&problems)?;
        } else {
            for problem in &problems {
                print(&format!("{}: {problem}\n", weight(problem.rule.weight())))?;
            }
            if problems.is_empty() {
                print("no rule is broken\n")?;
            }
        }
        Ok(if check::loads(&problems) {
            Answer::Yes
        } else {
            Answer::No
        })
    }
}

const fn weight(weight: Weight) -> &'static str {
    match weight {
        Weight::Error => "error",
        Weight::Warning => "warning",
    }
}
