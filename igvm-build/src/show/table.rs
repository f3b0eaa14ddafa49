//! A description as text: one line for each header or run of pages.

use std::fmt::{self, Display, Formatter};

use super::params::Parameters;
use super::{Description, Item, Measurement, Platform, State, What};

/// Columns before the text of a line.
const LABEL: usize = 18;

impl Display for Description {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let checksum = if self.checksum_holds {
            ""
        } else {
            ", wrong checksum"
        };
        line(
            f,
            "file",
            format_args!(
                "{} bytes, IGVM version {}, {} headers{checksum}",
                self.bytes, self.version, self.headers
            ),
        )?;
        for platform in &self.platforms {
            write!(f, "{platform}")?;
        }
        let single = self.platforms.len() <= 1;
        for item in &self.contents {
            write_item(f, item, if single { None } else { Some(&self.platforms) })?;
        }
        for parameters in &self.launch_parameters {
            write!(f, "{parameters}")?;
        }
        for platform in &self.platforms {
            match &platform.measurement {
                Some(Measurement::LaunchDigest(digest)) => {
                    line(f, "launch digest", format_args!("{digest}"))?;
                }
                Some(Measurement::Mrtd(mrtd)) => line(f, "MRTD", format_args!("{mrtd}"))?,
                Some(Measurement::None(why)) => {
                    line(
                        f,
                        "no measurement",
                        format_args!("{}: {why}", platform.name),
                    )?;
                }
                None => {}
            }
        }
        Ok(())
    }
}

/// A label and what it is for.
fn line(f: &mut Formatter<'_>, label: &str, text: fmt::Arguments<'_>) -> fmt::Result {
    writeln!(f, "{label:LABEL$} {text}")
}

impl Display for Platform {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let policy = self.policy.as_deref().unwrap_or("none");
        line(
            f,
            "platform",
            format_args!(
                "{}, mask {:#x}, highest VTL {}, shared from {:#x}, policy {policy}",
                self.name, self.mask, self.highest_vtl, self.shared_boundary
            ),
        )
    }
}

/// Writes an item, with the platforms it is for unless the file has but one.
fn write_item(f: &mut Formatter<'_>, item: &Item, platforms: Option<&[Platform]>) -> fmt::Result {
    let for_whom = Whom {
        mask: item.mask,
        platforms,
    };
    match &item.what {
        // Said with the platform.
        What::Policy { .. } => Ok(()),
        What::Pages {
            start,
            end,
            pages,
            kind,
            zero,
        } => {
            let zero = if *zero && kind == "measured" {
                ", zero"
            } else {
                ""
            };
            line(
                f,
                "pages",
                format_args!(
                    "{start:#014x}..{end:#014x} {pages:>6} × 4 KiB  {kind}{zero}{for_whom}"
                ),
            )
        }
        What::ParameterArea { index, bytes } => line(
            f,
            "parameter area",
            format_args!("index {index}, {bytes} bytes"),
        ),
        What::Parameter { name, area, offset } => line(
            f,
            "parameter",
            format_args!("{name} at area {area} + {offset:#x}"),
        ),
        What::Insert { gpa, area } => line(
            f,
            "parameter insert",
            format_args!("{gpa:#014x} area {area}, unmeasured{for_whom}"),
        ),
        What::RequiredMemory { start, end } => line(
            f,
            "required memory",
            format_args!("{start:#014x}..{end:#014x}, not launched{for_whom}"),
        ),
        What::Processor { index, gpa, state } => {
            let label = format!("processor {index}");
            match state {
                Some(state) => {
                    line(
                        f,
                        &label,
                        format_args!("VMSA at {gpa:#x}, VMPL {}{for_whom}", state.vmpl),
                    )?;
                    write!(f, "{state}")
                }
                None => line(f, &label, format_args!("context at {gpa:#x}{for_whom}")),
            }
        }
        What::IdBlock(block) => {
            let author = if block.author_key {
                "with author key"
            } else {
                "without author key"
            };
            line(
                f,
                "ID block",
                format_args!(
                    "version {}, SVN {}, {author}{for_whom}",
                    block.version, block.guest_svn
                ),
            )?;
            line(
                f,
                "",
                format_args!("family {} image {}", block.family_id, block.image_id),
            )?;
            line(f, "", format_args!("digest {}", block.launch_digest))
        }
        What::Range { name, start, end } => line(
            f,
            name,
            format_args!("{start:#014x}..{end:#014x}{for_whom}"),
        ),
        What::Other { name, bytes } => line(f, "other", format_args!("{name}, {bytes} bytes")),
    }
}

/// The platforms of an item, where that says something.
struct Whom<'a> {
    mask: Option<u32>,
    platforms: Option<&'a [Platform]>,
}

impl Display for Whom<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let (Some(mask), Some(platforms)) = (self.mask, self.platforms) else {
            return Ok(());
        };
        let mut chosen = platforms
            .iter()
            .filter(|platform| platform.mask & mask != 0)
            .map(|platform| platform.name.as_str());
        if platforms.iter().all(|platform| platform.mask & mask != 0) {
            return Ok(());
        }
        match chosen.next() {
            Some(first) => write!(f, "  [{first}")?,
            None => return write!(f, "  [mask {mask:#x}, no platform]"),
        }
        for name in chosen {
            write!(f, ", {name}")?;
        }
        write!(f, "]")
    }
}

impl Display for State {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        line(
            f,
            "",
            format_args!(
                "rip {:#x} rdi {:#x} rsp {:#x} rflags {:#x}",
                self.rip, self.rdi, self.rsp, self.rflags
            ),
        )?;
        line(
            f,
            "",
            format_args!(
                "cr0 {:#x} cr3 {:#x} cr4 {:#x} efer {:#x} sev features {:#x}",
                self.cr0, self.cr3, self.cr4, self.efer, self.sev_features
            ),
        )
    }
}

impl Display for Parameters {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        line(
            f,
            "launch parameters",
            format_args!(
                "{}: C-bit {}, region {:#x} + {:#x}, launched up to {:#x}",
                self.platform, self.c_bit, self.region_gpa, self.region_size, self.image_end
            ),
        )?;
        line(
            f,
            "",
            format_args!("accepts {}; fault {}", self.accepts, self.fault),
        )?;
        let Some(firmware) = &self.firmware else {
            return line(f, "firmware", format_args!("none"));
        };
        line(
            f,
            "firmware",
            format_args!(
                "{:#x} + {:#x}, reset vector {:#x}",
                firmware.gpa, firmware.size, firmware.reset_vector
            ),
        )?;
        if firmware.memory_map != 0 {
            line(
                f,
                "",
                format_args!("memory map goes to {:#x}", firmware.memory_map),
            )?;
        }
        for section in &firmware.sections {
            line(
                f,
                "",
                format_args!(
                    "{:#014x} + {:#08x} {}",
                    section.gpa, section.size, section.kind
                ),
            )?;
        }
        Ok(())
    }
}
