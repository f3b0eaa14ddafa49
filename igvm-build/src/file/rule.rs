//! What an IGVM file has to keep to, rule by rule.
//!
//! A rule has a name that does not change, a weight, and the reason it exists: what would happen to a
//! file that breaks it. [`Problem`] is one breach, with the offset of the header it is in.

use std::fmt;

use serde::Serialize;

/// What follows from a breach.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Weight {
    /// The file is not loaded, or its guest does not start.
    Error,
    /// The file is loaded, but not as it says.
    Warning,
}

macro_rules! rules {
    ($( $variant:ident = $name:literal, $weight:ident, $reason:literal; )+) => {
        /// A rule; the reason is its documentation ([`Rule::reason`]).
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Rule {
            $( #[doc = $reason] $variant, )+
        }

        impl Rule {
            /// All rules: those of the format, then those of QEMU and KVM.
            pub const ALL: &'static [Self] = &[ $( Self::$variant, )+ ];

            /// Its name.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $( Self::$variant => $name, )+ }
            }

            /// What follows from a breach.
            #[must_use]
            pub const fn weight(self) -> Weight {
                match self { $( Self::$variant => Weight::$weight, )+ }
            }

            /// Why the rule is there.
            #[must_use]
            pub const fn reason(self) -> &'static str {
                match self { $( Self::$variant => $reason, )+ }
            }
        }
    };
}

