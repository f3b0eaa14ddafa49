//! The referee: compares the paravisor's map with the RMP, page by page.
//!
//! It reads the map through physical memory, by the published layout ([`protocols::map`]),
//! and knows nothing of how the paravisor keeps it (docs/decisions/004). What must hold, by
//! the state the map gives a page:
//!
//! | map | RMP |
//! |---|---|
//! | Unaccepted | not validated |
//! | Ahead | validated; VMPL1–3 may do nothing; no VMSA |
//! | Accepted | validated; the guest's VMPL has full permissions, the levels between none more than it; no VMSA |
//! | Owned | validated; a VMSA of the vCPU table has the VMSA bit, and the guest's VMPL may at most read it; a calling area has full permissions for the guest's VMPL; all others have no lower permissions |
//! | Accepted | (or) not validated, if the guest gave the page away by its own access with C=0 |
//! | (not in the map) | not validated, unless the machine launched it there |

use alloc::collections::BTreeSet;
use alloc::format;
use alloc::string::{String, ToString};

use protocols::map::{BYTES_PER_REGION, MapDescriptor, PAGES_PER_REGION, PageState, VcpuEntry};
use protocols::report::{Disagreement, Referee};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::memory::PhysicalMemory;
use crate::platform::Platform;
use crate::rmp::{Entry, Permissions};
use crate::types::{Alias, Gpa, PAGE_SIZE, PageSize, Vmpl};

/// How many disagreements are told one by one.
const TOLD: usize = 16;

/// Roles of Owned pages, from the descriptor's vCPU table.
#[derive(Default)]
struct Roles {
    vmsas: BTreeSet<u64>,
    calling_areas: BTreeSet<u64>,
}

/// What one map range looks like to the referee.
struct Reader<'a, P> {
    platform: &'a Platform<P>,
    descriptor: MapDescriptor,
    guest: Vmpl,
    roles: Roles,
    verdict: Referee,
}

impl<P: PhysicalMemory> Platform<P> {
    /// The referee's verdict; `None` if there is nothing to judge: the settings name no map, or
    /// the paravisor ended before it had published one and entered a lower VMPL.
    pub fn judge(&self) -> Option<Referee> {
        let at = self.settings.referee?;
        let mut magic = [0xFF; size_of_val(&MapDescriptor::MAGIC)];
        if !self.is_firmware_entered()
            && self.read_guest(at, &mut magic).is_some()
            && magic.iter().all(|&byte| byte == 0)
        {
            return None;
        }
        Some(match self.read_map(at) {
            Ok(reader) => reader.compare(),
            Err(why) => Referee {
                disagreements: 1,
                first: alloc::vec![Disagreement {
                    gpa: at.get(),
                    map: why,
                    rmp: String::new()
                }],
                ..Referee::default()
            },
        })
    }

