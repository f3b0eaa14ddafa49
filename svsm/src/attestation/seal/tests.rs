//! What is left on the stack: the same message is sealed and opened with two keys, and what then lies below is
//! compared. Where it differs, it depends on the key.

use std::boxed::Box;
use std::fs::File;
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::vec;
use std::vec::Vec;

use protocols::amd_sp::message::{MessageHeader, MessageType};

use super::*;

/// Bytes that are looked at: more than any of it reaches.
const LOOK: usize = 128 << 10;
/// Bytes between what is looked at and the test, for the looking.
const DISTANCE: usize = 16 << 10;
const SIZE: usize = 96;

type Act = fn(&mut Message) -> bool;

/// A message and its key. Each lies where it lay the time before, so that its address does not differ.
struct Message {
    key: Key,
    header: MessageHeader,
    payload: [u8; SIZE],
}

impl Message {
    fn start(&mut self, key: Key, is_sealed: bool) {
        self.key = key;
        self.header = MessageHeader::new(MessageType::REPORT_REQUEST, SIZE as u16, 0, 1);
        self.payload = [0x11; SIZE];
        if is_sealed {
            assert!(seal(&self.key, &mut self.header, &mut self.payload));
        }
    }
}

/// About where the frame of whoever calls this ends.
#[inline(never)]
fn end_of_frame() -> usize {
    let mark = 0_u8;
    &raw const *black_box(&mark) as usize
}

/// Acts, and returns where the stack below began.
#[inline(never)]
fn act_and_tell(act: Act, message: &mut Message) -> usize {
    let end = end_of_frame();
    assert!(act(message));
    end
}

/// The same, so far down that looking at it does not change it.
#[inline(never)]
fn act_below(act: Act, message: &mut Message) -> usize {
    let distance = [0_u8; DISTANCE];
    black_box(&distance);
    let end = act_and_tell(act, message);
    black_box(&distance);
    end
}

/// How far below the end of its caller's frame bytes depend on the key once `act` is done; none if none do.
fn depends_on_key(act: Act, is_sealed: bool) -> Option<usize> {
    let memory = File::open("/proc/self/mem").expect("Linux");
    let mut message = Box::new(Message {
        key: [0; 32],
        header: MessageHeader::new(MessageType::REPORT_REQUEST, SIZE as u16, 0, 1),
        payload: [0; SIZE],
    });
    let mut looks: [Vec<u8>; 4] = std::array::from_fn(|_| vec![0; LOOK]);
    let mut first_end = None;
    // The first is for what is done only once; two more for what differs whatever the key is.
    for (key, look) in [1, 1, 1, 2].into_iter().zip(&mut looks) {
        message.start([key; 32], is_sealed);
        zeroize_stack::<{ LOOK + 2 * DISTANCE }>();
        let end = act_below(act, &mut message);
        assert_eq!(*first_end.get_or_insert(end), end);
        memory.read_exact_at(look, (end - LOOK) as u64).unwrap();
    }
    let [_, same, one, other] = looks;
    assert!(same == one, "the instrument is not steady");
    let differs = one.iter().zip(&other).position(|(one, other)| one != other);
    differs.map(|at| LOOK - at)
}

fn seal_it(message: &mut Message) -> bool {
    seal(&message.key, &mut message.header, &mut message.payload)
}

fn open_it(message: &mut Message) -> bool {
    open(&message.key, &message.header, &mut message.payload)
}

#[test]
fn nothing_on_the_stack_depends_on_the_key() {
    assert_eq!(depends_on_key(seal_it, false), None);
    assert_eq!(depends_on_key(open_it, true), None);
}

/// The instrument sees what is left if nobody wipes it, and it is not near the end of what is wiped.
#[test]
fn much_on_the_stack_depends_on_the_key_before_it_is_wiped() {
    let sealed: Act = |message| sealed(&message.key, &mut message.header, &mut message.payload);
    let opened: Act = |message| opened(&message.key, &message.header, &mut message.payload);
    for (act, is_sealed) in [(sealed, false), (opened, true)] {
        let depth = depends_on_key(act, is_sealed).expect("the cipher uses the stack");
        std::println!("{depth} bytes deep");
        assert!(depth < STACK * 3 / 4, "{depth} bytes of {STACK}");
    }
}
