//! What the unit tests share: a sparse memory, a CPU that records, a small platform.

use std::cell::RefCell;
use std::collections::BTreeMap;

use protocols::ghcb::page::{Field, Ghcb};
use protocols::report::Event;
use zerocopy::{FromZeros, IntoBytes};

use crate::ghcb::{Cpu, Reply};
use crate::isa::{Instruction, Opcode, Operands, Request};
use crate::memory::PhysicalMemory;
use crate::platform::Platform;
use crate::settings::Settings;
use crate::types::{Alias, Gpa, PageSize, Spa, VcpuId, Vmpl};

/// Pages come into being when they are written; the rest reads as zero.
#[derive(Default)]
pub(crate) struct Sparse(RefCell<BTreeMap<u64, Vec<u8>>>);

impl Sparse {
    /// Calls `visit` with each piece of the range that lies in one page.
    fn pieces(spa: Spa, len: usize, mut visit: impl FnMut(u64, usize, core::ops::Range<usize>)) {
        let mut done = 0;
        while done < len {
            let at = spa.plus(done as u64).get();
            let offset = (at & 0xFFF) as usize;
            let piece = (4096 - offset).min(len - done);
            visit(at >> 12, offset, done..done + piece);
            done += piece;
        }
    }
}

impl PhysicalMemory for Sparse {
    fn read(&self, spa: Spa, out: &mut [u8]) {
        let pages = self.0.borrow();
        Self::pieces(spa, out.len(), |frame, offset, range| {
            match pages.get(&frame) {
                Some(page) => {
                    let len = range.len();
                    out[range].copy_from_slice(&page[offset..offset + len]);
                }
                None => out[range].fill(0),
            }
        });
    }
    fn write(&self, spa: Spa, data: &[u8]) {
        let mut pages = self.0.borrow_mut();
        Self::pieces(spa, data.len(), |frame, offset, range| {
            let page = pages.entry(frame).or_insert_with(|| vec![0; 4096]);
            page[offset..offset + range.len()].copy_from_slice(&data[range]);
        });
    }
}

/// The first vCPU.
pub(crate) const CPU0: VcpuId = VcpuId(0);
/// A 2 MiB block of RAM that nobody uses.
pub(crate) const BLOCK: Gpa = Gpa::new(0x60_0000);
/// A page the tests use as GHCB.
pub(crate) const GHCB: Gpa = Gpa::new(0x30_1000);

/// Two vCPUs, 640 KiB and 15 MiB of RAM, settings from text.
pub(crate) fn platform(settings: &str) -> Platform<Sparse> {
    let settings = Settings::parse(settings).unwrap();
    let mut platform = Platform::new(Sparse::default(), settings, 2, || 42);
    platform.add_ram(Gpa::new(0), 0xA_0000).unwrap();
    platform.add_ram(Gpa::new(0x10_0000), 0xF0_0000).unwrap();
    platform
}

/// Operands in order for a privileged instruction.
pub(crate) const fn operands(gva: u64, rcx: u64, rdx: u64) -> Operands {
    Operands {
        rax: gva,
        rcx,
        rdx,
        cpl: 0,
        long_mode: true,
    }
}

impl Platform<Sparse> {
    /// Decodes and executes with GVA = GPA, C=1.
    pub(crate) fn run(&mut self, opcode: Opcode, vmpl: Vmpl, operands: Operands) -> Instruction {
        match Request::decode(opcode, vmpl, &operands) {
            Ok(request) => self.execute(vmpl, &request, Alias::Private, Gpa::new(request.gva)),
            Err(early) => early,
        }
    }

    /// (EAX, CF) of an instruction that completes.
    pub(crate) fn codes(&mut self, opcode: Opcode, vmpl: Vmpl, operands: Operands) -> (u32, bool) {
        match self.run(opcode, vmpl, operands) {
            Instruction::Complete(done) => (done.eax, done.carry),
            other => panic!("{other:?}"),
        }
    }

    /// PVALIDATE at VMPL0.
    pub(crate) fn pval(&mut self, gpa: Gpa, size: PageSize, validate: bool) -> (u32, bool) {
        let operands = operands(gpa.get(), size.encoding().into(), validate.into());
        self.codes(Opcode::Pvalidate, Vmpl::VMPL0, operands)
    }

    /// RMPADJUST at VMPL0; `rdx` as in the register.
    pub(crate) fn adjust(&mut self, gpa: Gpa, size: PageSize, rdx: u64) -> u32 {
        let operands = operands(gpa.get(), size.encoding().into(), rdx);
        self.codes(Opcode::Rmpadjust, Vmpl::VMPL0, operands).0
    }

    /// Zeroes a page or block through system memory.
    pub(crate) fn scrub(&self, gpa: Gpa, size: PageSize) {
        let spa = self.spa_of(gpa).unwrap();
        self.memory().write(spa, &vec![0; size.bytes() as usize]);
    }

