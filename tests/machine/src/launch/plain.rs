//! Plain mode: loading an image's native platform, as QEMU's loader does where nothing is
//! confidential.
//!
//! Pages are copied and that is all: nothing is assigned, validated or measured, and the RMP is not
//! asked again in the whole run.

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;
use core::mem::size_of;

use igvm_defs::IgvmNativeVpContextX64;
use zerocopy::FromBytes;

use super::file::{Directive, File, PageKind};
use super::{Environment, LaunchError, fill, whole_page};
use crate::memory::PhysicalMemory;
use crate::platform::Platform;
use crate::settings::PlatformKind;
use crate::tdx::Personality;
use crate::types::{Gpa, PAGE_SIZE};

impl<P: PhysicalMemory> Platform<P> {
    /// Loads the native platform of the IGVM file `bytes`, and returns the state that the first vCPU
    /// starts from.
    pub fn load_plain(
        &mut self,
        bytes: &[u8],
        environment: &mut Environment<'_>,
    ) -> Result<IgvmNativeVpContextX64, LaunchError> {
        let file = File::parse(bytes, Some(PlatformKind::Native))?;
        let (contexts, directives): (Vec<_>, Vec<_>) = file
            .directives
            .iter()
            .partition(|directive| matches!(directive, Directive::Context { .. }));
        let start = match contexts[..] {
            [
                Directive::Context {
                    vp_index: 0, vmsa, ..
                },
            ] => context(vmsa)?,
            [Directive::Context { vp_index, .. }] => return Err(LaunchError::VpIndex(vp_index)),
            _ => return Err(LaunchError::Contexts(contexts.len())),
        };
        self.find_memory(&directives, environment)?;
        let own = self.own_range(&super::launched_ranges(&directives));
        let mut areas: BTreeMap<u32, Vec<u8>> = BTreeMap::new();
        let mut loaded = 0;
        for directive in directives {
            match directive {
                Directive::Area { index, bytes } => {
                    areas.insert(index, vec![0; bytes as usize]);
                }
                Directive::Fill {
                    index,
                    offset,
                    parameter,
                } => {
                    let room = areas.get(&index).map_or(0, Vec::len);
                    let value = self.parameter(parameter, &own, room);
                    fill(&mut areas, index, offset as usize, &value)?;
                }
                Directive::Insert { gpa, index } => {
                    let area = areas.remove(&index).unwrap_or_default();
                    for (page, data) in (0..).zip(area.chunks_exact(PAGE_SIZE as usize)) {
                        self.load_page(Gpa::new(gpa.get() + page * PAGE_SIZE), Some(data))?;
                        loaded += 1;
                    }
                }
                Directive::RequiredMemory { gpa, bytes } => {
                    let missing = (gpa.get()..gpa.get() + bytes)
                        .step_by(PAGE_SIZE as usize)
                        .map(Gpa::new)
                        .find(|&gpa| self.layout().place(gpa).is_none());
                    if let Some(gpa) = missing {
                        return Err(LaunchError::NoMemory(gpa));
                    }
                }
                Directive::Page { gpa, kind } => {
                    let (PageKind::Normal(data) | PageKind::Unmeasured(data)) = kind else {
                        return Err(LaunchError::NotPlain(gpa));
                    };
                    self.load_page(gpa, data)?;
                    loaded += 1;
                }
                Directive::Context { .. } => {}
            }
        }
        self.personality = Personality::Plain;
        self.log(format!(
            "plain mode: {loaded} pages of the native platform loaded, no SEV-SNP"
        ));
        Ok(start)
    }

    fn load_page(&mut self, gpa: Gpa, data: Option<&[u8]>) -> Result<(), LaunchError> {
        let place = self.layout().place(gpa).ok_or(LaunchError::NoMemory(gpa))?;
        self.memory.write(place.spa, &whole_page(data)[..]);
        Ok(())
    }
}

/// Reads a context: the structure, and zeros to the end of the page.
fn context(page: &[u8]) -> Result<IgvmNativeVpContextX64, LaunchError> {
    let (context, rest) =
        IgvmNativeVpContextX64::read_from_prefix(page).map_err(|_| LaunchError::Context)?;
    const { assert!(size_of::<IgvmNativeVpContextX64>() <= PAGE_SIZE as usize) };
    // Bits 11:8 of attributes must be zero (IGVM, native VP context).
    let attributes = context.code_attributes | context.data_attributes;
    if attributes & 0xF00 != 0 || rest.iter().any(|&byte| byte != 0) {
        return Err(LaunchError::Context);
    }
    Ok(context)
}
