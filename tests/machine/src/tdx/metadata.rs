//! What the module remembers about the trust domain and its processors, and lets L1 read and write
//! (§6): TDG.VM.RD, VM.WR, VP.RD, VP.WR, VP.VEINFO.GET, VP.CPUIDVE.SET.

use protocols::tdx::metadata::{ConfigFlags, FieldId, TdControls};
use protocols::tdx::vmcall::register::{R8, R9, R10, RCX, RDX};
use protocols::tdx::{L2Vm, Operand, Status};

use super::Td;
use super::tdcall::Gprs;
use crate::memory::PhysicalMemory;
use crate::platform::Platform;
use crate::types::VcpuId;

/// The guest may switch the #VE of pending pages off and on; addresses have 48 bits.
const CONFIG_FLAGS: ConfigFlags = ConfigFlags::FLEXIBLE_PENDING_VE;

/// Bit 0 of NOTIFY_ENABLES: zero-step notification.
const NOTIFY_KNOWN: u64 = 1;

/// A field of the trust domain.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Field {
    ConfigFlags,
    TdControls,
    NotifyEnables,
    TopologyConfigured,
    L2Vms,
}

impl Field {
    /// In the order of TDG.VM.RD version 1, which walks through them: by class and code.
    const ALL: [(FieldId, Self); 5] = [
        (FieldId::NUM_L2_VMS, Self::L2Vms),
        (FieldId::NOTIFY_ENABLES, Self::NotifyEnables),
        (FieldId::CONFIG_FLAGS, Self::ConfigFlags),
        (FieldId::TD_CTLS, Self::TdControls),
        (FieldId::TOPOLOGY_ENUM_CONFIGURED, Self::TopologyConfigured),
    ];

    /// The field, and its place in the order.
    fn find(id: FieldId) -> Option<(usize, Self)> {
        let known = id.is_single();
        Self::ALL
            .into_iter()
            .enumerate()
            .find(|(_, (known_id, _))| known && known_id.is(id))
            .map(|(place, (_, field))| (place, field))
    }

    /// The identifier behind the one at `place`; none behind the last.
    fn id_behind(place: usize) -> FieldId {
        Self::ALL
            .get(place + 1)
            .map_or(FieldId::NONE, |&(id, _)| id)
    }
}

impl Td {
    fn read(&self, field: Field) -> u64 {
        match field {
            Field::ConfigFlags => CONFIG_FLAGS.bits(),
            Field::TdControls => self.controls.bits(),
            Field::NotifyEnables => self.notify_enables,
            Field::TopologyConfigured => 0,
            Field::L2Vms => L2Vm::ALL.len() as u64,
        }
    }

    fn write(&mut self, field: Field, value: u64) -> Status {
        match field {
            Field::TdControls => match TdControls::from_bits(value) {
                Some(controls) => {
                    self.controls = controls;
                    Status::SUCCESS
                }
                None => Status::METADATA_FIELD_VALUE_NOT_VALID,
            },
            Field::NotifyEnables if value & !NOTIFY_KNOWN == 0 => {
                self.notify_enables = value;
                Status::SUCCESS
            }
            Field::NotifyEnables => Status::METADATA_FIELD_VALUE_NOT_VALID,
            Field::ConfigFlags | Field::TopologyConfigured | Field::L2Vms => {
                Status::METADATA_FIELD_NOT_WRITABLE
            }
        }
    }
}

