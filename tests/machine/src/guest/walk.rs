//! The guest's own page tables: from a virtual address to a guest-physical one.
//!
//! Invariants: the C-bit is stripped from every table address (walks are private whatever it
//! says, APM table 15-39) and reported for the final page; nothing is written, so accessed and
//! dirty bits stay as the guest left them.

use crate::types::{Alias, Gpa, PAGE_SIZE};
use crate::vcpu::C_BIT;

use super::GuestMemory;

/// Bits of CR0, CR4 and EFER that decide how an address is translated.
mod control {
    pub const CR0_PG: u64 = 1 << 31;
    pub const CR0_WP: u64 = 1 << 16;
    pub const CR4_PSE: u64 = 1 << 4;
    pub const CR4_PAE: u64 = 1 << 5;
    pub const EFER_LMA: u64 = 1 << 10;
    pub const EFER_NXE: u64 = 1 << 11;
}

mod entry {
    pub const PRESENT: u64 = 1 << 0;
    pub const WRITE: u64 = 1 << 1;
    pub const USER: u64 = 1 << 2;
    pub const LARGE: u64 = 1 << 7;
    pub const NO_EXECUTE: u64 = 1 << 63;
    /// Address bits below the C-bit.
    pub const ADDRESS: u64 = (1 << super::C_BIT) - (1 << 12);
}

/// The registers that decide a translation.
#[derive(Clone, Copy, Debug)]
pub struct Paging {
    /// CR0.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER.
    pub efer: u64,
}

/// What an access wants of a translation.
#[derive(Clone, Copy, Debug, Default)]
pub struct Access {
    /// It writes.
    pub write: bool,
    /// It comes from CPL 3.
    pub user: bool,
    /// It fetches an instruction.
    pub execute: bool,
}

/// Where a virtual address leads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Translation {
    /// The guest-physical address, without the C-bit.
    pub gpa: Gpa,
    /// What the C-bit of the leaf said; private when the C-bit cannot be expressed.
    pub alias: Alias,
}

/// A page fault: the error code that goes with vector 14.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageFault {
    /// P, W, U and I/D bits (APM 8.2.15).
    pub code: u32,
}

/// How many levels there are and how an entry looks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mode {
    Off,
    Legacy,
    Pae,
    Long,
}

impl Paging {
    fn mode(&self) -> Mode {
        if self.cr0 & control::CR0_PG == 0 {
            Mode::Off
        } else if self.efer & control::EFER_LMA != 0 {
            Mode::Long
        } else if self.cr4 & control::CR4_PAE != 0 {
            Mode::Pae
        } else {
            Mode::Legacy
        }
    }

    /// Whether the C-bit means something: only in long mode.
    pub fn has_c_bit(&self) -> bool {
        self.mode() == Mode::Long
    }

    /// Translates `address`, or says which page fault the access gets.
    pub fn translate(
        &self,
        memory: &impl GuestMemory,
        address: u64,
        access: Access,
    ) -> Result<Translation, PageFault> {
        let (mut table, top) = match self.mode() {
            Mode::Off => {
                return Ok(Translation {
                    gpa: Gpa::new(address & 0xFFFF_FFFF),
                    alias: Alias::Private,
                });
            }
            Mode::Legacy => (self.cr3 & 0xFFFF_F000, 2),
            Mode::Pae => (self.cr3 & 0xFFFF_FFE0, 3),
            Mode::Long => (self.cr3 & entry::ADDRESS, 4),
        };
        let legacy = self.mode() == Mode::Legacy;
        let (index_bits, entry_bytes) = if legacy { (10, 4) } else { (9, 8) };
        let mut rights = entry::WRITE | entry::USER;
        let mut no_execute = false;
        for level in (1..=top).rev() {
            let shift = 12 + index_bits * (level - 1);
            let index = address >> shift & ((1 << index_bits) - 1);
            let mut bytes = [0; 8];
            let at = Gpa::new(table + index * entry_bytes);
            if !memory.read(at, &mut bytes[..entry_bytes as usize]) {
                return Err(self.fault(access, false));
            }
            let value = u64::from_le_bytes(bytes);
            if value & entry::PRESENT == 0 {
                return Err(self.fault(access, false));
            }
            // The four entries of a PAE root carry no rights.
            if !(self.mode() == Mode::Pae && level == 3) {
                rights &= value;
                no_execute |= value & entry::NO_EXECUTE != 0;
            }
            let large = level > 1
                && value & entry::LARGE != 0
                && (!legacy || self.cr4 & control::CR4_PSE != 0);
            if level == 1 || large {
                if !self.allowed(rights, no_execute, access) {
                    return Err(self.fault(access, true));
                }
                let span = 1u64 << shift;
                let base = value & entry::ADDRESS & !(span - 1);
                let alias = if self.has_c_bit() && value & 1 << C_BIT == 0 {
                    Alias::Shared
                } else {
                    Alias::Private
                };
                return Ok(Translation {
                    gpa: Gpa::new(base | address & (span - 1)),
                    alias,
                });
            }
            table = value & entry::ADDRESS;
        }
        Err(self.fault(access, false))
    }

