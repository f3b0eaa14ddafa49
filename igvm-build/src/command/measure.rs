//! `igvm-build measure`.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use igvm_build::error::{Error, FileError};
use igvm_build::file::File;
use igvm_build::measure::{Step, plain, snp, tdx};
use igvm_build::sidecar::hex;
use igvm_build::target::Target;
use igvm_defs::IgvmPlatformType;
use protocols::measure::Digest;
use serde::Serialize;

use super::input::IGVM_MAGIC;
use super::processors::Processors;
use super::{Input, print, print_json};

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Platform {
    /// The launch digest of SEV-SNP
    Snp,
    /// MRTD of TDX
    Tdx,
}

#[derive(Args)]
pub struct Measure {
    /// The IGVM file, or an OVMF image that QEMU launches by itself
    file: PathBuf,
    /// What is measured [default: all that the file is for]
    #[arg(long, value_enum)]
    platform: Option<Platform>,
    /// Whose loader launches it
    #[arg(long, value_enum, default_value_t)]
    loader: Target,
    #[command(flatten)]
    processors: Processors,
    /// Print each page's step
    #[arg(long)]
    explain: bool,
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// A measurement and, for JSON, its steps. (As text they are printed while they are made.)
#[derive(Serialize)]
struct Measured {
    name: &'static str,
    value: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    steps: Vec<Step>,
}

impl Measure {
    pub fn run(&self) -> Result<()> {
        let bytes = Input::IGVM_OR_FIRMWARE.read(&self.file)?;
        let measured = self
            .measure(&bytes)
            .map_err(FileError::content(&self.file))?;
        if measured.is_empty() {
            bail!(
                "{}: neither for SEV-SNP nor for TDX; `igvm-build show` says what it is for",
                self.file.display()
            );
        }
        if self.json {
            return print_json(&measured);
        }
        for measurement in &measured {
            print(&format!("{} {}\n", measurement.name, measurement.value))?;
        }
        Ok(())
    }

    fn measure(&self, bytes: &[u8]) -> Result<Vec<Measured>, Error> {
        let processors = self.processors.measured();
        if !bytes.starts_with(IGVM_MAGIC) {
            return Ok(vec![self.told("launch digest", |explain| {
                plain::launch_digest(bytes, processors, explain)
            })?]);
        }
        let file = File::read(bytes)?;
        let loader = self.loader.loader_for(processors);
        let wanted = |platform, kind| match self.platform {
            Some(chosen) => chosen == platform,
            None => file.mask_of(kind).is_some(),
        };
        let mut measured = Vec::new();
        if wanted(Platform::Snp, IgvmPlatformType::SEV_SNP) {
            measured.push(self.told("launch digest", |explain| {
                snp::launch_digest(&file, loader, explain)
            })?);
        }
        if wanted(Platform::Tdx, IgvmPlatformType::TDX) {
            measured.push(self.told("MRTD", |explain| tdx::mrtd(&file, explain))?);
        }
        Ok(measured)
    }

    /// Measures, and keeps the steps if they are asked for.
    fn told(
        &self,
        name: &'static str,
        measure: impl FnOnce(&mut dyn FnMut(&Step)) -> Result<Digest, Error>,
    ) -> Result<Measured, Error> {
        let mut steps = Vec::new();
        let value = measure(&mut |step| match (self.explain, self.json) {
            (true, true) => steps.push(step.clone()),
            // Whoever does not read them any more gets the rest neither.
            (true, false) => drop(print(&format!("{}\n", line(step)))),
            (false, _) => {}
        })?;
        Ok(Measured {
            name,
            value: hex(&value),
            steps,
        })
    }
}

/// A step in one line: where in the file, address, type, contents, digest so far.
fn line(step: &Step) -> String {
    let offset = step
        .offset
        .map_or_else(|| format!("{:>10}", "-"), |offset| format!("{offset:#10x}"));
    let digest = |digest: &Option<Digest>| digest.as_ref().map_or("-".to_owned(), |d| hex(d));
    format!(
        "{offset} {:#014x} {:10} {} {}",
        step.gpa,
        step.kind,
        digest(&step.contents),
        digest(&step.after)
    )
}
