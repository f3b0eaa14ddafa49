//! What the stress program tells the host: one JSON object on the last line of its output.

#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

/// The outcome of a run of the stress program, and all its figures.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Summary {
    /// What went wrong, in words; nothing in a good run.
    pub failures: Vec<String>,
    /// Processors the guest had at its start.
    pub processors: u32,
    /// What the converting module counted.
    pub conversions: Conversions,
    /// What happened to the processors meanwhile.
    pub hotplug: Hotplug,
    /// What happened to the memory meanwhile.
    pub memory: Memory,
    /// How long the conversions took, in milliseconds of the guest's clock.
    pub milliseconds: u64,
}

/// Counters of the kernel module (`module/turnstile_convert.c`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Conversions {
    /// Successful calls of `set_memory_decrypted`.
    pub to_shared_calls: u64,
    /// Pages of 4 KiB in them.
    pub to_shared_pages: u64,
    /// Successful calls of `set_memory_encrypted`.
    pub to_private_calls: u64,
    /// Pages of 4 KiB in them.
    pub to_private_pages: u64,
    /// Words of 8 bytes compared with what they had to be.
    pub words_checked: u64,
    /// Those that were something else.
    pub words_wrong: u64,
    /// Calls of either kind that the kernel refused.
    pub failed_calls: u64,
    /// Successful cycles by the processor whose thread asked for them.
    #[serde(default)]
    pub cycles: Vec<u64>,
    /// Cycles on a whole block of 2 MiB.
    #[serde(default)]
    pub whole_blocks: u64,
}

/// Processors taken away and brought back.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hotplug {
    /// Times a processor went offline.
    pub offline: u64,
    /// Times one came back.
    pub online: u64,
}

/// The user memory that was held and checked.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Memory {
    /// MiB that were filled and held to the end.
    pub held_mib: u64,
    /// MiB compared while conversions went on, counting each comparison.
    pub rechecked_mib: u64,
    /// Words of 8 bytes that were not what had been written, in all comparisons.
    pub words_wrong: u64,
    /// `Unaccepted:` of `/proc/meminfo` at the start, in KiB.
    pub unaccepted_before_kib: u64,
    /// The same at the end.
    pub unaccepted_after_kib: u64,
}

impl Summary {
    /// The summary in a program's output: its last line that is one.
    pub fn find(output: &str) -> Option<Summary> {
        output
            .lines()
            .rev()
            .find_map(|line| serde_json::from_str(line.trim()).ok())
    }

    /// Whether all that was checked was right.
    pub fn good(&self) -> bool {
        self.failures.is_empty()
            && self.conversions.words_wrong == 0
            && self.conversions.failed_calls == 0
            && self.memory.words_wrong == 0
    }
}

#[cfg(test)]
mod tests {
    use super::Summary;

    #[test]
    fn the_summary_is_found_behind_other_output() {
        let mut summary = Summary {
            processors: 4,
            ..Summary::default()
        };
        summary.conversions.cycles = vec![1, 2];
        let line = serde_json::to_string(&summary).unwrap();
        let output = format!("filling\n{{}}\n{line}\r\nbye\n");
        assert_eq!(Summary::find(&output), Some(summary));
        assert_eq!(Summary::find("no summary\n{\"failures\":[]}\n"), None);
    }

    #[test]
    fn one_wrong_word_is_enough() {
        let mut summary = Summary::default();
        assert!(summary.good());
        summary.memory.words_wrong = 1;
        assert!(!summary.good());
    }
}
