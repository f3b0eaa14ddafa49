//! `igvm-build diff`.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;
use igvm_build::diff::diff;
use igvm_build::error::{Error, FileError};
use igvm_build::file::File;

use super::{Answer, Input, print, print_json};

#[derive(Args)]
pub struct Diff {
    /// The first IGVM file
    left: PathBuf,
    /// The second IGVM file
    right: PathBuf,
    /// As JSON
    #[arg(long)]
    json: bool,
}

impl Diff {
    pub fn run(&self) -> Result<Answer> {
        let left = Input::IGVM.read(&self.left)?;
        let right = Input::IGVM.read(&self.right)?;
        let differences = diff(&parse(&self.left, &left)?, &parse(&self.right, &right)?);
        if self.json {
            print_json(&differences)?;
        } else {
            for difference in &differences {
                print(&format!("{difference}\n"))?;
            }
        }
        Ok(if differences.is_empty() {
            Answer::Yes
        } else {
            Answer::No
        })
    }
}

fn parse<'a>(file: &Path, bytes: &'a [u8]) -> Result<File<'a>> {
    let parsed = File::read(bytes);
    Ok(parsed.map_err(|problem| FileError::content(file)(Error::from(problem)))?)
}
