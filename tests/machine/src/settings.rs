//! The settings of a run: text with one `key=value` per line, given by fw_cfg.
//!
//! Nothing is guessed: an unknown key or value is an error that names it. Empty lines and
//! lines that begin with `#` are skipped. A key may come once.

use alloc::borrow::ToOwned;
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;

use protocols::oracle::Table;

use crate::types::{Gpa, PageSize};

/// Granularity of the host's private memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum HostBacking {
    /// As upstream KVM: every RMP entry is 4 KiB.
    #[default]
    Size4K,
    /// Folios of 2 MiB where a whole block is private and free.
    Size2M,
}

/// How faithfully instructions of VMPL1 and lower are reflected. VMPL0 is always strict.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Reflection {
    /// The machine answers CPUID, MSR and I/O itself; no #VC.
    #[default]
    Direct,
    /// #VC for everything that KVM has reflected.
    Strict,
    /// And for what a host may have reflected but KVM does not: RDTSC and RDTSCP.
    All,
}

/// A platform that the machine can be, and that an image can be for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PlatformKind {
    /// SEV-SNP.
    Snp,
    /// TDX.
    Tdx,
    /// No confidential hardware: plain mode.
    Native,
}

/// What the run is traced in.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub enum Trace {
    /// Nothing.
    #[default]
    Off,
    /// World switches and the guest's requests to the host.
    Switches,
    /// Every exit, VMGEXIT, RMP instruction and #VC besides.
    All,
}

/// How the machine itself breaks, on purpose, to show that it tells where.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Breakage {
    /// A panic.
    Panic,
    /// An exception of the processor.
    Exception,
}

macro_rules! hostile {
    ($( $(#[$doc:meta])* $variant:ident = $name:literal, )+) => {
        /// One way in which the host misbehaves.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub enum Hostile { $( $(#[$doc])* $variant, )+ }

        impl Hostile {
            /// All of them.
            pub const ALL: &'static [Self] = &[ $( Self::$variant, )+ ];

            /// The name in the settings.
            pub const fn name(self) -> &'static str {
                match self { $( Self::$variant => $name, )+ }
            }
        }
    };
}

hostile! {
    /// Two entries of the memory map overlap.
    MapOverlap = "map-overlap",
    /// An entry of the memory map runs past the end of the address space.
    MapWrap = "map-wrap",
    /// The memory map fills its whole area and has no end.
    MapMany = "map-many",
    /// The paravisor's region is in no RAM entry.
    MapOwnMissing = "map-own-missing",
    /// The memory map is not sorted.
    MapUnsorted = "map-unsorted",
    /// The CPUID page claims 65 entries.
    CpuidCount = "cpuid-count",
    /// The number of vCPUs is 0.
    VpCountZero = "vp-count-zero",
    /// The number of vCPUs is absurd.
    VpCountHuge = "vp-count-huge",
    /// The GHCB protocol range starts above version 2.
    GhcbVersion = "ghcb-version",
    /// The multi-VMPL feature is not advertised.
    GhcbFeatures = "ghcb-features",
    /// GHCB registration echoes another frame.
    GhcbRegister = "ghcb-register",
    /// Page state changes are answered with an error.
    GhcbPsc = "ghcb-psc",
    /// MSR requests are answered with an unknown code.
    GhcbUnknown = "ghcb-unknown",
    /// VMPL0 is entered although the guest asked for nothing.
    EarlyReturn = "early-return",
    /// Other memory is put under an accepted page, when the test guest says so.
    Remap = "remap",
    /// An accepted page is removed and added again, when the test guest says so.
    ReAdd = "re-add",
    /// Guest requests are put off, dropped or said to have failed, when the test guest says so; and an
    /// answer is changed. Without `oracle=on` every answer but the first is.
    MessagesTampered = "messages-tampered",
    /// The same, with an earlier answer that comes back.
    MessagesReplayed = "messages-replayed",
    /// The same, with an answer that is lost.
    MessagesLost = "messages-lost",
    /// MapGPA is answered with "again" and makes no progress.
    MapGpaRetry = "map-gpa-retry",
}

/// Everything a run can be told.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Settings {
    /// `backing=4k|2m`.
    pub backing: HostBacking,
    /// `platform=snp|tdx|native`, if the image is for several; native only if it is said.
    pub platform: Option<PlatformKind>,
    /// `vc=direct|strict|all`.
    pub reflection: Reflection,
    /// `referee=0xGPA`: the paravisor's map descriptor.
    pub referee: Option<Gpa>,
    /// `low-end=0xGPA`: where memory below 4 GiB ends for firmware that asks fw_cfg.
    pub low_end: Option<Gpa>,
    /// `td-hob=0xGPA`: the parameter area in which a trust domain's firmware looks for hand-off blocks.
    pub td_hob: Option<Gpa>,
    /// `oracle=on|off`.
    pub oracle: bool,
    /// `icount=on|off`: QEMU counts instructions, so the time stamp counter does.
    pub icount: bool,
    /// `hostile=NAME[,NAME…]`.
    pub hostile: Vec<Hostile>,
    /// `trace=off|on|all`.
    pub trace: Trace,
    /// `break=none|panic|exception`.
    pub breakage: Option<Breakage>,
    /// `table=eager|ahead|touch`: what the oracle tells a test guest to go through, if not that for any
    /// image.
    pub table: Option<Table>,
}

