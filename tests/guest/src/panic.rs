//! The end of a guest that cannot go on: file and line on the console, then exit code 2.

use core::fmt::Write;
use core::panic::PanicInfo;

use crate::console::{Console, Exit, exit};

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    // The console never fails, and there is nobody else to tell.
    let _ = match info.location() {
        Some(place) => writeln!(
            Console,
            "\npanic at {}:{}: {}",
            place.file(),
            place.line(),
            info.message()
        ),
        None => writeln!(Console, "\npanic: {}", info.message()),
    };
    exit(Exit::Panicked)
}
