//! What CPUID says inside the guest.
//!
//! One table serves all askers: the CPUID page of the launch, the GHCB requests, and CPUID
//! intercepts that the machine answers directly. It is the processor QEMU emulates, minus
//! what the machine cannot emulate faithfully (XSAVE and all that needs it, `tcg-svm.md` §5;
//! SVM; process-context ids; 5-level paging), plus SEV-SNP.
//!
//! Invariants:
//!
//! 1. the table has at most [`MAX_ENTRIES`] entries, sorted by leaf and subleaf, no duplicates;
//! 2. a leaf that is not in the table reads as zero;
//! 3. the table holds no value that differs between vCPUs; [`Table::lookup`] puts those in.

use alloc::vec::Vec;

use protocols::cpuid::MAX_ENTRIES;

use crate::vcpu::C_BIT;

/// The four registers CPUID writes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Leaf {
    /// EAX.
    pub eax: u32,
    /// EBX.
    pub ebx: u32,
    /// ECX.
    pub ecx: u32,
    /// EDX.
    pub edx: u32,
}

/// One leaf, or one subleaf of an indexed leaf.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry {
    /// EAX of the question.
    pub leaf: u32,
    /// ECX of the question; 0 where the leaf has no subleaves.
    pub subleaf: u32,
    /// The answer, without what differs between vCPUs.
    pub value: Leaf,
}

/// What an answer depends on besides leaf and subleaf.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Context {
    /// Whether the guest has set CR4.OSXSAVE.
    pub osxsave: bool,
    /// APIC id of the vCPU.
    pub apic_id: u32,
    /// Whether the software bit "SVSM present" is to be shown (direct answers at VMPL 1 to 3).
    pub svsm: bool,
}

/// Physical address bits the guest is told; above lie the C-bit and the other alias.
const PHYSICAL_BITS: u32 = 46;
/// Linear address bits.
const LINEAR_BITS: u32 = 48;

/// Highest standard leaf: without 0xD, because Linux' #VC handler needs XSAVEC to answer it
/// and TCG's XSAVEC does nothing (`tcg-svm.md` §5).
const MAX_STANDARD: u32 = 0xC;
const MAX_HYPERVISOR: u32 = 0x4000_0001;
const MAX_EXTENDED: u32 = 0x8000_001F;

/// The leaves of the table; of indexed leaves, the subleaves.
const LEAVES: [(u32, u32); 26] = [
    (0x0, 0),
    (0x1, 0),
    (0x5, 0),
    (0x6, 0),
    (0x7, 0),
    (0xB, 0),
    (0xB, 1),
    (0x4000_0000, 0),
    (0x4000_0001, 0),
    (0x8000_0000, 0),
    (0x8000_0001, 0),
    (0x8000_0002, 0),
    (0x8000_0003, 0),
    (0x8000_0004, 0),
    (0x8000_0005, 0),
    (0x8000_0006, 0),
    (0x8000_0007, 0),
    (0x8000_0008, 0),
    (0x8000_0019, 0),
    (0x8000_001A, 0),
    (0x8000_001D, 0),
    (0x8000_001D, 1),
    (0x8000_001D, 2),
    (0x8000_001D, 3),
    (0x8000_001E, 0),
    (0x8000_001F, 0),
];

const _: () = assert!(LEAVES.len() <= MAX_ENTRIES);

/// Bits that are taken away or added (APM volume 3, appendix E).
mod bits {
    use protocols::snp::{SevCpuid, SevCpuidEbx};

