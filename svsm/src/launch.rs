//! The launch parameters, checked.
//!
//! They are measured with the image, so a wrong value is a wrong image and not an attack; it
//! still ends with a reason. Addresses in them are used without further checks afterwards.

use protocols::addr::PAGE_SIZE;
use protocols::launch::{
    Acceptance, Fault, LaunchParams, MEMORY_MAP_SIZE, PlatformKind, REGION_GPA, REGION_SIZE,
    Section, Touch,
};
use protocols::terminate::TurnstileReason;

use crate::memory::layout::PageRange;

/// First address above the firmware.
const FIRMWARE_END: u64 = 1 << 32;

/// Launch parameters that make sense.
#[derive(Debug)]
pub struct Launch<'a> {
    params: &'a LaunchParams,
    region: PageRange,
    unlaunched: PageRange,
    firmware: PageRange,
    data: PageRange,
}

impl<'a> Launch<'a> {
    /// Takes the page if it fits this paravisor.
    ///
    /// # Errors
    ///
    /// [`TurnstileReason::LAUNCH_PARAMS`].
    pub fn check(params: &'a LaunchParams) -> Result<Self, TurnstileReason> {
        Self::check_inner(params).ok_or(TurnstileReason::LAUNCH_PARAMS)
    }

    fn check_inner(params: &'a LaunchParams) -> Option<Self> {
        let fits = params.is_understood()
            && params.region_gpa == REGION_GPA
            && params.region_size == REGION_SIZE
            && params.memory_map_size == MEMORY_MAP_SIZE
            && params.acceptance().check().is_ok()
            && (params.fault == Fault::NONE || cfg!(feature = "faults"));
        if !fits {
            return None;
        }
        let region = PageRange::try_from_bytes(params.region_gpa, params.region_size)?;
        let launched_size = params.image_end.checked_sub(params.region_gpa)?;
        let launched = PageRange::try_from_bytes(params.region_gpa, launched_size)?;
        let unlaunched = PageRange::try_from_frames(launched.end_frame(), region.end_frame())?;
        let is_launched = |&(gpa, size)| {
            PageRange::try_from_bytes(gpa, size).is_some_and(|pages| launched.contains(pages))
        };
        let inside = [
            (params.page_table_root, PAGE_SIZE),
            (params.memory_map_gpa, params.memory_map_size),
            (params.general_gpa, PAGE_SIZE),
        ];
        let of_snp = [
            (params.secrets_gpa, PAGE_SIZE),
            (params.cpuid_gpa, PAGE_SIZE),
        ];
        let of_td = (params.firmware_last_page, PAGE_SIZE);
        let platform_fits = match params.platform {
            PlatformKind::SEV_SNP => of_snp.iter().all(is_launched),
            PlatformKind::NATIVE => params.c_bit == 0,
            PlatformKind::TDX => params.c_bit == 0 && is_launched(&of_td),
            _ => false,
        };
        // Elsewhere a touch does not come here, so what the image asks for would not happen.
        let touch_fits = params.touch == Touch::FAULT || params.platform == PlatformKind::TDX;
        if !platform_fits || !touch_fits || !inside.iter().all(is_launched) {
            return None;
        }
        let firmware = PageRange::try_from_bytes(params.firmware_gpa, params.firmware_size)?;
        let at_top = firmware.end().get() == FIRMWARE_END && !firmware.is_empty();
        let data = PageRange::try_from_bytes(params.data_gpa, params.data_size)?;
        let data_fits = data.is_empty()
            || params.platform == PlatformKind::SEV_SNP
                && params.igvm_hob_gpa != 0
                && !data.overlaps(region)
                && !data.overlaps(firmware);
        (at_top && data_fits).then_some(Self {
            params,
            region,
            unlaunched,
            firmware,
            data,
        })
    }

    /// Position of the C-bit, on the platform that has one.
    #[must_use]
    pub fn c_bit(&self) -> Option<u32> {
        (self.params.platform == PlatformKind::SEV_SNP).then_some(self.params.c_bit)
    }

