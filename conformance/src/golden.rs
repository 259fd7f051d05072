//! Answers of other implementations: the case files in `cases/`, of which a program that uses this crate holds a copy.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use rust_embed::RustEmbed;

#[derive(RustEmbed)]
#[folder = "cases"]
#[include = "keras_jax/*.safetensors"]
#[include = "onnx/*.safetensors"]
#[include = "torch/*.safetensors"]
#[include = "transformers/*.safetensors"]
struct Golden;

/// The sources of cases, which are the folders of their files.
pub const SOURCES: [&str; 4] = ["keras_jax", "onnx", "torch", "transformers"];

/// The names of all case files, such as `onnx/test_attention_3d`, in order.
pub fn golden_names() -> Vec<String> {
    let name = |path: Cow<'_, str>| Some(path.strip_suffix(".safetensors")?.to_string());
    let mut names: Vec<String> = Golden::iter().filter_map(name).collect();
    names.sort();
    names
}

/// The bytes of a case file.
pub fn golden(name: &str) -> Option<Cow<'static, [u8]>> {
    Some(Golden::get(&format!("{name}.safetensors"))?.data)
}

/// A folder of case files in the source of this crate, for tests: one of [`SOURCES`], or `faults`.
pub fn case_folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("cases").join(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_is_carried() {
        let mut files = Vec::new();
        for source in SOURCES {
            for entry in std::fs::read_dir(case_folder(source)).unwrap() {
                let path = entry.unwrap().path();
                if path.extension().is_some_and(|ending| ending == "safetensors") {
                    files.push(format!("{source}/{}", path.file_stem().unwrap().to_str().unwrap()));
                }
            }
        }
        files.sort();
        assert_eq!(golden_names(), files);
        assert_eq!(golden("onnx/none"), None);
        let file = std::fs::read(case_folder("torch").join("mha_e6_h3.safetensors")).unwrap();
        assert_eq!(golden("torch/mha_e6_h3").unwrap(), file);
    }
}