    /// Leaf 1: initial APIC id, bits 31:24.
    pub const LEAF1_EBX_APIC: u32 = 0xFF << 24;
    /// Leaf 1: OSXSAVE, which mirrors CR4.
    pub const LEAF1_ECX_OSXSAVE: u32 = 1 << 27;
    /// Leaf 1: XSAVE.
    pub const LEAF1_ECX_XSAVE: u32 = 1 << 26;
    /// Leaf 1: MONITOR 3 (KVM reflects it, and OVMF's processors would wait by it where they
    /// cannot take #VC any more), FMA 12, PCID 17, XSAVE, OSXSAVE, AVX 28, F16C 29.
    pub const LEAF1_ECX_OFF: u32 =
        1 << 3 | 1 << 12 | 1 << 17 | LEAF1_ECX_XSAVE | LEAF1_ECX_OSXSAVE | 1 << 28 | 1 << 29;
    /// Leaf 1: RDRAND 30 (Linux cannot do without), hypervisor present 31.
    pub const LEAF1_ECX_ON: u32 = 1 << 30 | 1 << 31;
    /// All that is left of leaf 7: FSGSBASE 0, BMI1 3, SMEP 7, BMI2 8, ERMS 9, RDSEED 18,
    /// ADX 19, SMAP 20, CLFLUSHOPT 23, CLWB 24, SHA 29.
    pub const LEAF7_EBX_KEEP: u32 = 1
        | 1 << 3
        | 1 << 7
        | 1 << 8
        | 1 << 9
        | 1 << 18
        | 1 << 19
        | 1 << 20
        | 1 << 23
        | 1 << 24
        | 1 << 29;
    /// Leaf 7: UMIP 2, RDPID 22.
    pub const LEAF7_ECX_KEEP: u32 = 1 << 2 | 1 << 22;
    /// Leaf 7: FSRM 4.
    pub const LEAF7_EDX_KEEP: u32 = 1 << 4;
    /// 0x8000_0001: SVM 2, IBS 10, XOP 11, SKINIT 12, LWP 15, FMA4 16, performance counters
    /// 23 to 28.
    pub const EXTENDED1_ECX_OFF: u32 =
        1 << 2 | 1 << 10 | 1 << 11 | 1 << 12 | 1 << 15 | 1 << 16 | 0x3F << 23;
    /// 0x8000_0001: NX 20, 1 GiB pages 26, long mode 29.
    pub const EXTENDED1_EDX_ON: u32 = 1 << 20 | 1 << 26 | 1 << 29;
    /// 0x8000_0008: XSAVEERPTR 2, INVLPGB 3.
    pub const EXTENDED8_EBX_OFF: u32 = 1 << 2 | 1 << 3;
    /// 0x8000_001F (`snp-isa.md` §13): SEV 1, SEV-ES 3, SEV-SNP 4, VMPL 5, RMPQUERY 6.
    pub const SEV_EAX: u32 = SevCpuid::SEV
        .union(SevCpuid::SEV_ES)
        .union(SevCpuid::SEV_SNP)
        .union(SevCpuid::VMPL)
        .union(SevCpuid::RMPQUERY)
        .bits();
    /// 0x8000_001F: an SVSM is present. Set by software only, for lower levels.
    pub const SEV_EAX_SVSM: u32 = SevCpuid::SVSM.bits();
    /// 0x8000_001F: four VMPLs (15:12), no coherency mitigation needed (31).
    pub const SEV_EBX: u32 = 4 << 12 | SevCpuidEbx::COHERENCY_SFW_NO;
}

/// The table.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Table {
    entries: Vec<Entry>,
}

impl Table {
    /// Makes the table from the CPU below; `native` executes CPUID (leaf, subleaf). A guest of
    /// `vcpus` processors is told of so many cores in one package.
    pub fn build(native: &dyn Fn(u32, u32) -> Leaf, vcpus: u32) -> Self {
        let entries = LEAVES
            .into_iter()
            .map(|(leaf, subleaf)| {
                // Beyond its maximum a processor may answer anything.
                let known = leaf <= native(leaf & 0x8000_0000, 0).eax;
                let value = if known {
                    native(leaf, subleaf)
                } else {
                    Leaf::default()
                };
                Entry {
                    leaf,
                    subleaf,
                    value: guest_view(leaf, subleaf, value, vcpus),
                }
            })
            .collect();
        Self { entries }
    }

