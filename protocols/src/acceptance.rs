//! When memory is accepted: the part of the launch parameters that an image may choose.
//!
//! The same check is made where an image is built and where it starts, so that a value which the
//! paravisor would refuse never gets into an image by the tools.

use core::fmt;

use crate::addr::LARGE_PAGE_SIZE;
use crate::launch::{AcceptOrder, AcceptPolicy, BudgetUnit, Touch};

/// The most regions that a request may prepare beyond its own: with it they are what one call
/// may change (32 MiB).
pub const READ_AHEAD_LIMIT: u32 = 15;

/// How much may be accepted ahead of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// What is counted.
    pub unit: BudgetUnit,
    /// How much of it.
    pub amount: u64,
}

impl Budget {
    /// No limit.
    pub const ALL: Self = Self {
        unit: BudgetUnit::ALL,
        amount: 0,
    };

    /// The budget in bytes, whole regions, where `memory` bytes have a state.
    #[must_use]
    pub const fn bytes_of(self, memory: u64) -> u64 {
        let bytes = match self.unit {
            BudgetUnit::BYTES => self.amount,
            // No more than `memory`, however large the product is on the way there.
            BudgetUnit::PER_CENT if self.amount < 100 => {
                (memory as u128 * self.amount as u128 / 100) as u64
            }
            _ => memory,
        };
        bytes / LARGE_PAGE_SIZE * LARGE_PAGE_SIZE
    }
}

/// When memory is accepted, and how much of it before the guest asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Acceptance {
    /// Who accepts, and when.
    pub policy: AcceptPolicy,
    /// Which memory comes first.
    pub order: AcceptOrder,
    /// How much is accepted ahead of the guest at most, by requests' read-ahead as well.
    pub budget: Budget,
    /// How many further regions a request for 2 MiB prepares.
    pub read_ahead: u32,
    /// What becomes of a guest that touches memory which it has not accepted.
    pub touch: Touch,
}

/// A value that makes no sense, in words: what it is and what it may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadAcceptance {
    /// The policy's number means nothing.
    Policy(AcceptPolicy),
    /// The order's number means nothing.
    Order(AcceptOrder),
    /// The budget's unit means nothing.
    Unit(BudgetUnit),
    /// A policy that accepts nothing ahead has a budget or an order.
    Lazy,
    /// Too few bytes for a region, or not whole regions.
    Bytes(u64),
    /// Not a share of memory.
    PerCent(u64),
    /// An amount although everything may be accepted.
    Amount(u64),
    /// Too many regions.
    ReadAhead(u32),
    /// The number of what a touch leads to means nothing.
    Touch(Touch),
}

impl fmt::Display for BadAcceptance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Policy(policy) => write!(
                f,
                "policy {}: expected 0 (lazy), 1 (eager) or 2 (ahead)",
                policy.0
            ),
            Self::Order(order) => {
                write!(f, "order {}: expected 0 (low) or 1 (high)", order.0)
            }
            Self::Unit(unit) => write!(
                f,
                "unit {} of the budget: expected 0 (all), 1 (bytes) or 2 (per cent)",
                unit.0
            ),
            Self::Lazy => write!(
                f,
                "policy lazy accepts nothing ahead of the guest: it takes no budget, no order and \
                 no read-ahead; choose eager or ahead"
            ),
            Self::Bytes(bytes) => write!(
                f,
                "budget of {bytes} bytes: expected a multiple of 2 MiB, at least one"
            ),
            Self::PerCent(share) => write!(f, "budget of {share} %: expected 1 to 100 %"),
            Self::Amount(amount) => {
                write!(f, "amount {amount} of a budget without limit: expected 0")
            }
            Self::ReadAhead(regions) => write!(
                f,
                "read-ahead of {regions} regions of 2 MiB: expected at most {READ_AHEAD_LIMIT}, \
                 which is what one call may change"
            ),
            Self::Touch(touch) => {
                write!(f, "touch {}: expected 0 (fault) or 1 (accept)", touch.0)
            }
        }
    }
}

impl core::error::Error for BadAcceptance {}

impl Acceptance {
    /// On request only.
    pub const LAZY: Self = Self {
        policy: AcceptPolicy::LAZY,
        order: AcceptOrder::LOW_FIRST,
        budget: Budget::ALL,
        read_ahead: 0,
        touch: Touch::FAULT,
    };

    /// Whether anything is ever accepted before the guest asks for it.
    #[must_use]
    pub const fn is_lazy(&self) -> bool {
        self.policy.0 == AcceptPolicy::LAZY.0
    }

