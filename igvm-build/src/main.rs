//! `igvm-build`: the command around the library of the same name.
//!
//! | exit status | |
//! |---|---|
//! | 0 | done; for `check` and `diff`: the answer is yes |
//! | 1 | `check`: the file does not load; `diff`: the files differ |
//! | 2 | the command line is wrong |
//! | 3 | the content of an input is wrong |
//! | 4 | a file cannot be read or written |

#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use igvm_build::error::FileError;

mod command;

use command::Answer;

/// The content of an input is wrong.
const BAD_INPUT: u8 = 3;
/// A file cannot be read or written.
const NO_FILE: u8 = 4;

fn main() -> ExitCode {
    match command::Arguments::parse().run() {
        Ok(Answer::Yes) => ExitCode::SUCCESS,
        Ok(Answer::No) => ExitCode::FAILURE,
        Err(error) => match error.downcast::<clap::Error>() {
            // As clap's own: status 2.
            Ok(error) => error.exit(),
            Err(error) => {
                eprintln!("igvm-build: {error}");
                match error.downcast_ref::<FileError>() {
                    Some(FileError::Read { .. } | FileError::Write { .. }) => NO_FILE.into(),
                    _ => BAD_INPUT.into(),
                }
            }
        },
    }
}