    /// As [`Table::build`], without a word of SEV: for plain mode.
    pub fn build_plain(native: &dyn Fn(u32, u32) -> Leaf, vcpus: u32) -> Self {
        let mut table = Self::build(native, vcpus);
        table.entries.retain(|entry| entry.leaf != MAX_EXTENDED);
        table
    }

    /// Makes the table of a trust domain: an Intel processor, and what its host answers where the
    /// module does not ([`crate::tdx::ve`]). `tsc_hz` is 0 if unknown.
    pub fn build_td(native: &dyn Fn(u32, u32) -> Leaf, vcpus: u32, tsc_hz: u64) -> Self {
        let entries = TD_LEAVES
            .into_iter()
            .map(|(leaf, subleaf)| Entry {
                leaf,
                subleaf,
                value: td_view(leaf, subleaf, native(leaf, subleaf), vcpus, tsc_hz),
            })
            .collect();
        Self { entries }
    }

    /// Whether the table has an answer of its own.
    pub fn has(&self, leaf: u32, subleaf: u32) -> bool {
        let subleaf = if is_indexed(leaf) { subleaf } else { 0 };
        let wanted = (leaf, subleaf);
        self.entries.iter().any(|e| (e.leaf, e.subleaf) == wanted)
    }

    /// The entries, as the CPUID page has them.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Family, model and stepping of the processor, as leaf 1 tells them.
    pub fn family_model_stepping(&self) -> [u8; 3] {
        let leaf_1 = self.entries.iter().find(|entry| entry.leaf == 1);
        let eax = leaf_1.map_or(0, |entry| entry.value.eax);
        let bits = |low: u32, mask: u32| (eax >> low & mask) as u8;
        [
            bits(8, 0xF).wrapping_add(bits(20, 0xFF)),
            bits(16, 0xF) << 4 | bits(4, 0xF),
            bits(0, 0xF),
        ]
    }

    /// What a guest sees.
    pub fn lookup(&self, leaf: u32, subleaf: u32, context: &Context) -> Leaf {
        let subleaf = if is_indexed(leaf) { subleaf } else { 0 };
        let entry = self
            .entries
            .iter()
            .find(|e| (e.leaf, e.subleaf) == (leaf, subleaf));
        let mut value = entry.map(|e| e.value).unwrap_or_default();
        match leaf {
            0x1 => {
                value.ebx |= context.apic_id << 24;
                if context.osxsave && value.ecx & bits::LEAF1_ECX_XSAVE != 0 {
                    value.ecx |= bits::LEAF1_ECX_OSXSAVE;
                }
            }
            // The subleaf is echoed and the id given for every subleaf (APM volume 3, Fn000B).
            0xB => {
                value.ecx |= subleaf & 0xFF;
                value.edx = context.apic_id;
            }
            // One thread per core: the core's number is the APIC id.
            0x8000_001E => {
                value.eax = context.apic_id;
                value.ebx |= context.apic_id & 0xFF;
            }
            0x8000_001F if context.svsm => value.eax |= bits::SEV_EAX_SVSM,
            _ => {}
        }
        value
    }
}

/// Whether CPUID looks at ECX for this leaf, among the leaves of the table.
const fn is_indexed(leaf: u32) -> bool {
    matches!(leaf, 0x7 | 0xB | 0x8000_001D)
}

/// The leaves of a trust domain's table.
const TD_LEAVES: [(u32, u32); 18] = [
    (0x0, 0),
    (0x1, 0),
    (0x7, 0),
    (0xB, 0),
    (0xB, 1),
    (0x15, 0),
    (0x21, 0),
    (0x4000_0000, 0),
    (0x4000_0001, 0),
    (0x8000_0000, 0),
    (0x8000_0001, 0),
    (0x8000_0002, 0),
    (0x8000_0003, 0),
    (0x8000_0004, 0),
    (0x8000_0005, 0),
    (0x8000_0006, 0),
    (0x8000_0007, 0),
    (0x8000_0008, 0),
];