impl<P: PhysicalMemory> Platform<P> {
    /// TDG.VM.RD. Version 1 tells the next field's identifier, and takes the null identifier for a
    /// question after the first.
    pub(super) fn vm_rd(&self, gprs: &mut Gprs, version_1: bool) -> u64 {
        let id = FieldId(gprs[RDX]);
        gprs[R8] = 0;
        if version_1 {
            gprs[RDX] = FieldId::NONE.0;
        }
        if gprs[RCX] != 0 {
            return Operand::RCX.invalid();
        }
        if version_1 && id == FieldId::NONE {
            let [(first, _), ..] = Field::ALL;
            gprs[RDX] = first.0;
            return Status::METADATA_FIRST_FIELD_ID_IN_CONTEXT.with(0);
        }
        let (Some(td), Some((place, field))) = (self.td(), Field::find(id)) else {
            return Status::METADATA_FIELD_ID_INCORRECT.with(0);
        };
        gprs[R8] = td.read(field);
        if version_1 {
            gprs[RDX] = Field::id_behind(place).0;
        }
        Status::SUCCESS.with(0)
    }

    /// TDG.VM.WR: the bits in R9 of the field become those of R8; R8 comes back with the old value.
    pub(super) fn vm_wr(&mut self, gprs: &mut Gprs) -> u64 {
        let (id, value, mask) = (FieldId(gprs[RDX]), gprs[R8], gprs[R9]);
        gprs[R8] = 0;
        if gprs[RCX] != 0 {
            return Operand::RCX.invalid();
        }
        let (Some(td), Some((_, field))) = (self.td_mut(), Field::find(id)) else {
            return Status::METADATA_FIELD_ID_INCORRECT.with(0);
        };
        let old = td.read(field);
        let status = td.write(field, old & !mask | value & mask);
        if status == Status::SUCCESS {
            gprs[R8] = old;
        }
        status.with(0)
    }

    /// TDG.VP.RD.
    pub(super) fn vp_rd(&self, vcpu: VcpuId, gprs: &mut Gprs) -> u64 {
        let id = FieldId(gprs[RDX]);
        gprs[R8] = 0;
        gprs[RDX] = FieldId::NONE.0;
        if gprs[RCX] != 0 {
            return Operand::RCX.invalid();
        }
        let Some(value) = self.l2_field(vcpu, id) else {
            return Status::METADATA_FIELD_ID_INCORRECT.with(0);
        };
        gprs[R8] = value;
        Status::SUCCESS.with(0)
    }

    /// TDG.VP.WR.
    pub(super) fn vp_wr(&mut self, vcpu: VcpuId, gprs: &mut Gprs) -> u64 {
        let (id, value, mask) = (FieldId(gprs[RDX]), gprs[R8], gprs[R9]);
        gprs[R8] = 0;
        if gprs[RCX] != 0 {
            return Operand::RCX.invalid();
        }
        let Some(old) = self.l2_field(vcpu, id) else {
            return Status::METADATA_FIELD_ID_INCORRECT.with(0);
        };
        let status = self.set_l2_field(vcpu, id, old & !mask | value & mask);
        if status == Status::SUCCESS {
            gprs[R8] = old;
        }
        status.with(0)
    }

    /// TDG.VP.VEINFO.GET: once for each #VE.
    pub(super) fn veinfo_get(&mut self, vcpu: VcpuId, gprs: &mut Gprs) -> u64 {
        let info = self
            .td_mut()
            .and_then(|td| td.vp(vcpu))
            .and_then(|vp| vp.ve.take());
        let Some(info) = info else {
            return Status::NO_VALID_VE_INFO.with(0);
        };
        gprs[RCX] = u64::from(info.reason.0);
        gprs[RDX] = info.qualification;
        gprs[R8] = info.gla;
        gprs[R9] = info.gpa;
        gprs[R10] = u64::from(info.instruction_info) << 32 | u64::from(info.instruction_length);
        Status::SUCCESS.with(0)
    }

    /// TDG.VP.CPUIDVE.SET.
    pub(super) fn cpuidve_set(&mut self, vcpu: VcpuId, gprs: &Gprs) -> u64 {
        let control = gprs[RCX];
        if control & !3 != 0 {
            return Operand::RCX.invalid();
        }
        if let Some(vp) = self.td_mut().and_then(|td| td.vp(vcpu)) {
            vp.cpuid_ve = [control & 1 != 0, control & 2 != 0];
        }
        Status::SUCCESS.with(0)
    }
}
