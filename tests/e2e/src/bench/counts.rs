//! What a call costs: runs the guest `svsm_counts`, or `l2_counts` in a trust domain, and reads what it
//! says.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use igvm_build::sidecar::Sidecar;
use protocols::launch::{Acceptance, Fault};

use crate::image::Recipe;
use crate::scenario::Context;
use crate::vm::{Backing, Finished, Settings, Vc};

/// How long the run may take.
const LIMIT: Duration = Duration::from_secs(600);
/// Instructions of the paravisor's scrub of a 4 KiB page: an iteration of REP STOSQ, which QEMU counts
/// as one instruction, for each 8 bytes.
const SCRUB_4K: u64 = 4096 / 8;
/// The same of a 2 MiB page: a store for each 16 bytes, and the two instructions of a loop for 32 of
/// them.
pub const SCRUB_2M: u64 = (2 << 20) / 16 / 32 * 34;

/// The guest's own fill of 2 MiB.
pub const FILL: &str = "fill";
/// A list of 4 KiB pages.
pub const ACCEPT_4K: &str = "accept-4k";
/// A list of 2 MiB pages.
pub const ACCEPT_2M: &str = "accept-2m";

/// Where the guest runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// At VMPL1 of an SEV-SNP guest.
    Snp,
    /// In the L2 VM of a trust domain.
    Tdx,
}

impl Place {
    /// Both.
    pub const ALL: [Place; 2] = [Place::Snp, Place::Tdx];

    /// What names of runs begin with.
    pub const fn prefix(self) -> &'static str {
        match self {
            Place::Snp => "",
            Place::Tdx => "tdx-",
        }
    }

    /// What the instructions are called that make a page valid, and that give it to the guest.
    pub const fn instructions(self) -> [&'static str; 2] {
        match self {
            Place::Snp => ["PVALIDATE", "RMPADJUST"],
            Place::Tdx => ["PAGE.ACCEPT", "PAGE.ATTR.WR"],
        }
    }
}

/// What one piece of work cost, in calls, at VMPL0 or in L1.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// What was asked.
    pub name: String,
    /// Entries of the list, or calls of one page each.
    pub entries: u64,
    /// 4 KiB pages that changed.
    pub pages: u64,
    /// Calls that it took: a list may be worked off in several.
    pub calls: u64,
    /// Instructions of VMPL0, of L1.
    pub instructions: u64,
    /// World switches in both directions.
    pub switches: u64,
    /// PVALIDATEs, PAGE.ACCEPTs.
    pub validates: u64,
    /// RMPADJUSTs, PAGE.ATTR.WRs.
    pub adjusts: u64,
    /// TDCALLs of all kinds.
    pub tdcalls: u64,
}

impl Count {
    /// Any of the figures, per 2 MiB.
    pub fn per_2m(&self, figure: u64) -> f64 {
        figure as f64 * 512.0 / self.pages as f64
    }

    fn parse(line: &str) -> Option<Count> {
        let mut words = line.split_whitespace();
        let mut count = Count {
            name: words.next()?.to_owned(),
            ..Count::default()
        };
        for word in words {
            let (key, value) = word.split_once('=')?;
            let place = match key {
                "entries" => &mut count.entries,
                "pages" => &mut count.pages,
                "calls" => &mut count.calls,
                "instructions" => &mut count.instructions,
                "switches" => &mut count.switches,
                "pvalidates" | "accepts" => &mut count.validates,
                "rmpadjusts" | "attributes" => &mut count.adjusts,
                "tdcalls" => &mut count.tdcalls,
                _ => return None,
            };
            *place = value.parse().ok()?;
        }
        Some(count)
    }
}

/// What the guest said.
#[derive(Clone, Debug)]
pub struct Counts {
    /// Where the guest ran.
    pub place: Place,
    /// The granularity of the host's backing.
    pub backing: Backing,
    /// In the guest's order.
    pub lines: Vec<Count>,
    /// Instructions of known code, as counted and as they are.
    pub check: (u64, u64),
    /// The run.
    pub finished: Finished,
    /// The image that ran.
    pub sidecar: Sidecar,
}

