//! Further processors at VMPL1 that make calls at the same time as the first.
//!
//! A [`Team`] is the first processor and one worker on each other processor of the machine, each
//! with a VMSA, a calling area and a stack. Workers wait for jobs; while they wait they leave to
//! the host again and again, as an idle processor does. Workers use no exceptions as values and
//! no console: both are the first processor's.

use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use guest::ghcb::{self, Page, Reply, change_page_state};
use guest::harness::{Finding, Verdict, expect};
use guest::memory::{self, page_of};
use guest::svsm::{self, Caller};
use protocols::addr::{Gpa, PageSize, Vmpl};
use protocols::exit_code::ExitCode;
use protocols::ghcb::PageOperation;
use protocols::ghcb::event::{ApCreation, ApRequest};
use protocols::ghcb::msr::Request;
use protocols::ghcb::page::Field;
use protocols::svsm::{CoreCall, ResultCode};
use protocols::vmsa::{Efer, Segment, SegmentAttributes, SevFeatures, Vmsa};
use spin::{Mutex, Once};
use x86_64::instructions::tables::{sgdt, sidt};
use x86_64::registers::control::{Cr0, Cr3, Cr4, Efer as ProcessorEfer};

use crate::setup::{self, done, rescind, validate};
use crate::vcpus::{create, delete, good_vmsa, put_vmsa};

/// Workers at most; a machine may have fewer processors.
const MAX_WORKERS: usize = 3;
/// Pages of a worker's own region: the VMSA and the calling area, and the stack up to its end.
const VMSA_PAGE: u64 = 1;
const AREA_PAGE: u64 = 3;
const STACK_END_PAGE: u64 = 16;
/// Turns of a wait before the processor leaves to the host once.
const TURNS_PER_BREATH: u32 = 1000;

/// What a member of a team does.
pub type Job = fn(Member) -> Verdict;

/// One processor of a team.
#[derive(Clone, Copy)]
pub struct Member {
    /// Its number; 0 is the first processor.
    pub number: usize,
    /// How it makes calls.
    pub caller: Caller,
}

/// What a worker is given, and what it gives back.
struct Desk {
    job: Mutex<Option<Job>>,
    verdict: Mutex<Option<Verdict>>,
}

static DESKS: [Desk; MAX_WORKERS] = [const {
    Desk {
        job: Mutex::new(None),
        verdict: Mutex::new(None),
    }
}; MAX_WORKERS];
/// First page of each worker's region.
static HOMES: [Mutex<Gpa>; MAX_WORKERS] = [const { Mutex::new(Gpa::new(0)) }; MAX_WORKERS];
/// Workers that may be stopped.
static PARKED: [AtomicBool; MAX_WORKERS] = [const { AtomicBool::new(false) }; MAX_WORKERS];
/// Workers that nobody hears of any more: their VMSA was deleted, and they were not started again.
static LOST: [AtomicBool; MAX_WORKERS] = [const { AtomicBool::new(false) }; MAX_WORKERS];
/// Members of the team, the first processor included.
static MEMBERS: AtomicUsize = AtomicUsize::new(1);
/// How often a member has come to a meeting.
static ARRIVALS: AtomicUsize = AtomicUsize::new(0);

/// Leaves to the host and comes back.
pub fn breathe() {
    ghcb::msr_call(Request::SevInfo.encode());
}

/// Waits until `there` is true.
fn wait_until(mut there: impl FnMut() -> bool) {
    loop {
        for _ in 0..TURNS_PER_BREATH {
            if there() {
                return;
            }
        }
        breathe();
    }
}

/// Waits until all members are here. Every member has to come, whatever it found before.
pub fn meet() {
    let members = MEMBERS.load(Ordering::SeqCst);
    let mine = ARRIVALS.fetch_add(1, Ordering::SeqCst);
    let all = (mine / members + 1) * members;
    wait_until(|| ARRIVALS.load(Ordering::SeqCst) >= all);
}

/// Where a worker waits for its end, without any lock in its hands.
fn park(member: Member) -> Verdict {
    PARKED[member.number - 1].store(true, Ordering::SeqCst);
    loop {
        breathe();
    }
}

/// Deletes the VMSA that it runs from: the last that the guest hears of it.
fn go_home(member: Member) -> Verdict {
    let home = *HOMES[member.number - 1].lock();
    let own = page_of(home, VMSA_PAGE);
    let code = member
        .caller
        .call(CoreCall::DELETE_VCPU, svsm::Registers::rcx(own.get()))?;
    expect("came back, with", code, ResultCode::SUCCESS)?;
    Err(Finding::new(format_args!("came back from nowhere")))
}