    /// Checks every value.
    ///
    /// # Errors
    /// [`BadAcceptance`].
    pub fn check(&self) -> Result<(), BadAcceptance> {
        if self.policy.name().is_none() {
            return Err(BadAcceptance::Policy(self.policy));
        }
        if self.order.name().is_none() {
            return Err(BadAcceptance::Order(self.order));
        }
        if self.read_ahead > READ_AHEAD_LIMIT {
            return Err(BadAcceptance::ReadAhead(self.read_ahead));
        }
        if self.touch.name().is_none() {
            return Err(BadAcceptance::Touch(self.touch));
        }
        let amount = self.budget.amount;
        match self.budget.unit {
            BudgetUnit::ALL if amount == 0 => {}
            BudgetUnit::ALL => return Err(BadAcceptance::Amount(amount)),
            BudgetUnit::BYTES if amount > 0 && amount.is_multiple_of(LARGE_PAGE_SIZE) => {}
            BudgetUnit::BYTES => return Err(BadAcceptance::Bytes(amount)),
            BudgetUnit::PER_CENT if (1..=100).contains(&amount) => {}
            BudgetUnit::PER_CENT => return Err(BadAcceptance::PerCent(amount)),
            unit => return Err(BadAcceptance::Unit(unit)),
        }
        // What a touch leads to is another question.
        let lazy = Self {
            touch: self.touch,
            ..Self::LAZY
        };
        if self.is_lazy() && *self != lazy {
            return Err(BadAcceptance::Lazy);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::string::ToString as _;

    use super::*;

    const AHEAD: Acceptance = Acceptance {
        policy: AcceptPolicy::AHEAD,
        ..Acceptance::LAZY
    };

    fn with_budget(unit: BudgetUnit, amount: u64) -> Acceptance {
        Acceptance {
            budget: Budget { unit, amount },
            ..AHEAD
        }
    }

    #[test]
    fn sensible_values_pass() {
        for good in [
            Acceptance::LAZY,
            AHEAD,
            with_budget(BudgetUnit::BYTES, 2 << 20),
            with_budget(BudgetUnit::PER_CENT, 1),
            with_budget(BudgetUnit::PER_CENT, 100),
            Acceptance {
                read_ahead: READ_AHEAD_LIMIT,
                order: AcceptOrder::HIGH_FIRST,
                ..AHEAD
            },
            Acceptance {
                touch: Touch::ACCEPT,
                ..Acceptance::LAZY
            },
        ] {
            assert_eq!(good.check(), Ok(()), "{good:?}");
        }
    }

    #[test]
    fn every_other_value_is_named() {
        let spoilt = |change: fn(&mut Acceptance)| {
            let mut acceptance = AHEAD;
            change(&mut acceptance);
            acceptance
        };
        for (bad, words) in [
            (spoilt(|a| a.policy = AcceptPolicy(3)), "policy 3"),
            (spoilt(|a| a.order = AcceptOrder(2)), "order 2"),
            (spoilt(|a| a.read_ahead = 16), "16 regions"),
            (spoilt(|a| a.touch = Touch(2)), "touch 2"),
            (with_budget(BudgetUnit(3), 0), "unit 3"),
            (with_budget(BudgetUnit::ALL, 1), "amount 1"),
            (with_budget(BudgetUnit::BYTES, 0), "0 bytes"),
            (
                with_budget(BudgetUnit::BYTES, (2 << 20) + 1),
                "2097153 bytes",
            ),
            (with_budget(BudgetUnit::PER_CENT, 0), "0 %"),
            (with_budget(BudgetUnit::PER_CENT, 101), "101 %"),
            (
                Acceptance {
                    read_ahead: 1,
                    ..Acceptance::LAZY
                },
                "policy lazy",
            ),
        ] {
            let text = bad.check().unwrap_err().to_string();
            assert!(text.contains(words), "{bad:?}: {text}");
        }
    }

    #[test]
    fn a_budget_is_whole_regions_and_never_wraps() {
        let bytes = |unit, amount, memory| Budget { unit, amount }.bytes_of(memory);
        assert_eq!(bytes(BudgetUnit::ALL, 0, (5 << 20) + 1), 4 << 20);
        assert_eq!(bytes(BudgetUnit::BYTES, 6 << 20, 1 << 40), 6 << 20);
        assert_eq!(bytes(BudgetUnit::PER_CENT, 50, 100 << 21), 50 << 21);
        // All of it is all of it, to the last region.
        assert_eq!(bytes(BudgetUnit::PER_CENT, 100, 2 << 30), 2 << 30);
        assert_eq!(bytes(BudgetUnit::PER_CENT, 99, 100 << 21), 99 << 21);
        assert!(bytes(BudgetUnit::PER_CENT, 99, u64::MAX) > u64::MAX / 100 * 98);
    }
}
