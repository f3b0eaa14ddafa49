//! Running other programs: captured output, and errors of one line that say what to look at.

use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Stdio};
use std::thread;

use anyhow::{Context, Result, bail};

use crate::progress::Step;

/// Runs `command` to its end and returns its standard output as text. A failure names the program
/// and quotes the last line it printed.
pub fn output(command: &mut Command) -> Result<String> {
    let name = program(command);
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("{name} cannot be started"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        bail!(
            "{name} failed ({}): {}",
            output.status,
            telling_line(&errors, &text)
        );
    }
    Ok(text)
}

/// Runs `command` to its end while its lines are shown as notes of `step`; returns whether it
/// succeeded and everything it printed (both streams, in the order they arrived).
pub fn watched(command: &mut Command, step: &Step) -> Result<(bool, String)> {
    let name = program(command);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("{name} cannot be started"))?;
    let (lines, received) = std::sync::mpsc::channel();
    let streams: [Option<Box<dyn Read + Send>>; 2] = [
        child
            .stdout
            .take()
            .map(|s| Box::new(s) as Box<dyn Read + Send>),
        child
            .stderr
            .take()
            .map(|s| Box::new(s) as Box<dyn Read + Send>),
    ];
    for stream in streams.into_iter().flatten() {
        let lines = lines.clone();
        thread::spawn(move || {
            for line in BufReader::new(stream)
                .split(b'\n')
                .map_while(|line| line.ok())
            {
                // The receiver is gone only when this process is ending.
                let _ = lines.send(String::from_utf8_lossy(&line).into_owned());
            }
        });
    }
    drop(lines);
    let mut text = String::new();
    for line in received {
        if !line.trim().is_empty() {
            step.note(line.trim());
        }
        text.push_str(&line);
        text.push('\n');
    }
    let status = child
        .wait()
        .with_context(|| format!("{name} cannot be waited for"))?;
    Ok((status.success(), text))
}

/// The line of a failed program's output that says most: the last one with an error mark, else the
/// last one at all.
pub fn telling_line<'a>(errors: &'a str, other: &'a str) -> &'a str {
    let lines = || {
        errors
            .lines()
            .chain(other.lines())
            .filter(|line| !line.trim().is_empty())
    };
    lines()
        .rfind(|line| line.starts_with("E:") || line.starts_with("error"))
        .or_else(|| lines().next_back())
        .map_or("it printed nothing", str::trim)
}

/// The last `count` lines of `text`, indented, for the end of a failure report.
pub fn tail(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text
        .lines()
        .filter(|line| !line.trim().is_empty())
        .collect();
    let from = lines.len().saturating_sub(count);
    lines
        .iter()
        .skip(from)
        .map(|line| format!("    {line}\n"))
        .collect()
}

fn program(command: &Command) -> String {
    command.get_program().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::{tail, telling_line};

    #[test]
    fn the_line_with_an_error_mark_is_preferred() {
        assert_eq!(
            telling_line("E: no such package\nnote: bye\n", ""),
            "E: no such package"
        );
        assert_eq!(telling_line("", "one\ntwo\n\n"), "two");
        assert_eq!(telling_line("", ""), "it printed nothing");
    }

    #[test]
    fn the_tail_keeps_the_end() {
        assert_eq!(tail("a\nb\n\nc\n", 2), "    b\n    c\n");
        assert_eq!(tail("a", 5), "    a\n");
    }
}