    /// The page itself.
    #[must_use]
    pub const fn params(&self) -> &'a LaunchParams {
        self.params
    }

    /// When memory is accepted, checked.
    #[must_use]
    pub const fn acceptance(&self) -> Acceptance {
        self.params.acceptance()
    }

    /// All of the paravisor's region.
    #[must_use]
    pub const fn region(&self) -> PageRange {
        self.region
    }

    /// The part of the region that was not launched: it is not validated yet.
    #[must_use]
    pub const fn unlaunched(&self) -> PageRange {
        self.unlaunched
    }

    /// The firmware image, which was launched.
    #[must_use]
    pub const fn firmware(&self) -> PageRange {
        self.firmware
    }

    /// What the image hands to the firmware, which was launched; empty if there is none.
    #[must_use]
    pub const fn data(&self) -> PageRange {
        self.data
    }

    /// The areas the firmware wants prepared.
    #[must_use]
    pub fn sections(&self) -> &'a [Section] {
        self.params.sections()
    }
}

#[cfg(test)]
mod tests {
    use protocols::launch::{AcceptOrder, AcceptPolicy, Budget, BudgetUnit};

    use super::*;
    use crate::ahead::Ahead;

    fn good() -> LaunchParams {
        let mut params = LaunchParams::new();
        params.region_gpa = REGION_GPA;
        params.region_size = REGION_SIZE;
        params.image_end = REGION_GPA + 0x8_0000;
        params.page_table_root = REGION_GPA + 0x7_0000;
        params.secrets_gpa = REGION_GPA + 0x7_1000;
        params.cpuid_gpa = REGION_GPA + 0x7_2000;
        params.memory_map_gpa = REGION_GPA + 0x7_3000;
        params.memory_map_size = MEMORY_MAP_SIZE;
        params.general_gpa = REGION_GPA + 0x7_7000;
        params.firmware_gpa = 0xFFC0_0000;
        params.firmware_size = 0x40_0000;
        params
    }

    #[test]
    fn a_sound_page_tells_the_ranges() {
        let params = good();
        let launch = Launch::check(&params).unwrap();
        assert_eq!(launch.region().bytes(), REGION_SIZE);
        assert_eq!(launch.unlaunched().start().get(), REGION_GPA + 0x8_0000);
        assert_eq!(launch.unlaunched().end(), launch.region().end());
        assert_eq!(launch.firmware().bytes(), 0x40_0000);
    }

    #[test]
    fn a_wrong_page_is_refused() {
        let spoil: [fn(&mut LaunchParams); 18] = [
            |p| p.magic[0] ^= 1,
            |p| p.version += 1,
            |p| p.region_gpa += 0x1000,
            |p| p.image_end = REGION_GPA - 0x1000,
            |p| p.image_end = REGION_GPA + REGION_SIZE + 0x1000,
            |p| p.secrets_gpa += 1,
            |p| p.cpuid_gpa = p.image_end,
            |p| p.memory_map_gpa = p.image_end - 0x1000,
            |p| p.firmware_size = 0,
            |p| p.firmware_gpa += 0x1000,
            |p| p.accept_policy = AcceptPolicy(77),
            |p| p.accept_order = AcceptOrder(2),
            |p| p.read_ahead = 1,
            |p| (p.accept_policy, p.read_ahead) = (AcceptPolicy::AHEAD, 16),
            |p| {
                p.accept_policy = AcceptPolicy::EAGER;
                (p.budget_unit, p.budget) = (BudgetUnit::PER_CENT, 101);
            },
            |p| p.section_count = 33,
            |p| p.touch = Touch(2),
            // Of a trust domain alone.
            |p| p.touch = Touch::ACCEPT,
        ];
        for (index, change) in spoil.into_iter().enumerate() {
            let mut params = good();
            change(&mut params);
            let reason = Launch::check(&params).err();
            assert_eq!(
                reason,
                Some(TurnstileReason::LAUNCH_PARAMS),
                "change {index}"
            );
        }
    }