    fn read_map(&self, at: Gpa) -> Result<Reader<'_, P>, String> {
        let mut descriptor = MapDescriptor::new_zeroed();
        self.read_guest(at, descriptor.as_mut_bytes())
            .ok_or_else(|| format!("descriptor at {at} is outside memory"))?;
        if !descriptor.is_understood() {
            return Err("the map descriptor is not finished, or of another version".to_string());
        }
        let guest = Vmpl::try_new(u64::from(descriptor.guest_vmpl))
            .filter(|&vmpl| vmpl != Vmpl::VMPL0)
            .ok_or_else(|| format!("guest VMPL is {}", descriptor.guest_vmpl))?;
        let roles = self.read_roles(&descriptor)?;
        Ok(Reader {
            platform: self,
            descriptor,
            guest,
            roles,
            verdict: Referee::default(),
        })
    }

    fn read_roles(&self, descriptor: &MapDescriptor) -> Result<Roles, String> {
        let mut roles = Roles::default();
        for index in 0..u64::from(descriptor.vcpu_count) {
            let offset = index * size_of::<VcpuEntry>() as u64;
            let at = Gpa::new(descriptor.vcpu_table_gpa.saturating_add(offset));
            let mut bytes = [0; size_of::<VcpuEntry>()];
            self.read_guest(at, &mut bytes)
                .ok_or_else(|| format!("vCPU table entry at {at} is outside memory"))?;
            let Ok(entry) = VcpuEntry::read_from_bytes(&bytes) else {
                continue;
            };
            if entry.vmsa_gpa != 0 {
                roles.vmsas.insert(entry.vmsa_gpa);
            }
            if entry.ca_gpa != 0 {
                roles.calling_areas.insert(entry.ca_gpa & !(PAGE_SIZE - 1));
            }
        }
        Ok(roles)
    }

    /// The calling area of the VMSA that a vCPU runs at the guest's VMPL, as the paravisor's own
    /// table has it; for the MSR SVSM_CAA in direct reflection.
    pub fn calling_area(&self, vcpu: crate::types::VcpuId) -> Option<Gpa> {
        let mut descriptor = MapDescriptor::new_zeroed();
        self.read_guest(self.settings.referee?, descriptor.as_mut_bytes())?;
        if !descriptor.is_understood() {
            return None;
        }
        let guest = Vmpl::try_new(descriptor.guest_vmpl.into())?;
        let vmsa = self.context(vcpu, guest)?.vmsa?;
        let entry_at = |index: u32| {
            let offset = u64::from(index) * size_of::<VcpuEntry>() as u64;
            let at = Gpa::new(descriptor.vcpu_table_gpa).checked_add(offset)?;
            let mut entry = VcpuEntry::default();
            self.read_guest(at, entry.as_mut_bytes())?;
            Some(entry)
        };
        (0..descriptor.vcpu_count)
            .map_while(entry_at)
            .find(|entry| entry.vmsa_gpa == vmsa.get() && entry.ca_gpa != 0)
            .map(|entry| Gpa::new(entry.ca_gpa))
    }

    /// Copies guest memory that may cross pages; `None` if part of it does not exist.
    pub(crate) fn read_guest(&self, gpa: Gpa, out: &mut [u8]) -> Option<()> {
        let mut at = gpa;
        let mut rest = out;
        while !rest.is_empty() {
            let room = (PAGE_SIZE - at.offset_in_page()) as usize;
            let (chunk, later) = rest.split_at_mut(room.min(rest.len()));
            self.memory.read(self.spa_of(at)?, chunk);
            at = at.checked_add(chunk.len() as u64)?;
            rest = later;
        }
        Some(())
    }
}

