//! When memory is accepted, as it is written on a command line.
//!
//! `lazy`, `eager`, `ahead`, the last two with a budget behind a colon: `ahead:512M`, `eager:50%`.
//! The values themselves are checked where the format is: [`Acceptance::check`].

use protocols::launch::{
    AcceptOrder, AcceptPolicy, Acceptance, BadAcceptance, Budget, BudgetUnit, Touch,
};

/// What is wrong with a word of the command line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadAccept {
    /// No policy has this name.
    #[error(
        "policy {0:?}: expected lazy, eager or ahead, the last two with or without a budget such as ahead:512M or ahead:50%"
    )]
    Policy(String),
    /// Not an amount of memory.
    #[error(
        "budget {0:?}: expected a size in M or G of whole 2 MiB such as 512M, or a share of memory such as 50%"
    )]
    Budget(String),
    /// No order has this name.
    #[error("order {0:?}: expected low (memory below 4 GiB first) or high")]
    Order(String),
    /// A touch leads to nothing of this name.
    #[error("touch {0:?}: expected fault or accept")]
    Touch(String),
    /// A value outside its limits.
    #[error(transparent)]
    Value(#[from] BadAcceptance),
}

/// A policy and its budget: the value of `--accept`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Accept {
    /// Who accepts, and when.
    pub policy: AcceptPolicy,
    /// How much ahead of the guest at most.
    pub budget: Budget,
}

impl Default for Accept {
    fn default() -> Self {
        Self {
            policy: AcceptPolicy::LAZY,
            budget: Budget::ALL,
        }
    }
}

impl std::str::FromStr for Accept {
    type Err = BadAccept;

    fn from_str(text: &str) -> Result<Self, BadAccept> {
        let (name, budget) = match text.split_once(':') {
            Some((name, budget)) => (name, Some(budget)),
            None => (text, None),
        };
        let policy = match name {
            "lazy" => AcceptPolicy::LAZY,
            "eager" => AcceptPolicy::EAGER,
            "ahead" => AcceptPolicy::AHEAD,
            _ => return Err(BadAccept::Policy(text.to_owned())),
        };
        let accept = Self {
            policy,
            budget: budget.map_or(Ok(Budget::ALL), parse_budget)?,
        };
        accept.with(Extras::default())?;
        Ok(accept)
    }
}

fn parse_budget(text: &str) -> Result<Budget, BadAccept> {
    let bad = || BadAccept::Budget(text.to_owned());
    let (digits, unit) = text
        .split_at_checked(text.len().saturating_sub(1))
        .ok_or_else(bad)?;
    let number: u64 = digits.parse().map_err(|_| bad())?;
    let (unit, amount) = match unit {
        "%" => (BudgetUnit::PER_CENT, Some(number)),
        "M" | "m" => (BudgetUnit::BYTES, number.checked_mul(1 << 20)),
        "G" | "g" => (BudgetUnit::BYTES, number.checked_mul(1 << 30)),
        _ => return Err(bad()),
    };
    Ok(Budget {
        unit,
        amount: amount.ok_or_else(bad)?,
    })
}

/// The further values, each with an option of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::Args)]
pub struct Extras {
    /// Which memory is accepted first ahead of the guest: low (below 4 GiB) or high
    #[arg(long = "accept-order", value_name = "ORDER", default_value = "low", value_parser = parse_order)]
    pub order: AcceptOrder,
    /// How many further regions of 2 MiB a request for one prepares, up to 15
    #[arg(long, value_name = "REGIONS", default_value_t = 0)]
    pub read_ahead: u32,
    /// What the guest of a trust domain meets that touches memory before accepting it: fault (as on
    /// hardware) or accept (for guests that cannot accept memory themselves)
    #[arg(long = "on-touch", value_name = "WHAT", default_value = "fault", value_parser = parse_touch)]
    pub touch: Touch,
}

impl Default for Extras {
    fn default() -> Self {
        Self {
            order: AcceptOrder::LOW_FIRST,
            read_ahead: 0,
            touch: Touch::FAULT,
        }
    }
}

fn parse_order(text: &str) -> Result<AcceptOrder, BadAccept> {
    match text {
        "low" => Ok(AcceptOrder::LOW_FIRST),
        "high" => Ok(AcceptOrder::HIGH_FIRST),
        _ => Err(BadAccept::Order(text.to_owned())),
    }
}

fn parse_touch(text: &str) -> Result<Touch, BadAccept> {
    match text {
        "fault" => Ok(Touch::FAULT),
        "accept" => Ok(Touch::ACCEPT),
        _ => Err(BadAccept::Touch(text.to_owned())),
    }
}