/// Family 6, model 0x8F, stepping 8: Sapphire Rapids.
const TD_SIGNATURE: u32 = 0x0008_06F8;
/// Highest basic leaf of a trust domain: the one that says what it is.
const TD_MAX_STANDARD: u32 = 0x21;
const TD_MAX_EXTENDED: u32 = 0x8000_0008;
/// Linear and physical address bits of a trust domain: the shared bit is one of an address.
const TD_ADDRESS_BITS: u32 = LINEAR_BITS << 8 | crate::tdx::GPA_WIDTH;
/// The module tells the TSC's frequency as a multiple of this crystal's, which is the clock of the APIC's
/// timer, too.
pub const TD_CRYSTAL_HZ: u32 = 25_000_000;

/// As [`guest_view`], for a trust domain: the same features under Intel's name.
fn td_view(leaf: u32, subleaf: u32, native: Leaf, vcpus: u32, tsc_hz: u64) -> Leaf {
    match leaf {
        0x0 => vendor(TD_MAX_STANDARD, *b"GenuineIntel"),
        0x1 => Leaf {
            eax: TD_SIGNATURE,
            ..guest_view(leaf, subleaf, native, vcpus)
        },
        0x15 => Leaf {
            eax: 1,
            ebx: (tsc_hz / u64::from(TD_CRYSTAL_HZ)) as u32,
            ecx: TD_CRYSTAL_HZ,
            edx: 0,
        },
        0x21 => vendor(0, *b"IntelTDX    "),
        0x8000_0000 => Leaf {
            eax: TD_MAX_EXTENDED,
            ..Leaf::default()
        },
        // LAHF in 64-bit code; SYSCALL, NX, 1 GiB pages, RDTSCP, long mode: Intel's bits of these.
        0x8000_0001 => Leaf {
            ecx: native.ecx & 1,
            edx: native.edx & (1 << 11 | 1 << 27) | bits::EXTENDED1_EDX_ON,
            ..Leaf::default()
        },
        0x8000_0005 => Leaf::default(),
        // Invariant TSC.
        0x8000_0007 => Leaf {
            edx: native.edx & 1 << 8,
            ..Leaf::default()
        },
        0x8000_0008 => Leaf {
            eax: TD_ADDRESS_BITS,
            ..Leaf::default()
        },
        _ => guest_view(leaf, subleaf, native, vcpus),
    }
}

/// Takes away what the machine does not emulate and what differs between vCPUs, and adds
/// SEV-SNP and the topology.
fn guest_view(leaf: u32, subleaf: u32, native: Leaf, vcpus: u32) -> Leaf {
    let mut value = native;
    match leaf {
        0x0 => return vendor(MAX_STANDARD, *b"AuthenticAMD"),
        0x1 => {
            value.ebx &= !bits::LEAF1_EBX_APIC;
            value.ecx = value.ecx & !bits::LEAF1_ECX_OFF | bits::LEAF1_ECX_ON;
        }
        0x7 => {
            // EAX is the highest subleaf: there is only this one.
            value.eax = 0;
            value.ebx &= bits::LEAF7_EBX_KEEP;
            value.ecx &= bits::LEAF7_ECX_KEEP;
            value.edx &= bits::LEAF7_EDX_KEEP;
        }
        0xB => return topology(subleaf, vcpus),
        0x4000_0000 => return hypervisor(MAX_HYPERVISOR, *b"KVMKVMKVM\0\0\0"),
        // No paravirtual feature: each would need a hypercall, an MSR or a shared page.
        0x4000_0001 => return Leaf::default(),
        0x8000_0000 => return vendor(MAX_EXTENDED, *b"AuthenticAMD"),
        0x8000_0001 => {
            value.ecx &= !bits::EXTENDED1_ECX_OFF;
            value.edx |= bits::EXTENDED1_EDX_ON;
        }
        0x8000_0008 => {
            value.eax = LINEAR_BITS << 8 | PHYSICAL_BITS;
            value.ebx &= !bits::EXTENDED8_EBX_OFF;
        }
        0x8000_001E => {
            value.eax = 0;
            value.ebx &= !0xFF;
        }
        0x8000_001F => {
            let ebx = bits::SEV_EBX | u32::from(C_BIT);
            return Leaf {
                eax: bits::SEV_EAX,
                ebx,
                ..Leaf::default()
            };
        }
        _ => {}
    }
    value
}

