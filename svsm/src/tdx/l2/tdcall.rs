//! The guest's TDCALLs: as the module answers those of an ordinary trust domain, with its own status
//! codes. Leaves for L2 VMs do not exist for it: it has none.

use accept::{Backend, Frame};
use protocols::addr::Gpa;
use protocols::tdx::metadata::{Features0, FieldId, TdControls};
use protocols::tdx::vmcall::register::{R8, R9, R10, R11, RAX, RCX, RDX};
use protocols::tdx::{Leaf, MAPPING_PENDING, Operand, Status};
use protocols::terminate::TurnstileReason;

use super::memory::{PageOperand, busy, is_private, refused};
use super::vp::Vp;
use super::{Domain, MEASUREMENT, Next, REPORT, REPORT_DATA, Service};

/// Runtime measurement registers.
const REGISTERS: u64 = 4;

/// What a leaf comes to.
pub(super) enum Done {
    /// RAX.
    Status(u64),
    /// An operand lies in this page, which is not accepted: as an access of the guest's to it.
    Pending(u64),
    /// The machine ends.
    End(TurnstileReason),
}

impl From<Status> for Done {
    fn from(status: Status) -> Self {
        Self::Status(status.with(0))
    }
}

impl From<Operand> for Done {
    fn from(operand: Operand) -> Self {
        Self::Status(operand.invalid())
    }
}

/// A field of the guest's control structure.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Field {
    /// The module's, as it is.
    Passed,
    /// TD_CTLS: the guest's own.
    Controls,
    /// NOTIFY_ENABLES: there are no notifications.
    Notify,
    /// NUM_L2_VMS: none.
    L2Vms,
}

/// All fields, in the order of their class and code, which is that of TDG.VM.RD version 1.
const FIELDS: [(FieldId, Field); 5] = [
    (FieldId::NUM_L2_VMS, Field::L2Vms),
    (FieldId::NOTIFY_ENABLES, Field::Notify),
    (FieldId::CONFIG_FLAGS, Field::Passed),
    (FieldId::TD_CTLS, Field::Controls),
    (FieldId::TOPOLOGY_ENUM_CONFIGURED, Field::Passed),
];

/// A field, and its place.
fn find(id: FieldId) -> Option<(usize, Field)> {
    (0..)
        .zip(FIELDS)
        .find(|(_, (known, _))| id.is_single() && known.is(id))
        .map(|(place, (_, field))| (place, field))
}

