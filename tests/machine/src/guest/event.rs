//! Events that are being delivered when something else happens (APM 15.20, 8.2.9).

/// What kind of event (TYPE of EVENTINJ and EXITINTINFO).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// An external interrupt.
    Interrupt,
    /// An NMI.
    Nmi,
    /// An exception.
    Exception,
    /// INT n.
    Software,
}

/// An event as EVENTINJ and EXITINTINFO have it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Event {
    /// What kind.
    pub kind: Kind,
    /// Vector.
    pub vector: u8,
    /// Error code, if one is pushed.
    pub error: Option<u32>,
}

/// Vectors that the machine injects or tells apart (APM table 8-1).
pub mod vector {
    /// Non-maskable interrupt.
    pub const NMI: u8 = 2;
    /// Invalid opcode.
    pub const UD: u8 = 6;
    /// Double fault.
    pub const DF: u8 = 8;
    /// General protection.
    pub const GP: u8 = 13;
    /// Page fault.
    pub const PF: u8 = 14;
    /// First vector of external interrupts.
    pub const FIRST_EXTERNAL: u8 = 32;
}

const TYPE_SHIFT: u32 = 8;
const ERROR_VALID: u64 = 1 << 11;
const VALID: u64 = 1 << 31;

/// What becomes of an event whose delivery ended in #VC, which is delivered instead.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Interrupted {
    /// Nothing: it comes again when its instruction is executed again.
    Repeats,
    /// It has been taken from its source and is to be delivered later.
    Pending(Event),
    /// Both together are #DF.
    DoubleFault,
    /// It was #DF: the processor shuts down.
    Shutdown,
}

impl Event {
    /// An exception.
    pub const fn exception(vector: u8, error: Option<u32>) -> Self {
        Self {
            kind: Kind::Exception,
            vector,
            error,
        }
    }

    /// An NMI.
    pub const NMI: Self = Self {
        kind: Kind::Nmi,
        vector: vector::NMI,
        error: None,
    };

    /// The value for EVENTINJ.
    pub fn encode(self) -> u64 {
        let kind = match self.kind {
            Kind::Interrupt => 0,
            Kind::Nmi => 2,
            Kind::Exception => 3,
            Kind::Software => 4,
        };
        let error = self
            .error
            .map_or(0, |code| ERROR_VALID | u64::from(code) << 32);
        VALID | kind << TYPE_SHIFT | u64::from(self.vector) | error
    }

    /// Reads EVENTINJ or EXITINTINFO, in which TCG reports external interrupts and NMIs that go
    /// straight to the guest as exceptions (facts: tcg-svm.md §6).
    pub fn decode(raw: u64) -> Option<Self> {
        if raw & VALID == 0 {
            return None;
        }
        let vector = raw as u8;
        let kind = match raw >> TYPE_SHIFT & 7 {
            0 => Kind::Interrupt,
            2 => Kind::Nmi,
            3 if vector >= vector::FIRST_EXTERNAL => Kind::Interrupt,
            3 if vector == vector::NMI => Kind::Nmi,
            3 => Kind::Exception,
            4 => Kind::Software,
            _ => return None,
        };
        let error = (raw & ERROR_VALID != 0).then_some((raw >> 32) as u32);
        Some(Self {
            kind,
            vector,
            error,
        })
    }

    /// What becomes of this event when #VC is due instead. #VC is taken as contributory.
    pub const fn after_vc(self) -> Interrupted {
        match (self.kind, self.vector) {
            (Kind::Interrupt | Kind::Nmi, _) => Interrupted::Pending(self),
            (Kind::Exception, vector::DF) => Interrupted::Shutdown,
            // Page faults and the contributory ones: #DE, #TS, #NP, #SS, #GP.
            (Kind::Exception, 0 | 10..=14) => Interrupted::DoubleFault,
            (Kind::Exception | Kind::Software, _) => Interrupted::Repeats,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_survive_encoding() {
        for event in [
            Event::NMI,
            Event::exception(vector::PF, Some(0x11)),
            Event::exception(vector::UD, None),
            Event {
                kind: Kind::Interrupt,
                vector: 0xEC,
                error: None,
            },
            Event {
                kind: Kind::Software,
                vector: 0x80,
                error: None,
            },
        ] {
            assert_eq!(Event::decode(event.encode()), Some(event));
        }
        assert_eq!(Event::exception(vector::GP, Some(0)).encode(), 0x8000_0B0D);
        assert_eq!(Event::decode(0x7FFF_0B0D), None);
    }

    #[test]
    fn interrupts_that_tcg_calls_exceptions_are_interrupts() {
        let kind = |raw| Event::decode(raw).map(|event| event.kind);
        assert_eq!(kind(0x8000_0355), Some(Kind::Interrupt));
        assert_eq!(kind(0x8000_0302), Some(Kind::Nmi));
        assert_eq!(kind(0x8000_0306), Some(Kind::Exception));
        assert_eq!(kind(0x8000_0480), Some(Kind::Software));
    }

    #[test]
    fn only_what_came_from_outside_waits() {
        let exception = |vector| Event::exception(vector, None).after_vc();
        let timer = Event::decode(0x8000_0055).unwrap();
        assert_eq!(timer.after_vc(), Interrupted::Pending(timer));
        assert_eq!(Event::NMI.after_vc(), Interrupted::Pending(Event::NMI));
        for vector in [1, 3, 6, 7, 16, 19] {
            assert_eq!(exception(vector), Interrupted::Repeats, "{vector}");
        }
        for vector in [0, 10, 11, 12, 13, 14] {
            assert_eq!(exception(vector), Interrupted::DoubleFault, "{vector}");
        }
        assert_eq!(exception(vector::DF), Interrupted::Shutdown);
        let int_80 = Event::decode(0x8000_0480).unwrap();
        assert_eq!(int_80.after_vc(), Interrupted::Repeats);
    }
}
