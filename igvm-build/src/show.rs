//! What is in an IGVM file: as a table for people, as JSON for programs.
//!
//! Any file whose headers can be told apart can be shown, for whatever platform, by whatever builder, and
//! also one that no loader would take. What is shown is read from the file, never remembered from building
//! it. One description is made ([`Description`]); table and JSON are two ways to write it.

use igvm_defs::{IGVM_VHS_PAGE_DATA, IgvmPageDataType, IgvmPlatformType};
use protocols::addr::PAGE_SIZE;
use protocols::launch::LaunchParams;
use protocols::vmsa::Vmsa;
use serde::{Serialize, Serializer};
use zerocopy::FromBytes;

use crate::error::Error;
use crate::file::{Content, File, Header, names};
use crate::measure::{quietly, snp, tdx};
use crate::sidecar::hex;

mod params;
mod table;

/// Writes a number as `"0x…"`, which JSON has no other way for.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
pub(crate) fn as_hex<S: Serializer>(value: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&format!("{value:#x}"))
}

/// What is in a file.
#[derive(Debug, Clone, Serialize)]
pub struct Description {
    /// Bytes of the file.
    pub bytes: usize,
    /// Version of the format.
    pub version: u32,
    /// Whether the checksum is right.
    pub checksum_holds: bool,
    /// Variable headers.
    pub headers: usize,
    /// The platforms.
    pub platforms: Vec<Platform>,
    /// All other headers in the order of the file, pages that continue each other as one.
    pub contents: Vec<Item>,
    /// What Turnstile's paravisor is told, for each platform for which the file has such a page.
    pub launch_parameters: Vec<params::Parameters>,
}

/// A platform and its measurement.
#[derive(Debug, Clone, Serialize)]
pub struct Platform {
    /// Its name.
    pub name: String,
    /// Its bit in masks.
    pub mask: u32,
    /// Its highest VTL.
    pub highest_vtl: u8,
    /// First shared address; 0 if there is none.
    #[serde(serialize_with = "as_hex")]
    pub shared_boundary: u64,
    /// Its launch policy.
    pub policy: Option<String>,
    /// Launch digest or MRTD; for platforms that measure nothing, none.
    pub measurement: Option<Measurement>,
}

/// A measurement, or what stands against it.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Measurement {
    /// Launch digest as QEMU and KVM launch the file with one processor.
    LaunchDigest(String),
    /// MRTD.
    Mrtd(String),
    /// Why there is none.
    None(String),
}

/// One header, or a run of pages.
#[derive(Debug, Clone, Serialize)]
pub struct Item {
    /// Offset in the file of the (first) header.
    pub offset: usize,
    /// The platforms it is for; none if it is for all.
    pub mask: Option<u32>,
    /// What it is.
    #[serde(flatten)]
    pub what: What,
}

/// What a header is.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
#[expect(missing_docs, reason = "the names of the format")]
pub enum What {
    Pages {
        #[serde(serialize_with = "as_hex")]
        start: u64,
        #[serde(serialize_with = "as_hex")]
        end: u64,
        pages: u64,
        kind: String,
        /// Stored without data.
        zero: bool,
    },
    Policy {
        #[serde(serialize_with = "as_hex")]
        policy: u64,
    },
    ParameterArea {
        index: u32,
        bytes: u64,
    },
    Parameter {
        name: String,
        area: u32,
        offset: u32,
    },
    Insert {
        #[serde(serialize_with = "as_hex")]
        gpa: u64,
        area: u32,
    },
    RequiredMemory {
        #[serde(serialize_with = "as_hex")]
        start: u64,
        #[serde(serialize_with = "as_hex")]
        end: u64,
    },
    Processor {
        index: u16,
        #[serde(serialize_with = "as_hex")]
        gpa: u64,
        state: Option<Box<State>>,
    },
    IdBlock(Box<IdBlock>),
    Range {
        name: String,
        #[serde(serialize_with = "as_hex")]
        start: u64,
        #[serde(serialize_with = "as_hex")]
        end: u64,
    },
    Other {
        name: String,
        bytes: usize,
    },
}

