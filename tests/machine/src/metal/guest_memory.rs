//! Guest memory for what the machine does in the guest's place: walks, fetches, stack frames.
//!
//! Reads go wherever there is memory (a walk or a fetch that has got this far was allowed by
//! the nested tables, or is about to be refused by them). Writes are checked like the guest's
//! own: the level needs a private, validated, writable page.

use machine::Platform;
use machine::guest::GuestMemory;
use machine::guest::walk::{Access, pages};
use machine::memory::PhysicalMemory;
use machine::settings::PlatformKind;
use machine::types::{Alias, Gpa, Vmpl};

use super::memory::DirectMap;
use super::shared::Machine;
use super::vcpu::Vcpu;

/// What one level can reach.
pub struct View<'a> {
    platform: &'a Platform<DirectMap>,
    vmpl: Vmpl,
}

impl<'a> View<'a> {
    /// The memory of `vmpl`.
    pub fn new(platform: &'a Platform<DirectMap>, vmpl: Vmpl) -> Self {
        View { platform, vmpl }
    }
}

impl GuestMemory for View<'_> {
    fn read(&self, gpa: Gpa, out: &mut [u8]) -> bool {
        let Some(spa) = self.platform.spa_of(gpa) else {
            return false;
        };
        DirectMap.read(spa, out);
        true
    }

    fn write(&mut self, gpa: Gpa, data: &[u8]) -> bool {
        if self.platform.kind() == PlatformKind::Native {
            // All memory is the guest's, and has one alias.
            let at = self.platform.spa_of(gpa);
            if let Some(spa) = at {
                DirectMap.write(spa, data);
            }
            return at.is_some();
        }
        let Some(mapping) = self.platform.peek(self.vmpl, Alias::Private, gpa) else {
            return false;
        };
        if !mapping.write {
            return false;
        }
        DirectMap.write(mapping.spa.plus(gpa.offset_in_page()), data);
        true
    }
}

/// Reads the bytes at RIP, fewer if they run into an unmapped page.
pub fn fetch<const N: usize>(machine: &Machine, vcpu: &Vcpu) -> ([u8; N], usize) {
    let view = View::new(&machine.platform, vcpu.vmpl);
    let paging = vcpu.paging();
    let base = if vcpu.is_64_bit() {
        0
    } else {
        vcpu.save().segments[super::svm::seg::CS].base
    };
    let access = Access {
        execute: true,
        user: vcpu.cpl() == 3,
        write: false,
    };
    let mut bytes = [0; N];
    for (at, part) in pages(base.wrapping_add(vcpu.rip()), N) {
        let start = part.start;
        let there = paging
            .translate(&view, at, access)
            .is_ok_and(|to| view.read(to.gpa, &mut bytes[part]));
        if !there {
            return (bytes, start);
        }
    }
    (bytes, N)
}
