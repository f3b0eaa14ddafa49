//! From the guest-physical address of a fault back to the virtual one, which hardware has in CR2
//! and TCG does not tell.
//!
//! The addresses that the guest's CPU can have used are tried in the order in which it uses them:
//! the instruction, its operands, then the tables and stacks of interrupt delivery and segment
//! loads. The one whose translation leads to the page is it.

use alloc::vec::Vec;
use core::cell::Cell;

use protocols::vmsa::Segment;

use super::GuestMemory;
use super::operand::{self, CodeSize};
use super::walk::{Access, Paging};
use crate::types::{Gpa, Kind, PAGE_SIZE, PageSize};

/// What decides which addresses the CPU uses.
#[derive(Clone, Copy, Debug)]
pub struct Cpu<'a> {
    /// Translation.
    pub paging: Paging,
    /// The instruction and its registers.
    pub context: operand::Context<'a>,
    /// IDTR, GDTR, LDTR and TR.
    pub tables: [Segment; 4],
}

const CS: usize = 1;
const SS: usize = 2;
const RSP: usize = 4;

/// Bytes of the largest frame that delivery of an event pushes.
const FRAME: u64 = 48;

impl Cpu<'_> {
    /// The virtual address of an access of this kind that faulted at `gpa`.
    pub fn locate(&self, memory: &impl GuestMemory, gpa: Gpa, kind: Kind) -> Option<u64> {
        let fetch = self.fetch_addresses();
        if kind == Kind::Execute {
            return fetch
                .into_iter()
                .find(|&at| self.leads_to(memory, at, gpa))
                .map(|at| if at == fetch[0] { at } else { at & !0xFFF });
        }
        let data = operand::addresses(&self.context);
        if kind == Kind::Walk {
            return fetch
                .into_iter()
                .chain(data)
                .chain(self.system_addresses(memory))
                .find(|&at| self.walks_through(memory, at, gpa));
        }
        data.into_iter()
            .chain(self.system_addresses(memory))
            .find(|&at| self.leads_to(memory, at, gpa))
            .map(|at| at & !(PAGE_SIZE - 1) | gpa.offset_in_page())
    }

    /// RIP, the last byte of its page and the first of the next, into which the instruction may
    /// reach.
    fn fetch_addresses(&self) -> [u64; 3] {
        let at = match self.context.size {
            CodeSize::Bits64 => self.context.rip,
            _ => self.context.segments[CS].wrapping_add(self.context.rip) & 0xFFFF_FFFF,
        };
        [at, at | 0xFFF, (at | 0xFFF).wrapping_add(1)]
    }

    /// One address in each page of the descriptor tables and the TSS, and the places where a
    /// frame may be pushed: the stack in use and those that the TSS has.
    fn system_addresses(&self, memory: &impl GuestMemory) -> Vec<u64> {
        /// Pages of a table of the largest size.
        const MOST: usize = 17;
        let mut found = Vec::new();
        for table in self.tables {
            let last = table.base.wrapping_add(u64::from(table.limit.min(0xFFFF)));
            let mut at = table.base;
            for _ in 0..MOST {
                found.push(at.min(last));
                at = (at | 0xFFF).wrapping_add(1);
                if at > last {
                    break;
                }
            }
        }
        let stack_base = match self.context.size {
            CodeSize::Bits64 => 0,
            _ => self.context.segments[SS],
        };
        let mut push = |top: u64| found.extend([top.wrapping_sub(1), top.wrapping_sub(FRAME)]);
        push(stack_base.wrapping_add(self.context.registers[RSP]) & !0xF);
        if self.paging.has_c_bit() {
            // RSP0 to RSP2 and IST1 to IST7 (APM figure 12-8).
            let task = self.tables[3].base;
            for offset in (4..0x1C).chain(0x24..0x5C).step_by(8) {
                if let Some(top) = self.read(memory, task.wrapping_add(offset)) {
                    push(top & !0xF);
                }
            }
        }
        found
    }

    fn read(&self, memory: &impl GuestMemory, address: u64) -> Option<u64> {
        let mut bytes = [0; 8];
        for (at, part) in super::walk::pages(address, bytes.len()) {
            let to = self.paging.translate(memory, at, Access::default()).ok()?;
            if !memory.read(to.gpa, &mut bytes[part]) {
                return None;
            }
        }
        Some(u64::from_le_bytes(bytes))
    }

    fn leads_to(&self, memory: &impl GuestMemory, address: u64, gpa: Gpa) -> bool {
        self.paging
            .translate(memory, address, Access::default())
            .is_ok_and(|to| page(to.gpa) == page(gpa))
    }

    /// Whether a translation of `address` reads a table in the page of `gpa`.
    fn walks_through(&self, memory: &impl GuestMemory, address: u64, gpa: Gpa) -> bool {
        let watched = Watched {
            memory,
            page: page(gpa),
            seen: Cell::new(false),
        };
        // Where it leads, or whether anywhere, does not matter.
        let _ = self.paging.translate(&watched, address, Access::default());
        watched.seen.get()
    }
}