impl<B: Backend, D: Domain> Service<'_, B, D> {
    /// Answers TDCALL, an instruction of `length` bytes.
    pub(super) fn tdcall(&self, vp: &mut Vp, length: u32) -> Next {
        let rax = vp.gprs()[RAX];
        let (leaf, version) = (Leaf(rax as u16), rax >> 16);
        // The reserved bits are above the version.
        if version > u64::from(leaf == Leaf::VM_RD) {
            vp.gprs()[RAX] = Operand::RAX.invalid();
            vp.skip(length);
            return Next::Resume;
        }
        if leaf == Leaf::VP_VMCALL {
            return self.vmcall(vp, length);
        }
        let done = match leaf {
            Leaf::VP_INFO => self.vp_info(vp),
            Leaf::MR_RTMR_EXTEND => self.rtmr_extend(vp),
            Leaf::VP_VEINFO_GET => ve_info(vp),
            Leaf::MR_REPORT => self.report(vp),
            Leaf::VP_CPUIDVE_SET => cpuidve_set(vp),
            Leaf::MEM_PAGE_ACCEPT => self.accept(vp),
            Leaf::VM_RD => self.vm_rd(vp, version != 0),
            Leaf::VM_WR => self.vm_wr(vp),
            Leaf::VP_RD | Leaf::VP_WR => vp_field(vp),
            Leaf::SYS_RD => self.sys_rd(vp),
            Leaf::MEM_PAGE_ATTR_RD => self.attr_rd(vp),
            _ => Operand::RAX.into(),
        };
        match done {
            Done::Status(status) => {
                vp.gprs()[RAX] = status;
                vp.skip(length);
                Next::Resume
            }
            Done::Pending(gpa) => self.pending_operand(vp, gpa),
            Done::End(reason) => Next::End(reason),
        }
    }

    /// TDG.VP.INFO: what the module says of the trust domain, and the guest's own number.
    fn vp_info(&self, vp: &mut Vp) -> Done {
        let [rcx, rdx, r8, _, r10] = self.domain.info();
        let index = vp.index;
        let gprs = vp.gprs();
        gprs[RCX] = rcx;
        gprs[RDX] = rdx;
        gprs[R8] = r8;
        gprs[R9] = index.into();
        gprs[R10] = r10;
        gprs[R11] = 0;
        Status::SUCCESS.into()
    }

    /// TDG.MR.RTMR.EXTEND: the trust domain's registers are the guest's, the paravisor uses none.
    fn rtmr_extend(&self, vp: &mut Vp) -> Done {
        let (gpa, register) = (vp.gprs()[RCX], vp.gprs()[RDX]);
        if !is_private(gpa, self.shared()) || !gpa.is_multiple_of(64) {
            return Operand::RCX.into();
        }
        let mut value = [0; MEASUREMENT];
        match self.read_accepted(gpa, &mut value) {
            // The value is read before the register is looked at, as the module does.
            Ok(()) if register >= REGISTERS => Operand::RDX.into(),
            Ok(()) => self.domain.extend(register, &value).into(),
            Err(refused) => refused,
        }
    }

    /// TDG.MR.REPORT: about the trust domain, paravisor and guest together.
    fn report(&self, vp: &mut Vp) -> Done {
        let (to, data_at, subtype) = (vp.gprs()[RCX], vp.gprs()[RDX], vp.gprs()[R8]);
        if !is_private(to, self.shared()) || !to.is_multiple_of(REPORT as u64) {
            return Operand::RCX.into();
        }
        if !is_private(data_at, self.shared()) || !data_at.is_multiple_of(REPORT_DATA as u64) {
            return Operand::RDX.into();
        }
        let mut data = [0; REPORT_DATA];
        if let Err(refused) = self.read_accepted(data_at, &mut data) {
            return match refused {
                Done::Status(status) if status == Operand::RCX.invalid() => Operand::RDX.into(),
                other => other,
            };
        }
        if subtype != 0 {
            return Operand::R8.into();
        }
        match self.domain.report(&data) {
            Ok(report) => match self.write_accepted(to, &report) {
                Ok(()) => Status::SUCCESS.into(),
                Err(refused) => refused,
            },
            Err(status) => status.into(),
        }
    }

    /// TDG.VM.RD. Version 1 tells the next field's identifier, and takes the null identifier for a
    /// question after the first.
    fn vm_rd(&self, vp: &mut Vp, version_1: bool) -> Done {
        let gprs = vp.gprs();
        let id = FieldId(gprs[RDX]);
        gprs[R8] = 0;
        if version_1 {
            gprs[RDX] = FieldId::NONE.0;
        }
        if gprs[RCX] != 0 {
            return Operand::RCX.into();
        }
        if version_1 && id == FieldId::NONE {
            let [(first, _), ..] = FIELDS;
            gprs[RDX] = first.0;
            return Status::METADATA_FIRST_FIELD_ID_IN_CONTEXT.into();
        }
        let Some((place, field)) = find(id) else {
            return Status::METADATA_FIELD_ID_INCORRECT.into();
        };
        let value = match field {
            Field::Passed => self.domain.read_vm(id),
            Field::Controls => Ok(self.td.controls().bits()),
            Field::Notify | Field::L2Vms => Ok(0),
        };
        match value {
            Ok(value) => {
                gprs[R8] = value;
                if version_1 {
                    gprs[RDX] = FIELDS.get(place + 1).map_or(FieldId::NONE, |&(id, _)| id).0;
                }
                Status::SUCCESS.into()
            }
            Err(status) => status.into(),
        }
    }

    /// TDG.VM.WR: the bits in R9 of the field become those of R8; R8 comes back with the old value.
    fn vm_wr(&self, vp: &mut Vp) -> Done {
        let gprs = vp.gprs();
        let (id, value, mask) = (FieldId(gprs[RDX]), gprs[R8], gprs[R9]);
        gprs[R8] = 0;
        if gprs[RCX] != 0 {
            return Operand::RCX.into();
        }
        match find(id) {
            None => Status::METADATA_FIELD_ID_INCORRECT.into(),
            Some((_, Field::Passed | Field::L2Vms)) => Status::METADATA_FIELD_NOT_WRITABLE.into(),
            Some((_, Field::Notify)) if value & mask == 0 => Status::SUCCESS.into(),
            Some((_, Field::Notify)) => Status::METADATA_FIELD_VALUE_NOT_VALID.into(),
            Some((_, Field::Controls)) => {
                let old = self.td.controls().bits();
                match TdControls::from_bits(old & !mask | value & mask) {
                    Some(controls) => {
                        self.td.set_controls(controls);
                        gprs[R8] = old;
                        Status::SUCCESS.into()
                    }
                    None => Status::METADATA_FIELD_VALUE_NOT_VALID.into(),
                }
            }
        }
    }

    /// TDG.SYS.RD: the module's, but that there are no L2 VMs to be had.
    fn sys_rd(&self, vp: &mut Vp) -> Done {
        let gprs = vp.gprs();
        let id = FieldId(gprs[RDX]);
        gprs[R8] = 0;
        gprs[RDX] = FieldId::NONE.0;
        match self.domain.read_sys(id) {
            Ok(value) => {
                let hidden = if id.is(FieldId::TDX_FEATURES0) {
                    Features0::TD_PARTITIONING.bits()
                } else {
                    0
                };
                gprs[R8] = value & !hidden;
                Status::SUCCESS.into()
            }
            Err(status) => status.into(),
        }
    }

    /// TDG.MEM.PAGE.ATTR.RD: a page of the guest's, and that no L2 VM has anything of it.
    fn attr_rd(&self, vp: &mut Vp) -> Done {
        let raw = vp.gprs()[RCX];
        (vp.gprs()[RCX], vp.gprs()[RDX]) = (0, 0);
        if !is_private(raw, self.shared()) {
            return Operand::RCX.into();
        }
        let gpa = Gpa::new(PageOperand::page_of(raw));
        let frame = Frame::containing(gpa.get());
        let looked = self
            .engine
            .while_accepted(frame, || self.domain.mapping(gpa));
        match looked {
            Ok(Ok(mapping)) => {
                let pending = if mapping.pending { MAPPING_PENDING } else { 0 };
                let size = 1_u64 << (12 + 9 * mapping.level.min(1));
                vp.gprs()[RCX] = gpa.get() & !(size - 1) | u64::from(mapping.level) | pending;
                Status::SUCCESS.into()
            }
            Ok(Err(status)) => refused(status),
            Err(accept::Error::NotAccepted) => {
                vp.gprs()[RCX] = gpa.get() | MAPPING_PENDING;
                Status::SUCCESS.into()
            }
            Err(accept::Error::Busy) => busy(),
            Err(_) => Operand::RCX.into(),
        }
    }
}

