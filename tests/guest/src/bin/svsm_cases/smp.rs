//! Calls on several processors at once. With one processor more than the first there are two
//! callers, with three more there are four.

use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use guest::harness::{Case, Finding, Verdict, case, expect};
use guest::memory::{self, page_of};
use guest::svsm::{self, Caller, Registers};
use protocols::addr::{Gpa, LARGE_PAGE_SIZE, PAGE_SIZE, PageSize};
use protocols::svsm::{CoreCall, PvalidateEntry, ResultCode};

use crate::setup::{
    accepted_region, done, expect_guests, expect_not_accepted, ignoring, rescind, validate,
};
use crate::team::{Member, Team, create_ok, meet};
use crate::vcpus::{delete, good_vmsa, put_vmsa};

/// Memory that several ask for.
pub const MEMORY: &[Case] = &[
    case("smp_all_accept", "design.md §6, I2", all_accept),
    case("smp_one_page_for_all", "design.md I1, I2", one_page_for_all),
    case(
        "smp_accept_against_rescind",
        "design.md I1, I3",
        accept_against_rescind,
    ),
    case(
        "smp_one_region_in_two_sizes",
        "design.md I1, I3",
        one_region_in_two_sizes,
    ),
    case(
        "smp_one_region_asked_for_in_two_sizes",
        "design.md I1, I2",
        asked_for_in_two_sizes,
    ),
];

/// Processors that several make and delete.
pub const PROCESSORS: &[Case] = &[
    case(
        "smp_create_and_delete",
        "svsm.md §4.2, §4.3",
        create_and_delete,
    ),
    case(
        "smp_delete_while_running",
        "svsm.md §4.3",
        delete_while_running,
    ),
    case(
        "create_without_delete",
        "svsm.md §4.2",
        create_without_delete,
    ),
];

/// Memory that the jobs share.
static SHARED: AtomicU64 = AtomicU64::new(0);
static SUCCESSES: AtomicUsize = AtomicUsize::new(0);
static STOP: AtomicBool = AtomicBool::new(false);

fn shared() -> Gpa {
    Gpa::new(SHARED.load(Ordering::SeqCst))
}

fn share(regions: u64) -> Gpa {
    let region = memory::fresh_regions(regions);
    SHARED.store(region.get(), Ordering::SeqCst);
    region
}

fn expect_done(caller: Caller, entries: &[PvalidateEntry]) -> Verdict {
    expect("PVALIDATE", caller.pvalidate(entries)?, ResultCode::SUCCESS)
}

fn all_accept() -> Verdict {
    Team::with(|team| {
        share(team.members() as u64);
        team.all(|Member { number, caller }| {
            let own = Gpa::new(shared().get() + number as u64 * LARGE_PAGE_SIZE);
            for round in 0..3 {
                expect_done(caller, &[validate(own, PageSize::Size2M)])?;
                memory::expect_zero(own.get(), LARGE_PAGE_SIZE)?;
                memory::fill(own.get(), LARGE_PAGE_SIZE, round)?;
                memory::expect_filled(own.get(), LARGE_PAGE_SIZE, round)?;
                expect_done(caller, &[rescind(own, PageSize::Size2M)])?;
                let pages: [_; 16] = core::array::from_fn(|page| {
                    validate(page_of(own, page as u64), PageSize::Size4K)
                });
                expect_done(caller, &pages)?;
                memory::expect_zero(own.get(), 16 * PAGE_SIZE)?;
                expect_done(caller, &pages.map(|entry| PvalidateEntry(entry.0 & !4)))?;
            }
            Ok(())
        })
    })
}

