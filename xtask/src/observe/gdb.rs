//! `--gdb`: QEMU's debugger stub with the symbols of paravisor and machine.
//!
//! Breakpoints are matched by virtual address in TCG, so they hit wherever that address is
//! executed, inside the nested guest as well. Memory is another matter: the stub walks the page
//! tables of whatever runs and knows neither nested tables nor the C-bit. The paravisor's region
//! is mapped one to one, so while it runs the stub is told to take addresses as physical ones; the
//! machine's own tables are walked as they are.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use protocols::launch::{REGION_GPA, REGION_SIZE};

use super::{MACHINE, PARAVISOR};

/// The names of socket and command file in a run's directory.
const SOCKET: &str = "gdb.sock";
const COMMANDS: &str = "turnstile.gdb";
/// The longest path of a UNIX socket in bytes (`sun_path` less its final zero).
const MAX_SOCKET_PATH: usize = 107;

/// Where QEMU listens for the debugger of the run in `dir`.
pub fn socket(dir: &Path) -> PathBuf {
    dir.join(SOCKET)
}

/// Writes the command file of the run in `dir` and says how to start gdb with it.
pub fn prepare(dir: &Path, root: &Path) -> Result<()> {
    // gdb is started from anywhere.
    let dir = &std::path::absolute(dir)?;
    let length = socket(dir).as_os_str().len();
    if length > MAX_SOCKET_PATH {
        bail!(
            "{}: this path of a socket has {length} bytes, at most {MAX_SOCKET_PATH} are possible; \
             use a shorter directory with --out DIR",
            socket(dir).display()
        );
    }
    let file = dir.join(COMMANDS);
    fs::write(&file, commands(dir, root))
        .with_context(|| format!("{}: cannot be written", file.display()))?;
    eprintln!(
        "  the machine waits for a debugger; in another terminal: gdb -x {}",
        file.display()
    );
    Ok(())
}

/// gdb's commands: symbols, the stub, and how memory is to be read.
fn commands(dir: &Path, root: &Path) -> String {
    let machine = dir.join(MACHINE);
    let paravisor = dir.join(PARAVISOR);
    let socket = socket(dir);
    let region_end = REGION_GPA + REGION_SIZE;
    format!(
        "\
# Breakpoints take the plain name of a function or a place, such as
#   break boot_processor
#   break svsm/src/requests.rs:26
set architecture i386:x86-64
set pagination off
directory {root}
file {machine}
add-symbol-file {paravisor} -o 0
# Code is read from the files: the stub cannot see it while a nested guest runs.
set trust-readonly-sections on
# The paravisor's addresses are physical ones; all others go through the page tables.
define hook-stop
  if $pc >= {REGION_GPA:#x} && $pc < {region_end:#x}
    pipe maintenance packet Qqemu.PhyMemMode:1 | cat > /dev/null
  else
    pipe maintenance packet Qqemu.PhyMemMode:0 | cat > /dev/null
  end
end
target remote {socket}
",
        root = root.display(),
        machine = machine.display(),
        paravisor = paravisor.display(),
        socket = socket.display(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_commands_name_the_files_of_the_run() {
        let text = commands(Path::new("/run/1"), Path::new("/src"));
        for line in [
            "directory /src",
            "file /run/1/machine.elf",
            "add-symbol-file /run/1/svsm.elf -o 0",
            "target remote /run/1/gdb.sock",
        ] {
            assert!(text.lines().any(|l| l == line), "{line}: {text}");
        }
    }
}
