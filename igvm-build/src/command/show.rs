//! `igvm-build show`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use igvm_build::error::{Error, FileError};
use igvm_build::file::File;
use igvm_build::show::Description;

use super::{Input, print, print_json};

#[derive(Args)]
pub struct Show {
    /// The IGVM file, of any builder
    file: PathBuf,
    /// As JSON
    #[arg(long)]
    json: bool,
}

impl Show {
    pub fn run(&self) -> Result<()> {
        let bytes = Input::IGVM.read(&self.file)?;
        let file = File::read(&bytes)
            .map_err(|problem| FileError::content(&self.file)(Error::from(problem)))?;
        let description = Description::of(&file);
        if self.json {
            print_json(&description)
        } else {
            print(&description.to_string())
        }
    }
}