fn one_page_for_all() -> Verdict {
    const ROUNDS: u64 = 64;
    Team::with(|team| {
        share(1);
        SUCCESSES.store(0, Ordering::SeqCst);
        team.all(|Member { number, caller }| {
            let mut verdict = Ok(());
            for round in 0..ROUNDS {
                let page = page_of(shared(), round);
                meet();
                // Whatever happens, everybody comes to the next meeting.
                verdict = verdict.and(
                    caller
                        .pvalidate(&[validate(page, PageSize::Size4K)])
                        .and_then(|code| match code {
                            ResultCode::SUCCESS => {
                                SUCCESSES.fetch_add(1, Ordering::SeqCst);
                                memory::expect_zero(page.get(), PAGE_SIZE)
                            }
                            code => expect("PVALIDATE", code, ResultCode::FAIL_NO_CHANGE),
                        }),
                );
                meet();
                if number == 0 {
                    let so_far = SUCCESSES.load(Ordering::SeqCst);
                    verdict = verdict.and(expect("accepted once", so_far as u64, round + 1));
                }
                meet();
            }
            verdict
        })
    })
}

fn accept_against_rescind() -> Verdict {
    Team::with(|team| {
        let region = share(1);
        team.all(|Member { number, caller }| {
            let page = page_of(shared(), 7);
            let entry = match number % 2 {
                0 => validate(page, PageSize::Size4K),
                _ => rescind(page, PageSize::Size4K),
            };
            (0..60).try_for_each(|_| expect_done(caller, &[ignoring(entry)]))
        })?;
        let page = page_of(region, 7);
        done(&[ignoring(rescind(page, PageSize::Size4K))])?;
        expect_not_accepted(page)
    })
}

fn one_region_in_two_sizes() -> Verdict {
    Team::with(|team| {
        let region = share(1);
        team.all(|Member { number, caller }| {
            for round in 0..12 {
                let page = page_of(shared(), 100 + round);
                let entry = match number % 2 {
                    0 => validate(shared(), PageSize::Size2M),
                    _ => rescind(page, PageSize::Size4K),
                };
                expect_done(caller, &[ignoring(entry)])?;
            }
            Ok(())
        })?;
        done(&[ignoring(validate(region, PageSize::Size2M))])?;
        for index in [0, 100, 105, 511] {
            expect_guests(page_of(region, index))?;
        }
        Ok(())
    })
}

/// Half of the team asks for a region, half for one of its pages: one member gets it. Then all ask
/// again for what is missing.
fn asked_for_in_two_sizes() -> Verdict {
    const ROUNDS: u64 = 16;
    Team::with(|team| {
        share(ROUNDS);
        SUCCESSES.store(0, Ordering::SeqCst);
        team.all(|Member { number, caller }| {
            let mut verdict = Ok(());
            for round in 0..ROUNDS {
                let region = Gpa::new(shared().get() + round * LARGE_PAGE_SIZE);
                let page = page_of(region, 9);
                let entry = match number % 2 {
                    0 => validate(region, PageSize::Size2M),
                    _ => validate(page, PageSize::Size4K),
                };
                meet();
                let asked = caller.pvalidate(&[entry]).and_then(|code| match code {
                    ResultCode::SUCCESS => {
                        SUCCESSES.fetch_add(1, Ordering::SeqCst);
                        memory::expect_zero(page.get(), PAGE_SIZE)?;
                        memory::fill(page.get(), PAGE_SIZE, round)
                    }
                    code => expect("PVALIDATE", code, ResultCode::FAIL_NO_CHANGE),
                });
                meet();
                let so_far = SUCCESSES.load(Ordering::SeqCst);
                verdict = verdict
                    .and(asked)
                    .and(expect("accepted once", so_far as u64, round + 1))
                    .and(expect_done(caller, &[ignoring(entry)]));
                meet();
                if number == 0 {
                    verdict = verdict
                        .and(expect_guests(region))
                        .and(expect_guests(page))
                        .and(memory::expect_filled(page.get(), PAGE_SIZE, round));
                }
                meet();
            }
            verdict
        })
    })
}

/// VMSAs that one member makes in `create_and_delete`, and their calling areas.
const MADE: u64 = 10;

fn made(number: usize, n: u64) -> (Gpa, Gpa) {
    let region = Gpa::new(shared().get() + number as u64 * LARGE_PAGE_SIZE);
    (page_of(region, 1 + 2 * n), page_of(region, 2 + 2 * n))
}

