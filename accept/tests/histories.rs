//! Random histories on the model of SEV-SNP, with a host that changes page sizes, fails
//! instructions and lies. The rules are in `model/history.rs`.
#![cfg(not(loom))]

mod model;

use model::Model;
use model::history::{
    REGIONS, a_lie_gains_nothing, any_page, any_step, follows_the_rules, stays_true,
};
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn i1_i2_i4_i11_every_history_follows_the_rules(
        on_large: bool,
        steps in prop::collection::vec(any_step(), 1..60),
    ) {
        follows_the_rules(&Model::new(REGIONS as usize, on_large), &steps);
    }

    #[test]
    fn i9_i11_failures_anywhere_leave_the_map_true(
        on_large: bool,
        steps in prop::collection::vec(
            (any_step(), prop::option::of((0..40usize, any::<bool>()))), 1..40),
    ) {
        stays_true(&Model::new(REGIONS as usize, on_large), &steps);
    }

    #[test]
    fn i5_a_lying_host_gains_nothing(
        on_large: bool,
        steps in prop::collection::vec(any_step(), 1..40),
        lie_at in 0..40usize,
        victim in any_page(),
    ) {
        a_lie_gains_nothing(&Model::new(REGIONS as usize, on_large), &steps, lie_at, victim);
    }
}