    /// Validates, scrubs and gives `rdx` permissions to a page.
    pub(crate) fn accept(&mut self, gpa: Gpa, rdx: u64) {
        assert_eq!(self.pval(gpa, PageSize::Size4K, true), (0, false));
        self.scrub(gpa, PageSize::Size4K);
        assert_eq!(self.adjust(gpa, PageSize::Size4K, rdx), 0);
    }

    /// One MSR request; the reply and the MSR afterwards.
    pub(crate) fn msr(&mut self, vmpl: Vmpl, value: u64) -> (Reply, u64) {
        self.set_ghcb_msr(CPU0, vmpl, value);
        let reply = self.vmgexit(CPU0, vmpl, &mut FakeCpu::default());
        (reply, self.ghcb_msr(CPU0, vmpl))
    }

    /// Makes [`GHCB`] a registered GHCB of `vmpl`.
    pub(crate) fn register_ghcb_page(&mut self, vmpl: Vmpl) {
        self.msr(vmpl, 2 << 52 | GHCB.get() | 0x014);
        let (_, response) = self.msr(vmpl, GHCB.get() | 0x012);
        assert_eq!(response, GHCB.get() | 0x013);
    }

    /// One page request: valid fields in, the page out.
    pub(crate) fn ask(
        &mut self,
        vmpl: Vmpl,
        fields: &[(Field, u64)],
        buffer: &[u8],
        cpu: &mut FakeCpu,
    ) -> (Reply, Ghcb) {
        let mut page = Ghcb::new_zeroed();
        page.set(Field::EXIT_INFO_1, 0);
        page.set(Field::EXIT_INFO_2, 0);
        for &(field, value) in fields {
            page.set(field, value);
        }
        page.shared_buffer[..buffer.len()].copy_from_slice(buffer);
        page.protocol_version = 2;
        self.exchange(vmpl, page, cpu)
    }

    /// One page request with a page made by the caller.
    pub(crate) fn exchange(
        &mut self,
        vmpl: Vmpl,
        mut page: Ghcb,
        cpu: &mut FakeCpu,
    ) -> (Reply, Ghcb) {
        let spa = self.spa_of(GHCB).unwrap();
        self.memory().write(spa, page.as_bytes());
        self.set_ghcb_msr(CPU0, vmpl, GHCB.get());
        let reply = self.vmgexit(CPU0, vmpl, cpu);
        self.memory().read(spa, page.as_mut_bytes());
        (reply, page)
    }

    /// Lines of refusals so far; takes the events.
    pub(crate) fn refusals(&mut self) -> Vec<String> {
        let refusal = |event| match event {
            Event::Refusal(refusal) => Some(refusal.text),
            _ => None,
        };
        self.take_events().into_iter().filter_map(refusal).collect()
    }
}

/// Answers with recognisable numbers and remembers what was written.
#[derive(Default)]
pub(crate) struct FakeCpu {
    /// Writes in order: (what, address, bytes, value).
    pub(crate) writes: Vec<(&'static str, u64, u8, u64)>,
    /// An interrupt waits.
    pub(crate) interrupted: bool,
    next: u8,
}

impl Cpu for FakeCpu {
    fn is_interrupted(&mut self) -> bool {
        self.interrupted
    }
    fn cpuid(&mut self, leaf: u32, subleaf: u32) -> [u32; 4] {
        [leaf, subleaf, 0xC, 0xD]
    }
    fn io_in(&mut self, _port: u16, _bytes: u8) -> u32 {
        self.next += 1;
        0xAABB_CC00 + u32::from(self.next)
    }
    fn io_out(&mut self, port: u16, bytes: u8, value: u32) {
        self.writes.push(("port", port.into(), bytes, value.into()));
    }
    fn rdmsr(&mut self, msr: u32) -> Option<u64> {
        (msr != 0xBAD).then_some(0x1111_2222_3333_4444)
    }
    fn wrmsr(&mut self, msr: u32, value: u64) -> bool {
        self.writes.push(("msr", msr.into(), 8, value));
        msr != 0xBAD
    }
    fn mmio_read(&mut self, _gpa: Gpa, _bytes: u8) -> u64 {
        0x8877_6655_4433_2211
    }
    fn mmio_write(&mut self, gpa: Gpa, bytes: u8, value: u64) {
        self.writes.push(("mmio", gpa.get(), bytes, value));
    }
    fn rdtsc(&mut self) -> u64 {
        0x5_0000_0006
    }
    fn tsc_aux(&mut self) -> u32 {
        7
    }
    fn rdpmc(&mut self, counter: u32) -> Option<u64> {
        (counter < 4).then_some(9)
    }
    fn dr7(&mut self) -> u64 {
        0x400
    }
    fn set_dr7(&mut self, value: u64) {
        self.writes.push(("dr7", 0, 8, value));
    }
    fn wbinvd(&mut self) {
        self.writes.push(("wbinvd", 0, 0, 0));
    }
}
