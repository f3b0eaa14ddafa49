//! Guest memory as the host sees it: how much, in what pieces, and what conversions cost.

use serde::{Deserialize, Serialize};

/// Memory as the host sees it. Page counts are in units of 4 KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Memory {
    /// Pages of guest memory.
    pub guest_pages: u64,
    /// Pages assigned to the guest at the end.
    pub assigned_pages: u64,
    /// Pages validated at the end.
    pub validated_pages: u64,
    /// Bytes validated by VMPL0 after the launch, minus those rescinded.
    pub validated_bytes: u64,
    /// Bytes overwritten by the scramble pattern.
    pub scrambled_bytes: u64,
    /// 2 MiB RMP entries that were split into 4 KiB entries.
    pub psmashes: u64,
    /// Pages that are shared at the end.
    pub shared_pages: u64,
    /// Changes between private and shared.
    pub conversions: Conversions,
    /// The pieces private memory lives in.
    pub folios: Folios,
    /// The host kernel's direct map.
    pub direct_map: DirectMap,
}

/// Changes between private and shared, asked for by the guest or made for its accesses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Conversions {
    /// Contiguous ranges to be made shared, neighbouring entries of one request merged.
    pub ranges_to_shared: u64,
    /// Contiguous ranges to be made private.
    pub ranges_to_private: u64,
    /// Pages that were made shared.
    pub pages_to_shared: u64,
    /// Pages that were made private.
    pub pages_to_private: u64,
    /// Pages whose mappings were withdrawn for it.
    pub invalidated_pages: u64,
}

/// The pieces of host memory that private pages live in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Folios {
    /// 2 MiB folios at the end.
    pub large: u64,
    /// Those of them that have no hole.
    pub large_whole: u64,
    /// Those of them that have a 2 MiB RMP entry.
    pub large_in_rmp: u64,
    /// 2 MiB folios ever allocated.
    pub large_allocated: u64,
    /// 2 MiB folios ever freed.
    pub large_freed: u64,
    /// How often a whole 2 MiB folio lost a part to a conversion.
    pub large_holed: u64,
    /// 4 KiB folios at the end.
    pub small: u64,
    /// 4 KiB folios ever allocated.
    pub small_allocated: u64,
    /// 4 KiB folios ever freed.
    pub small_freed: u64,
    /// Pages of 2 MiB folios that are shared now, so that the host holds them twice.
    pub hole_pages: u64,
    /// The most there ever were.
    pub hole_pages_peak: u64,
}

/// The host kernel's direct map of the memory that backs the guest, in 2 MiB mappings at first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DirectMap {
    /// 2 MiB blocks of guest memory.
    pub blocks: u64,
    /// Blocks split because a 4 KiB folio in them became private.
    pub splits: u64,
    /// Blocks Linux would have split: those that ever saw an RMPUPDATE of 4 KiB.
    pub splits_as_linux: u64,
}
