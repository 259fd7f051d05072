//! Recognises files that this program cannot read tensors from, and says how to convert them.

use std::path::Path;

/// How many bytes from the beginning of a file identify it.
pub const HEAD: usize = 1 << 16;

/// What the file is and how to convert it, as the end of a sentence: `it is …: …`. `head` is its first [`HEAD`] bytes,
/// or the whole file if it is shorter. Contents take precedence over the name. `None` if neither is recognised, or if
/// the file is what the extension `own` says.
pub fn recognise(path: &Path, head: &[u8], own: Option<&str>) -> Option<String> {
    let file = path.file_name().unwrap_or_default().to_string_lossy();
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let ending = path.extension().map(|ending| ending.to_string_lossy().to_lowercase()).unwrap_or_default();
    let kind = match by_content(head) {
        // A zip, a pickle or a protobuf can be many things: the name may be more specific.
        Some(Kind::Zip | Kind::Pickle) | None => by_ending(&ending).or(by_content(head))?,
        Some(kind) => kind,
    };
    if matches!(
        (kind, own),
        (Kind::Npz, Some("npz")) | (Kind::Npy, Some("npy")) | (Kind::Safetensors, Some("safetensors"))
    ) {
        return None;
    }
    let from_torch = |load: &str| {
        format!(
            "in Python, state = {load}; safetensors.torch.save_file(state, \"{stem}.safetensors\") writes a readable file \
             (for arrays: numpy.savez(\"in.npz\", q=q, k=k, v=v))"
        )
    };
    let from_numpy = |load: &str| {
        format!(
            "in Python, safetensors.numpy.save_file({load}, \"{stem}.safetensors\") writes a readable file (for arrays: \
             numpy.savez(\"in.npz\", q=q, k=k, v=v))"
        )
    };
    let rename = |right: &str| if ending == right { String::new() } else { format!("rename it to {stem}.{right}; ") };
    let (is, way_out) = match kind {
        Kind::Empty => ("empty", "nothing was written to it, or not all of it was copied".to_string()),
        Kind::Torch => (
            "PyTorch's own format (a pickle)",
            from_torch(&format!("torch.load(\"{file}\", map_location=\"cpu\", weights_only=True)")),
        ),
        Kind::TorchScript => ("a TorchScript module", from_torch(&format!("torch.jit.load(\"{file}\").state_dict()"))),
        Kind::Pickle => ("a Python pickle", from_torch(&format!("pickle.load(open(\"{file}\", \"rb\"))"))),
        Kind::Hdf5 => (
            "HDF5 (Keras, TensorFlow)",
            from_numpy("{name: array[()] for name, array in the datasets of h5py.File, as contiguous arrays}"),
        ),
        Kind::Keras => (
            "a Keras model",
            from_numpy("{weight.path: weight.numpy() for weight in keras.saving.load_model(…).weights}"),
        ),
        Kind::Onnx => (
            "an ONNX model",
            from_numpy(&format!(
                "{{x.name: onnx.numpy_helper.to_array(x) for x in onnx.load(\"{file}\").graph.initializer}}"
            )),
        ),
        Kind::Gguf => (
            "GGUF (llama.cpp), mostly quantised",
            "take the safetensors file that the model was published with".to_string(),
        ),
        Kind::Tflite => {
            ("a TensorFlow Lite model", from_numpy("the arrays of tf.lite.Interpreter(…).get_tensor(index) by name"))
        }
        Kind::TensorFlow => (
            "a TensorFlow checkpoint or graph",
            from_numpy(
                "{name: tf.train.load_variable(checkpoint, name) for name, _ in tf.train.list_variables(checkpoint)}",
            ),
        ),
        Kind::Flax => {
            ("a Flax checkpoint (msgpack)", from_numpy("the arrays of flax.serialization.msgpack_restore(…) by name"))
        }
        Kind::Matlab => ("a MATLAB file", from_numpy(&format!("scipy.io.loadmat(\"{file}\")'s arrays by name"))),
        Kind::Npz => (
            "a NumPy archive",
            format!("{}for layer weights, {}", rename("npz"), from_numpy(&format!("dict(numpy.load(\"{file}\"))"))),
        ),
        Kind::Npy => (
            "a NumPy array",
            format!(
                "{}for layer weights, safetensors.numpy.save_file({{name: array}}, …) writes several arrays by name",
                rename("npy")
            ),
        ),
        Kind::Safetensors => ("a safetensors file", rename("safetensors").trim_end_matches("; ").to_string()),
        Kind::Lfs => ("a Git LFS pointer, not the file itself", "`git lfs pull` fetches the file".to_string()),
        Kind::Index => (
            "an index of safetensors files (\"weight_map\"), not one of them",
            "rename it to NAME.json to load layer weights, or pass one of the files that it lists, in the same folder"
                .to_string(),
        ),
        Kind::Json => ("JSON text", from_numpy("{name: numpy.array(…)} of what json.load gives")),
        Kind::Html => (
            "a web page, not the file behind it",
            "download the file itself (on Hugging Face, replace /blob/ with /resolve/ in the address)".to_string(),
        ),
        Kind::Text => (
            "text",
            format!(
                "in Python, numpy.save(\"{stem}.npy\", numpy.loadtxt(\"{file}\", delimiter=\",\", dtype=\"float32\"))"
            ),
        ),
        Kind::Compressed(with) => (with, "unpack it first".to_string()),
        Kind::Zip => ("a zip archive", "unpack it first".to_string()),
        Kind::Table => ("a table (Parquet, Arrow)", from_numpy("{name: its column as a NumPy array}")),
        Kind::Picture => ("a picture or a document", "it holds no tensors".to_string()),
    };
    Some(format!("it is {is}: {way_out}"))
}