/// A line that was not understood.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SettingsError {
    /// Number of the line, from 1.
    pub line: usize,
    /// The key as given; the whole line if it has no `=`.
    pub key: String,
    /// The value as given.
    pub value: String,
    /// What would have been accepted.
    pub expected: &'static str,
}

impl fmt::Display for SettingsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            line,
            key,
            value,
            expected,
        } = self;
        write!(
            f,
            "settings line {line}: {key}={value}: expected {expected}"
        )
    }
}

/// The tables by their names.
const TABLES: [(&str, Table); 3] = [
    ("eager", Table::EAGER),
    ("ahead", Table::AHEAD),
    ("touch", Table::TOUCH),
];

fn on_off(value: &str) -> Result<bool, &'static str> {
    match value {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("on or off"),
    }
}

impl Settings {
    /// Reads the text.
    pub fn parse(text: &str) -> Result<Self, SettingsError> {
        let mut settings = Self::default();
        let mut seen: Vec<&str> = Vec::new();
        for (index, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let (key, value) = line.split_once('=').unwrap_or((line, ""));
            let result = if seen.contains(&key) {
                Err("each key only once")
            } else {
                settings.set(key, value)
            };
            seen.push(key);
            result.map_err(|expected| SettingsError {
                line: index + 1,
                key: key.to_owned(),
                value: value.to_owned(),
                expected,
            })?;
        }
        Ok(settings)
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), &'static str> {
        match key {
            "backing" => {
                self.backing = match value {
                    "4k" => HostBacking::Size4K,
                    "2m" => HostBacking::Size2M,
                    _ => return Err("4k or 2m"),
                }
            }
            "platform" => {
                self.platform = Some(match value {
                    "snp" => PlatformKind::Snp,
                    "tdx" => PlatformKind::Tdx,
                    "native" => PlatformKind::Native,
                    _ => return Err("snp, tdx or native"),
                });
            }
            "vc" => {
                self.reflection = match value {
                    "direct" => Reflection::Direct,
                    "strict" => Reflection::Strict,
                    "all" => Reflection::All,
                    _ => return Err("direct, strict or all"),
                }
            }
            "referee" => self.referee = Some(parse_gpa(value)?),
            "low-end" => self.low_end = Some(parse_gpa(value)?),
            "td-hob" => self.td_hob = Some(parse_gpa(value)?),
            "oracle" => self.oracle = on_off(value)?,
            "icount" => self.icount = on_off(value)?,
            "trace" => {
                self.trace = match value {
                    "off" => Trace::Off,
                    "on" => Trace::Switches,
                    "all" => Trace::All,
                    _ => return Err("off, on or all"),
                }
            }
            "break" => {
                self.breakage = match value {
                    "none" => None,
                    "panic" => Some(Breakage::Panic),
                    "exception" => Some(Breakage::Exception),
                    _ => return Err("none, panic or exception"),
                }
            }
            "hostile" => self.hostile = parse_hostile(value)?,
            "table" => {
                let mut tables = TABLES.into_iter();
                let found = tables.find(|&(name, _)| name == value);
                self.table = Some(found.ok_or("eager, ahead or touch")?.1);
            }
            _ => {
                return Err(
                    "one of backing, platform, vc, referee, low-end, td-hob, oracle, icount, trace, \
                     hostile, break, table",
                );
            }
        }
        Ok(())
    }

    /// Whether the host misbehaves in this way.
    pub fn is_hostile(&self, behaviour: Hostile) -> bool {
        self.hostile.contains(&behaviour)
    }

    /// The settings as understood, for the first line of the machine's log.
    pub fn echo(&self) -> BTreeMap<String, String> {
        let on_off = |value| if value { "on" } else { "off" }.to_string();
        let hostile: Vec<&str> = self.hostile.iter().map(|h| h.name()).collect();
        let backing = match self.backing {
            HostBacking::Size4K => "4k",
            HostBacking::Size2M => "2m",
        };
        let reflection = match self.reflection {
            Reflection::Direct => "direct",
            Reflection::Strict => "strict",
            Reflection::All => "all",
        };
        let trace = match self.trace {
            Trace::Off => "off",
            Trace::Switches => "on",
            Trace::All => "all",
        };
        let mut echo = BTreeMap::from([
            ("backing".to_string(), backing.to_string()),
            ("vc".to_string(), reflection.to_string()),
            ("oracle".to_string(), on_off(self.oracle)),
            ("icount".to_string(), on_off(self.icount)),
            ("trace".to_string(), trace.to_string()),
            ("hostile".to_string(), hostile.join(",")),
        ]);
        if let Some(platform) = self.platform {
            let name = match platform {
                PlatformKind::Snp => "snp",
                PlatformKind::Tdx => "tdx",
                PlatformKind::Native => "native",
            };
            echo.insert("platform".to_string(), name.to_string());
        }
        if let Some(gpa) = self.referee {
            echo.insert("referee".to_string(), format!("{gpa:#x}"));
        }
        if let Some(gpa) = self.low_end {
            echo.insert("low-end".to_string(), format!("{gpa:#x}"));
        }
        if let Some(gpa) = self.td_hob {
            echo.insert("td-hob".to_string(), format!("{gpa:#x}"));
        }
        if let Some(breakage) = self.breakage {
            let name = match breakage {
                Breakage::Panic => "panic",
                Breakage::Exception => "exception",
            };
            echo.insert("break".to_string(), name.to_string());
        }
        for (name, table) in TABLES {
            if self.table == Some(table) {
                echo.insert("table".to_string(), name.to_string());
            }
        }
        echo
    }
}