    #[test]
    fn data_for_the_firmware_lies_apart_and_has_a_place() {
        let with = |change: fn(&mut LaunchParams)| {
            let mut params = good();
            params.igvm_hob_gpa = 0x81_3000;
            (params.data_gpa, params.data_size) = (REGION_GPA + REGION_SIZE, 0x3000);
            change(&mut params);
            Launch::check(&params)
                .map(|launch| launch.data().bytes())
                .ok()
        };
        assert_eq!(with(|_| {}), Some(0x3000));
        assert_eq!(with(|p| p.data_size = 0), Some(0));
        assert_eq!(with(|p| p.igvm_hob_gpa = 0), None);
        assert_eq!(with(|p| p.data_gpa -= 0x1000), None);
        assert_eq!(with(|p| p.data_gpa += 1), None);
        assert_eq!(with(|p| p.data_gpa = p.firmware_gpa), None);
    }

    #[test]
    fn every_policy_is_taken() {
        for policy in [AcceptPolicy::LAZY, AcceptPolicy::EAGER, AcceptPolicy::AHEAD] {
            let mut params = good();
            params.accept_policy = policy;
            assert!(Launch::check(&params).is_ok(), "{policy:?}");
        }
    }

    /// From the image's words to what may be prepared: a share of the memory that has a state.
    #[test]
    fn a_share_of_memory_becomes_bytes() {
        let mut params = good();
        params.set_acceptance(Acceptance {
            policy: AcceptPolicy::AHEAD,
            order: AcceptOrder::HIGH_FIRST,
            budget: Budget {
                unit: BudgetUnit::PER_CENT,
                amount: 25,
            },
            read_ahead: 3,
            touch: Touch::FAULT,
        });
        let launch = Launch::check(&params).unwrap();
        let ahead = Ahead::new(launch.acceptance(), (1 << 30) + (6 << 20));
        // 257.5 MiB, in whole regions.
        assert_eq!(ahead.budget(), 256 << 20);
        assert_eq!(ahead.order(), accept::Order::HighFirst);
        assert_eq!(ahead.acceptance().read_ahead, 3);
    }

    #[test]
    fn a_native_page_has_nothing_of_sev_snp() {
        let mut params = good();
        params.c_bit = 47;
        assert_eq!(Launch::check(&params).unwrap().c_bit(), Some(47));
        params.platform = PlatformKind::NATIVE;
        assert!(Launch::check(&params).is_err());
        params.c_bit = 0;
        params.secrets_gpa = 0;
        params.cpuid_gpa = 0;
        assert_eq!(Launch::check(&params).unwrap().c_bit(), None);
        params.platform = PlatformKind(77);
        assert!(Launch::check(&params).is_err());
        params.platform = PlatformKind::SEV_SNP;
        assert!(Launch::check(&params).is_err());
    }

    #[test]
    fn a_page_of_a_trust_domain_names_the_firmwares_last_page() {
        let mut params = good();
        params.platform = PlatformKind::TDX;
        params.firmware_last_page = params.secrets_gpa;
        (params.secrets_gpa, params.cpuid_gpa) = (0, 0);
        assert_eq!(Launch::check(&params).unwrap().c_bit(), None);
        params.touch = Touch::ACCEPT;
        let launch = Launch::check(&params).unwrap();
        assert_eq!(launch.acceptance().touch, Touch::ACCEPT);
        params.firmware_last_page = params.image_end;
        assert!(Launch::check(&params).is_err());
        params.firmware_last_page = 0;
        assert!(Launch::check(&params).is_err());
    }

    #[test]
    fn a_fault_needs_a_test_build() {
        let mut params = good();
        params.fault = Fault::SKIP_SCRUB;
        assert_eq!(Launch::check(&params).is_ok(), cfg!(feature = "faults"));
    }
}