    fn allowed(&self, rights: u64, no_execute: bool, access: Access) -> bool {
        let user_ok = !access.user || rights & entry::USER != 0;
        let protected = access.user || self.cr0 & control::CR0_WP != 0;
        let write_ok = !access.write || !protected || rights & entry::WRITE != 0;
        let fetch_ok = !access.execute || !no_execute || self.efer & control::EFER_NXE == 0;
        user_ok && write_ok && fetch_ok
    }

    fn fault(&self, access: Access, present: bool) -> PageFault {
        let fetch = access.execute && self.efer & control::EFER_NXE != 0;
        PageFault {
            code: u32::from(present)
                | u32::from(access.write) << 1
                | u32::from(access.user) << 2
                | u32::from(fetch) << 4,
        }
    }
}

/// Splits `[address, address + len)` at page borders: pairs of offset and length.
pub fn pages(address: u64, len: usize) -> impl Iterator<Item = (u64, core::ops::Range<usize>)> {
    let mut done = 0;
    core::iter::from_fn(move || {
        if done == len {
            return None;
        }
        let at = address.wrapping_add(done as u64);
        let room = (PAGE_SIZE - at % PAGE_SIZE) as usize;
        let part = done..(done + room).min(len);
        done = part.end;
        Some((at, part))
    })
}

#[cfg(test)]
mod tests {
    use super::super::testing::Pages;
    use super::*;
    use std::vec::Vec;

    const C: u64 = 1 << C_BIT;
    const P: u64 = 1;
    const PW: u64 = 3;
    const PWU: u64 = 7;
    const NX: u64 = 1 << 63;

    const LONG: Paging = Paging {
        cr0: 1 << 31 | 1 << 16 | 1,
        cr3: 0x1000 | C,
        cr4: 1 << 5,
        efer: 0xD00,
    };

    /// 0x0: 4 KiB pages; 0x20_0000: a 2 MiB page; 0x4000_0000: a 1 GiB page.
    fn tables() -> Pages {
        let mut memory = Pages::default();
        memory.put(0x1000, 0x2000 | PWU | C);
        memory.put(0x2000, 0x3000 | PWU);
        memory.put(0x2008, 0x4000_0000 | PW | entry::LARGE | C);
        memory.put(0x3000, 0x4000 | PWU | C);
        memory.put(0x3008, 0x60_0000 | PW | entry::LARGE);
        memory.put(0x4000, 0x9000 | PWU | C);
        memory.put(0x4008, 0xA000 | P | C | NX);
        memory
    }

    fn walk(address: u64, access: Access) -> Result<(u64, Alias), u32> {
        LONG.translate(&tables(), address, access)
            .map(|to| (to.gpa.get(), to.alias))
            .map_err(|fault| fault.code)
    }

    const READ: Access = Access {
        write: false,
        user: false,
        execute: false,
    };

