//! Random histories: whatever a guest asks for, on whatever memory, it is answered, the map and the
//! hardware agree, and the machine goes on. Only the host can end it, and here the host is honest.

use accept::{Backend, Frame};
use protocols::addr::Gpa;
use protocols::exit_code::ExitCode;
use protocols::svsm::{CallId, ResultCode};

use super::model::{AREA, BOOT, END, GUEST, GUEST_PAGES, OWN_PAGE, VMSA};
use super::world::{World, in_world, rescind_2m, rescind_4k, validate_2m, validate_4k};
use crate::protocol::{Answer, GuestMemory, Registers, Vcpus};

/// Calls of each history.
const CALLS: u32 = 3000;

/// A xorshift generator: the same history each time for the same seed.
struct Random(u64);

impl Random {
    fn draw(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.draw() % bound
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// A page-aligned address, mostly one of the guest's.
    fn page(&mut self) -> u64 {
        match self.below(12) {
            0 => OWN_PAGE,
            1 => VMSA,
            2 => AREA,
            3 => 0,
            4 => END - 0x1000 + (self.below(3) << 12),
            5 => 0x40_0000 + (self.below(1024) << 12),
            6 => self.draw() & !0xfff,
            _ => GUEST + (self.below(GUEST_PAGES) << 12),
        }
    }

    /// An address as a register of a call, mostly page aligned.
    fn address(&mut self) -> u64 {
        match self.below(8) {
            0 => self.page() + self.below(512) * 8,
            1 => self.draw(),
            _ => self.page(),
        }
    }

    fn entry(&mut self) -> u64 {
        let region = 0x40_0000 * (1 + self.below(4));
        let entry = match self.below(8) {
            0 => validate_2m(region),
            1 => rescind_2m(region),
            2..=4 => validate_4k(self.page()),
            5 | 6 => rescind_4k(self.page()),
            _ => self.draw(),
        };
        entry | self.below(2) << 3
    }
}

/// What the guest has before the call: a list or a VMSA where it can write, and a host that
/// changes what an honest host may change.
fn prepare(world: &World<'_>, random: &mut Random, address: u64) {
    world.machine.large.set(random.one_in(2));
    world
        .machine
        .room
        .set(if random.one_in(16) { 0 } else { 8 });
    match random.below(64) {
        0..8 => world.machine.flush_fails.set(random.below(4) as u32),
        8 => {
            let status = random.below(20) as u32 + 1;
            world.machine.adjust_fails.set(Some(status));
        }
        _ => {}
    }
    let page = address & !0xfff;
    if page >= END || !world.machine.page(page).granted {
        return;
    }
    if random.one_in(2) {
        world.write_vmsa(page, |vmsa| {
            if random.one_in(4) {
                vmsa.vmpl = random.draw() as u8;
            }
        });
    } else {
        let list = page + (address & 0xff8);
        let room = (page + 0x1000 - list) / 8 - 1;
        let count = random.below(6).min(room);
        let entries: Vec<u64> = (0..count).map(|_| random.entry()).collect();
        let claimed = match random.below(10) {
            0 => random.draw() as u16,
            _ => count as u16,
        };
        world.write_list(list, claimed, random.below(2) as u16, &entries);
    }
}

#[test]
fn i7_no_history_of_calls_ends_the_machine_or_parts_map_and_hardware() {
    for seed in 1..=4 {
        let mut random = Random(0x9e37_79b9_7f4a_7c15 ^ seed);
        in_world(|world| history(world, &mut random));
    }
}

fn history(world: &World<'_>, random: &mut Random) {
    let mut succeeded = 0;
    for number in 0..CALLS {
        let address = random.address();
        prepare(world, random, address);
        let call = match random.below(10) {
            0 => random.draw(),
            1 => random.below(1 << 3) << 32 | random.below(8),
            2..=5 => 1,
            call => call & 7,
        };
        let registers = Registers {
            rax: call,
            rcx: address,
            rdx: random.address(),
            r8: random.below(3),
            r9: random.draw(),
        };
        let area = (&world.machine).calling_area(BOOT).expect("has one").gpa();
        let pending = if random.one_in(16) {
            random.draw() as u8
        } else {
            1
        };
        let write = (&world.machine).write_u8(Gpa::new(area), pending);
        write.expect("the calling area is there");
        let exit = if random.one_in(16) {
            ExitCode(random.draw())
        } else {
            ExitCode::VMGEXIT
        };
        match world.exit(exit, &registers) {
            Answer::Return(answer) => {
                assert_ne!(pending, 0);
                succeeded += u32::from(ResultCode::decode(answer.rax) == ResultCode::SUCCESS);
                let after = (&world.machine).calling_area(BOOT).map(Frame::gpa);
                assert_eq!(world.machine.bytes(after.expect("has one"), 1), [0]);
            }
            Answer::Resume => assert!(pending == 0 || exit != ExitCode::VMGEXIT),
            Answer::Gone => assert_eq!(CallId::decode(call).call, 3, "it deleted itself"),
            Answer::Terminate(reason) => panic!("call {number} {registers:x?}: {reason:?}"),
        }
        world.machine.flush_fails.set(0);
        world.machine.adjust_fails.set(None);
    }
    (&world.machine).flush().expect("what is owed at the end");
    assert!(
        succeeded > CALLS / 20,
        "the history does something: {succeeded}"
    );
}