/// The registers of a VMSA that say most.
#[derive(Debug, Clone, Serialize)]
#[expect(missing_docs, reason = "the names of the architecture")]
pub struct State {
    pub vmpl: u8,
    #[serde(serialize_with = "as_hex")]
    pub rip: u64,
    #[serde(serialize_with = "as_hex")]
    pub rdi: u64,
    #[serde(serialize_with = "as_hex")]
    pub rsp: u64,
    #[serde(serialize_with = "as_hex")]
    pub rflags: u64,
    #[serde(serialize_with = "as_hex")]
    pub cr0: u64,
    #[serde(serialize_with = "as_hex")]
    pub cr3: u64,
    #[serde(serialize_with = "as_hex")]
    pub cr4: u64,
    #[serde(serialize_with = "as_hex")]
    pub efer: u64,
    #[serde(serialize_with = "as_hex")]
    pub sev_features: u64,
}

/// An ID block.
#[derive(Debug, Clone, Serialize)]
#[expect(missing_docs, reason = "the names of the SNP ABI")]
pub struct IdBlock {
    pub launch_digest: String,
    pub family_id: String,
    pub image_id: String,
    pub version: u32,
    pub guest_svn: u32,
    pub author_key: bool,
}

/// Describes the IGVM file in `bytes` as a table.
///
/// # Errors
///
/// When the headers of the file cannot be told apart.
pub fn show(bytes: &[u8]) -> Result<String, Error> {
    Ok(Description::of(&File::read(bytes)?).to_string())
}

impl Description {
    /// Describes a file.
    #[must_use]
    pub fn of(file: &File<'_>) -> Self {
        let mut contents: Vec<Item> = Vec::new();
        for header in &file.headers {
            let Some(item) = Item::of(file, header) else {
                continue;
            };
            if contents.last_mut().is_none_or(|last| !last.absorb(&item)) {
                contents.push(item);
            }
        }
        let platforms: Vec<Platform> = file
            .platforms()
            .map(|(_, header)| Platform {
                name: names::platform(header.platform_type),
                mask: header.compatibility_mask,
                highest_vtl: header.highest_vtl,
                shared_boundary: header.shared_gpa_boundary,
                policy: file
                    .policy(header.compatibility_mask)
                    .map(|policy| format!("{policy:#x}")),
                measurement: Measurement::of(file, header.platform_type),
            })
            .collect();
        let launch_parameters = file
            .platforms()
            .filter_map(|(_, header)| params::Parameters::find(file, header))
            .collect();
        Self {
            bytes: file.bytes().len(),
            version: file.fixed.version,
            checksum_holds: file.fixed.checksum == file.fixed.computed_checksum,
            headers: file.headers.len(),
            platforms,
            contents,
            launch_parameters,
        }
    }
}

impl Measurement {
    fn of(file: &File<'_>, platform: IgvmPlatformType) -> Option<Self> {
        match platform {
            IgvmPlatformType::SEV_SNP => {
                let loader = snp::Loader::Qemu(snp::Processors::default());
                Some(match snp::launch_digest(file, loader, &mut quietly) {
                    Ok(digest) => Self::LaunchDigest(hex(&digest)),
                    Err(error) => Self::None(error.to_string()),
                })
            }
            IgvmPlatformType::TDX => Some(match tdx::mrtd(file, &mut quietly) {
                Ok(mrtd) => Self::Mrtd(hex(&mrtd)),
                Err(error) => Self::None(error.to_string()),
            }),
            _ => None,
        }
    }
}

