//! MSG_KEY_REQ (`snp-launch.md` §7). How the real firmware derives a key is its own affair; what goes into
//! one is not.

use alloc::vec::Vec;

use hmac::{Hmac, Mac};
use protocols::amd_sp::FirmwareStatus;
use protocols::amd_sp::key::{GuestFields, KeyRequest, KeyResponse};
use protocols::amd_sp::report::KeySelect;
use sha2::Sha256;
use zerocopy::FromZeros;

use super::SecurityProcessor;

const LABEL: &[u8] = b"turnstile machine, derived key";
/// The lowest level there is.
const LAST_VMPL: u32 = 3;
/// Bits of `root` that mean something.
const ROOT_BITS: u32 = 0b111;

impl SecurityProcessor {
    /// The answer to a request that came with the key of level `vmpck`.
    pub(super) fn key(&self, vmpck: u8, request: &KeyRequest) -> KeyResponse {
        let mut answer = KeyResponse::new_zeroed();
        match self.derive(vmpck, request) {
            Ok(key) => answer.key = key,
            Err(status) => answer.status = status,
        }
        answer
    }

    fn derive(&self, vmpck: u8, request: &KeyRequest) -> Result<[u8; 32], FirmwareStatus> {
        const INVALID: FirmwareStatus = FirmwareStatus::INVALID_PARAM;
        if request.reserved != 0 || request.root & !ROOT_BITS != 0 {
            return Err(INVALID);
        }
        let of_launch = request.root & KeyRequest::ROOT_VMRK != 0;
        let selected = KeySelect(request.root >> KeyRequest::KEY_SELECT_SHIFT);
        let root: Vec<u8> = if of_launch {
            self.vmrk.to_vec()
        } else {
            match (selected, &self.chip) {
                (KeySelect::ANY | KeySelect::VCEK, Some(chip)) => chip.vcek.to_bytes().to_vec(),
                _ => return Err(FirmwareStatus::INVALID_KEY),
            }
        };
        if request.vmpl < u32::from(vmpck) || request.vmpl > LAST_VMPL {
            return Err(INVALID);
        }
        let fields = GuestFields::from_bits_retain(request.fields);
        let known = GuestFields::POLICY
            | GuestFields::IMAGE_ID
            | GuestFields::FAMILY_ID
            | GuestFields::MEASUREMENT
            | GuestFields::GUEST_SVN
            | GuestFields::TCB_VERSION;
        if !known.contains(fields) {
            return Err(INVALID);
        }
        let guest = &self.guest;
        let tcb = self.chip.as_ref().map_or(0, |chip| chip.tcb);
        let svn_exceeds = request.guest_svn > guest.identity.guest_svn;
        if fields.contains(GuestFields::GUEST_SVN) && svn_exceeds
            || fields.contains(GuestFields::TCB_VERSION) && exceeds(request.tcb, tcb)
        {
            return Err(INVALID);
        }
        let parts: [(GuestFields, &[u8]); 6] = [
            (GuestFields::POLICY, &guest.policy.to_le_bytes()),
            (GuestFields::IMAGE_ID, &guest.identity.image_id),
            (GuestFields::FAMILY_ID, &guest.identity.family_id),
            (GuestFields::MEASUREMENT, &guest.measurement),
            (GuestFields::GUEST_SVN, &request.guest_svn.to_le_bytes()),
            (GuestFields::TCB_VERSION, &request.tcb.to_le_bytes()),
        ];
        // A key of any length will do.
        let mut mac = Hmac::<Sha256>::new_from_slice(&root).map_err(|_| INVALID)?;
        mac.update(LABEL);
        mac.update(&request.root.to_le_bytes());
        mac.update(&request.vmpl.to_le_bytes());
        mac.update(&request.fields.to_le_bytes());
        for (field, value) in parts {
            if fields.contains(field) {
                mac.update(value);
            }
        }
        Ok(mac.finalize().into_bytes().into())
    }
}

/// Whether one part of version `wanted` is above that of `there`.
fn exceeds(wanted: u64, there: u64) -> bool {
    wanted
        .to_le_bytes()
        .into_iter()
        .zip(there.to_le_bytes())
        .any(|(wanted, there)| wanted > there)
}