/// Where worker `number` (from 1) starts.
extern "C" fn worker(number: usize) -> ! {
    let home = *HOMES[number - 1].lock();
    let member = Member {
        number,
        caller: Caller(page_of(home, AREA_PAGE)),
    };
    let desk = &DESKS[number - 1];
    loop {
        let job = desk.job.lock().take();
        match job {
            Some(job) => *desk.verdict.lock() = Some(job(member)),
            None => breathe(),
        }
    }
}

/// The state worker `number` starts from: as this processor is, on its own stack.
fn start_state(number: usize, home: Gpa) -> Vmsa {
    let data = Segment {
        selector: guest::trap::DATA_SELECTOR,
        attributes: SegmentAttributes::DATA32,
        limit: u32::MAX,
        base: 0,
    };
    let mut vmsa = good_vmsa();
    vmsa.cs = Segment {
        selector: guest::trap::CODE_SELECTOR,
        attributes: SegmentAttributes::CODE64,
        ..data
    };
    (vmsa.ds, vmsa.es, vmsa.ss) = (data, data, data);
    let table = |limit: u16, base: u64| Segment {
        selector: 0,
        limit: limit.into(),
        base,
        ..data
    };
    let (gdt, idt) = (sgdt(), sidt());
    vmsa.gdtr = table(gdt.limit, gdt.base.as_u64());
    vmsa.idtr = table(idt.limit, idt.base.as_u64());
    let (frame, flags) = Cr3::read_raw();
    vmsa.cr3 = frame.start_address().as_u64() | u64::from(flags);
    vmsa.cr0 = Cr0::read_raw();
    vmsa.cr4 = Cr4::read_raw();
    vmsa.efer = Efer(ProcessorEfer::read_raw()) | Efer::SVME;
    vmsa.rip = worker as *const () as u64;
    // As if called: the stack is aligned before the return address is pushed.
    vmsa.rsp = page_of(home, STACK_END_PAGE).get() - 8;
    vmsa.rdi = number as u64;
    vmsa
}

/// Asks the host for AP creation or destruction at VMPL1.
fn ask_host(request: ApRequest, number: usize, vmsa: Gpa) -> Verdict {
    static PAGE: Once<Gpa> = Once::new();
    let page = match PAGE.get() {
        Some(page) => *page,
        None => {
            // Given back before it is shared: it may have been made ready, behind the guest's back.
            let page = setup::accepted_page()?;
            done(&[rescind(page, PageSize::Size4K)])?;
            change_page_state(page, PageOperation::SHARED)?;
            *PAGE.call_once(|| page)
        }
    };
    let page = Page::at(page);
    page.register()?;
    let info = ApCreation {
        request,
        vmpl: Vmpl::VMPL1,
        apic_id: number as u32,
    };
    let features = SevFeatures::SNP_ACTIVE.0;
    let infos = [info.encode(), vmsa.get()];
    let reply = page.call(ExitCode::AP_CREATION, infos, &[(Field::RAX, features)]);
    setup::reopen_console();
    expect("reply to AP creation", reply, Reply::DONE)
}

/// The first processor and its workers.
pub struct Team {
    workers: usize,
}

impl Team {
    /// Runs `play` with a team of all processors, and dismisses it.
    pub fn with(play: impl FnOnce(&mut Team) -> Verdict) -> Verdict {
        let mut team = Team { workers: 0 };
        let mut verdict = Ok(());
        for number in 1..=MAX_WORKERS {
            match team.hire(number) {
                Ok(true) => team.workers = number,
                Ok(false) => break,
                Err(finding) => verdict = Err(finding),
            }
        }
        MEMBERS.store(team.workers + 1, Ordering::SeqCst);
        ARRIVALS.store(0, Ordering::SeqCst);
        verdict = verdict.and_then(|()| play(&mut team));
        for number in team.workers().filter(|number| !is_lost(*number)) {
            // Also after a finding: a processor left behind would disturb other cases.
            let left = team.stop(number).and_then(|()| {
                let vmsa = team.vmsa(number);
                expect("DELETE_VCPU", delete(vmsa.get())?, ResultCode::SUCCESS)
            });
            verdict = verdict.and(left);
        }
        verdict
    }

    /// How many members there are, the first processor included.
    pub fn members(&self) -> usize {
        self.workers + 1
    }