impl Item {
    /// The item of a header; platforms have their own place.
    fn of(file: &File<'_>, header: &Header<'_>) -> Option<Self> {
        let what = match &header.content {
            Content::Platform(_) => return None,
            Content::Page(page) => What::Pages {
                start: page.gpa,
                end: page.gpa.saturating_add(PAGE_SIZE),
                pages: 1,
                kind: page_kind(page),
                zero: page.file_offset == 0,
            },
            Content::Policy(policy) => What::Policy {
                policy: policy.policy,
            },
            Content::Area(area) => What::ParameterArea {
                index: area.parameter_area_index,
                bytes: area.number_of_bytes,
            },
            Content::Parameter(parameter) => What::Parameter {
                name: names::header(header.kind),
                area: parameter.parameter_area_index,
                offset: parameter.byte_offset,
            },
            Content::Insert(insert) => What::Insert {
                gpa: insert.gpa,
                area: insert.parameter_area_index,
            },
            Content::RequiredMemory(memory) => What::RequiredMemory {
                start: memory.gpa,
                end: memory.gpa.saturating_add(memory.number_of_bytes.into()),
            },
            Content::Context(context) => What::Processor {
                index: context.vp_index,
                gpa: context.gpa.get(),
                state: vmsa(file, header).map(|vmsa| Box::new(State::of(&vmsa))),
            },
            Content::IdBlock(block) => What::IdBlock(Box::new(IdBlock {
                launch_digest: hex(&block.ld),
                family_id: hex(&block.family_id),
                image_id: hex(&block.image_id),
                version: block.version,
                guest_svn: block.guest_svn,
                author_key: block.author_key_enabled != 0,
            })),
            Content::Relocation(region) => What::Range {
                name: names::header(header.kind),
                start: region.relocation_region_gpa,
                end: region
                    .relocation_region_gpa
                    .saturating_add(region.relocation_region_size),
            },
            Content::TableRelocation(region) => What::Range {
                name: names::header(header.kind),
                start: region.gpa,
                end: region.gpa.saturating_add(region.size),
            },
            Content::ErrorRange(range) => What::Range {
                name: names::header(header.kind),
                start: range.gpa,
                end: range.gpa.saturating_add(range.size_bytes.into()),
            },
            Content::Manifest(_) | Content::Other => What::Other {
                name: names::header(header.kind),
                bytes: header.body.len(),
            },
        };
        Some(Self {
            offset: header.offset,
            mask: header.content.mask(),
            what,
        })
    }

    /// Takes in `next` if both are pages and it continues this run.
    fn absorb(&mut self, next: &Self) -> bool {
        let (
            What::Pages {
                end,
                pages,
                kind,
                zero,
                ..
            },
            What::Pages {
                start: next_start,
                end: next_end,
                kind: next_kind,
                zero: next_zero,
                ..
            },
        ) = (&mut self.what, &next.what)
        else {
            return false;
        };
        let continues =
            self.mask == next.mask && end == next_start && kind == next_kind && zero == next_zero;
        if continues {
            *end = *next_end;
            *pages += 1;
        }
        continues
    }
}

impl State {
    fn of(vmsa: &Vmsa) -> Self {
        Self {
            vmpl: vmsa.vmpl,
            rip: vmsa.rip,
            rdi: vmsa.rdi,
            rsp: vmsa.rsp,
            rflags: vmsa.rflags,
            cr0: vmsa.cr0,
            cr3: vmsa.cr3,
            cr4: vmsa.cr4,
            efer: vmsa.efer.bits(),
            sev_features: vmsa.sev_features.bits(),
        }
    }
}

/// The VMSA of a context, if it is one for an encrypted guest.
pub(crate) fn vmsa(file: &File<'_>, header: &Header<'_>) -> Option<Vmsa> {
    let Content::Context(context) = &header.content else {
        return None;
    };
    let encrypted = [IgvmPlatformType::SEV_SNP, names::SEV_ES];
    file.platforms().find(|(_, platform)| {
        platform.compatibility_mask & context.compatibility_mask != 0
            && encrypted.contains(&platform.platform_type)
    })?;
    let page = file.data(header, context.file_offset, PAGE_SIZE).ok()?;
    Vmsa::read_from_bytes(page).ok()
}

/// What a page is, in one or two words.
pub(crate) fn page_kind(page: &IGVM_VHS_PAGE_DATA) -> String {
    let kind = match page.data_type {
        IgvmPageDataType::NORMAL if page.flags.shared() => "shared".to_owned(),
        IgvmPageDataType::NORMAL if page.flags.unmeasured() => "unmeasured".to_owned(),
        IgvmPageDataType::NORMAL => "measured".to_owned(),
        other => names::page(other),
    };
    if page.flags.is_2mb_page() {
        return kind + ", 2 MiB";
    }
    kind
}
