//! The native platform: the same paravisor on a processor without confidential hardware (decision 019).
//!
//! ```text
//! own exceptions -> launch parameters -> what the host says -> own memory -> the map
//!   -> rounds: the engine's flows over all memory -> all memory to the firmware, reset
//! ```
//!
//! Engine, map, page tables and the checks on the host's words are those of SEV-SNP. What hardware would
//! keep about pages is simulated ([`crate::platform::native`]). A guest cannot be kept below the paravisor
//! here, so there is none to serve: when the rounds are done the paravisor gives everything away, its own
//! memory too, and the firmware starts as after a reset ([`handover`]).

#[cfg(target_os = "none")]
mod handover;
pub mod rounds;

#[cfg(target_os = "none")]
pub use bare::boot_processor;

/// The half that needs the processor.
#[cfg(target_os = "none")]
mod bare {
    #![expect(unsafe_code, reason = "CPUID, and pools of memory that is ours")]

    use accept::{Frame, PageState, RegionLock, RegionLocks};
    use log::info;
    use protocols::addr::{Gpa, PAGE_SIZE};
    use protocols::launch::LaunchParams;
    use protocols::map::MapDescriptor;
    use protocols::terminate::TurnstileReason;

    use super::handover;
    use super::rounds::{Memory, Rounds};
    use crate::backend::{Alone, WindowBackend};
    use crate::boot::harden_processor;
    use crate::boot::host::{check_vp_count, read_host_map};
    use crate::boot::map::{make_engine, map_guest_memory};
    use crate::entry::boot_stack_guard;
    use crate::guest::parameters::LEGACY_HOLE;
    use crate::host_map::HostMap;
    use crate::hypervisor::native;
    use crate::launch::Launch;
    use crate::memory::layout::{OWN_WINDOW, PageRange};
    use crate::memory::page_tables::{self, Owner};
    use crate::memory::plan::{CarveOut, Plan, regions_touched};
    use crate::memory::pool::Pool;
    use crate::memory::{access, guest_map};
    use crate::platform::AccessFault;
    use crate::platform::native::Native;
    use crate::platform::native::table::{Record, Stretch, Table};
    use crate::terminate::terminate;
    use crate::{console, exceptions, percpu};

    /// CPUID leaf 7, EBX: FSGSBASE, SMEP, SMAP.
    const NEEDED: u32 = 1 << 0 | 1 << 7 | 1 << 20;
    /// Memory in so many pieces at most: each piece of the map less region, carve-out and legacy hole.
    const MAX_PIECES: usize = 4 * MapDescriptor::MAX_RANGES;

    /// Where the entry point continues on the native platform.
    pub fn boot_processor(params: &'static LaunchParams) -> ! {
        native::arrive();
        console::open();
        if core::arch::x86_64::__cpuid_count(7, 0).ebx & NEEDED != NEEDED {
            terminate(TurnstileReason::NATIVE_PROCESSOR);
        }
        percpu::install_boot();
        exceptions::load();
        match start(params) {
            Ok(reset) => reset.start(),
            Err(reason) => terminate(reason),
        }
    }

    /// All steps up to the last one.
    fn start(params: &'static LaunchParams) -> Result<handover::Reset, TurnstileReason> {
        let launch = Launch::check(params)?;
        harden_processor();
        page_tables::init(
            Gpa::new(params.page_table_root),
            launch.region(),
            launch.c_bit(),
        );
        page_tables::unmap(Gpa::new(boot_stack_guard()))?;
        let vp_count = check_vp_count(params)?;
        info!(
            "Turnstile {}, native: nothing is confidential, acceptance is simulated; {vp_count} vCPU(s)",
            env!("CARGO_PKG_VERSION")
        );

        let host_map = read_host_map(&launch)?;
        let mut region_pool = region_pool(&launch);
        let locks = RegionLocks::count_for(vp_count);
        let others = locks * size_of::<RegionLock>()
            + regions_at_most(&host_map, launch.firmware()) * size_of::<Record>()
            + PAGE_SIZE as usize;
        let plan = Plan::make(
            &host_map,
            launch.region(),
            // No page is shared with a host.
            PageRange::EMPTY,
            launch.firmware(),
            others as u64,
            // The firmware gets it back.
            CarveOut::Highest,
        )?;
        let mut pool = carve_out_pool(&plan, &mut region_pool)?;
        map_guest_memory(&plan, &launch, &mut pool)?;

        let table = make_table(&plan, &mut pool)?;
        for (pages, granted) in [
            (launch.region(), false),
            (plan.carve_out, false),
            (launch.firmware(), true),
        ] {
            table
                .launch(pages, granted)
                .map_err(|_| TurnstileReason::INTERNAL)?;
        }
        let backend = WindowBackend::new(Native { table }, Alone);
        let engine = make_engine(backend, &launch, &plan, locks, &mut pool)?;
        let firmware = launch.firmware();
        engine
            .record_launch(
                Frame::containing(firmware.start().get()),
                firmware.pages(),
                PageState::Accepted,
            )
            .map_err(|_| TurnstileReason::INTERNAL)?;
        reserve_legacy_hole(&plan, table, &engine)?;

        let mut pieces = [PageRange::EMPTY; MAX_PIECES];
        let pages = nobodys(&plan, &launch, &mut pieces)?;
        let summary = Rounds {
            engine: &engine,
            table,
            memory: Window,
            pages,
        }
        .run()?;
        info!(
            "{} pages accepted twice, {} requests repeated, {} validations",
            summary.pages,
            summary.repeated,
            summary.counts.validations()
        );
        let reset = handover::Reset::prepare(params.firmware_reset_eip, &mut region_pool)?;
        info!(
            "all memory, ours too, is the firmware's; reset to {:#x}",
            params.firmware_reset_eip
        );
        Ok(reset)
    }