fn page(gpa: Gpa) -> Gpa {
    gpa.align_down(PageSize::Size4K)
}

/// Memory that notes whether a page was read.
struct Watched<'a, M> {
    memory: &'a M,
    page: Gpa,
    seen: Cell<bool>,
}

impl<M: GuestMemory> GuestMemory for Watched<'_, M> {
    fn read(&self, gpa: Gpa, out: &mut [u8]) -> bool {
        if page(gpa) == self.page {
            self.seen.set(true);
        }
        self.memory.read(gpa, out)
    }

    fn write(&mut self, _gpa: Gpa, _data: &[u8]) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::Pages;
    use super::*;

    const CODE: u64 = 0x10_0FF8;
    const DATA: u64 = 0x20_3000;
    const STACK: u64 = 0x20_5000;
    const TSS: u64 = 0x20_6000;
    const IST1: u64 = 0x20_9000;

    /// Tables for 4 MiB, of which the second half lies 4 MiB higher in guest-physical memory.
    fn memory() -> Pages {
        let mut memory = Pages::default();
        memory.put(0x1000, 0x2007);
        memory.put(0x2000, 0x3007);
        memory.put(0x3000, 0x87);
        memory.put(0x3008, 0x4007);
        for n in 0..512 {
            memory.put(0x4000 + 8 * n, 0x60_0007 + 0x1000 * n);
        }
        memory.put(gpa(TSS) + 0x20, IST1 << 32);
        memory.put(gpa(TSS) + 0x28, 0);
        memory
    }

    const fn gpa(address: u64) -> u64 {
        address + 0x40_0000
    }

    fn locate(bytes: &[u8], at: u64, kind: Kind) -> Option<u64> {
        let mut registers = [0; 16];
        registers[6] = DATA + 0xFFC;
        registers[RSP] = STACK;
        let table = |base, limit| Segment {
            base,
            limit,
            ..Segment::default()
        };
        let cpu = Cpu {
            paging: Paging {
                cr0: 1 << 31 | 1,
                cr3: 0x1000,
                cr4: 1 << 5,
                efer: 0x500,
            },
            context: operand::Context {
                bytes,
                size: CodeSize::Bits64,
                rip: CODE,
                registers: &registers,
                segments: [0; 6],
            },
            tables: [
                table(0x20_7F00, 0xFFF),
                table(0x20_8800, 0x7F),
                table(0, 0),
                table(TSS, 0x67),
            ],
        };
        cpu.locate(&memory(), Gpa::new(at), kind)
    }

    /// mov rax, [rsi]: eight bytes over a page border.
    const LOAD: [u8; 3] = [0x48, 0x8B, 0x06];

    #[test]
    fn data_faults_have_the_offset_of_the_fault() {
        let read = |at| locate(&LOAD, at, Kind::Read);
        assert_eq!(read(gpa(DATA) + 0xFFC), Some(DATA + 0xFFC));
        assert_eq!(read(gpa(DATA) + 0x1000), Some(DATA + 0x1000));
        assert_eq!(read(gpa(0x30_0000)), None);
    }

    #[test]
    fn fetch_faults_are_at_the_instruction_or_the_next_page() {
        let fetch = |at| locate(&LOAD, at, Kind::Execute);
        assert_eq!(fetch(CODE), Some(CODE));
        assert_eq!(fetch(0x10_1000), Some(0x10_1000));
        assert_eq!(fetch(gpa(DATA)), None);
    }

    #[test]
    fn a_walk_is_traced_to_the_address_it_is_for() {
        let walk = |at| locate(&LOAD, at, Kind::Walk);
        // Everybody needs the root, the fetch first.
        assert_eq!(walk(0x1000), Some(CODE));
        // Only the data needs the last table.
        assert_eq!(walk(0x4018), Some(DATA + 0xFFC));
        assert_eq!(walk(0x5000), None);
    }

    #[test]
    fn tables_and_stacks_of_delivery_are_known() {
        let nop = [0x90];
        let write = |at| locate(&nop, at, Kind::Write);
        assert_eq!(write(gpa(STACK) - 8), Some(STACK - 8));
        assert_eq!(write(gpa(IST1) - 16), Some(IST1 - 16));
        let read = |at| locate(&nop, at, Kind::Read);
        assert_eq!(read(gpa(TSS) + 0x24), Some(TSS + 0x24));
        // The IDT reaches into its second page, in which the GDT lies as well.
        assert_eq!(read(gpa(0x20_7F00) + 0x1D0), Some(0x20_80D0));
        assert_eq!(read(gpa(0x20_8810)), Some(0x20_8810));
    }
}
