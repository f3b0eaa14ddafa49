//! One figure, the table of all, and the JSON file.

use std::fmt::Write as _;
use std::fs;

use anyhow::{Context as _, Result};
use serde::Serialize;

/// What a figure has to be.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Limit {
    /// This or less.
    AtMost(f64),
    /// This or more.
    AtLeast(f64),
}

/// One figure.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Figure {
    /// What found it.
    pub bench: String,
    /// What it tells.
    pub name: String,
    /// The value.
    pub value: f64,
    /// What it is a number of.
    pub unit: String,
    /// What it has to be, if it is held to something.
    pub limit: Option<Limit>,
}

impl Figure {
    /// A figure that is held to nothing.
    pub fn new(name: impl Into<String>, value: f64, unit: &str) -> Figure {
        Figure {
            bench: String::new(),
            name: name.into(),
            value,
            unit: unit.to_owned(),
            limit: None,
        }
    }

    /// The same with a limit.
    #[must_use]
    pub fn limit(self, limit: Limit) -> Figure {
        Figure {
            limit: Some(limit),
            ..self
        }
    }

    /// The same, found by this bench.
    #[must_use]
    pub fn of(self, bench: &str) -> Figure {
        Figure {
            bench: bench.to_owned(),
            ..self
        }
    }

    /// Whether it is what it has to be.
    pub fn holds(&self) -> bool {
        match self.limit {
            None => true,
            Some(Limit::AtMost(limit)) => self.value <= limit,
            Some(Limit::AtLeast(limit)) => self.value >= limit,
        }
    }

    /// Reads a line of the host benches: `figure | NAME | VALUE | UNIT | LIMIT`.
    pub fn parse(line: &str) -> Option<Figure> {
        let mut columns = line.strip_prefix("figure |")?.split('|').map(str::trim);
        let name = columns.next()?;
        let value = columns.next()?.parse().ok()?;
        let figure = Figure::new(name, value, columns.next()?);
        let limit = columns.next()?;
        let number = |text: &str| text.parse().ok();
        Some(if let Some(limit) = limit.strip_prefix("at most ") {
            figure.limit(Limit::AtMost(number(limit)?))
        } else if let Some(limit) = limit.strip_prefix("at least ") {
            figure.limit(Limit::AtLeast(number(limit)?))
        } else {
            figure
        })
    }
}

/// A number as people read it: whole, or with as many places as say something.
fn number(value: f64) -> String {
    if value.fract() == 0.0 || value.abs() >= 10_000.0 {
        format!("{value:.0}")
    } else if value.abs() >= 100.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.3}")
    }
}

/// All figures, for people.
pub fn table(figures: &[Figure]) -> String {
    let mut text = String::new();
    let mut bench = "";
    for figure in figures {
        if figure.bench != bench {
            bench = &figure.bench;
            let _ = writeln!(text, "\n{bench}");
        }
        let limit = match figure.limit {
            None => String::new(),
            Some(Limit::AtMost(limit)) => format!("at most {}", number(limit)),
            Some(Limit::AtLeast(limit)) => format!("at least {}", number(limit)),
        };
        let verdict = if figure.holds() { "" } else { "  MISSED" };
        let line = format!(
            "  {:<48} {:>12} {:<14} {limit}{verdict}",
            figure.name,
            number(figure.value),
            figure.unit
        );
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text
}

/// All figures and what they were found on, for programs.
pub fn json(figures: &[Figure]) -> Result<String> {
    #[derive(Serialize)]
    struct File<'a> {
        processor: String,
        processors: usize,
        figures: &'a [Figure],
    }
    let file = File {
        processor: processor(),
        processors: std::thread::available_parallelism().map_or(1, usize::from),
        figures,
    };
    serde_json::to_string_pretty(&file).context("the figures cannot be written as JSON")
}

/// The processor of this computer, as Linux names it.
fn processor() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    text.lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(':'))
        .map_or_else(|| "unknown".to_owned(), |(_, name)| name.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::{Figure, Limit, table};

    #[test]
    fn lines_of_the_benches_are_read() {
        let line = "figure | accept 2 MiB        |      90.5000 | ns       | at most 150";
        let expected = Figure::new("accept 2 MiB", 90.5, "ns").limit(Limit::AtMost(150.0));
        assert_eq!(Figure::parse(line), Some(expected));
        let free = Figure::parse("figure | x | 1 | ns | ").unwrap();
        assert!(free.limit.is_none() && free.holds());
        for bad in [
            "",
            "warning: x",
            "figure | x | y | ns | ",
            "figure | x | 1 | ns | at most z",
        ] {
            assert_eq!(Figure::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_figure_outside_of_its_limit_is_named() {
        let figures = [
            Figure::new("a", 2.0, "ns")
                .limit(Limit::AtMost(1.0))
                .of("host/x"),
            Figure::new("b", 2.0, "ns")
                .limit(Limit::AtLeast(2.0))
                .of("host/x"),
        ];
        let text = table(&figures);
        let missed: Vec<&str> = text
            .lines()
            .filter(|line| line.contains("MISSED"))
            .collect();
        assert_eq!(missed.len(), 1);
        assert!(missed[0].trim_start().starts_with("a "), "{text}");
    }
}
