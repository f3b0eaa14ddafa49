//! What the guest asked of the paravisor, as the host sees it: a guest's request to run VMPL 0
//! with a call in its registers, and the answer it is resumed with.

use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::vec::Vec;

use serde::{Deserialize, Serialize};

/// One kind of call.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct CallCounters {
    /// Who called.
    pub vmpl: u8,
    /// Protocol number.
    pub protocol: u32,
    /// Call number within the protocol.
    pub call: u32,
    /// Both in words (`CORE/PVALIDATE`), or numbers if they have no name.
    pub name: String,
    /// Answers by result code (`SUCCESS`, `INCOMPLETE`, …, or `0x80001234`).
    pub results: BTreeMap<String, u64>,
    /// Calls the caller was never resumed after: the run ended, or its VMSA was replaced.
    pub unanswered: u64,
    /// Entries of PVALIDATE lists; all zero for other calls.
    pub entries: ListEntries,
    /// From the request to the caller's resumption.
    pub latency: Histogram,
}

/// Entries of PVALIDATE lists by size and action.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ListEntries {
    /// 4 KiB, validate.
    pub validate_4k: EntryResults,
    /// 2 MiB, validate.
    pub validate_2m: EntryResults,
    /// 4 KiB, rescind.
    pub rescind_4k: EntryResults,
    /// 2 MiB, rescind.
    pub rescind_2m: EntryResults,
    /// Entries that ask for neither size.
    pub malformed: u64,
}

/// Entries by what became of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct EntryResults {
    /// The list's `next` went past them.
    pub done: u64,
    /// The call failed with `next` at them.
    pub refused: u64,
}

/// Durations in ticks of the time stamp counter, counted by the power of two below them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Histogram {
    /// How many durations.
    pub count: u64,
    /// Their sum.
    pub total: u64,
    /// The shortest; 0 if there is none.
    pub min: u64,
    /// The longest.
    pub max: u64,
    /// Element n counts durations d with 2^n ≤ d < 2^(n+1); element 0 also those of 0. Empty
    /// elements at the end are left out.
    pub buckets: Vec<u64>,
}

/// How much memory had been accepted at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Sample {
    /// Time stamp counter.
    pub tsc: u64,
    /// Bytes validated by VMPL0 since the launch, minus those rescinded.
    pub validated_bytes: u64,
}