    /// The numbers of the workers.
    pub fn workers(&self) -> core::ops::RangeInclusive<usize> {
        1..=self.workers
    }

    /// The VMSA that a worker runs from.
    pub fn vmsa(&self, number: usize) -> Gpa {
        page_of(*HOMES[number - 1].lock(), VMSA_PAGE)
    }

    /// Starts a worker; false if there is no such processor.
    fn hire(&mut self, number: usize) -> Result<bool, Finding> {
        let home = memory::fresh_region();
        done(&[validate(home, PageSize::Size2M)])?;
        *HOMES[number - 1].lock() = home;
        LOST[number - 1].store(false, Ordering::SeqCst);
        self.launch(number)
    }

    fn launch(&self, number: usize) -> Result<bool, Finding> {
        let home = *HOMES[number - 1].lock();
        let (vmsa, area) = (self.vmsa(number), page_of(home, AREA_PAGE));
        put_vmsa(vmsa, &start_state(number, home))?;
        let first = Caller(svsm::calling_area());
        let registers = svsm::Registers {
            rcx: vmsa.get(),
            rdx: area.get(),
            r8: number as u64,
            r9: 0,
        };
        match first.call(CoreCall::CREATE_VCPU, registers)? {
            ResultCode::INVALID_PARAMETER => return Ok(false),
            code => expect("CREATE_VCPU", code, ResultCode::SUCCESS)?,
        }
        ask_host(ApRequest::CREATE, number, vmsa)?;
        Ok(true)
    }

    /// Has a worker delete the VMSA that it runs from. Its processor is the paravisor's from then
    /// on, and the worker may be started again ([`Team::revive`]).
    pub fn send_home(&self, number: usize) {
        let job = &DESKS[number - 1].job;
        *job.lock() = Some(go_home);
        wait_until(|| job.lock().is_none());
        self.lose(number);
    }

    /// A worker's VMSA was deleted: nobody waits for it until it is started again.
    pub fn lose(&self, number: usize) {
        LOST[number - 1].store(true, Ordering::SeqCst);
    }

    /// Starts a worker again whose VMSA was deleted in the middle of `job`, with the same pages.
    pub fn revive(&self, number: usize, job: Job) -> Verdict {
        *DESKS[number - 1].job.lock() = Some(job);
        let started = self.launch(number)?;
        expect("started again", started, true)?;
        // Until it runs, only the guest knows that the host was told to run it: who deletes it
        // now leaves the host without a VMSA, which ends the VM.
        wait_until(|| DESKS[number - 1].job.lock().is_none());
        LOST[number - 1].store(false, Ordering::SeqCst);
        Ok(())
    }

    /// Has the host stop a worker. Its VMSA stays.
    pub fn stop(&self, number: usize) -> Verdict {
        let parked = &PARKED[number - 1];
        parked.store(false, Ordering::SeqCst);
        *DESKS[number - 1].job.lock() = Some(park);
        wait_until(|| parked.load(Ordering::SeqCst));
        ask_host(ApRequest::DESTROY, number, self.vmsa(number))
    }

    /// Gives all workers a job.
    pub fn give(&self, job: Job) {
        for number in self.workers() {
            *DESKS[number - 1].verdict.lock() = None;
            *DESKS[number - 1].job.lock() = Some(job);
        }
    }

    /// Waits for the verdicts of all workers; returns the first finding.
    pub fn collect(&self) -> Verdict {
        let mut verdict = Ok(());
        for number in self.workers().filter(|number| !is_lost(*number)) {
            let mut theirs = None;
            wait_until(|| {
                theirs = DESKS[number - 1].verdict.lock().take();
                theirs.is_some()
            });
            verdict = verdict.and(theirs.unwrap_or(Ok(())));
        }
        verdict
    }

    /// Every member does the job, at the same time.
    pub fn all(&self, job: Job) -> Verdict {
        self.give(job);
        let mine = job(Member {
            number: 0,
            caller: Caller(svsm::calling_area()),
        });
        mine.and(self.collect())
    }
}

fn is_lost(number: usize) -> bool {
    LOST[number - 1].load(Ordering::SeqCst)
}

/// CREATE_VCPU by the first processor, for cases that need no team.
pub fn create_ok(vmsa: Gpa, area: Gpa, apic_id: u64) -> Verdict {
    let code = create(vmsa.get(), area.get(), apic_id)?;
    expect("CREATE_VCPU", code, ResultCode::SUCCESS)
}
