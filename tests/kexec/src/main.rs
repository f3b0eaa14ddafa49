//! `kexec KERNEL INITRD COMMAND-LINE`: loads a kernel and starts it at once.
//!
//! Debian's kexec-tools do the same, but bring Xen's libraries along; the guest's userspace is one
//! static busybox, and this program beside it is static, too. The kernel itself loads the files
//! (kexec_file_load(2)), so there is nothing to know here about their formats. Nothing is shut down
//! first: like `poweroff -f`.
//!
//! It does not return when it succeeds.

#![expect(
    unsafe_code,
    reason = "two system calls that libc has no safe wrapper for"
)]

use std::env;
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};

fn main() -> ExitCode {
    match kexec() {
        Ok(never) => match never {},
        Err(error) => {
            eprintln!("kexec: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn kexec() -> Result<std::convert::Infallible> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [kernel, initrd, command_line] = arguments.as_slice() else {
        bail!(
            "expected KERNEL INITRD COMMAND-LINE, found {} arguments",
            arguments.len()
        );
    };
    let open = |path: &String| File::open(path).with_context(|| format!("{path}: cannot be read"));
    load(&open(kernel)?, &open(initrd)?, command_line)?;
    start()
}

/// Gives both files to the kernel, which checks and places them.
fn load(kernel: &File, initrd: &File, command_line: &str) -> Result<()> {
    let command_line = CString::new(command_line).context("the command line holds a NUL")?;
    let text = command_line.as_bytes_with_nul();
    // SAFETY: both descriptors are open files, and the command line is as long as is said, its final
    // NUL included. The call keeps none of them.
    let result = unsafe {
        libc::syscall(
            libc::SYS_kexec_file_load,
            kernel.as_raw_fd(),
            initrd.as_raw_fd(),
            text.len(),
            text.as_ptr(),
            0_u64,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error()).context("the kernel cannot be loaded");
    }
    Ok(())
}

/// Starts the loaded kernel.
fn start() -> Result<std::convert::Infallible> {
    // SAFETY: both calls take no pointer. What the first leaves in memory is all there is: the guest
    // has no disk.
    unsafe {
        libc::sync();
        libc::reboot(libc::LINUX_REBOOT_CMD_KEXEC);
    }
    Err(io::Error::last_os_error()).context("the loaded kernel cannot be started")
}