    /// How many records the simulated hardware needs at most: a plan splits memory at the region only.
    fn regions_at_most(host_map: &HostMap, firmware: PageRange) -> usize {
        let memory: u64 = host_map
            .memory()
            .map(|memory| regions_touched(memory) + 1)
            .sum();
        (memory + regions_touched(firmware)) as usize
    }

    /// The part of the region that was not launched, zeroed.
    fn region_pool(launch: &Launch<'_>) -> Pool {
        let pages = launch.unlaunched();
        // SAFETY: the image maps the whole region one to one, writable where it is not launched, and
        // nobody uses that part yet.
        unsafe {
            core::ptr::write_bytes(pages.start().get() as *mut u8, 0, pages.bytes() as usize);
            Pool::new(pages, 0)
        }
    }

    /// The carve-out, mapped and zeroed.
    fn carve_out_pool(plan: &Plan, tables: &mut Pool) -> Result<Pool, TurnstileReason> {
        let pages = plan.carve_out;
        page_tables::map_large(OWN_WINDOW, pages, Owner::Paravisor, tables)?;
        access::fill_zero(OWN_WINDOW + pages.start().get(), pages.bytes())
            .map_err(|_| TurnstileReason::NOT_VALIDATED)?;
        // SAFETY: mapped and zeroed just now; the plan gives it to nobody else.
        Ok(unsafe { Pool::new(pages, OWN_WINDOW) })
    }

    /// The simulated hardware for all memory that has a state.
    fn make_table(
        plan: &Plan,
        pool: &mut Pool,
    ) -> Result<&'static Table<'static>, TurnstileReason> {
        let nothing = Stretch::new(Gpa::new(0), &[]);
        let mut made = [nothing; MapDescriptor::MAX_RANGES];
        let mut count = 0;
        for ((outer, _), slot) in plan.groups().zip(&mut made) {
            let (_, records) =
                pool.slice(regions_touched(outer) as usize, |_| Record::default())?;
            *slot = Stretch::new(outer.start(), records);
            count += 1;
        }
        let (_, stretches) =
            pool.slice(count, |index| made.get(index).copied().unwrap_or(nothing))?;
        pool.leak(Table::new(stretches))
    }

    /// A host may call all of low memory RAM; video memory and ROMs are not.
    fn reserve_legacy_hole(
        plan: &Plan,
        table: &Table<'_>,
        engine: &accept::Engine<'_, WindowBackend<Native, Alone>>,
    ) -> Result<(), TurnstileReason> {
        if !plan
            .ranges()
            .iter()
            .any(|range| range.contains(LEGACY_HOLE))
        {
            return Ok(());
        }
        table
            .launch(LEGACY_HOLE, false)
            .map_err(|_| TurnstileReason::INTERNAL)?;
        engine
            .record_launch(
                Frame::containing(LEGACY_HOLE.start().get()),
                LEGACY_HOLE.pages(),
                PageState::Owned,
            )
            .map_err(|_| TurnstileReason::INTERNAL)
    }

    /// All memory but the paravisor's, the firmware's and the legacy hole.
    fn nobodys<'p>(
        plan: &Plan,
        launch: &Launch<'_>,
        pieces: &'p mut [PageRange],
    ) -> Result<&'p [PageRange], TurnstileReason> {
        let taken = [
            LEGACY_HOLE,
            launch.region(),
            plan.carve_out,
            launch.firmware(),
        ];
        let mut count = 0;
        for range in plan.ranges() {
            let mut rest = *range;
            // Ascending: what lies below each hole is done with. A carve-out lies anywhere, so the
            // lowest hole that is left comes first.
            loop {
                let hole = taken
                    .iter()
                    .filter(|hole| hole.overlaps(rest))
                    .min_by_key(|hole| hole.start_frame());
                let (below, above) = match hole {
                    Some(hole) => rest.without(*hole),
                    None => (rest, PageRange::EMPTY),
                };
                if !below.is_empty() {
                    *pieces.get_mut(count).ok_or(TurnstileReason::MAP_TOO_MANY)? = below;
                    count += 1;
                }
                if above.is_empty() {
                    break;
                }
                rest = above;
            }
        }
        Ok(pieces.get(..count).unwrap_or_default())
    }

    /// Memory through the guest window.
    struct Window;

    /// First and last word of a page.
    const WORDS: [u64; 2] = [0, PAGE_SIZE - 8];

    /// What a page is marked with: its address, and something in the page's offset bits.
    fn mark_of(page: Gpa) -> u64 {
        page.get() | 0x5A5
    }

    impl Memory for Window {
        fn is_zero(&self, pages: PageRange) -> Result<bool, AccessFault> {
            let address = guest_map::address(pages.start(), pages.bytes())?;
            access::is_zero(address, pages.bytes())
        }

        fn mark(&self, page: Gpa) -> Result<(), AccessFault> {
            let address = guest_map::address(page, PAGE_SIZE)?;
            WORDS
                .into_iter()
                .try_for_each(|word| access::store_u64(address + word, mark_of(page)))
        }

        fn is_marked(&self, page: Gpa) -> Result<bool, AccessFault> {
            let address = guest_map::address(page, PAGE_SIZE)?;
            for word in WORDS {
                if access::load_u64(address + word)? != mark_of(page) {
                    return Ok(false);
                }
            }
            Ok(true)
        }
    }
}