fn parse_gpa(value: &str) -> Result<Gpa, &'static str> {
    const EXPECTED: &str = "a page aligned hexadecimal address with 0x";
    let digits = value.strip_prefix("0x").ok_or(EXPECTED)?;
    let gpa = Gpa::new(u64::from_str_radix(digits, 16).map_err(|_| EXPECTED)?);
    if gpa.is_aligned(PageSize::Size4K) {
        Ok(gpa)
    } else {
        Err(EXPECTED)
    }
}

fn parse_hostile(value: &str) -> Result<Vec<Hostile>, &'static str> {
    if matches!(value, "" | "none") {
        return Ok(Vec::new());
    }
    let find = |name: &str| Hostile::ALL.iter().copied().find(|h| h.name() == name);
    value
        .split(',')
        .map(|name| find(name).ok_or("names from docs/machine.md"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_keys_are_read_and_echoed() {
        let text = "backing=2m\nvc=strict\n# why\n\nreferee=0x8123000\noracle=on\n\
                    hostile=map-wrap,early-return\ntrace=on\nbreak=exception\nplatform=tdx\ntd-hob=0x809000\n\
                    table=ahead\n";
        let settings = Settings::parse(text).unwrap();
        assert_eq!(settings.backing, HostBacking::Size2M);
        assert_eq!(settings.reflection, Reflection::Strict);
        assert_eq!(settings.referee, Some(Gpa::new(0x812_3000)));
        assert_eq!(settings.td_hob, Some(Gpa::new(0x80_9000)));
        assert!(settings.oracle);
        assert_eq!(settings.platform, Some(PlatformKind::Tdx));
        assert_eq!(settings.trace, Trace::Switches);
        assert_eq!(settings.table, Some(Table::AHEAD));
        assert_eq!(settings.breakage, Some(Breakage::Exception));
        assert!(settings.is_hostile(Hostile::MapWrap) && settings.is_hostile(Hostile::EarlyReturn));
        let echo: String = settings
            .echo()
            .iter()
            .map(|(k, v)| format!("{k}={v}\n"))
            .collect();
        assert_eq!(Settings::parse(&echo).unwrap(), settings);
    }

    #[test]
    fn a_trace_of_all_holds_a_trace_of_switches() {
        let trace = |text| Settings::parse(text).unwrap().trace;
        assert!(trace("trace=all") > trace("trace=on") && trace("trace=on") > trace(""));
    }

    #[test]
    fn every_reflection_has_a_name() {
        for name in ["direct", "strict", "all"] {
            let settings = Settings::parse(&format!("vc={name}")).unwrap();
            assert_eq!(settings.echo()["vc"], name);
        }
    }

    #[test]
    fn every_hostile_host_has_a_name() {
        for &behaviour in Hostile::ALL {
            let text = format!("hostile={}", behaviour.name());
            assert!(Settings::parse(&text).unwrap().is_hostile(behaviour));
        }
    }

    #[test]
    fn what_is_not_understood_is_named() {
        for (text, line, key, value) in [
            ("backing=1g", 1, "backing", "1g"),
            ("\nvc=maybe", 2, "vc", "maybe"),
            ("colour=red", 1, "colour", "red"),
            ("platform=sgx", 1, "platform", "sgx"),
            ("referee=8123000", 1, "referee", "8123000"),
            ("referee=0x8123004", 1, "referee", "0x8123004"),
            ("hostile=map-wrap,nice", 1, "hostile", "map-wrap,nice"),
            ("oracle", 1, "oracle", ""),
            ("table=all", 1, "table", "all"),
            ("oracle=on\noracle=off", 2, "oracle", "off"),
        ] {
            let error = Settings::parse(text).unwrap_err();
            assert_eq!((error.line, &*error.key, &*error.value), (line, key, value));
            assert!(error.to_string().contains(key));
        }
    }

    #[test]
    fn no_text_means_defaults() {
        assert_eq!(Settings::parse("").unwrap(), Settings::default());
    }
}
