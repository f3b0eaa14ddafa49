//! What differs between two IGVM files, for each platform that either of them has.
//!
//! Compared is what a guest is launched with, page by page and register by register, not how it is written:
//! files that put the same pages at other places or in other pieces do not differ.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

use igvm_defs::{IGVM_VHS_SUPPORTED_PLATFORM, IgvmPlatformType};
use protocols::addr::PAGE_SIZE;
use serde::Serialize;
use zerocopy::IntoBytes;

use crate::file::{Content, File, names};
use crate::measure::{quietly, snp, tdx};
use crate::show::page_kind;
use crate::sidecar::hex;

/// One difference.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// The platform.
    pub platform: String,
    /// What differs.
    pub what: String,
    /// What the first file has; none if it has no such thing.
    pub left: Option<String>,
    /// What the second file has.
    pub right: Option<String>,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let side = |text: &Option<String>| text.clone().unwrap_or_else(|| "none".to_owned());
        writeln!(f, "{}: {}", self.platform, self.what)?;
        writeln!(f, "    < {}", side(&self.left))?;
        write!(f, "    > {}", side(&self.right))
    }
}

/// What one platform of one file is launched with.
#[derive(Default)]
struct Launch<'a> {
    /// What has one value: by name.
    values: BTreeMap<String, String>,
    /// Pages by address: their kind and their bytes without zeroes at the end.
    pages: BTreeMap<u64, (String, &'a [u8])>,
}

/// All differences; none if both files launch the same.
#[must_use]
pub fn diff(left: &File<'_>, right: &File<'_>) -> Vec<Difference> {
    let mut kinds: Vec<IgvmPlatformType> = Vec::new();
    for (_, platform) in left.platforms().chain(right.platforms()) {
        if !kinds.contains(&platform.platform_type) {
            kinds.push(platform.platform_type);
        }
    }
    let mut differences = Vec::new();
    for kind in kinds {
        let name = names::platform(kind);
        let mut report = |what: String, left: Option<String>, right: Option<String>| {
            differences.push(Difference {
                platform: name.clone(),
                what,
                left,
                right,
            });
        };
        let header = |file: &File<'_>| {
            let found = file.platforms().find(|(_, own)| own.platform_type == kind);
            found.map(|(_, platform)| *platform)
        };
        match (header(left), header(right)) {
            (Some(first), Some(second)) => {
                let (first, second) = (Launch::of(left, &first), Launch::of(right, &second));
                compare_values(&first.values, &second.values, &mut report);
                compare_pages(&first.pages, &second.pages, &mut report);
            }
            (first, second) => {
                let there = |header: Option<_>| header.map(|_| "there".to_owned());
                report("the platform".to_owned(), there(first), there(second));
            }
        }
    }
    differences
}

impl<'a> Launch<'a> {
    fn of(file: &File<'a>, platform: &IGVM_VHS_SUPPORTED_PLATFORM) -> Self {
        let mut launch = Self::default();
        let mut value = |name: String, value: String| {
            launch.values.insert(name, value);
        };
        value("highest VTL".into(), platform.highest_vtl.to_string());
        let boundary = platform.shared_gpa_boundary;
        value("boundary of shared memory".into(), format!("{boundary:#x}"));
        match platform.platform_type {
            IgvmPlatformType::SEV_SNP => {
                let loader = snp::Loader::Qemu(snp::Processors::default());
                if let Ok(digest) = snp::launch_digest(file, loader, &mut quietly) {
                    value("launch digest".into(), hex(&digest));
                }
            }
            IgvmPlatformType::TDX => {
                if let Ok(mrtd) = tdx::mrtd(file, &mut quietly) {
                    value("MRTD".into(), hex(&mrtd));
                }
            }
            _ => {}
        }
        for header in file.of_platform(platform.compatibility_mask) {
            match &header.content {
                Content::Policy(policy) => {
                    value("policy".into(), format!("{:#x}", policy.policy));
                }
                Content::Area(area) => value(
                    format!("parameter area {}", area.parameter_area_index),
                    format!("{} bytes", area.number_of_bytes),
                ),
                Content::Parameter(parameter) => value(
                    names::header(header.kind),
                    format!(
                        "area {} + {:#x}",
                        parameter.parameter_area_index, parameter.byte_offset
                    ),
                ),
                Content::Insert(insert) => value(
                    format!("insert of area {}", insert.parameter_area_index),
                    format!("{:#x}", insert.gpa),
                ),
                Content::RequiredMemory(memory) => value(
                    format!("required memory at {:#x}", memory.gpa),
                    format!("{:#x} bytes", memory.number_of_bytes),
                ),
                Content::IdBlock(block) => value("ID block".into(), hex(block.as_bytes())),
                Content::Context(context) => {
                    let name = format!("processor {}", context.vp_index);
                    value(
                        format!("{name}, address"),
                        format!("{:#x}", context.gpa.get()),
                    );
                    let page = file.data(header, context.file_offset, PAGE_SIZE);
                    for (at, word) in words(page.unwrap_or_default()) {
                        value(format!("{name}, state at {at:#05x}"), word);
                    }
                }
                Content::Page(page) => {
                    let data = file.page_data(header, page).ok().flatten();
                    let data = data.unwrap_or_default();
                    let length = data
                        .iter()
                        .rposition(|&byte| byte != 0)
                        .map_or(0, |at| at + 1);
                    let data = data.get(..length).unwrap_or_default();
                    launch.pages.insert(page.gpa, (page_kind(page), data));
                }
                _ => {}
            }
        }
        launch
    }
}

