//! What models of CPUs say of themselves: family, model and stepping, as CPUID function 1 has them in EAX
//! and a processor in EDX after reset.

/// The models that QEMU has for hosts with SEV-SNP and before: name, family, model, stepping
/// (QEMU `target/i386/cpu.c`). Versions of a model, such as EPYC-Milan-v2, do not differ in this.
const MODELS: [(&str, u32, u32, u32); 5] = [
    ("EPYC", 23, 1, 2),
    ("EPYC-Rome", 23, 49, 0),
    ("EPYC-Milan", 25, 1, 1),
    ("EPYC-Genoa", 25, 17, 0),
    ("EPYC-Turin", 26, 0, 0),
];

/// The signature of a model, with or without a version behind its name.
///
/// # Errors
///
/// When there is no such model.
pub fn signature_of(name: &str) -> Result<u32, String> {
    let without_version = name
        .rsplit_once("-v")
        .filter(|(_, version)| version.bytes().all(|byte| byte.is_ascii_digit()))
        .map_or(name, |(model, _)| model);
    MODELS
        .iter()
        .find(|(model, ..)| *model == without_version)
        .map(|&(_, family, model, stepping)| signature(family, model, stepping))
        .ok_or_else(|| {
            let known: Vec<&str> = MODELS.iter().map(|(model, ..)| *model).collect();
            format!("expected one of {}", known.join(", "))
        })
}

/// Puts family, model and stepping together (AMD 25481, CPUID Fn0000_0001_EAX).
#[must_use]
pub const fn signature(family: u32, model: u32, stepping: u32) -> u32 {
    let (base, extended) = if family > 15 {
        (15, family - 15)
    } else {
        (family, 0)
    };
    extended << 20 | (model >> 4 & 15) << 16 | base << 8 | (model & 15) << 4 | stepping & 15
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signatures_are_those_of_the_processors() {
        assert_eq!(signature_of("EPYC"), Ok(0x80_0F12));
        assert_eq!(signature_of("EPYC-v4"), Ok(0x80_0F12));
        assert_eq!(signature_of("EPYC-Milan-v2"), Ok(0xA0_0F11));
        assert_eq!(signature_of("EPYC-Genoa"), Ok(0xA1_0F10));
        assert!(signature_of("EPYC-vx").is_err());
        assert!(signature_of("Skylake").unwrap_err().contains("EPYC-Rome"));
    }
}