/// Leaf 0xB without the id: subleaf 0 is the threads of a core (one), subleaf 1 the cores of
/// the package. ECX bits 15:8 give the kind of level (APM volume 3, Fn0000_000B).
fn topology(subleaf: u32, vcpus: u32) -> Leaf {
    let (shift, processors, kind) = match subleaf {
        0 => (0, 1, 1),
        _ => (vcpus.next_power_of_two().trailing_zeros(), vcpus, 2),
    };
    Leaf {
        eax: shift,
        ebx: processors,
        ecx: kind << 8,
        edx: 0,
    }
}

/// A maximum and twelve letters in the order of leaf 0: EBX, EDX, ECX.
fn vendor(maximum: u32, name: [u8; 12]) -> Leaf {
    let leaf = hypervisor(maximum, name);
    Leaf {
        ecx: leaf.edx,
        edx: leaf.ecx,
        ..leaf
    }
}

/// A maximum and twelve letters in the order of the hypervisor's leaf: EBX, ECX, EDX.
fn hypervisor(maximum: u32, name: [u8; 12]) -> Leaf {
    let [a, b, c, d, e, f, g, h, i, j, k, l] = name;
    Leaf {
        eax: maximum,
        ebx: u32::from_le_bytes([a, b, c, d]),
        ecx: u32::from_le_bytes([e, f, g, h]),
        edx: u32::from_le_bytes([i, j, k, l]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FIRST: Context = Context {
        osxsave: false,
        apic_id: 0,
        svsm: false,
    };

    /// A processor with every feature, and with every leaf up to 0x20.
    fn everything(leaf: u32, _: u32) -> Leaf {
        let eax = if leaf & 0x7FFF_FFFF == 0 {
            leaf | 0x20
        } else {
            !0
        };
        Leaf {
            eax,
            ebx: !0,
            ecx: !0,
            edx: !0,
        }
    }

    fn table() -> Table {
        Table::build(&everything, 3)
    }

    #[test]
    fn the_table_is_sorted_and_fits_in_a_page() {
        let table = table();
        assert!(table.entries().len() <= MAX_ENTRIES);
        assert!(
            table
                .entries()
                .is_sorted_by(|a, b| (a.leaf, a.subleaf) < (b.leaf, b.subleaf))
        );
    }

    #[test]
    fn the_processor_is_an_snp_guest_of_amd() {
        let table = table();
        let leaf0 = table.lookup(0, 0, &FIRST);
        assert_eq!(leaf0.eax, 0xC);
        let letters = |words: [u32; 3]| words.map(u32::to_le_bytes).concat();
        assert_eq!(letters([leaf0.ebx, leaf0.edx, leaf0.ecx]), b"AuthenticAMD");
        let host = table.lookup(0x4000_0000, 0, &FIRST);
        assert_eq!(letters([host.ebx, host.ecx, host.edx]), b"KVMKVMKVM\0\0\0");
        let sev = table.lookup(0x8000_001F, 0, &FIRST);
        assert_eq!(sev.eax, 0b111_1010);
        assert_eq!(sev.ebx, 47 | 4 << 12 | 1 << 31);
        assert_eq!(table.lookup(0x8000_0008, 0, &FIRST).eax, 0x302E);
    }

    /// `tcg-svm.md` §5: what must not be advertised.
    #[test]
    fn nothing_that_needs_xsave_or_nested_svm_is_left() {
        let table = table();
        let leaf1 = table.lookup(
            1,
            0,
            &Context {
                osxsave: true,
                ..FIRST
            },
        );
        for bit in [3, 12, 17, 26, 27, 28, 29] {
            assert_eq!(leaf1.ecx & 1 << bit, 0, "leaf 1 ECX bit {bit}");
        }
        let leaf7 = table.lookup(7, 0, &FIRST);
        // AVX2, INVPCID, AVX512F; PKU, LA57.
        assert_eq!(leaf7.ebx & (1 << 5 | 1 << 10 | 1 << 16), 0);
        assert_eq!(leaf7.ecx & (1 << 3 | 1 << 16), 0);
        assert_eq!(table.lookup(7, 1, &FIRST), Leaf::default());
        assert_eq!(table.lookup(0xD, 0, &FIRST), Leaf::default());
        assert_eq!(table.lookup(0x8000_0001, 0, &FIRST).ecx & 1 << 2, 0);
        assert_eq!(table.lookup(0x8000_000A, 0, &FIRST), Leaf::default());
    }

    #[test]
    fn only_answers_know_who_asks() {
        let table = table();
        let fifth = Context {
            osxsave: false,
            apic_id: 5,
            svsm: true,
        };
        assert_eq!(table.lookup(1, 0, &fifth).ebx >> 24, 5);
        assert_eq!(table.lookup(0xB, 1, &fifth).edx, 5);
        assert_eq!(table.lookup(0xB, 3, &fifth).ecx & 0xFF, 3);
        assert_eq!(table.lookup(0x8000_001E, 0, &fifth).eax, 5);
        assert_eq!(table.lookup(0x8000_001F, 0, &fifth).eax >> 28, 1);
        assert_eq!(table.lookup(0x8000_001F, 0, &FIRST).eax >> 28, 0);
        for entry in table.entries() {
            match entry.leaf {
                1 => assert_eq!(entry.value.ebx >> 24, 0),
                0xB => assert_eq!(entry.value.edx, 0),
                0x8000_001E => assert_eq!(entry.value.eax, 0),
                _ => {}
            }
        }
    }

    #[test]
    fn the_topology_counts_every_processor() {
        let threads = table().lookup(0xB, 0, &FIRST);
        assert_eq!((threads.eax, threads.ebx, threads.ecx), (0, 1, 0x100));
        let cores = table().lookup(0xB, 1, &FIRST);
        assert_eq!((cores.eax, cores.ebx, cores.ecx), (2, 3, 0x201));
        assert_eq!(table().lookup(0xB, 2, &FIRST).ebx, 0);
    }

    #[test]
    fn leaves_the_processor_lacks_are_zero_or_made() {
        let small = |leaf, _| match leaf {
            0 | 0x8000_0000 => Leaf {
                eax: leaf,
                ..Leaf::default()
            },
            _ => Leaf {
                eax: !0,
                ebx: !0,
                ecx: !0,
                edx: !0,
            },
        };
        let table = Table::build(&small, 1);
        assert_eq!(table.lookup(6, 0, &FIRST), Leaf::default());
        assert_eq!(table.lookup(0x8000_001D, 0, &FIRST), Leaf::default());
        assert_ne!(table.lookup(0x8000_001F, 0, &FIRST), Leaf::default());
    }

    proptest! {
        #[test]
        fn questions_nobody_foresaw_are_answered_with_zero(
            leaf: u32,
            subleaf: u32,
            apic_id in 0u32..256,
            svsm: bool,
        ) {
            let value = table().lookup(leaf, subleaf, &Context { osxsave: true, apic_id, svsm });
            let known = LEAVES.iter().any(|&(l, s)| {
                l == leaf && (s == subleaf || !is_indexed(leaf))
            });
            if !known && leaf != 0xB {
                prop_assert_eq!(value, Leaf::default());
            }
        }
    }
}
