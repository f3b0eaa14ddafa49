//! MRTD of an IGVM file on TDX: pages are added in the order of the file, measured ones are extended.

use igvm_defs::IgvmPlatformType;
use protocols::addr::PAGE_SIZE;
use protocols::measure::{Digest, Mrtd};

use super::areas::Areas;
use super::{Explain, Step, bounded, contents, whole_page};
use crate::error::Error;
use crate::file::{Content, File, Problem, Rule};

/// MRTD of `file`; `explain` is told each step.
///
/// # Errors
///
/// When the file is not for TDX, or something that is measured is not where the file says.
pub fn mrtd(file: &File<'_>, explain: Explain<'_>) -> Result<Digest, Error> {
    let mask = file
        .mask_of(IgvmPlatformType::TDX)
        .ok_or(Error::NoPlatform { platform: "TDX" })?;
    let mut areas = Areas::default();
    let mut mrtd = Mrtd::new();
    let mut count = 0;
    let mut add = |offset, gpa, data: Option<&[u8]>| {
        count += 1;
        bounded(count)?;
        let page = data.map(whole_page);
        mrtd.add_page(gpa, page.as_ref());
        explain(&Step {
            offset: Some(offset),
            gpa,
            kind: if page.is_some() { "EXTENDED" } else { "ADDED" },
            contents: data.map(contents),
            after: None,
        });
        Ok::<(), Error>(())
    };
    for header in file.of_platform(mask) {
        match &header.content {
            Content::Area(area) => areas.declare(header, area)?,
            Content::Parameter(parameter) => areas.write(header, parameter)?,
            Content::Insert(insert) => {
                let bytes = areas.insert(header, insert.parameter_area_index)?;
                for gpa in header.range(insert.gpa, bytes)?.step_by(PAGE_SIZE as usize) {
                    add(header.offset, gpa, None)?;
                }
            }
            // Shared pages are no part of the trust domain.
            Content::Page(page) if page.flags.shared() => {}
            Content::Page(page) => {
                let data = file.page_data(header, page)?.unwrap_or_default();
                header.range(page.gpa, PAGE_SIZE)?;
                let measured = !page.flags.unmeasured();
                add(header.offset, page.gpa, measured.then_some(data))?;
            }
            Content::Context(context) => {
                let found = format!("context of processor {}", context.vp_index);
                return Err(Problem::new(header.offset, Rule::ContextForTdx, found).into());
            }
            _ => {}
        }
    }
    Ok(mrtd.value())
}
