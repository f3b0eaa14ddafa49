//! Calls and boots in the machine, in counted instructions.

use anyhow::Result;
use e2e::bench::boots::{Boot, Policy};
use e2e::bench::counts::{Count, Counts, Place};
use e2e::bench::{BUDGET_LAZY, counts};
use e2e::scenario::{Artefacts, Context};
use e2e::vm::Backing;

use super::figure::{Figure, Limit};
use crate::layout::{Layout, create_dir};
use crate::progress::Step;
use crate::test;

/// Memory of the guest that boots.
const MEMORY: &str = "4G";

/// One thing to run in the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MachineBench {
    /// What calls cost.
    Counts(Place, Backing),
    /// What a boot takes with each policy.
    Boots(Backing),
}

/// Builds and fetches what all of them need.
pub fn prepare(layout: &Layout) -> Result<Artefacts> {
    test::artefacts_for_benches(layout)
}

impl MachineBench {
    /// All of them.
    pub fn all() -> Vec<MachineBench> {
        let backings = [Backing::Large, Backing::Small];
        let counts = Place::ALL
            .into_iter()
            .flat_map(|place| backings.map(|backing| MachineBench::Counts(place, backing)));
        counts.chain(backings.map(MachineBench::Boots)).collect()
    }

    /// Its name.
    pub fn name(self) -> String {
        match self {
            MachineBench::Counts(place, backing) => {
                format!("{}counts-{}", place.prefix(), backing.name())
            }
            MachineBench::Boots(backing) => format!("boots-{}", backing.name()),
        }
    }

    /// Runs it.
    pub fn run(
        self,
        layout: &Layout,
        artefacts: &Artefacts,
        policies: &[Policy],
        step: &Step,
    ) -> Result<Vec<Figure>> {
        let context = |name: &str| -> Result<Context> {
            let dir = layout.artefacts.join("bench").join(self.name()).join(name);
            create_dir(&dir)?;
            Ok(Context {
                artefacts: artefacts.clone(),
                dir,
            })
        };
        match self {
            MachineBench::Counts(place, backing) => {
                let counts = Counts::run(&context("run")?, place, backing)?;
                counts_figures(&counts)
            }
            MachineBench::Boots(backing) => {
                let boots: Result<Vec<Boot>> = policies
                    .iter()
                    .map(|policy| {
                        step.note(policy.name());
                        Boot::run(&context(policy.name())?, *policy, backing, MEMORY)
                    })
                    .collect();
                Ok(boot_figures(&boots?))
            }
        }
    }
}

fn counts_figures(counts: &Counts) -> Result<Vec<Figure>> {
    let (got, want) = counts.check;
    let mut figures = vec![
        Figure::new(
            "self-check: 1000 NOPs are counted as",
            got as f64,
            "instructions",
        )
        .limit(Limit::AtMost(want as f64)),
    ];
    for count in &counts.lines {
        figures.extend(figures_of(count, counts));
    }
    Ok(figures)
}

/// What one line of the guest comes to.
fn figures_of(count: &Count, counts: &Counts) -> Vec<Figure> {
    let name = match count.entries {
        0 => count.name.clone(),
        entries => format!("{} x {entries}", count.name),
    };
    let used = counts.without_scrub(count);
    let figure =
        |what: &str, value: f64, unit: &str| Figure::new(format!("{name}: {what}"), value, unit);
    if count.name == counts::FILL {
        return vec![figure(
            "by the guest itself",
            count.instructions as f64,
            "instructions",
        )];
    }
    if !count.name.ends_with("-2m") || count.pages == 0 {
        return vec![figure("without scrub", used as f64, "instructions")];
    }
    let mut instructions = figure(
        "per 2 MiB, without scrub",
        count.per_2m(used),
        "instructions",
    );
    if count.name == counts::ACCEPT_2M {
        instructions = instructions.limit(Limit::AtMost(counts.budget() as f64));
    }
    let [validate, adjust] = counts.place.instructions();
    let mut figures = vec![
        instructions,
        figure("calls", count.calls as f64, "calls"),
        figure("per 2 MiB", count.per_2m(count.switches), "switches"),
        figure("per 2 MiB", count.per_2m(count.validates), validate),
        figure("per 2 MiB", count.per_2m(count.adjusts), adjust),
    ];
    if counts.place == Place::Tdx {
        figures.push(figure("per 2 MiB", count.per_2m(count.tdcalls), "TDCALL"));
    }
    figures
}

fn boot_figures(boots: &[Boot]) -> Vec<Figure> {
    let mut figures = Vec::new();
    let control = boots.iter().find(|boot| boot.policy == Policy::Control);
    for boot in boots {
        let name = boot.policy.name();
        let million = |what: &str, value: u64| {
            Figure::new(format!("{name}: {what}"), value as f64 / 1e6, "million")
        };
        figures.push(million("instructions of guest and paravisor", boot.time()));
        figures.push(million("of these the paravisor's", boot.paravisor));
        figures.push(million("ticks, the machine's own included", boot.ticks));
        let accepted = boot.report.memory.validated_bytes >> 20;
        figures.push(Figure::new(
            format!("{name}: validated"),
            accepted as f64,
            "MiB",
        ));
        if let Some(control) = control.filter(|_| boot.policy != Policy::Control) {
            let ratio = boot.time() as f64 / control.time() as f64;
            let figure = Figure::new(format!("{name}: time, to the control's"), ratio, "ratio");
            figures.push(match boot.policy {
                Policy::Lazy => figure.limit(Limit::AtMost(BUDGET_LAZY)),
                Policy::Eager | Policy::Ahead | Policy::Control => figure,
            });
        }
    }
    figures
}