fn create_and_delete() -> Verdict {
    Team::with(|team| {
        share(team.members() as u64);
        // All for the same processor, whose records they fight for.
        team.all(|Member { number, caller }| {
            let (first, _) = made(number, 0);
            let region = Gpa::new(first.get() - PAGE_SIZE);
            expect_done(caller, &[validate(region, PageSize::Size2M)])?;
            for round in 0..3 {
                for n in 0..MADE {
                    let (vmsa, area) = made(number, n);
                    put_vmsa(vmsa, &good_vmsa())?;
                    let registers = Registers {
                        rcx: vmsa.get(),
                        rdx: area.get(),
                        r8: 0,
                        r9: round,
                    };
                    let code = caller.call(CoreCall::CREATE_VCPU, registers)?;
                    expect("CREATE_VCPU", code, ResultCode::SUCCESS)?;
                }
                for n in 0..MADE {
                    let (vmsa, _) = made(number, n);
                    // Most have made room for newer ones already.
                    match caller.call(CoreCall::DELETE_VCPU, Registers::rcx(vmsa.get()))? {
                        ResultCode::SUCCESS | ResultCode::INVALID_PARAMETER => {}
                        code => expect("DELETE_VCPU", code, ResultCode::SUCCESS)?,
                    }
                }
            }
            Ok(())
        })?;
        for number in 0..team.members() {
            for n in 0..MADE {
                let (vmsa, area) = made(number, n);
                expect_guests(vmsa)?;
                expect_guests(area)?;
            }
        }
        Ok(())
    })
}

/// Calls without end. Nothing of the team is locked meanwhile, so it may vanish at any moment.
fn call_until_stop(Member { caller, .. }: Member) -> Verdict {
    while !STOP.load(Ordering::SeqCst) {
        let query = caller.call(CoreCall::QUERY_PROTOCOL, Registers::rcx(1))?;
        expect("QUERY_PROTOCOL", query, ResultCode::SUCCESS)?;
    }
    Ok(())
}

fn delete_while_running() -> Verdict {
    Team::with(|team| {
        STOP.store(false, Ordering::SeqCst);
        team.give(call_until_stop);
        let first = Caller(svsm::calling_area());
        let verdict = (0..100).try_for_each(|_| {
            team.workers().try_for_each(|number| {
                let vmsa = team.vmsa(number);
                match first.call_once(CoreCall::DELETE_VCPU, Registers::rcx(vmsa.get()))? {
                    ResultCode::BUSY | ResultCode::FAIL_IN_USE => Ok(()),
                    // Between its exit and the moment VMPL0 takes its call the worker does not
                    // run, and how long that is decides the host: then it may be deleted, and
                    // its call is never answered. All else has to go on.
                    ResultCode::SUCCESS => {
                        team.lose(number);
                        expect_guests(vmsa)?;
                        team.revive(number, call_until_stop)
                    }
                    code => expect("DELETE_VCPU", code, ResultCode::FAIL_IN_USE),
                }
            })
        });
        STOP.store(true, Ordering::SeqCst);
        verdict.and(team.collect())
    })
}

fn create_without_delete() -> Verdict {
    const COUNT: u64 = 40;
    let region = accepted_region()?;
    let pages = || (0..COUNT).map(|n| (page_of(region, 1 + 2 * n), page_of(region, 2 + 2 * n)));
    for (vmsa, area) in pages() {
        put_vmsa(vmsa, &good_vmsa())?;
        create_ok(vmsa, area, 1)?;
    }
    let mut deleted = 0;
    for (vmsa, area) in pages() {
        match delete(vmsa.get())? {
            ResultCode::SUCCESS => deleted += 1,
            code => expect("DELETE_VCPU", code, ResultCode::INVALID_PARAMETER)?,
        }
        expect_guests(vmsa)?;
        expect_guests(area)?;
    }
    if deleted == 0 || deleted == COUNT {
        return Err(Finding::new(format_args!(
            "{deleted} of {COUNT} VMSAs were on record at the end"
        )));
    }
    Ok(())
}
