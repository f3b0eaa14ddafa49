//! `--plot`: two drawings for people, in one SVG file: memory accepted over time, and how long the
//! guest's calls took.

use std::path::Path;

use anyhow::{Result, anyhow};
use e2e::vm::{Finished, Stage};
use plotters::coord::Shift;
use plotters::prelude::*;
use protocols::report::{CallCounters, Event, Sample, StageName};

use super::latency::bucket_end;

/// Size of the drawing in pixels.
const SIZE: (u32, u32) = (1000, 900);
/// The most kinds of calls that are drawn: those made most often.
const MAX_CALLS: usize = 6;
/// Font of all words.
const FONT: &str = "sans-serif";

/// What is drawn.
#[derive(Debug, Default, PartialEq)]
struct Figures {
    /// Seconds since the machine started, mebibytes accepted.
    accepted: Vec<(f64, f64)>,
    /// When stages began, in the same seconds.
    stages: Vec<(f64, &'static str)>,
    /// Name of a call, and how many calls took up to how many microseconds (or ticks).
    calls: Vec<(String, Vec<(f64, u64)>)>,
    /// Whether time is in ticks, because the machine does not know how many make a second.
    ticks: bool,
}

impl Figures {
    fn of(finished: &Finished) -> Figures {
        let tsc_hz = finished.events.iter().find_map(|event| match event {
            Event::Machine(machine) => Some(machine.tsc_hz),
            _ => None,
        });
        let hz = tsc_hz.filter(|hz| *hz > 0);
        let report = finished.report.as_ref();
        let samples = report.map_or(&[][..], |report| &report.samples);
        let begin = stage_tsc(finished, StageName::Paravisor)
            .or_else(|| samples.first().map(|sample| sample.tsc))
            .unwrap_or(0);
        // The clock of the stages is xtask's; it and the machine's meet where the paravisor starts.
        let begin_wall = stage_seconds(finished, Stage::Paravisor).unwrap_or(0.0);
        let time = |tsc: u64| {
            let ticks = tsc.saturating_sub(begin) as f64;
            hz.map_or(ticks, |hz| begin_wall + ticks / hz as f64)
        };
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        let point = |sample: &Sample| (time(sample.tsc), mib(sample.validated_bytes));
        let mut calls: Vec<&CallCounters> = report.map_or(Vec::new(), |report| {
            let made = |call: &&CallCounters| call.latency.count > 0;
            report.calls.iter().filter(made).collect()
        });
        calls.sort_by_key(|call| std::cmp::Reverse(call.latency.count));
        let unit = hz.map_or(1.0, |hz| 1e6 / hz as f64);
        Figures {
            accepted: samples.iter().map(point).collect(),
            stages: match hz {
                Some(_) => finished
                    .stages
                    .iter()
                    .map(|(stage, at)| (at.as_secs_f64(), stage.name()))
                    .collect(),
                None => Vec::new(),
            },
            calls: calls
                .into_iter()
                .take(MAX_CALLS)
                .map(|call| (title(call), steps(&call.latency.buckets, unit)))
                .collect(),
            ticks: hz.is_none(),
        }
    }
}

fn title(call: &CallCounters) -> String {
    format!("{} ({} calls)", call.name, call.latency.count)
}

/// A histogram as a line of steps. Buckets are as wide as they are on a logarithmic axis.
fn steps(buckets: &[u64], unit: f64) -> Vec<(f64, u64)> {
    let first = buckets.iter().position(|count| *count > 0).unwrap_or(0);
    let mut line = Vec::new();
    for (index, count) in buckets.iter().enumerate().skip(first) {
        let end = bucket_end(index) as f64 * unit;
        line.extend([(end / 2.0, *count), (end, *count)]);
    }
    let begin = line.first().map(|(x, _)| (*x, 0));
    let end = line.last().map(|(x, _)| (*x, 0));
    begin.into_iter().chain(line).chain(end).collect()
}

fn stage_tsc(finished: &Finished, name: StageName) -> Option<u64> {
    finished.events.iter().find_map(|event| match event {
        Event::Stage(stage) if stage.name == name => Some(stage.tsc),
        _ => None,
    })
}

fn stage_seconds(finished: &Finished, wanted: Stage) -> Option<f64> {
    let found = finished.stages.iter().find(|(stage, _)| *stage == wanted);
    found.map(|(_, at)| at.as_secs_f64())
}

/// Draws the run into `path`.
pub fn write(path: &Path, finished: &Finished) -> Result<()> {
    draw(path, &Figures::of(finished))
        .map_err(|error| anyhow!("{}: the plot cannot be written: {error}", path.display()))
}

type Drawn = std::result::Result<(), Box<dyn std::error::Error>>;

fn draw(path: &Path, figures: &Figures) -> Drawn {
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let (upper, lower) = area.split_vertically(SIZE.1 / 2);
    accepted(&upper, figures)?;
    latency(&lower, figures)?;
    area.present()?;
    Ok(())
}

fn accepted(area: &DrawingArea<SVGBackend<'_>, Shift>, figures: &Figures) -> Drawn {
    let last = |points: &mut dyn Iterator<Item = f64>| points.fold(0.0, f64::max);
    let times = figures.accepted.iter().map(|(x, _)| *x);
    let mut times = times.chain(figures.stages.iter().map(|(x, _)| *x));
    let width = last(&mut times).max(1.0) * 1.05;
    let height = last(&mut figures.accepted.iter().map(|(_, y)| *y)).max(1.0) * 1.1;
    let mut chart = ChartBuilder::on(area)
        .caption("Memory accepted", (FONT, 24))
        .margin(14)
        .x_label_area_size(46)
        .y_label_area_size(80)
        .build_cartesian_2d(0.0..width, 0.0..height)?;
    chart
        .configure_mesh()
        .x_desc(if figures.ticks {
            "TSC ticks"
        } else {
            "seconds"
        })
        .y_desc("MiB")
        .x_label_formatter(&|x| plain(*x))
        .y_label_formatter(&|y| plain(*y))
        .light_line_style(WHITE)
        .label_style((FONT, 15))
        .draw()?;
    chart.draw_series(
        AreaSeries::new(figures.accepted.iter().copied(), 0.0, BLUE.mix(0.15))
            .border_style(BLUE.stroke_width(2)),
    )?;
    for (index, (at, name)) in figures.stages.iter().enumerate() {
        chart.draw_series(LineSeries::new(
            [(*at, 0.0), (*at, height)],
            BLACK.mix(0.4).stroke_width(1),
        ))?;
        // Stages that begin close to each other would write over each other on one line.
        let level = height * (0.97 - 0.06 * index as f64);
        chart.draw_series([Text::new(format!(" {name}"), (*at, level), (FONT, 15))])?;
    }
    Ok(())
}

fn latency(area: &DrawingArea<SVGBackend<'_>, Shift>, figures: &Figures) -> Drawn {
    let points = || figures.calls.iter().flat_map(|(_, line)| line);
    let least = points().map(|(x, _)| *x).fold(f64::INFINITY, f64::min);
    let most = points().map(|(x, _)| *x).fold(0.0, f64::max);
    let (least, most) = if least < most {
        (least, most)
    } else {
        (1.0, 10.0)
    };
    let height = points().map(|(_, y)| *y).max().unwrap_or(1) as f64 * 2.0;
    let mut chart = ChartBuilder::on(area)
        .caption("From a call of the guest to its answer", (FONT, 24))
        .margin(14)
        .x_label_area_size(46)
        .y_label_area_size(80)
        // A count of 0 has no place on a logarithmic axis; half a call is below all others.
        .build_cartesian_2d((least..most).log_scale(), (0.5..height).log_scale())?;
    chart
        .configure_mesh()
        .x_desc(if figures.ticks { "TSC ticks" } else { "" })
        .y_desc("calls")
        .x_label_formatter(&|x| match figures.ticks {
            true => plain(*x),
            false => duration(*x),
        })
        .y_label_formatter(&|y| plain(*y))
        .light_line_style(WHITE)
        .label_style((FONT, 15))
        .draw()?;
    for (index, (name, line)) in figures.calls.iter().enumerate() {
        let color = Palette99::pick(index).to_rgba();
        chart
            .draw_series(LineSeries::new(
                line.iter().map(|(x, y)| (*x, (*y as f64).max(0.5))),
                color.stroke_width(2),
            ))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2)));
    }
    if !figures.calls.is_empty() {
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .background_style(WHITE.mix(0.85))
            .border_style(BLACK.mix(0.3))
            .label_font((FONT, 15))
            .draw()?;
    }
    Ok(())
}