    #[test]
    fn the_c_bit_is_stripped_from_tables_and_told_of_leaves() {
        assert_eq!(walk(0x123, READ), Ok((0x9123, Alias::Private)));
        assert_eq!(walk(0x20_1234, READ), Ok((0x60_1234, Alias::Shared)));
        assert_eq!(walk(0x4012_3456, READ), Ok((0x4012_3456, Alias::Private)));
    }

    #[test]
    fn rights_of_all_levels_count() {
        assert_eq!(
            walk(
                0,
                Access {
                    write: true,
                    user: true,
                    ..READ
                }
            ),
            Ok((0x9000, Alias::Private))
        );
        assert_eq!(
            walk(
                0x1000,
                Access {
                    write: true,
                    ..READ
                }
            ),
            Err(0b00011)
        );
        assert_eq!(walk(0x1000, Access { user: true, ..READ }), Err(0b00101));
        assert_eq!(
            walk(
                0x1000,
                Access {
                    execute: true,
                    ..READ
                }
            ),
            Err(0b10001)
        );
        assert_eq!(walk(0x20_0000, Access { user: true, ..READ }), Err(0b00101));
    }

    #[test]
    fn absent_entries_and_absent_tables_are_faults() {
        assert_eq!(walk(0x2000, READ), Err(0));
        assert_eq!(
            walk(
                0x80_0000_0000,
                Access {
                    write: true,
                    ..READ
                }
            ),
            Err(2)
        );
        let lost = Paging {
            cr3: 0x77_0000,
            ..LONG
        };
        assert!(lost.translate(&tables(), 0, READ).is_err());
    }

    #[test]
    fn supervisor_writes_ignore_protection_without_wp() {
        let lax = Paging {
            cr0: 1 << 31 | 1,
            ..LONG
        };
        assert!(
            lax.translate(
                &tables(),
                0x1000,
                Access {
                    write: true,
                    ..READ
                }
            )
            .is_ok()
        );
    }

    #[test]
    fn without_paging_addresses_are_private_and_32_bits_wide() {
        let off = Paging {
            cr0: 1,
            cr3: 0,
            cr4: 0,
            efer: 0,
        };
        let to = off.translate(&Pages::default(), 0x1_FFFF_FFF0, READ);
        assert_eq!(
            to,
            Ok(Translation {
                gpa: Gpa::new(0xFFFF_FFF0),
                alias: Alias::Private
            })
        );
        assert!(!off.has_c_bit());
    }

    #[test]
    fn two_and_three_level_tables_are_walked() {
        let mut memory = Pages::default();
        memory.put(0x1000, 0x2000 | P);
        memory.put(0x2000, 0x4000 | PW);
        memory.put(0x4000, 0x5000 | PW);
        let pae = Paging {
            cr0: 1 << 31 | 1,
            cr3: 0x1000,
            cr4: 1 << 5,
            efer: 0,
        };
        let to = pae.translate(
            &memory,
            0x12,
            Access {
                write: true,
                ..READ
            },
        );
        assert_eq!(to.map(|to| to.gpa.get()), Ok(0x5012));

        let mut memory = Pages::default();
        memory.put(0x1000, 0x2000 | PW | (0x40_0000 | PW | entry::LARGE) << 32);
        memory.put(0x2000, 0x3000 | PW);
        let legacy = Paging {
            cr0: 1 << 31 | 1,
            cr3: 0x1000,
            cr4: 1 << 4,
            efer: 0,
        };
        let at = |address| {
            legacy
                .translate(&memory, address, READ)
                .map(|to| to.gpa.get())
        };
        assert_eq!(at(0x34), Ok(0x3034));
        assert_eq!(at(0x40_1234), Ok(0x40_1234));
    }

    #[test]
    fn ranges_split_at_page_borders() {
        let parts: Vec<_> = pages(0xFFE, 0x1004).collect();
        assert_eq!(
            parts,
            [(0xFFE, 0..2), (0x1000, 2..0x1002), (0x2000, 0x1002..0x1004)]
        );
        assert_eq!(pages(0, 0).count(), 0);
    }
}
