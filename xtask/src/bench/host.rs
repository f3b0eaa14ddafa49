//! The engine alone, on this computer: the benches of `accept`, which are programs of their own.

use anyhow::{Result, bail};

use super::figure::Figure;
use crate::command::{self, tail};
use crate::layout::Layout;
use crate::progress::Step;
use crate::toolchain::cargo;

/// A bench of the crate `accept`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostBench {
    /// What a request costs where the platform costs nothing.
    Cost,
    /// What is left of the memory's speed, beside two simpler designs.
    Throughput,
    /// Maps and processors that no test machine has.
    Scale,
}

impl HostBench {
    /// All of them.
    pub const ALL: [HostBench; 3] = [HostBench::Cost, HostBench::Throughput, HostBench::Scale];

    /// Its name, which is cargo's for it, too.
    pub const fn name(self) -> &'static str {
        match self {
            HostBench::Cost => "cost",
            HostBench::Throughput => "throughput",
            HostBench::Scale => "scale",
        }
    }

    /// Runs it.
    pub fn run(self, layout: &Layout, step: &Step) -> Result<Vec<Figure>> {
        let mut cargo = cargo(&layout.root);
        cargo.args([
            "bench",
            "--quiet",
            "--package",
            "accept",
            "--bench",
            self.name(),
        ]);
        let (ok, text) = command::watched(&mut cargo, step)?;
        let figures: Vec<Figure> = text.lines().filter_map(Figure::parse).collect();
        if !ok || figures.is_empty() {
            bail!(
                "the bench {} of accept failed; its last words:\n{}",
                self.name(),
                tail(&text, 20).trim_end()
            );
        }
        Ok(figures)
    }
}