impl<P: PhysicalMemory> Reader<'_, P> {
    fn compare(mut self) -> Referee {
        for range in self.descriptor.clone().ranges() {
            for region in 0..range.pages / PAGES_PER_REGION {
                let gpa = Gpa::new(range.gpa + region * PageSize::Size2M.bytes());
                let states = Gpa::new(range.states_gpa + region * BYTES_PER_REGION);
                self.compare_region(gpa, states);
            }
        }
        self.find_strays();
        self.verdict
    }

    fn compare_region(&mut self, gpa: Gpa, states: Gpa) {
        let mut bytes = [0; BYTES_PER_REGION as usize];
        if self.platform.read_guest(states, &mut bytes).is_none() {
            self.disagree(
                gpa,
                format!("states at {states} are outside memory"),
                String::new(),
            );
            return;
        }
        for page in 0..PAGES_PER_REGION {
            let at = Gpa::new(gpa.get() + page * PAGE_SIZE);
            let state =
                PageState::from_low_bits(u64::from(bytes[(page / 4) as usize]) >> (2 * (page % 4)));
            self.compare_page(at, state);
        }
    }

    fn compare_page(&mut self, gpa: Gpa, state: PageState) {
        let host = &self.platform.host;
        let Some(place) = host.layout().place(gpa) else {
            // Ranges are rounded outwards to 2 MiB: what does not exist is nobody's.
            if matches!(state, PageState::Ahead | PageState::Accepted) {
                self.disagree(gpa, format!("{state:?}"), "no such page".to_string());
            }
            return;
        };
        self.verdict.checked += 1;
        let entry = host.rmp().entry(&place);
        let valid =
            entry.is_assigned() && entry.is_validated() && host.attribute(&place) == Alias::Private;
        if self.agrees(gpa, state, &entry, valid) {
            return;
        }
        if state == PageState::Accepted && !valid && host.is_given_away(&place) {
            self.verdict.given_away += 1;
            return;
        }
        let rmp = describe(&entry, valid);
        self.disagree(gpa, format!("{state:?}"), rmp);
    }

    fn agrees(&self, gpa: Gpa, state: PageState, entry: &Entry, valid: bool) -> bool {
        let guest = entry.permissions(self.guest);
        let only_guest = Vmpl::ALL
            .iter()
            .skip(1)
            .all(|&vmpl| vmpl == self.guest || entry.permissions(vmpl).is_none());
        match state {
            PageState::Unaccepted => !valid,
            PageState::Ahead => valid && !entry.has_lower_permissions() && !entry.is_vmsa(),
            PageState::Accepted => {
                valid && guest == Permissions::FULL && only_guest && !entry.is_vmsa()
            }
            PageState::Owned if self.roles.vmsas.contains(&gpa.get()) => {
                // Whoever created a processor may look at its VMSA, but no more than look.
                let harmless = Permissions::READ.contains(guest) && only_guest;
                valid && entry.is_vmsa() && harmless
            }
            PageState::Owned if self.roles.calling_areas.contains(&gpa.get()) => {
                valid && guest == Permissions::FULL && only_guest && !entry.is_vmsa()
            }
            PageState::Owned => valid && !entry.has_lower_permissions(),
        }
    }

    /// Validated pages that the map knows nothing of. VMSAs that the launch put where the map
    /// does not reach are the AMD-SP's doing.
    fn find_strays(&mut self) {
        let covered = |gpa: Gpa| {
            self.descriptor.ranges().iter().any(|range| {
                gpa.get() >= range.gpa && gpa.get() - range.gpa < range.pages * PAGE_SIZE
            })
        };
        let host = &self.platform.host;
        let mut strays = alloc::vec::Vec::new();
        for range in host.layout().ranges() {
            for page in 0..range.pages as u64 {
                let gpa = Gpa::new(range.gpa.get() + page * PAGE_SIZE);
                if covered(gpa) {
                    continue;
                }
                let Some(place) = host.layout().place(gpa) else {
                    continue;
                };
                let entry = host.rmp().entry(&place);
                if entry.is_validated() && !entry.is_vmsa() {
                    strays.push((gpa, describe(&entry, true)));
                }
            }
        }
        for (gpa, rmp) in strays {
            self.disagree(gpa, "not in the map".to_string(), rmp);
        }
    }

    fn disagree(&mut self, gpa: Gpa, map: String, rmp: String) {
        self.verdict.disagreements += 1;
        if self.verdict.first.len() < TOLD {
            self.verdict.first.push(Disagreement {
                gpa: gpa.get(),
                map,
                rmp,
            });
        }
    }
}

