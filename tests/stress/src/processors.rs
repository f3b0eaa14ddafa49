//! Takes processors away and brings them back, through sysfs.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use stress::Hotplug;

/// How long a processor stays as it is, unless the end comes first.
const REST: Duration = Duration::from_secs(2);
/// How often the end is looked for meanwhile.
const LOOK: Duration = Duration::from_millis(50);

/// Every processor but the first goes offline and comes back, in turn, `turns` times or until
/// `end` says so; the first time in any case. All are online when this returns without an error.
/// What was done counts whether or not there was one.
pub fn come_and_go(processors: u32, turns: u32, end: &AtomicBool) -> (Hotplug, Result<()>) {
    let mut hotplug = Hotplug::default();
    let done = switch_all(processors, turns, end, &mut hotplug);
    (hotplug, done)
}

fn switch_all(processors: u32, turns: u32, end: &AtomicBool, hotplug: &mut Hotplug) -> Result<()> {
    for turn in 0..turns {
        for processor in 1..processors {
            if turn > 0 && end.load(Ordering::Relaxed) {
                return Ok(());
            }
            switch(processor, false)?;
            hotplug.offline += 1;
            rest(end);
            switch(processor, true)?;
            hotplug.online += 1;
            rest(end);
        }
    }
    Ok(())
}

fn rest(end: &AtomicBool) {
    let begun = Instant::now();
    while begun.elapsed() < REST && !end.load(Ordering::Relaxed) {
        sleep(LOOK);
    }
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