#[derive(Clone, Copy)]
enum Kind {
    Empty,
    Torch,
    TorchScript,
    Pickle,
    Hdf5,
    Keras,
    Onnx,
    Gguf,
    Tflite,
    TensorFlow,
    Flax,
    Matlab,
    Npz,
    Npy,
    Safetensors,
    Lfs,
    Index,
    Json,
    Html,
    Text,
    /// In words.
    Compressed(&'static str),
    Zip,
    Table,
    Picture,
}

fn by_content(head: &[u8]) -> Option<Kind> {
    let holds = |text: &str| head.windows(text.len()).any(|part| part == text.as_bytes());
    Some(match head {
        [] => Kind::Empty,
        [b'P', b'K', 3 | 5, 4 | 6, ..] => {
            if holds("constants.pkl") || holds("/code/") {
                Kind::TorchScript
            } else if holds("data.pkl") {
                Kind::Torch
            } else if holds("model.weights.h5") {
                Kind::Keras
            } else if holds(".npy") {
                Kind::Npz
            } else {
                Kind::Zip
            }
        }
        // PyTorch before 1.6 begins with a pickle of this number: 0x1950a86a20f9469cfc6c.
        [0x80, 2, 0x8a, 0x0a, 0x6c, 0xfc, 0x9c, 0x46, ..] => Kind::Torch,
        [0x80, 2..=5, ..] => Kind::Pickle,
        [0x89, b'H', b'D', b'F', b'\r', b'\n', 0x1a, b'\n', ..] => Kind::Hdf5,
        [b'G', b'G', b'U', b'F', ..] => Kind::Gguf,
        [_, _, _, _, b'T', b'F', b'L', b'3', ..] => Kind::Tflite,
        [0x93, b'N', b'U', b'M', b'P', b'Y', ..] => Kind::Npy,
        [0x1f, 0x8b, ..] => Kind::Compressed("compressed with gzip"),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Kind::Compressed("compressed with zstd"),
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Kind::Compressed("compressed with xz"),
        [b'B', b'Z', b'h', b'1'..=b'9', ..] => Kind::Compressed("compressed with bzip2"),
        [b'P', b'A', b'R', b'1', ..] | [b'A', b'R', b'R', b'O', b'W', b'1', ..] => Kind::Table,
        [0x89, b'P', b'N', b'G', ..] | [0xff, 0xd8, 0xff, ..] | [b'%', b'P', b'D', b'F', ..] => Kind::Picture,
        // A header's length, then its JSON.
        [_, _, _, _, _, 0, 0, 0, b'{', ..] => Kind::Safetensors,
        _ if head.get(257..262) == Some(b"ustar") => Kind::Compressed("a tar archive"),
        _ if head.starts_with(b"MATLAB ") => Kind::Matlab,
        _ if head.starts_with(b"version https://git-lfs.github.com") => Kind::Lfs,
        // ONNX has no magic bytes: a version, then a producer or an opset, of protobuf.
        [8, 1..=31, 0x12 | 0x1a | 0x3a | 0x42, ..] => Kind::Onnx,
        _ => return by_text(head),
    })
}

fn by_text(head: &[u8]) -> Option<Kind> {
    // The last character may be cut off.
    let text = match std::str::from_utf8(head) {
        Ok(text) => text,
        Err(error) if error.error_len().is_none() => std::str::from_utf8(&head[..error.valid_up_to()]).ok()?,
        Err(_) => return None,
    };
    if text.chars().any(|c| c.is_control() && !c.is_whitespace()) {
        return None;
    }
    let begin = text.trim_start().get(..15).unwrap_or(text.trim_start()).to_lowercase();
    Some(match begin {
        begin if begin.starts_with("<!doctype html") || begin.starts_with("<html") => Kind::Html,
        begin if begin.starts_with('{') && text.contains("\"weight_map\"") => Kind::Index,
        begin if begin.starts_with(['{', '[']) => Kind::Json,
        _ => Kind::Text,
    })
}

fn by_ending(ending: &str) -> Option<Kind> {
    Some(match ending {
        "pt" | "pth" | "bin" | "ckpt" => Kind::Torch,
        "pkl" | "pickle" => Kind::Pickle,
        "h5" | "hdf5" => Kind::Hdf5,
        "keras" => Kind::Keras,
        "onnx" => Kind::Onnx,
        "gguf" | "ggml" => Kind::Gguf,
        "tflite" => Kind::Tflite,
        "pb" => Kind::TensorFlow,
        "msgpack" => Kind::Flax,
        "mat" => Kind::Matlab,
        "parquet" | "arrow" | "feather" => Kind::Table,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contents_tell_before_names_do() {
        let zip = |names: &[&str]| [b"PK\x03\x04".to_vec(), names.join("\0").into_bytes()].concat();
        let padded = |bytes: &[u8]| [bytes, &[0xfe; 64]].concat();
        for (name, head, say) in [
            ("m.pt", zip(&["archive/data.pkl"]), "PyTorch's own format"),
            ("m.safetensors", zip(&["archive/data.pkl"]), "torch.load(\"m.safetensors\""),
            ("m.pt", zip(&["m/data.pkl", "m/code/__torch__.py"]), "TorchScript"),
            ("m.bin", padded(b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20"), "safetensors.torch.save_file"),
            ("m.pkl", padded(b"\x80\x04\x95"), "a Python pickle"),
            ("m.ckpt", padded(b"\x80\x04\x95"), "PyTorch's own format"),
            ("m.h5", padded(b"\x89HDF\r\n\x1a\n"), "HDF5"),
            ("m.keras", zip(&["metadata.json", "model.weights.h5"]), "a Keras model"),
            ("m.gguf", padded(b"GGUF\x03\0\0\0"), "GGUF"),
            ("m.onnx", padded(b"\x08\x07\x12\x07pytorch"), "onnx.load(\"m.onnx\")"),
            ("m.bin", padded(b"\x08\x07\x12\x07pytorch"), "an ONNX model"),
            ("m.tflite", padded(b"\x1c\0\0\0TFL3"), "TensorFlow Lite"),
            ("m.bin", padded(b"\x93NUMPY\x01\0"), "rename it to m.npy"),
            ("m.zip", zip(&["q.npy", "k.npy"]), "rename it to m.npz"),
            ("m.zip", zip(&["readme"]), "unpack it first"),
            ("m.gz", padded(b"\x1f\x8b\x08"), "compressed with gzip"),
            ("m.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n".to_vec(), "git lfs pull"),
            ("m.safetensors.index.json", b"{\"weight_map\": {\"a\": \"b\"}}".to_vec(), "\"weight_map\""),
            ("m.json", b" {\"a\": 1}".to_vec(), "JSON"),
            ("m.safetensors", b"<!DOCTYPE html>\n<html>".to_vec(), "/resolve/"),
            ("m.csv", b"1,2\n3,4\n".to_vec(), "numpy.loadtxt"),
            ("m.dat", [&8u64.to_le_bytes()[..], b"{}      "].concat(), "rename it to m.safetensors"),
            ("m.npy", Vec::new(), "empty"),
            ("m.pth", padded(b"\xfe\xed"), "PyTorch's own format"),
            ("m.mat", b"MATLAB 5.0 MAT-file".to_vec(), "scipy.io.loadmat"),
        ] {
            let said = recognise(Path::new(name), &head, None).unwrap_or_else(|| panic!("{name} is not known"));
            assert!(said.starts_with("it is ") && said.contains(say), "{name}: {said}");
        }
        assert!(recognise(Path::new("m.dat"), &padded(b"\xfe\xed"), None).is_none());
        assert!(recognise(Path::new("m.npy"), &padded(b"\x93NUMPY\x01\0"), Some("npy")).is_none());
        assert!(recognise(Path::new("m.npy"), &padded(b"\x93NUMPY\x01\0"), Some("npz")).is_some());
    }
}