impl Counts {
    /// Runs the guest.
    pub fn run(context: &Context, place: Place, backing: Backing) -> Result<Counts> {
        let artefacts = &context.artefacts;
        let (image, sidecar) = context.image_of(Recipe {
            paravisor: &artefacts.paravisor,
            firmware: Some(&artefacts.svsm_counts),
            td_firmware: (place == Place::Tdx).then_some(artefacts.l2_counts.as_path()),
            fault: Fault::NONE,
            acceptance: Acceptance::LAZY,
        })?;
        let settings = Settings {
            tdx: place == Place::Tdx,
            backing,
            vc: Vc::Direct,
            oracle: true,
            icount: true,
            ..Settings::default()
        };
        let config = context.machine(image, &sidecar, settings);
        let finished = config.run(LIMIT, |_| {})?;
        finished.report()?;
        let text = String::from_utf8_lossy(&finished.output).into_owned();
        let (lines, check) = parse(&text)?;
        Ok(Counts {
            place,
            backing,
            lines,
            check,
            finished,
            sidecar,
        })
    }

    /// The line about this many entries.
    pub fn find(&self, name: &str, entries: u64) -> Result<&Count> {
        self.lines
            .iter()
            .find(|count| count.name == name && count.entries == entries)
            .with_context(|| format!("the guest did not count {name} with {entries} entries"))
    }

    /// Instructions without the scrub of the pages that became the guest's. A trust domain's are
    /// zeroed by the module.
    pub fn without_scrub(&self, count: &Count) -> u64 {
        let scrub = match (self.place, count.name.as_str()) {
            (Place::Snp, ACCEPT_2M) => count.entries * SCRUB_2M,
            (Place::Snp, ACCEPT_4K) => count.entries * SCRUB_4K,
            _ => 0,
        };
        count.instructions.saturating_sub(scrub)
    }

    /// The budget for a request of 2 MiB on this backing.
    pub const fn budget(&self) -> u64 {
        match self.backing {
            Backing::Small => super::BUDGET_4K,
            Backing::Large => super::BUDGET_2M,
        }
    }
}

fn parse(text: &str) -> Result<(Vec<Count>, (u64, u64))> {
    let mut lines = Vec::new();
    let mut check = None;
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let understood = if let Some(rest) = line.strip_prefix("count ") {
            Count::parse(rest).map(|count| lines.push(count))
        } else if let Some(rest) = line.strip_prefix("check nops ") {
            parse_check(rest).map(|found| check = Some(found))
        } else {
            None
        };
        if understood.is_none() {
            bail!("the guest that counts said {line:?}");
        }
    }
    let check = check.context("the guest that counts did not check the counter")?;
    Ok((lines, check))
}

fn parse_check(text: &str) -> Option<(u64, u64)> {
    let (got, want) = text.split_once(' ')?;
    let number = |text: &str, key| text.strip_prefix(key)?.parse().ok();
    Some((number(got, "got=")?, number(want, "want=")?))
}

#[cfg(test)]
mod tests {
    use super::{Count, parse};

    const LINE: &str = "count accept-2m entries=1 pages=512 calls=1 instructions=141000 \
                        switches=2 pvalidates=1 rmpadjusts=1";

    #[test]
    fn lines_are_read_and_nothing_else_is_accepted() {
        let (lines, check) = parse(&format!("check nops got=9 want=10\r\n{LINE}\r\n")).unwrap();
        assert_eq!(check, (9, 10));
        let expected = Count {
            name: "accept-2m".into(),
            entries: 1,
            pages: 512,
            calls: 1,
            instructions: 141_000,
            switches: 2,
            validates: 1,
            adjusts: 1,
            tdcalls: 0,
        };
        assert_eq!(lines, [expected]);
        let (lines, _) = parse(
            "count x entries=1 pages=1 calls=1 instructions=9 switches=2 accepts=3 attributes=4 \
             tdcalls=5\ncheck nops got=1 want=1",
        )
        .unwrap();
        let [line] = &lines[..] else {
            panic!("one line")
        };
        assert_eq!((line.validates, line.adjusts, line.tdcalls), (3, 4, 5));
        assert!(parse(LINE).is_err(), "no check");
        assert!(parse("check nops got=9 want=10\nfailed: x\n").is_err());
        assert!(parse("check nops got=9 want=10\ncount x pages=many\n").is_err());
    }
}
