//! The sidecar: a small JSON file beside the image, for the tools that start it.
//!
//! It holds nothing that could not be found in the image and the paravisor's ELF file; it
//! spares `xtask` and scripts from parsing either.

use serde::{Deserialize, Serialize};

use crate::image::Image;

/// Content of `FILE.igvm.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sidecar {
    /// Launch digest, 96 hexadecimal digits.
    pub digest: String,
    /// Measurement as a trust domain, 96 hexadecimal digits, if the image is for TDX.
    #[serde(default)]
    pub mrtd: Option<String>,
    /// First byte of the paravisor's region.
    pub region_gpa: u64,
    /// Bytes of the region.
    pub region_size: u64,
    /// Bytes of the region that are launched, from its start.
    pub launched_size: u64,
    /// Bytes of the IGVM file.
    pub image_bytes: u64,
    /// Guest-physical address of the paravisor's map descriptor, if it has one.
    pub map_descriptor: Option<u64>,
    /// Where the host has to end the memory below 4 GiB that it tells the firmware about
    /// (`etc/e820`), if the firmware takes no memory map from the paravisor.
    #[serde(default)]
    pub low_end: Option<u64>,
    /// Position of the C-bit the image was built for.
    pub c_bit: u32,
    /// File name of the firmware, without its directory.
    pub firmware: Option<String>,
}

impl Sidecar {
    /// Describes `image`.
    pub fn new(image: &Image, c_bit: u32, firmware: Option<String>) -> Self {
        use protocols::launch::{REGION_GPA, REGION_SIZE};
        Self {
            digest: hex(&image.digest),
            mrtd: image.mrtd.as_ref().map(|mrtd| hex(mrtd)),
            region_gpa: REGION_GPA,
            region_size: REGION_SIZE,
            launched_size: image.layout.image_end - REGION_GPA,
            image_bytes: image.bytes.len() as u64,
            map_descriptor: image.map_descriptor,
            low_end: image.low_end,
            c_bit,
            firmware,
        }
    }
}

/// Lower-case hexadecimal digits of `bytes`.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes
        .iter()
        .fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
            // Writing to a string cannot fail.
            let _ = write!(text, "{byte:02x}");
            text
        })
}