impl Accept {
    /// All values together, checked against each other.
    ///
    /// # Errors
    ///
    /// [`BadAccept::Value`].
    pub fn with(self, extras: Extras) -> Result<Acceptance, BadAccept> {
        let acceptance = Acceptance {
            policy: self.policy,
            order: extras.order,
            budget: self.budget,
            read_ahead: extras.read_ahead,
            touch: extras.touch,
        };
        acceptance.check()?;
        Ok(acceptance)
    }
}

/// The values in words, as the command line has them.
pub fn describe(acceptance: &Acceptance) -> String {
    let mut words = describe_policy(acceptance);
    if acceptance.touch != Touch::FAULT {
        words.push_str(", on touch");
    }
    words
}

fn describe_policy(acceptance: &Acceptance) -> String {
    let unknown = "unknown";
    let policy = acceptance.policy.name().unwrap_or(unknown).to_lowercase();
    if acceptance.is_lazy() {
        return policy;
    }
    let budget = match acceptance.budget {
        Budget {
            unit: BudgetUnit::BYTES,
            amount,
        } => format!("up to {} MiB", amount >> 20),
        Budget {
            unit: BudgetUnit::PER_CENT,
            amount,
        } => format!("up to {amount} % of memory"),
        _ => "all of memory".to_owned(),
    };
    let order = match acceptance.order {
        AcceptOrder::HIGH_FIRST => "high first",
        _ => "low first",
    };
    format!(
        "{policy}, {budget}, {order}, read-ahead {}",
        acceptance.read_ahead
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accept(policy: AcceptPolicy, unit: BudgetUnit, amount: u64) -> Accept {
        Accept {
            policy,
            budget: Budget { unit, amount },
        }
    }

    #[test]
    fn policies_and_budgets_are_read() {
        for (text, expected) in [
            ("lazy", Accept::default()),
            ("eager", accept(AcceptPolicy::EAGER, BudgetUnit::ALL, 0)),
            ("ahead", accept(AcceptPolicy::AHEAD, BudgetUnit::ALL, 0)),
            (
                "ahead:512M",
                accept(AcceptPolicy::AHEAD, BudgetUnit::BYTES, 512 << 20),
            ),
            (
                "eager:2g",
                accept(AcceptPolicy::EAGER, BudgetUnit::BYTES, 2 << 30),
            ),
            (
                "ahead:50%",
                accept(AcceptPolicy::AHEAD, BudgetUnit::PER_CENT, 50),
            ),
        ] {
            assert_eq!(text.parse(), Ok(expected), "{text}");
        }
    }

    #[test]
    fn a_wrong_word_is_named_with_what_was_expected() {
        for text in ["", "Lazy", "ahead2", "soon:1G"] {
            let error = text.parse::<Accept>().unwrap_err().to_string();
            assert!(
                error.contains(&format!("{text:?}")) && error.contains("eager"),
                "{error}"
            );
        }
        for budget in [
            "",
            "512",
            "512K",
            "-1G",
            "%",
            "99999999999999999999G",
            "1.5G",
            "é",
        ] {
            let text = format!("ahead:{budget}");
            let error = text.parse::<Accept>().unwrap_err().to_string();
            assert!(
                error.contains(&format!("{budget:?}")) && error.contains("50%"),
                "{error}"
            );
        }
        for (text, value) in [
            ("ahead:0M", "0 bytes"),
            ("ahead:3M", "3145728 bytes"),
            ("eager:0%", "0 %"),
            ("ahead:101%", "101 %"),
            ("lazy:1G", "policy lazy"),
        ] {
            let error = text.parse::<Accept>().unwrap_err().to_string();
            assert!(error.contains(value), "{text}: {error}");
        }
    }

    #[test]
    fn values_are_checked_together() {
        let ahead: Accept = "ahead".parse().unwrap();
        let extras = Extras {
            order: AcceptOrder::HIGH_FIRST,
            read_ahead: 15,
            ..Extras::default()
        };
        let good = ahead.with(extras).unwrap();
        assert_eq!(
            describe(&good),
            "ahead, all of memory, high first, read-ahead 15"
        );
        let far = Extras {
            read_ahead: 16,
            ..extras
        };
        let touching = Extras {
            touch: parse_touch("accept").unwrap(),
            ..Extras::default()
        };
        let on_touch = Accept::default().with(touching).unwrap();
        assert_eq!(describe(&on_touch), "lazy, on touch");
        let error = parse_touch("yes").unwrap_err().to_string();
        assert!(
            error.contains("\"yes\"") && error.contains("fault"),
            "{error}"
        );
        let error = ahead.with(far).unwrap_err().to_string();
        assert!(
            error.contains("16 regions") && error.contains("at most 15"),
            "{error}"
        );
        assert!(
            Accept::default().with(extras).is_err(),
            "lazy takes no order"
        );
    }
}
