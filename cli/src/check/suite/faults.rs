//! Faults introduced on purpose, to test the check itself.

use std::time::Duration;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use wgpu_attention::kernels::{Kernel, Variant};
use wgpu_attention::{Device, wgpu};

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub enum Fault {
    /// The fused kernels skip the last key if there are more than eight
    SkippedKey,
    /// The fused kernel in workgroup memory reads keys before all of them are written
    MissingBarrier,
    /// The fused kernels round their sums to f16 after each step
    F16Sums,
    /// The driver hangs in the tenth case, or in the only one
    Hang,
    /// The driver crashes the process in the tenth case, or in the only one
    Crash,
    /// The GL driver crashes the process during enumeration
    CrashAtSight,
    /// The tenth case creates a Vulkan buffer of zero bytes, which a validation layer must report
    BrokenRule,
}

/// The index of the case in which driver faults occur.
pub const STRIKES_AT: usize = 9;

impl Fault {
    /// The rewrite that breaks the kernels, if this fault is in kernels.
    pub fn rewrite(self) -> Option<fn(&Variant, &str) -> Option<String>> {
        match self {
            Fault::SkippedKey => Some(skipped_key),
            Fault::MissingBarrier => Some(missing_barrier),
            Fault::F16Sums => Some(f16_sums),
            Fault::Hang | Fault::Crash | Fault::CrashAtSight | Fault::BrokenRule => None,
        }
    }

    /// What the driver does when adapters are enumerated.
    pub fn seen(self) {
        let is_spared = std::env::var("WGPU_BACKEND").is_ok_and(|backend| backend != "gl");
        if self == Fault::CrashAtSight && !is_spared {
            std::process::abort();
        }
    }

    /// What the driver does when the case begins.
    pub fn strike(self, device: &Device) {
        match self {
            Fault::Hang => loop {
                std::thread::sleep(Duration::from_secs(1));
            },
            Fault::Crash => std::process::abort(),
            Fault::BrokenRule => {
                if let Some(gpu) = device.gpu() {
                    break_rule(gpu.device());
                }
            }
            Fault::SkippedKey | Fault::MissingBarrier | Fault::F16Sums | Fault::CrashAtSight => {}
        }
    }
}

/// VUID-VkBufferCreateInfo-size-00912. Nothing is broken where the device is not Vulkan's.
#[cfg(any(target_os = "linux", target_os = "windows", target_os = "android"))]
#[expect(unsafe_code, reason = "what is broken here cannot be broken through wgpu's own calls")]
fn break_rule(device: &wgpu::Device) {
    // SAFETY: wgpu itself never breaks a rule, so this bypasses it. The device is not destroyed here, and the buffer
    // that the driver may create in spite of the rule is not used.
    unsafe {
        if let Some(device) = device.as_hal::<wgpu::hal::api::Vulkan>()
            && let Ok(buffer) = device.raw_device().create_buffer(&Default::default(), None)
        {
            device.raw_device().destroy_buffer(buffer, None);
        }
    }
}

#[cfg(not(any(target_os = "linux", target_os = "windows", target_os = "android")))]
fn break_rule(_: &wgpu::Device) {}

/// `text` with the only occurrence of `from` replaced. Panics if there is none, so that an intact kernel is never taken
/// for a broken one.
fn change(text: &str, from: &str, to: &str) -> Option<String> {
    assert_eq!(text.matches(from).count(), 1, "the kernel has changed: it must hold once\n{from}");
    Some(text.replace(from, to))
}

fn skipped_key(variant: &Variant, text: &str) -> Option<String> {
    let end = "let end = min(start + sequence.keys_per_split, sequence.len_k);";
    match variant.kernel {
        Kernel::Flash | Kernel::FlashTiled => {
            change(text, end, &end.replace(";", " - select(0u, 1u, sequence.len_k > 8u && start < sequence.len_k);"))
        }
        _ => None,
    }
}

fn missing_barrier(variant: &Variant, text: &str) -> Option<String> {
    let after = "{\n                var k4";
    match variant.kernel {
        Kernel::FlashTiled => change(text, &format!("            workgroupBarrier();\n{after}"), after),
        _ => None,
    }
}

fn f16_sums(variant: &Variant, text: &str) -> Option<String> {
    // Loops are unrolled: every row and column has its own line.
    let (sum, rounded) = match variant.kernel {
        Kernel::Flash => (r"= (row_sum);", "= ROUND;"),
        Kernel::FlashTiled => (r"(sum\[[^\]]*\]) \*= factor;", "$1 = ROUND * factor;"),
        _ => return None,
    };
    let round = "vec4<f32>(unpack2x16float(pack2x16float($1.xy)), unpack2x16float(pack2x16float($1.zw)))";
    let sum = regex_lite::Regex::new(sum).expect("a pattern");
    assert!(sum.is_match(text), "the kernel has changed: it must add up its values in {sum}");
    Some(sum.replace_all(text, rounded.replace("ROUND", round)).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use wgpu_attention::kernels::catalogue::variants;

    #[test]
    fn every_fused_variant_can_be_broken() {
        for fault in [Fault::SkippedKey, Fault::F16Sums, Fault::MissingBarrier] {
            let rewrite = fault.rewrite().unwrap();
            let mut broken = 0;
            for variant in variants() {
                let source = variant.source().unwrap();
                if let Some(changed) = rewrite(&variant, &source) {
                    assert_ne!(changed, source);
                    broken += 1;
                }
            }
            assert!(broken >= 48, "{fault:?}: {broken}");
        }
    }
}
