//! The guest's copy of the secrets page.
//!
//! I10: keys of more privileged levels never reach the guest. With a key of VMPL0 it could ask
//! the security processor for reports that speak for the paravisor.

use protocols::addr::{Gpa, Vmpl};
use protocols::secrets::SecretsPage;
use protocols::svsm::CORE_PROTOCOL_VERSION;

use crate::memory::layout::PageRange;

/// What the guest is told about the paravisor.
#[derive(Clone, Copy, Debug)]
pub struct Introduction {
    /// The paravisor's region.
    pub region: PageRange,
    /// Calling area of the boot processor.
    pub calling_area: Gpa,
    /// Level the guest runs at.
    pub guest_vmpl: Vmpl,
}

/// Turns a copy of the launch page into what the guest at `guest_vmpl` may see.
pub fn make_guest_copy(page: &mut SecretsPage, introduction: &Introduction) {
    page.forget_keys_above(introduction.guest_vmpl);
    page.svsm_base = introduction.region.start().get();
    page.svsm_size = introduction.region.bytes();
    page.svsm_caa = introduction.calling_area.get();
    page.svsm_max_version = CORE_PROTOCOL_VERSION;
    page.svsm_guest_vmpl = introduction.guest_vmpl.number();
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::FromZeros;

    #[test]
    fn i10_keys_above_the_guest_are_gone_and_the_others_stay() {
        let mut page = SecretsPage::new_zeroed();
        for (number, key) in page.vmpck.iter_mut().enumerate() {
            *key = [number as u8 + 1; 32];
        }
        let introduction = Introduction {
            region: PageRange::try_from_frames(0x8000, 0x8400).unwrap(),
            calling_area: Gpa::new(0x80_F000),
            guest_vmpl: Vmpl::VMPL2,
        };
        make_guest_copy(&mut page, &introduction);
        assert_eq!(page.vmpck, [[0; 32], [0; 32], [3; 32], [4; 32]]);
        assert_eq!(page.svsm_base, 0x800_0000);
        assert_eq!(page.svsm_size, 4 << 20);
        assert_eq!(page.svsm_caa, 0x80_F000);
        assert_eq!((page.svsm_max_version, page.svsm_guest_vmpl), (1, 2));
    }
}
