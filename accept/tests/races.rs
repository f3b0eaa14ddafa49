//! Many vCPUs at once: who wins, who waits, and for how long.
#![cfg(not(loom))]

mod model;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use accept::{
    AdjustFault, Backend, Block, Error, Fault, NotFlushed, OnNoChange, PageState, Role,
    ValidateFault,
};
use model::race::{PATIENCE, one_of_many_wins_a_region, random_work_never_validates_twice};
use model::{Model, frame, large, page, with_engine};

/// How long a test waits for its other thread before it fails.
const LONG_ENOUGH: Duration = Duration::from_secs(20);

#[test]
fn i2_one_of_many_wins_a_region() {
    one_of_many_wins_a_region(|on_large| Model::shared(1, on_large));
}

#[test]
fn i1_i2_random_work_on_few_regions_never_validates_twice() {
    random_work_never_validates_twice(&Model::shared(2, false));
}

#[test]
fn a_page_on_its_way_out_is_waited_for_not_called_owned() {
    // While a page leaves, the map calls it Owned; a concurrent request must never say so.
    let model = Model::shared(1, true);
    with_engine(&model, 1, PATIENCE, |engine| {
        engine.accept(page(0), OnNoChange::Fail).expect("accepted");
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                for _ in 0..500 {
                    let done = engine
                        .rescind(page(0), OnNoChange::Ignore)
                        .expect("rescinded");
                    if let Some(owed) = done.flush {
                        engine.flush(owed).expect("flushed");
                    }
                    engine
                        .accept(page(0), OnNoChange::Ignore)
                        .expect("accepted");
                }
                over.store(true, Ordering::Relaxed);
            });
            while !over.load(Ordering::Relaxed) {
                match engine.accept(page(0), OnNoChange::Fail) {
                    Ok(_) | Err(Error::NoChange) => {}
                    Err(error) => panic!("{error:?}"),
                }
            }
        });
        model.assert_agrees(engine);
    });
}

/// A platform that can be stopped in the middle of an instruction, like a vCPU that the host does
/// not run.
struct Stoppable<'a> {
    model: &'a Model,
    scrubbing: Option<mpsc::SyncSender<()>>,
    flushing: Option<mpsc::SyncSender<()>>,
    resume: std::sync::Mutex<mpsc::Receiver<()>>,
}

impl Stoppable<'_> {
    fn stop(&self, at: Option<&mpsc::SyncSender<()>>) {
        if let Some(at) = at
            && at.try_send(()).is_ok()
        {
            let resumed = self.resume.lock().unwrap().recv_timeout(LONG_ENOUGH);
            resumed.expect("the test resumes in time");
        }
    }
}

impl Backend for Stoppable<'_> {
    fn validate(&self, block: Block) -> Result<(), ValidateFault> {
        self.model.validate(block)
    }
    fn rescind(&self, block: Block) -> Result<(), ValidateFault> {
        self.model.rescind(block)
    }
    fn scrub(&self, block: Block) -> Result<(), Fault> {
        self.stop(self.scrubbing.as_ref());
        self.model.scrub(block)
    }
    fn grant(&self, block: Block) -> Result<(), AdjustFault> {
        self.model.grant(block)
    }
    fn revoke(&self, block: Block) -> Result<(), AdjustFault> {
        self.model.revoke(block)
    }
    fn flush(&self) -> Result<(), NotFlushed> {
        self.stop(self.flushing.as_ref());
        self.model.flush()
    }
}

#[test]
fn i12_who_waits_for_a_stopped_vcpu_waits_a_bounded_time() {
    let model = Model::new(2, true);
    let (stopped, wait) = mpsc::sync_channel(1);
    let (resume, resumed) = mpsc::channel();
    let backend = Stoppable {
        model: &model,
        scrubbing: Some(stopped),
        flushing: None,
        resume: resumed.into(),
    };
    with_engine(backend, 2, 1000, |engine| {
        engine
            .record_launch(frame(5), 1, PageState::Accepted)
            .expect("recorded");
        thread::scope(|scope| {
            let slow = scope.spawn(|| engine.accept(page(6), OnNoChange::Fail));
            wait.recv_timeout(LONG_ENOUGH)
                .expect("the slow one holds the lock");
            for block in [page(6), page(7), large(0)] {
                assert_eq!(engine.rescind(block, OnNoChange::Fail), Err(Error::Busy));
            }
            assert_eq!(engine.take(frame(5), Role::Vmsa), Err(Error::Busy));
            assert_eq!(
                engine.record_launch(frame(0), 1, PageState::Owned),
                Err(Error::Busy)
            );
            // The lock-free test still answers, in the very region.
            assert_eq!(
                engine.accept(page(5), OnNoChange::Fail),
                Err(Error::NoChange)
            );
            resume.send(()).expect("waiting");
            slow.join().expect("no panic").expect("accepted");
        });
        assert_eq!(engine.counters().busy, 5);
        assert_eq!(engine.state(frame(0)), Some(PageState::Unaccepted));
    });
}

#[test]
fn i12_no_lock_is_held_across_a_flush() {
    let model = Model::new(1, true);
    let (stopped, wait) = mpsc::sync_channel(1);
    let (resume, resumed) = mpsc::channel();
    let backend = Stoppable {
        model: &model,
        scrubbing: None,
        flushing: Some(stopped),
        resume: resumed.into(),
    };
    with_engine(backend, 1, 1000, |engine| {
        engine.accept(page(6), OnNoChange::Fail).expect("accepted");
        thread::scope(|scope| {
            let taking = scope.spawn(|| engine.take(frame(6), Role::Vmsa).map(drop));
            wait.recv_timeout(LONG_ENOUGH)
                .expect("the flush waits for the host");
            engine
                .accept(page(7), OnNoChange::Fail)
                .expect("the region is free");
            assert_eq!(engine.rescind(page(6), OnNoChange::Fail), Err(Error::Owned));
            resume.send(()).expect("waiting");
            taking.join().expect("no panic").expect("taken");
        });
    });
}
