//! `igvm-build sign`.

use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow};
use base64ct::{Base64, Encoding as _};
use clap::{ArgGroup, Args};
use igvm_build::error::FileError;
use igvm_build::id_block::{Identity, Keys, SigningKey, read_key, sign_image};
use igvm_build::sidecar::hex;
use igvm_build::target::Target;
use zeroize::Zeroizing;

use super::processors::Processors;
use super::{Input, print, write};

#[derive(Args)]
// What is written nowhere need not be signed.
#[command(group = ArgGroup::new("written").args(["out", "id_block", "id_auth"]).required(true).multiple(true))]
pub struct Sign {
    /// The IGVM file
    file: PathBuf,
    /// The key that signs the block: a private key on P-384, in PEM
    #[arg(long, value_name = "PEM")]
    id_key: PathBuf,
    /// The key that signs the ID key, likewise
    #[arg(long, value_name = "PEM")]
    author_key: Option<PathBuf>,
    /// Family of the image: up to 32 hexadecimal digits, filled up with zeroes
    #[arg(long, value_name = "HEX", value_parser = parse_id, default_value = "")]
    family_id: Id,
    /// The image, likewise
    #[arg(long, value_name = "HEX", value_parser = parse_id, default_value = "")]
    image_id: Id,
    /// Security version of the guest
    #[arg(long, default_value_t = 0)]
    guest_svn: u32,
    /// Whose loader launches it
    #[arg(long, value_enum, default_value_t)]
    loader: Target,
    #[command(flatten)]
    processors: Processors,
    /// Where to write the signed image; it may have had an ID block before
    #[arg(long)]
    out: Option<PathBuf>,
    /// Where to write the block for QEMU's property id-block, in base64
    #[arg(long)]
    id_block: Option<PathBuf>,
    /// Where to write the signatures for QEMU's property id-auth, in base64
    #[arg(long)]
    id_auth: Option<PathBuf>,
}

/// A family or an image.
type Id = [u8; 16];

impl Sign {
    pub fn run(&self) -> Result<()> {
        let bytes = Input::IGVM.read(&self.file)?;
        let keys = Keys {
            id: read_key_file(&self.id_key)?,
            author: self.author_key.as_deref().map(read_key_file).transpose()?,
        };
        let identity = Identity {
            family_id: self.family_id,
            image_id: self.image_id,
            guest_svn: self.guest_svn,
        };
        let loader = self.loader.loader_for(self.processors.measured());
        let (image, signed) =
            sign_image(&bytes, loader, &identity, &keys).map_err(FileError::content(&self.file))?;
        if let Some(out) = &self.out {
            write(out, &image)?;
        }
        let (block, auth) = signed.for_qemu();
        for (file, bytes) in [(&self.id_block, block), (&self.id_auth, auth)] {
            if let Some(file) = file {
                write(file, Base64::encode_string(&bytes).as_bytes())?;
            }
        }
        let (id, author) = signed.key_digests();
        print(&format!("launch digest {}\n", hex(&signed.header.ld)))?;
        print(&format!("ID key digest {}\n", hex(&id)))?;
        if let Some(author) = author {
            print(&format!("author key digest {}\n", hex(&author)))?;
        }
        Ok(())
    }
}

fn read_key_file(file: &Path) -> Result<SigningKey> {
    let bytes = Zeroizing::new(Input::KEY.read(file)?);
    let text = std::str::from_utf8(&bytes).map_err(|_| {
        anyhow!(
            "{}: not a private key in PEM; expected text",
            file.display()
        )
    })?;
    Ok(read_key(text).map_err(FileError::content(file))?)
}

fn parse_id(text: &str) -> Result<Id, String> {
    let bad = || "expected up to 32 hexadecimal digits, two for each byte".to_owned();
    let mut id = Id::default();
    if text.len() > 2 * id.len()
        || !text.len().is_multiple_of(2)
        || !text.bytes().all(|byte| byte.is_ascii_hexdigit())
    {
        return Err(bad());
    }
    for (index, byte) in id.iter_mut().take(text.len() / 2).enumerate() {
        *byte = u8::from_str_radix(&text[2 * index..2 * index + 2], 16).map_err(|_| bad())?;
    }
    Ok(id)
}
