//! Parameter areas: declared, written to, inserted once.

use std::collections::BTreeMap;

use igvm_defs::{IGVM_VHS_PARAMETER, IGVM_VHS_PARAMETER_AREA};
use protocols::addr::PAGE_SIZE;

use crate::file::{Header, Problem, Rule, names};

/// Largest area: 64 MiB, far more than a memory map or a table of ACPI can need.
const MAX_BYTES: u64 = 64 << 20;

/// The areas that a file declared so far.
#[derive(Debug, Default)]
pub struct Areas(BTreeMap<u32, Area>);

#[derive(Debug, Clone, Copy)]
struct Area {
    bytes: u64,
    inserted: bool,
}

impl Areas {
    /// Declares an area.
    ///
    /// # Errors
    ///
    /// When it is not whole pages, too large, or declared already.
    pub fn declare(
        &mut self,
        header: &Header<'_>,
        area: &IGVM_VHS_PARAMETER_AREA,
    ) -> Result<(), Problem> {
        let (index, bytes) = (area.parameter_area_index, area.number_of_bytes);
        if self.0.contains_key(&index) {
            let found = format!("area {index} a second time");
            return Err(Problem::new(header.offset, Rule::AreaTwice, found));
        }
        // An area of a wrong size is declared all the same: those who go on want no second message about it.
        let usable = bytes.clamp(PAGE_SIZE, MAX_BYTES) / PAGE_SIZE * PAGE_SIZE;
        let area = Area {
            bytes: usable,
            inserted: false,
        };
        self.0.insert(index, area);
        if usable != bytes {
            let found = format!("area {index} of {bytes} bytes");
            return Err(Problem::new(header.offset, Rule::AreaSize, found));
        }
        Ok(())
    }

    /// Writes a parameter into an area.
    ///
    /// # Errors
    ///
    /// When there is no such area any more, or it ends before the parameter can.
    pub fn write(
        &mut self,
        header: &Header<'_>,
        parameter: &IGVM_VHS_PARAMETER,
    ) -> Result<(), Problem> {
        let area = self.usable(header, parameter.parameter_area_index)?;
        let least = names::least_bytes(header.kind).unwrap_or(1);
        if u64::from(parameter.byte_offset) + least > area.bytes {
            let found = format!(
                "{least} bytes or more at {:#x} in area {} of {:#x} bytes",
                parameter.byte_offset, parameter.parameter_area_index, area.bytes
            );
            return Err(Problem::new(header.offset, Rule::AreaOverrun, found));
        }
        Ok(())
    }

    /// Inserts an area, which nobody can use any more then; its size in bytes.
    ///
    /// # Errors
    ///
    /// When there is no such area any more.
    pub fn insert(&mut self, header: &Header<'_>, index: u32) -> Result<u64, Problem> {
        let area = self.usable(header, index)?;
        area.inserted = true;
        Ok(area.bytes)
    }

    fn usable(&mut self, header: &Header<'_>, index: u32) -> Result<&mut Area, Problem> {
        match self.0.get_mut(&index) {
            None => {
                let found = format!("area {index} is not declared");
                Err(Problem::new(header.offset, Rule::AreaUnknown, found))
            }
            Some(area) if area.inserted => {
                let found = format!("area {index} was inserted");
                Err(Problem::new(header.offset, Rule::AreaGone, found))
            }
            Some(area) => Ok(area),
        }
    }
}