rules! {
    // The format: what no reader can do without. `File::read` ends at these.
    TooShort = "too-short", Error, "an IGVM file begins with 24 bytes of header, 32 in version 2";
    Magic = "magic", Error, "an IGVM file begins with the bytes IGVM";
    Version = "version", Error, "versions 1 and 2 are defined";
    HeaderSection = "header-section", Error,
        "the variable headers begin behind the fixed header, at a multiple of 8, and end inside the file";
    HeaderCut = "header-cut", Error, "a variable header with its padding ends inside its section";
    BodyLength = "body-length", Error, "each type of header has one length";

    // The format: what a reader can live with, but a loader need not.
    FileLength = "file-length", Error, "the header says how long the file is, and loaders compare";
    Checksum = "checksum", Error, "the checksum covers all headers, and loaders compare";
    Architecture = "architecture", Error, "this tool and its loaders are for x86-64 (0)";
    PageSizeField = "page-size-field", Error, "the public parser takes 4096 alone";
    NoData = "no-data", Error, "the public parser wants data behind the headers";
    Padding = "padding", Error, "what fills a header up to a multiple of 8 is zero";
    Order = "order", Error, "platforms come first, then initialization headers, then directives";
    UnknownType = "unknown-type", Error,
        "a loader refuses types it does not know, unless bit 31 says that they may be skipped";
    Reserved = "reserved", Error, "reserved fields are zero";
    NoPlatform = "no-platform", Error, "without a platform there is nothing to load";
    PlatformMask = "platform-mask", Error, "each platform has one bit of the masks for itself";
    PlatformTwice = "platform-twice", Error, "a loader chooses by type, so each type comes once";
    PlatformType = "platform-type", Error, "loaders refuse platforms without a definition";
    PlatformVersion = "platform-version", Error, "all platforms are defined in version 1";
    HighestVtl = "highest-vtl", Error, "the public parser takes 0 and 2 as the highest VTL";
    Boundary = "boundary", Error,
        "native and VSM have no boundary of shared memory, and the public parser wants none";
    StrayMask = "stray-mask", Error, "a mask names platforms that the file has";
    PolicyTwice = "policy-twice", Error, "a guest has one launch policy";
    PageAlignment = "page-alignment", Error, "addresses are multiples of 4 KiB";
    PageSize = "page-size", Error, "public loaders read 4 KiB for a page that is flagged as 2 MiB";
    PageType = "page-type", Error, "pages are normal, secrets or CPUID pages";
    Wrap = "wrap", Error, "a range ends below 2^64";
    Overlap = "overlap", Error, "a page is launched once";
    DataRange = "data-range", Error, "data lies behind the headers and ends inside the file";
    AreaSize = "area-size", Error, "a parameter area is 1 to 16384 whole pages";
    AreaTwice = "area-twice", Error, "a parameter area is declared once";
    AreaUnknown = "area-unknown", Error, "a parameter area is declared before it is used";
    AreaGone = "area-gone", Error, "a parameter area is not used after it was inserted";
    AreaOverrun = "area-overrun", Error, "a parameter lies inside its area";
    ContextTwice = "context-twice", Error, "a processor has one context";
    ContextMask = "context-mask", Error,
        "a context is for one platform of the file, as what it holds depends on the platform";
    NativeContext = "native-context", Error, "behind the registers of a native context there is nothing";
    NativeAttributes = "native-attributes", Error,
        "bits 11:8 of segment attributes are zero; in a descriptor the limit has bits in this place";
    ContextForTdx = "context-for-tdx", Error,
        "a processor of a trust domain starts at the reset vector, with no state of the file's";

    // The launch on SEV-SNP.
    SnpPolicy = "snp-policy", Error,
        "the security processor wants bit 17 of the policy set and bits 63:26 clear";
    SecretsOutsideSnp = "secrets-outside-snp", Error,
        "only the security processor of SEV-SNP fills secrets and CPUID pages";
    IdBlockTwice = "id-block-twice", Error, "a guest has one ID block";
    IdBlockDigest = "id-block-digest", Error,
        "the security processor refuses a launch whose digest is not the ID block's (BAD_MEASUREMENT)";
    IdBlockSignature = "id-block-signature", Error,
        "the security processor refuses an ID block whose signatures do not hold (BAD_SIGNATURE)";
    AuthorKeyFlag = "author-key-flag", Warning,
        "the author key is on (1) or off (0); what else means on, readers do not agree about";

    // QEMU and KVM.
    QemuPlatform = "qemu-platform", Error,
        "QEMU loads SEV-SNP, SEV-ES, SEV and native; TDX and VSM headers are never chosen";
    QemuType = "qemu-type", Error,
        "QEMU refuses types it does not know, for whatever platform, even those marked as optional";
    QemuVmsaAddress = "qemu-vmsa-address", Error, "KVM launches every VMSA at 0xfffffffff000";
    QemuVmsaField = "qemu-vmsa-field", Error,
        "QEMU hands KVM registers, not the page, and refuses a VMSA that sets anything else";
    QemuSevFeatures = "qemu-sev-features", Error,
        "SEV_FEATURES has SNP_ACTIVE, and besides only what upstream KVM takes: DebugSwap and SecureTSC";
    QemuProcessor = "qemu-processor", Error,
        "QEMU knows no processor beyond those it was started with, and natively takes the first's alone";
    QemuNoContext = "qemu-no-context", Warning,
        "without a context the first processor starts in the reset state";
    QemuInsertOrder = "qemu-insert-order", Warning,
        "QEMU inserts parameters at once but collects pages: an insert behind pages is measured before them";
    KvmVmsaOrder = "kvm-vmsa-order", Warning,
        "KVM measures VMSAs when the launch is finished, behind all pages; other tools go by the file";
    QemuShared = "qemu-shared", Warning, "QEMU launches a page flagged as shared as a private one";
    QemuAreaData = "qemu-area-data", Warning, "QEMU ignores what a parameter area should hold at first";
    QemuOffset = "qemu-offset", Warning,
        "QEMU writes memory map and MADT to the start of their area, whatever the offset says";
    QemuGsBase = "qemu-gs-base", Warning,
        "QEMU ignores gs_base of a native context: GS has the base of the other data segments";
    QemuAuthorKey = "qemu-author-key", Warning,
        "QEMU turns the author key on if the first byte of the key is not zero, whatever the flag says";
    QemuIdVersion = "qemu-id-version", Error,
        "QEMU writes 1 as the version of an ID block, so a signature over another one fails";
    QemuBoundary = "qemu-boundary", Warning, "QEMU ignores the boundary of shared memory: there is no vTOM";
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Serialize for Rule {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

/// One breach of a rule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("at offset {offset:#x}: {rule}: {found}; {}", .rule.reason())]
pub struct Problem {
    /// Where in the file, in bytes: the header that breaks the rule.
    pub offset: usize,
    /// The rule.
    pub rule: Rule,
    /// What was found.
    pub found: String,
}

impl Problem {
    /// A breach of `rule` by what is at `offset`.
    pub fn new(offset: usize, rule: Rule, found: impl Into<String>) -> Self {
        Self {
            offset,
            rule,
            found: found.into(),
        }
    }
}

impl Serialize for Problem {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Fields<'a> {
            offset: usize,
            rule: Rule,
            weight: Weight,
            found: &'a str,
            reason: &'a str,
        }
        let fields = Fields {
            offset: self.offset,
            rule: self.rule,
            weight: self.rule.weight(),
            found: &self.found,
            reason: self.rule.reason(),
        };
        fields.serialize(serializer)
    }
}