/// An RMP entry in words.
fn describe(entry: &Entry, valid: bool) -> String {
    let [p0, p1, p2, p3] = Vmpl::ALL.map(|vmpl| entry.permissions(vmpl).mask());
    format!(
        "{}{}{} permissions {p0:x}/{p1:x}/{p2:x}/{p3:x}",
        if valid { "validated" } else { "not validated" },
        if entry.is_vmsa() { ", VMSA" } else { "" },
        if entry.size() == PageSize::Size2M {
            ", 2M"
        } else {
            ""
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{BLOCK, CPU0, Sparse, platform};
    use crate::types::Kind;
    use protocols::map::MapRange;

    /// Where the tests keep descriptor, states and vCPU table: launched pages of "the
    /// paravisor".
    const DESCRIPTOR: Gpa = Gpa::new(0x20_0000);
    const STATES: Gpa = Gpa::new(0x20_1000);
    const VCPUS: Gpa = Gpa::new(0x20_2000);
    const VMSA: u64 = 1;
    const CALLING_AREA: u64 = 2;

    /// A map that covers the paravisor's block and [`BLOCK`], all states as given.
    fn mapped() -> Platform<Sparse> {
        let mut platform = platform("referee=0x200000");
        let mut descriptor = MapDescriptor::new();
        for (gpa, states) in [(DESCRIPTOR, STATES), (BLOCK, Gpa::new(STATES.get() + 128))] {
            let range = MapRange {
                gpa: gpa.get(),
                pages: 512,
                states_gpa: states.get(),
            };
            assert!(descriptor.push_range(range));
        }
        descriptor.vcpu_count = 1;
        descriptor.guest_vmpl = 1;
        descriptor.vcpu_table_gpa = VCPUS.get();
        let write = |gpa: Gpa, bytes: &[u8]| {
            platform
                .memory()
                .write(platform.spa_of(gpa).unwrap(), bytes);
        };
        write(DESCRIPTOR, descriptor.as_bytes());
        let entry = VcpuEntry {
            vmsa_gpa: BLOCK.get() + VMSA * PAGE_SIZE,
            ca_gpa: BLOCK.get() + CALLING_AREA * PAGE_SIZE + 8,
        };
        write(VCPUS, entry.as_bytes());
        for page in [DESCRIPTOR, STATES, VCPUS] {
            let place = platform.layout().place(page).unwrap();
            platform.host.assign_for_launch(&place, page).unwrap();
            platform.host.rmp_mut().finish_launch(&place, false);
        }
        for page in 0..3 {
            set(&platform, 0, page, PageState::Owned);
        }
        platform
    }

    fn set(platform: &Platform<Sparse>, region: u64, page: u64, state: PageState) {
        let at = STATES.get() + region * BYTES_PER_REGION + page / 4;
        let spa = platform.spa_of(Gpa::new(at)).unwrap();
        let mut byte = [0];
        platform.memory().read(spa, &mut byte);
        let shift = 2 * (page % 4);
        byte[0] = byte[0] & !(3 << shift) | (state as u8) << shift;
        platform.memory().write(spa, &byte);
    }

    fn disagreements(platform: &Platform<Sparse>) -> u64 {
        platform.judge().unwrap().disagreements
    }

    fn page(index: u64) -> Gpa {
        Gpa::new(BLOCK.get() + index * PAGE_SIZE)
    }

    #[test]
    fn a_map_that_is_right_is_agreed_with_page_by_page() {
        let mut platform = mapped();
        platform.accept(page(VMSA), 1 << 16 | 0x101);
        platform.accept(page(CALLING_AREA), 0xF01);
        platform.accept(page(3), 0xF01);
        platform.accept(page(4), 1);
        platform.accept(page(5), 1);
        for (index, state) in [
            (VMSA, PageState::Owned),
            (CALLING_AREA, PageState::Owned),
            (3, PageState::Accepted),
            (4, PageState::Ahead),
            (5, PageState::Owned),
        ] {
            set(&platform, 1, index, state);
        }
        let verdict = platform.judge().unwrap();
        assert_eq!(verdict.first, []);
        assert_eq!((verdict.disagreements, verdict.checked), (0, 1024));
        assert_eq!(platform.calling_area(CPU0), None, "it runs nothing");
        platform.set_vmsa(CPU0, Vmpl::VMPL1, Some(page(VMSA)));
        assert_eq!(
            platform.calling_area(CPU0).unwrap().get(),
            page(CALLING_AREA).get() + 8
        );
        platform.set_vmsa(CPU0, Vmpl::VMPL1, Some(page(3)));
        assert_eq!(platform.calling_area(CPU0), None, "of that VMSA, no other");
    }

    /// Every state against every kind of page: only the right ones agree.
    #[test]
    fn every_wrong_combination_is_seen() {
        // RDX of RMPADJUST for a validated page; None = not validated.
        let kinds = [
            None,
            Some(1),
            Some(0xF01),
            Some(0x301),
            Some(0xF02),
            Some(1 << 16 | 1),
        ];
        for kind in kinds {
            for state in [
                PageState::Unaccepted,
                PageState::Ahead,
                PageState::Accepted,
                PageState::Owned,
            ] {
                let mut platform = mapped();
                if let Some(rdx) = kind {
                    platform.accept(page(7), rdx);
                }
                set(&platform, 1, 7, state);
                let right = match state {
                    PageState::Unaccepted => kind.is_none(),
                    PageState::Ahead => kind == Some(1),
                    PageState::Accepted => kind == Some(0xF01),
                    // A VMSA nobody knows of is nobody's.
                    PageState::Owned => kind == Some(1) || kind == Some(1 << 16 | 1),
                };
                assert_eq!(disagreements(&platform) == 0, right, "{state:?} {kind:x?}");
            }
        }
    }

    #[test]
    fn roles_need_their_marks() {
        let vmsa = 1 << 16;
        let wrong = [
            (VMSA, 1),
            (VMSA, vmsa | 0x301),
            (VMSA, vmsa | 0x102),
            (CALLING_AREA, 1),
        ];
        for (index, rdx) in wrong {
            let mut platform = mapped();
            platform.accept(page(index), rdx);
            set(&platform, 1, index, PageState::Owned);
            assert_eq!(disagreements(&platform), 1, "page {index} {rdx:#x}");
        }
    }

    #[test]
    fn a_page_the_host_took_away_disagrees() {
        let mut platform = mapped();
        platform.accept(page(3), 0xF01);
        set(&platform, 1, 3, PageState::Accepted);
        let place = platform.layout().place(page(3)).unwrap();
        platform
            .host
            .take_away(&platform.memory, &place, page(3), PageSize::Size4K)
            .unwrap();
        let verdict = platform.judge().unwrap();
        assert_eq!(verdict.disagreements, 1);
        assert_eq!(verdict.first[0].gpa, page(3).get());
        assert_eq!(verdict.first[0].map, "Accepted");
        assert!(verdict.first[0].rmp.contains("not validated"));
    }

    /// OVMF reads what would be flash with C=0; the host takes the page, the paravisor is not told.
    #[test]
    fn a_page_the_guest_gave_away_is_excused_until_it_comes_back() {
        let mut platform = mapped();
        platform.accept(page(3), 0xF01);
        set(&platform, 1, 3, PageState::Accepted);
        platform.access(Vmpl::VMPL1, Alias::Shared, page(3), Kind::Read);
        let verdict = platform.judge().unwrap();
        assert_eq!((verdict.disagreements, verdict.given_away), (0, 1));
        platform.access(Vmpl::VMPL0, Alias::Private, page(3), Kind::Read);
        assert_eq!(disagreements(&platform), 1, "a fresh page, nobody's gift");
    }

    #[test]
    fn a_validated_page_outside_the_map_is_a_stray() {
        let mut platform = mapped();
        platform.accept(Gpa::new(0x40_0000), 0xF01);
        let verdict = platform.judge().unwrap();
        assert_eq!(
            (verdict.disagreements, verdict.first[0].gpa),
            (1, 0x40_0000)
        );
    }

    #[test]
    fn an_unfinished_or_wild_descriptor_is_one_disagreement() {
        let mut platform = mapped();
        let spa = platform.spa_of(DESCRIPTOR).unwrap();
        platform.memory().write(spa, &[0; 8]);
        assert!(
            platform.judge().is_none(),
            "a paravisor that ended before its guest began"
        );
        platform.stages = [true; 2];
        assert_eq!(disagreements(&platform), 1);
        platform.memory().write(spa, b"garbage!");
        assert_eq!(disagreements(&platform), 1);
        let mut platform = mapped();
        platform.settings.referee = Some(Gpa::new(0xFE00_0000));
        assert_eq!(disagreements(&platform), 1);
        platform.settings.referee = None;
        assert!(platform.judge().is_none());
    }

    #[test]
    fn only_the_first_few_are_told() {
        let platform = mapped();
        for index in 0..100 {
            set(&platform, 1, index, PageState::Accepted);
        }
        let verdict = platform.judge().unwrap();
        assert_eq!((verdict.disagreements, verdict.first.len()), (100, TOLD));
    }
}
