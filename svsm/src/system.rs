//! What all processors share once the boot processor is done: the engine and the registry, with
//! the types they have in this build.

use accept::Engine;
use protocols::launch::Fault;
use spin::Once;

use crate::ahead::Ahead;
use crate::attestation::Line;
use crate::attestation::shared::SharedPages;
use crate::backend::WindowBackend;
use crate::guest::vmsa::{NewVmsas, VmsaWindow};
use crate::memory::guest_map::Window;
use crate::memory::layout::PageRange;
use crate::platform::snp::Snp;
use crate::protocol::Service;
use crate::vcpus::Registry;

/// The registry of the guest's processors.
pub type GuestRegistry = Registry<'static, VmsaWindow>;
/// The acceptance engine on the guest's memory.
pub type GuestEngine = Engine<'static, GuestBackend>;
/// The SVSM service.
pub type GuestService =
    Service<'static, GuestBackend, GuestMemory, &'static GuestRegistry, NewVmsas, SharedPages>;

/// The engine's backend.
#[cfg(not(feature = "faults"))]
pub type GuestBackend = WindowBackend<Snp>;
/// The engine's backend, behind the wrapper that misbehaves on purpose.
#[cfg(feature = "faults")]
pub type GuestBackend = crate::faulty::Faulty<WindowBackend<Snp>>;

/// The guest's memory for the protocols.
#[cfg(not(feature = "faults"))]
pub type GuestMemory = Window;
/// The guest's memory for the protocols, behind the wrapper that misbehaves on purpose.
#[cfg(feature = "faults")]
pub type GuestMemory = crate::faulty::FaultyMemory<Window>;

/// The shared parts.
pub struct System {
    /// Owner of the acceptance map.
    pub engine: GuestEngine,
    /// Owner of the guest's processors.
    pub registry: &'static GuestRegistry,
    /// What is accepted before the guest asks.
    pub ahead: Ahead,
    /// The line to the security processor.
    pub line: &'static Line<SharedPages>,
    /// Where VMSAs are mapped.
    pub vmsas: VmsaWindow,
    /// The pages of the processors' GHCBs, by number of the processor.
    pub ghcbs: PageRange,
    /// The deliberate fault of a test build.
    pub fault: Fault,
}

static SYSTEM: Once<System> = Once::new();

/// Makes the parts known to all processors. Only the first call counts.
pub fn publish(system: System) -> &'static System {
    SYSTEM.call_once(|| system)
}

/// The parts, once they are published.
#[must_use]
pub fn get() -> Option<&'static System> {
    SYSTEM.get()
}

impl System {
    /// The service on these parts.
    #[must_use]
    pub fn service(&'static self) -> GuestService {
        let vmsa_pages = NewVmsas {
            engine: &self.engine,
        };
        Service::new(
            &self.engine,
            guest_memory(self.fault),
            self.registry,
            vmsa_pages,
            &self.ahead,
            self.line,
        )
    }
}

/// The backend that an engine was made on.
#[cfg(not(feature = "faults"))]
#[must_use]
pub fn window_backend(engine: &GuestEngine) -> &WindowBackend<Snp> {
    engine.backend()
}

/// The backend that an engine was made on, behind the wrapper.
#[cfg(feature = "faults")]
#[must_use]
pub fn window_backend(engine: &GuestEngine) -> &WindowBackend<Snp> {
    engine.backend().inner()
}

/// Makes the engine's backend; a fault other than none was refused before.
#[cfg(not(feature = "faults"))]
#[must_use]
pub fn backend(inner: WindowBackend<Snp>, _: Fault) -> GuestBackend {
    inner
}

/// Makes the engine's backend, with a deliberate fault.
#[cfg(feature = "faults")]
#[must_use]
pub fn backend(inner: WindowBackend<Snp>, fault: Fault) -> GuestBackend {
    crate::faulty::Faulty::new(inner, fault)
}

#[cfg(not(feature = "faults"))]
fn guest_memory(_: Fault) -> GuestMemory {
    Window
}

#[cfg(feature = "faults")]
fn guest_memory(fault: Fault) -> GuestMemory {
    crate::faulty::FaultyMemory::new(Window, fault)
}
