//! Stack traces with names: addresses from the logs, names from the ELF files of the run.
//!
//! Paravisor and machine tell addresses only ([`protocols::stack_trace`]); the debug information
//! never leaves the host. A guest owns the console after the paravisor, so a line there may be a
//! guest's forgery: it is looked up and shown, nothing else.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use addr2line::Loader;
use anyhow::{Result, anyhow};
use e2e::vm::Finished;
use protocols::report::Event;
use protocols::stack_trace::{self, Site};

/// What the paravisor's lines on the console begin with.
const PARAVISOR_MARK: &str = "[svsm] ";
/// Width of the column of function names.
const NAME: usize = 40;

/// The programs whose addresses may be met, as ELF files with debug information.
#[derive(Clone, Debug)]
pub struct Programs {
    /// The paravisor.
    pub paravisor: PathBuf,
    /// The machine.
    pub machine: PathBuf,
    /// The checkout they were built in; paths of source files are shown relative to it.
    pub root: PathBuf,
}

/// All stack traces in the logs of a run, ready to be printed; empty if there is none.
pub fn stack_traces(finished: &Finished, programs: &Programs) -> String {
    let paravisor = finished
        .console
        .lines()
        .filter(|line| line.contains(PARAVISOR_MARK));
    let machine = finished.events.iter().filter_map(|event| match event {
        Event::Log(log) => Some(log.text.as_str()),
        _ => None,
    });
    let mut text = shown(
        "paravisor",
        &programs.paravisor,
        &programs.root,
        &mut paravisor.into_iter(),
    );
    text += &shown(
        "machine",
        &programs.machine,
        &programs.root,
        &mut machine.into_iter(),
    );
    text
}

/// The stack traces in `lines`, which are those of `program`.
fn shown(name: &str, elf: &Path, root: &Path, lines: &mut dyn Iterator<Item = &str>) -> String {
    let mut text = String::new();
    for sites in lines.filter_map(stack_trace::parse) {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "stack of the {name}, innermost call first:");
        match Symbols::open(elf, root) {
            Ok(symbols) => {
                for site in sites {
                    text += &symbols.explain(site);
                }
            }
            Err(error) => {
                let _ = writeln!(text, "  {error:#}");
                for site in sites {
                    let _ = writeln!(text, "  {site}");
                }
            }
        }
    }
    text
}

/// The names in one ELF file.
pub struct Symbols<'a> {
    loader: Loader,
    root: &'a Path,
}

impl<'a> Symbols<'a> {
    /// Reads `elf`.
    pub fn open(elf: &Path, root: &'a Path) -> Result<Symbols<'a>> {
        let loader = Loader::new(elf).map_err(|error| {
            anyhow!(
                "{}: the debug information cannot be read: {error}",
                elf.display()
            )
        })?;
        Ok(Symbols { loader, root })
    }

    /// The functions at `site`, innermost first: one line for each, those that were inlined
    /// included.
    pub fn explain(&self, site: Site) -> String {
        let address = site.lookup_address();
        // The debug information names what was inlined; only the symbol table is sure to name the
        // function itself, and the only one to name assembly.
        let symbol = self.loader.find_symbol(address);
        let symbol = symbol.map(|name| addr2line::demangle_auto(name.into(), None));
        let mut rows = Vec::new();
        if let Ok(mut frames) = self.loader.find_frames(address) {
            while let Ok(Some(frame)) = frames.next() {
                let name = frame.function.as_ref().and_then(|function| {
                    let name = function.demangle().ok()?;
                    Some(short_name(&name))
                });
                let place = frame.location.as_ref().and_then(|location| {
                    let line = location.line?;
                    Some(format!("{}:{line}", self.short_path(location.file?)))
                });
                rows.push((name, place));
            }
        }
        if rows.is_empty() {
            rows.push((None, None));
        }
        // The debug information of a function that others were inlined into has a name without
        // its path; of one without them it has none.
        if let Some((name, _)) = rows.last_mut()
            && let Some(symbol) = symbol
        {
            *name = Some(short_name(&symbol));
        }
        let first = match site {
            Site::At(address) | Site::From(address) => format!("{address:#x}"),
        };
        let mut text = String::new();
        for (index, (name, place)) in rows.into_iter().enumerate() {
            let address = if index == 0 { first.as_str() } else { "" };
            let name = name.unwrap_or_else(|| "?".into());
            let line = format!(
                "  {address:>18}  {name:NAME$}  {}",
                place.unwrap_or_default()
            );
            text += line.trim_end();
            text.push('\n');
        }
        text
    }

    /// The path of a source file below the checkout, or below the sources of Rust's library.
    fn short_path<'f>(&self, file: &'f str) -> &'f str {
        const LIBRARY: &str = "/lib/rustlib/src/rust/";
        if let Some((_, path)) = file.split_once(LIBRARY) {
            return path;
        }
        Path::new(file)
            .strip_prefix(self.root)
            .ok()
            .and_then(Path::to_str)
            .unwrap_or(file)
    }
}