/// The words of a context that are not zero.
fn words(page: &[u8]) -> impl Iterator<Item = (usize, String)> {
    page.chunks(8).enumerate().filter_map(|(index, word)| {
        let value = word
            .iter()
            .rev()
            .fold(0_u64, |all, &byte| all << 8 | u64::from(byte));
        (value != 0).then(|| (index * 8, format!("{value:#x}")))
    })
}

fn compare_values(
    left: &BTreeMap<String, String>,
    right: &BTreeMap<String, String>,
    report: &mut impl FnMut(String, Option<String>, Option<String>),
) {
    let names = left
        .keys()
        .chain(right.keys().filter(|name| !left.contains_key(*name)));
    for name in names {
        let (first, second) = (left.get(name), right.get(name));
        if first != second {
            report(name.clone(), first.cloned(), second.cloned());
        }
    }
}

/// Compares pages, and reports those that follow each other and differ in the same way as one.
fn compare_pages(
    left: &BTreeMap<u64, (String, &[u8])>,
    right: &BTreeMap<u64, (String, &[u8])>,
    report: &mut impl FnMut(String, Option<String>, Option<String>),
) {
    let mut gpas: Vec<u64> = left.keys().chain(right.keys()).copied().collect();
    gpas.sort_unstable();
    gpas.dedup();
    let mut run: Option<(Range<u64>, [Option<String>; 2])> = None;
    let mut report = |(range, [left, right]): (Range<u64>, [Option<String>; 2])| {
        let count = (range.end - range.start) / PAGE_SIZE;
        let what = format!("pages {:#x}..{:#x} ({count})", range.start, range.end);
        report(what, left, right);
    };
    for gpa in gpas {
        let (first, second) = (left.get(&gpa), right.get(&gpa));
        if first == second {
            continue;
        }
        let texts = match (first, second) {
            (Some((kind, one)), Some((other_kind, other))) if kind == other_kind => [
                Some(differing(kind, one, other)),
                Some(differing(kind, other, one)),
            ],
            _ => [first, second].map(|page| page.map(|(kind, _)| kind.clone())),
        };
        let end = gpa.saturating_add(PAGE_SIZE);
        match &mut run {
            Some((range, so_far)) if range.end == gpa && *so_far == texts => range.end = end,
            _ => {
                if let Some(run) = run.replace((gpa..end, texts)) {
                    report(run);
                }
            }
        }
    }
    if let Some(run) = run {
        report(run);
    }
}

/// What a page has where it first differs from another one of its kind.
fn differing(kind: &str, page: &[u8], other: &[u8]) -> String {
    let byte = |page: &[u8], at| page.get(at).copied().unwrap_or(0);
    let first = (0..page.len().max(other.len())).find(|&at| byte(page, at) != byte(other, at));
    match first {
        Some(at) => format!("{kind}, from byte {at:#x} on: {:02x}", byte(page, at)),
        None => kind.to_owned(),
    }
}
