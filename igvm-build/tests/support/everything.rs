//! All that the tool does with an IGVM file that somebody hands it.

use igvm_build::check::{Target, check};
use igvm_build::diff::diff;
use igvm_build::file::{File, Problem};
use igvm_build::firmware;
use igvm_build::id_block::{Identity, Keys, SigningKey, sign_image};
use igvm_build::measure::snp::{Loader, Processors, launch_digest};
use igvm_build::measure::{quietly, tdx};
use igvm_build::show::Description;

/// Reads, shows, checks, measures, compares, signs and unpacks `bytes`; nothing of it may panic. What
/// keeps the headers from being told apart, if anything does.
pub fn everything(bytes: &[u8]) -> Result<(), Problem> {
    for qemu in [true, false] {
        let problems = check(
            bytes,
            Target {
                qemu,
                processors: Processors {
                    count: 2,
                    signature: Some(0x80_0F12),
                },
            },
        );
        for problem in &problems {
            assert!(problem.offset <= bytes.len(), "{problem}");
            assert!(!problem.to_string().contains('\n'), "{problem}");
        }
    }
    let _ = firmware::of_igvm(bytes);
    let file = File::read(bytes)?;
    let description = Description::of(&file);
    assert!(!description.to_string().is_empty());
    serde_json::to_string(&description).unwrap();
    for loader in [
        Loader::Qemu(Processors {
            count: 2,
            signature: Some(0x80_0F12),
        }),
        Loader::AsWritten {
            native_zeroes: true,
        },
    ] {
        let _ = launch_digest(&file, loader, &mut quietly);
    }
    let _ = tdx::mrtd(&file, &mut quietly);
    assert_eq!(diff(&file, &file), []);
    Ok(())
}

/// As above, and signs it, which takes longer than all the rest.
pub fn everything_and_sign(bytes: &[u8]) -> Result<(), Problem> {
    everything(bytes)?;
    let keys = Keys {
        id: SigningKey::from_slice(&[1; 48]).unwrap(),
        author: None,
    };
    let loader = Loader::AsWritten {
        native_zeroes: false,
    };
    if let Ok((signed, _)) = sign_image(bytes, loader, &Identity::default(), &keys) {
        // What was signed can be read again.
        File::read(&signed)?;
    }
    Ok(())
}
