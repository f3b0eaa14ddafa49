//! Takes processors away and brings them back, through sysfs.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result};
use stress::Hotplug;

/// How long a processor stays as it is.
const REST: Duration = Duration::from_millis(250);

/// Every processor but the first goes offline and comes back, in turn, until `end` says so. All
/// are online when this returns without an error. What was done counts in either case.
pub fn come_and_go(processors: u32, end: &AtomicBool) -> (Hotplug, Result<()>) {
    let mut hotplug = Hotplug::default();
    let done = turns(processors, end, &mut hotplug);
    (hotplug, done)
}

fn turns(processors: u32, end: &AtomicBool, hotplug: &mut Hotplug) -> Result<()> {
    if processors < 2 {
        return Ok(());
    }
    for processor in (1..processors).cycle() {
        if end.load(Ordering::Relaxed) {
            break;
        }
        switch(processor, false)?;
        hotplug.offline += 1;
        sleep(REST);
        switch(processor, true)?;
        hotplug.online += 1;
        sleep(REST);
    }
    Ok(())
}

fn switch(processor: u32, online: bool) -> Result<()> {
    let file = format!("/sys/devices/system/cpu/cpu{processor}/online");
    let value = if online { "1" } else { "0" };
    fs::write(&file, value).with_context(|| format!("{file} := {value}"))?;
    let found = fs::read_to_string(&file).with_context(|| file.clone())?;
    anyhow::ensure!(
        found.trim() == value,
        "{file}: expected {value} after it was written, found {found:?}"
    );
    Ok(())
}