/// A demangled name without the hash the compiler appends and without type arguments, which make a
/// name longer than a line.
fn short_name(name: &str) -> String {
    let name = match name.rsplit_once("::h") {
        Some((rest, hash)) if hash.len() == 16 && hash.bytes().all(|b| b.is_ascii_hexdigit()) => {
            rest
        }
        _ => name,
    };
    let mut short = String::new();
    let mut depth = 0_u32;
    for (index, c) in name.char_indices() {
        match c {
            // At the begin or after a path it is not a list of arguments but `<Type as Trait>`.
            '<' if depth > 0 || index > 0 && !short.ends_with("::") && !short.ends_with('<') => {
                depth += 1;
            }
            '>' if depth > 0 => depth -= 1,
            c if depth == 0 => short.push(c),
            _ => {}
        }
    }
    short
}

#[cfg(test)]
mod tests {
    use super::*;

    #[inline(never)]
    fn somewhere() -> u64 {
        // A function's own address, in this very program.
        std::hint::black_box(somewhere as *const () as u64)
    }

    #[test]
    fn names_are_short() {
        for (long, short) in [
            ("a::b::h0123456789abcdef", "a::b"),
            ("a::b::hello", "a::b::hello"),
            ("h0123456789abcdef", "h0123456789abcdef"),
            ("and_then<(), a::B<C>, d::{closure_env#0}>", "and_then"),
            ("{closure#1}<A, B>", "{closure#1}"),
            ("<a::B<C> as d::E<F>>::g<H>", "<a::B as d::E>::g"),
            ("_start", "_start"),
        ] {
            assert_eq!(short_name(long), short);
        }
    }

    /// This test is an ELF file with debug information itself; it is loaded at an address of the
    /// system's choice, which its symbols tell.
    #[test]
    fn a_function_is_found_by_its_address() {
        let elf = std::env::current_exe().unwrap();
        let symbols = Symbols::open(&elf, Path::new("/")).unwrap();
        // Positions in the file are those in memory minus one page-aligned base, so the lowest 12
        // bits agree; the base is that of the mapping the function lies in.
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let base = maps
            .lines()
            .find(|line| line.ends_with(elf.to_str().unwrap()))
            .and_then(|line| u64::from_str_radix(line.split('-').next()?, 16).ok())
            .unwrap();
        let text = symbols.explain(Site::At(somewhere() - base));
        assert!(text.contains("somewhere"), "{text}");
        assert!(text.contains("observe/symbolise.rs:"), "{text}");
    }

    #[test]
    fn without_debug_information_addresses_remain() {
        let none = Path::new("/no/such/file");
        let mut lines = ["x", "[svsm] stack trace: at 0x10 from 0x20"].into_iter();
        let text = shown("paravisor", none, Path::new("/"), &mut lines);
        assert!(text.contains("/no/such/file"), "{text}");
        assert!(text.ends_with("  at 0x10\n  from 0x20\n"), "{text}");
    }
}