/// Microseconds in the unit that makes them short.
fn duration(us: f64) -> String {
    match us {
        us if us < 1e3 => format!("{} us", plain(us)),
        us if us < 1e6 => format!("{} ms", plain(us / 1e3)),
        us => format!("{} s", plain(us / 1e6)),
    }
}

/// A number without digits that nobody reads.
fn plain(value: f64) -> String {
    if value >= 10.0 || value.fract() == 0.0 {
        format!("{value:.0}")
    } else {
        format!("{value:.1}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_short() {
        for (us, text) in [
            (0.5, "0.5 us"),
            (100.0, "100 us"),
            (1e4, "10 ms"),
            (2e6, "2 s"),
        ] {
            assert_eq!(duration(us), text);
        }
    }

    #[test]
    fn a_histogram_becomes_steps() {
        assert_eq!(
            steps(&[0, 0, 5, 3], 0.5),
            [(2.0, 0), (2.0, 5), (4.0, 5), (4.0, 3), (8.0, 3), (8.0, 0)]
        );
        assert_eq!(steps(&[], 1.0), []);
    }

    #[test]
    fn the_drawing_has_its_words_and_lines() {
        let path = std::env::temp_dir().join(format!("turnstile-plot-{}.svg", std::process::id()));
        let figures = Figures {
            accepted: vec![(0.5, 0.0), (1.0, 64.0), (9.0, 2048.0)],
            stages: vec![(0.4, "paravisor"), (8.0, "kernel")],
            calls: vec![("CORE/PVALIDATE (8 calls)".into(), steps(&[0, 0, 5, 3], 1.0))],
            ticks: false,
        };
        for (figures, words) in [
            (
                &figures,
                &[
                    "Memory accepted",
                    "paravisor",
                    "kernel",
                    "CORE/PVALIDATE (8 calls)",
                    "seconds",
                ][..],
            ),
            // A run that was killed has nothing to show; that is no error.
            (&Figures::default(), &["Memory accepted", "calls"]),
        ] {
            draw(&path, figures).unwrap();
            let text = std::fs::read_to_string(&path).unwrap();
            for word in words {
                assert!(text.contains(word), "{word}");
            }
            assert!(text.trim_end().ends_with("</svg>"));
        }
        std::fs::remove_file(path).unwrap();
    }
}