/// TDG.VP.VEINFO.GET.
fn ve_info(vp: &mut Vp) -> Done {
    let Some(info) = vp.ve.take() else {
        return Status::NO_VALID_VE_INFO.into();
    };
    let gprs = vp.gprs();
    gprs[RCX] = info.reason.0.into();
    gprs[RDX] = info.qualification;
    gprs[R8] = info.gla;
    gprs[R9] = info.gpa;
    gprs[R10] = u64::from(info.instruction_info) << 32 | u64::from(info.instruction_length);
    Status::SUCCESS.into()
}

/// TDG.VP.CPUIDVE.SET.
fn cpuidve_set(vp: &mut Vp) -> Done {
    let control = vp.gprs()[RCX];
    if control & !3 != 0 {
        return Operand::RCX.into();
    }
    vp.cpuid_ve = [control & 1 != 0, control & 2 != 0];
    Status::SUCCESS.into()
}

/// TDG.VP.RD and TDG.VP.WR: a trust domain without L2 VMs has no field of a processor to see.
fn vp_field(vp: &mut Vp) -> Done {
    let gprs = vp.gprs();
    gprs[R8] = 0;
    if Leaf(gprs[RAX] as u16) == Leaf::VP_RD {
        gprs[RDX] = FieldId::NONE.0;
    }
    if gprs[RCX] != 0 {
        return Operand::RCX.into();
    }
    Status::METADATA_FIELD_ID_INCORRECT.into()
}
