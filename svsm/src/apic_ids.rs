//! Which APIC ids the guest's processors have.
//!
//! The host is asked for its list (GHCB: get APIC ids) and may say anything. What matters to the
//! paravisor is that each id stands for one processor and that the running one is among them:
//! with two processors of one id a VMSA of level 0 would be announced in the place of another.

use protocols::terminate::TurnstileReason;

/// Checks the host's list, which was copied before, and puts the id of the boot processor first.
/// `claimed` is the number of ids that the host says it has listed.
///
/// # Errors
///
/// [`TurnstileReason::APIC_IDS`]: another number than there are processors, an id that is listed
/// twice, or none that is `own`.
pub fn check(ids: &mut [u32], claimed: u32, own: u32) -> Result<(), TurnstileReason> {
    let complete = usize::try_from(claimed) == Ok(ids.len());
    let distinct = ids
        .iter()
        .enumerate()
        .all(|(index, id)| !ids.iter().skip(index + 1).any(|other| other == id));
    let first = ids.iter().position(|&id| id == own);
    match first.filter(|_| complete && distinct) {
        Some(first) => {
            // The others keep their order.
            ids.get_mut(..=first).unwrap_or_default().rotate_right(1);
            Ok(())
        }
        None => Err(TurnstileReason::APIC_IDS),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_boot_processor_comes_first_and_the_others_stay_in_order() {
        let mut ids = [0, 1, 8, 9];
        assert_eq!(check(&mut ids, 4, 8), Ok(()));
        assert_eq!(ids, [8, 0, 1, 9]);
        let mut one = [u32::MAX];
        assert_eq!(check(&mut one, 1, u32::MAX), Ok(()));
    }

    #[test]
    fn a_list_that_makes_no_sense_is_refused() {
        for (ids, claimed, own) in [
            (&mut [0, 1, 2][..], 4, 0),
            (&mut [0, 1, 2], 2, 0),
            (&mut [0, 1, 1], 3, 0),
            (&mut [0, 1, 0], 3, 0),
            (&mut [0, 1, 2], 3, 3),
            (&mut [], 0, 0),
        ] {
            let before = ids.to_vec();
            assert_eq!(check(ids, claimed, own), Err(TurnstileReason::APIC_IDS));
            assert_eq!(ids, before);
        }
    }
}
