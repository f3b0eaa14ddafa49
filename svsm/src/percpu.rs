//! What each virtual processor has to itself at VMPL0.
//!
//! A [`PerCpu`] is found through the GS base, which is set before anything that could fault or
//! log. It never moves and is never freed. Nobody looks at another processor's block.
#![expect(unsafe_code, reason = "GS base, descriptor tables")]

use core::cell::{OnceCell, UnsafeCell};

use x86_64::VirtAddr;
use x86_64::instructions::tables::load_tss;
use x86_64::registers::control::{Cr4, Cr4Flags};
use x86_64::registers::segmentation::{CS, DS, ES, GS, SS, Segment, Segment64};
use x86_64::structures::gdt::{Descriptor, GlobalDescriptorTable, SegmentSelector};
use x86_64::structures::tss::TaskStateSegment;

use crate::hypervisor::ghcb::Ghcb;
use crate::tdx::vectors::Taken;

/// Index of the stack (in the TSS) for exceptions that may hit while the normal one is unusable.
pub const EMERGENCY_STACK: u16 = 0;
/// Bytes of that stack.
const EMERGENCY_STACK_SIZE: usize = 8 * 1024;

/// Descriptor tables of one processor. Written once by [`PerCpu::install`], then only read, by
/// the processor itself.
struct Tables {
    gdt: GlobalDescriptorTable,
    tss: TaskStateSegment,
}

/// One processor's private block.
#[repr(C, align(64))]
pub struct PerCpu {
    /// Number of the processor in [`crate::vcpus`], from 0.
    index: usize,
    /// Its channel to the host, once that is set up.
    ghcb: OnceCell<Ghcb>,
    /// Interrupts that its handlers have taken (in a trust domain).
    taken: Taken,
    tables: UnsafeCell<Tables>,
    emergency_stack: UnsafeCell<[u8; EMERGENCY_STACK_SIZE]>,
}

// SAFETY: a block is reached only through the GS base of the one processor it belongs to, which
// runs with interrupts off; exception handlers only read cells that are set already, and `taken` is
// atomic.
unsafe impl Sync for PerCpu {}

/// The block of the boot processor; the others get theirs from the carve-out.
static BOOT: PerCpu = PerCpu::new(0);

impl PerCpu {
    /// The block of processor `index`, not installed yet.
    #[must_use]
    pub const fn new(index: usize) -> Self {
        Self {
            index,
            ghcb: OnceCell::new(),
            taken: Taken::new(),
            tables: UnsafeCell::new(Tables {
                gdt: GlobalDescriptorTable::new(),
                tss: TaskStateSegment::new(),
            }),
            emergency_stack: UnsafeCell::new([0; EMERGENCY_STACK_SIZE]),
        }
    }

    /// The processor's number, from 0.
    #[must_use]
    pub fn index(&self) -> usize {
        self.index
    }

    /// The processor's channel to the host; none until [`PerCpu::set_ghcb`].
    #[must_use]
    pub fn ghcb(&self) -> Option<&Ghcb> {
        self.ghcb.get()
    }

    /// Gives the processor its channel to the host. Only the first call counts.
    pub fn set_ghcb(&self, ghcb: Ghcb) -> &Ghcb {
        self.ghcb.get_or_init(|| ghcb)
    }

    /// The interrupts that its handlers have taken.
    #[must_use]
    pub const fn taken(&self) -> &Taken {
        &self.taken
    }

    /// Makes this the block of the running processor: descriptor tables and GS base.
    pub fn install(&'static self) {
        // SAFETY: called once per block, before the processor uses its tables; they are not
        // written afterwards.
        let tables = unsafe { &mut *self.tables.get() };
        let stack_top = self.emergency_stack.get() as u64 + EMERGENCY_STACK_SIZE as u64;
        tables.tss.interrupt_stack_table[EMERGENCY_STACK as usize] = VirtAddr::new(stack_top);
        let code = tables.gdt.append(Descriptor::kernel_code_segment());
        let data = tables.gdt.append(Descriptor::kernel_data_segment());
        let tss = tables.gdt.append(Descriptor::tss_segment(&tables.tss));
        tables.gdt.load();
        // SAFETY: the selectors come from the table just loaded, code and data are flat ring 0
        // segments, the TSS lives for ever; FSGSBASE is set before GS base is written with it.
        unsafe {
            CS::set_reg(code);
            SS::set_reg(data);
            DS::set_reg(SegmentSelector::NULL);
            ES::set_reg(SegmentSelector::NULL);
            load_tss(tss);
            Cr4::update(|flags| flags.insert(Cr4Flags::FSGSBASE));
            GS::write_base(VirtAddr::from_ptr(self));
        }
    }
}

/// Installs the boot processor's block. First thing the boot processor does.
pub fn install_boot() {
    BOOT.install();
}

/// The running processor's block; none before it is installed.
#[must_use]
pub fn current() -> Option<&'static PerCpu> {
    if !Cr4::read().contains(Cr4Flags::FSGSBASE) {
        return None;
    }
    let block = GS::read_base().as_ptr::<PerCpu>();
    // SAFETY: FSGSBASE is set by `install` alone, right before the GS base gets the address of
    // a block that lives for ever.
    unsafe { block.as_ref() }
}
