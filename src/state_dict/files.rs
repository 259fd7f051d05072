//! Checkpoints on disk: single files, and sharded files with an index.

use std::collections::BTreeMap;

use safetensors::tensor::{Metadata, TensorInfo};

use super::StateDict;
#[cfg(not(target_arch = "wasm32"))]
use crate::error::Error;

/// Recognises a file that is not safetensors by its first bytes, and says what to do.
pub(super) fn what_it_is(bytes: &[u8]) -> Option<&'static str> {
    const CONVERT: &str = "it is a PyTorch pickle (.pt, .pth, .bin), which can run code when it is read; convert it: \
        safetensors.torch.save_file(torch.load(PATH, weights_only=True), 'layer.safetensors')";
    let text = bytes.iter().position(|byte| !byte.is_ascii_whitespace()).map(|first| bytes[first]);
    match bytes {
        // PyTorch's files since 1.6 are zip archives, like .npz.
        [b'P', b'K', 3, 4, ..] if contains(bytes, b".npy") => {
            Some("it is a NumPy .npz; write the weights with safetensors.numpy.save_file(dict(numpy.load(PATH)), …)")
        }
        [b'P', b'K', 3, 4, ..] | [0x80, 2..=5, ..] => Some(CONVERT),
        [b'G', b'G', b'U', b'F', ..] => Some("it is a GGUF file of llama.cpp, whose weights are mostly quantised"),
        [0x89, b'H', b'D', b'F', ..] => {
            Some("it is an HDF5 file (Keras's .h5); MultiHeadAttention::from_keras takes kernels")
        }
        [0x93, b'N', b'U', b'M', b'P', b'Y', ..] => Some("it is one NumPy array, without a name"),
        _ if bytes.starts_with(b"version https://git-lfs") => {
            Some("it is a pointer of Git LFS, not the file itself: run `git lfs pull`")
        }
        _ if text == Some(b'{') => Some(
            "it is JSON; the index of shards is read by its path (StateDict::open, --weights model.safetensors.index.json)",
        ),
        _ => None,
    }
}

/// Whether `part` is in the first 4 KiB.
fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes[..bytes.len().min(4096)].windows(part.len()).any(|window| window == part)
}

/// The longest header that safetensors allows.
const LONGEST: u64 = 100_000_000;

/// The header length of a file of `length` bytes that begins with `start`.
pub(super) fn header_len(start: &[u8], length: u64) -> Result<usize, String> {
    let Some(header_len) = start.first_chunk().map(|bytes| u64::from_le_bytes(*bytes)) else {
        return Err("it is shorter than 8 bytes".into());
    };
    if header_len > LONGEST || header_len + 8 > length {
        return Err(format!("its header would be {header_len} bytes long"));
    }
    Ok(header_len as usize)
}

/// The tensors that a header describes in the `data_len` bytes after it. Checks that offsets, shapes and types agree.
pub(super) fn tensors(header: &[u8], data_len: u64) -> Result<Metadata, String> {
    let Entries(mut entries) = serde_json::from_slice(header).map_err(|error| error.to_string())?;
    let about = entries.remove("__metadata__").map(serde_json::from_value).transpose();
    let about = about.map_err(|error| format!("__metadata__: {error}"))?;
    let mut tensors = Vec::with_capacity(entries.len());
    for (name, entry) in entries {
        let info: TensorInfo = serde_json::from_value(entry).map_err(|error| format!("{name}: {error}"))?;
        tensors.push((name, info));
    }
    tensors.sort_by_key(|(_, info)| info.data_offsets);
    let metadata = Metadata::new(about, tensors).map_err(|error| error.to_string())?;
    match metadata.data_len() as u64 {
        taken if taken == data_len => Ok(metadata),
        taken => Err(format!("its tensors take {taken} bytes of the {data_len} after its header")),
    }
}

/// The entries of a header. A duplicate name is an error, because it would be ambiguous.
struct Entries(BTreeMap<String, serde_json::Value>);

impl<'de> serde::Deserialize<'de> for Entries {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<Entries, D::Error> {
        struct Once;
        impl<'de> serde::de::Visitor<'de> for Once {
            type Value = Entries;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object of tensors")
            }
            fn visit_map<M: serde::de::MapAccess<'de>>(self, mut map: M) -> std::result::Result<Entries, M::Error> {
                let mut entries = BTreeMap::new();
                while let Some((name, entry)) = map.next_entry::<String, serde_json::Value>()? {
                    if entries.insert(name.clone(), entry).is_some() {
                        return Err(serde::de::Error::custom(format_args!("{name:?} appears twice")));
                    }
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(Once)
    }
}

#[cfg(not(target_arch = "wasm32"))]
pub(super) mod open {
    use std::collections::{BTreeMap, BTreeSet};
    use std::fs::File;
    use std::io::{Read, Seek, SeekFrom};
    use std::path::Path;

    use super::super::{NOT_OPENED, Unread};
    use super::{Error, LONGEST, StateDict, header_len, tensors, what_it_is};
    use crate::error::Result;

    /// The usual files in a model's folder, in the order in which they are tried.
    const USUAL: [&str; 2] = ["model.safetensors", "model.safetensors.index.json"];

    fn failed(path: &Path, what: impl std::fmt::Display) -> Error {
        Error::File(format!("{}: {what}", path.display()))
    }

    /// What to read of a tensor.
    #[derive(Clone, Copy, PartialEq, Eq)]
    pub(crate) enum Wanted {
        Values,
        /// Type and shape.
        Header,
        Name,
    }

    pub(crate) type Choice<'a> = &'a dyn Fn(&str) -> Wanted;

    impl StateDict {
        /// Reads a checkpoint: a `.safetensors` file, the index of a sharded one (`model.safetensors.index.json`:
        /// `{"weight_map": {name: file}}`, with the files next to it), or a folder that contains `model.safetensors` or
        /// such an index.
        ///
        /// Reads only the values of tensors whose names begin with `part`, and opens only shards that contain some. Of
        /// the other tensors only the names are kept. `""` reads everything.
        pub fn open(path: impl AsRef<Path>, part: &str) -> Result<StateDict> {
            let choice = |name: &str| if name.starts_with(part) { Wanted::Values } else { Wanted::Name };
            StateDict::open_chosen(path.as_ref(), &choice)
        }

        pub(crate) fn open_chosen(path: &Path, choice: Choice<'_>) -> Result<StateDict> {
            if path.is_dir() {
                let usual = USUAL.iter().map(|name| path.join(name)).find(|file| file.exists());
                let none = || failed(path, format!("the folder holds no {}", USUAL.join(" and no ")));
                return StateDict::open_chosen(&usual.ok_or_else(none)?, choice);
            }
            let mut state = StateDict::default();
            match path.extension() {
                Some(ending) if ending.eq_ignore_ascii_case("json") => state.read_shards(path, choice)?,
                _ => drop(state.read_file(path, choice)?),
            }
            Ok(state)
        }

        fn read_shards(&mut self, index: &Path, choice: Choice<'_>) -> Result<()> {
            let length = std::fs::metadata(index).map_err(|error| failed(index, error))?.len();
            if length > LONGEST {
                return Err(failed(index, format!("{length} bytes are too many for an index of shards")));
            }
            let text = std::fs::read(index).map_err(|error| failed(index, error))?;
            let form = "an index of shards is {\"weight_map\": {\"name\": \"file.safetensors\", …}}";
            let json: serde_json::Value =
                serde_json::from_slice(&text).map_err(|error| failed(index, format!("not JSON ({error}); {form}")))?;
            let map = (json.get("weight_map").and_then(|map| map.as_object()))
                .ok_or_else(|| failed(index, format!("there is no \"weight_map\"; {form}")))?;
            let mut shards: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
            for (name, file) in map {
                let file = file.as_str();
                let file = file.ok_or_else(|| failed(index, format!("the file of {name} is not a string; {form}")))?;
                let mut parts = Path::new(file).components();
                if !matches!((parts.next(), parts.next()), (Some(std::path::Component::Normal(_)), None)) {
                    return Err(failed(index, format!("the shard {file:?} of {name} is not next to the index")));
                }
                match choice(name) {
                    Wanted::Name => {
                        let unread = Unread { dtype: NOT_OPENED.into(), shape: Vec::new() };
                        self.unread.insert(name.clone(), unread);
                    }
                    _ => {
                        shards.entry(file).or_default().insert(name);
                    }
                }
            }
            let folder = index.parent().unwrap_or(Path::new(""));
            for (file, names) in shards {
                // The index decides which shard a name is read from.
                let here = |name: &str| if names.contains(name) { choice(name) } else { Wanted::Name };
                let there = self.read_file(&folder.join(file), &here)?;
                if let Some(name) = names.iter().find(|name| !there.contains(**name)) {
                    return Err(failed(index, format!("{name} should be in {file}, but is not")));
                }
                let unlisted = there.iter().find(|name| !map.contains_key(*name) && choice(name) != Wanted::Name);
                if let Some(name) = unlisted {
                    return Err(failed(index, format!("{name} is in {file}, but not in the index")));
                }
            }
            Ok(())
        }

        /// Reads a file and returns the names of all its tensors.
        fn read_file(&mut self, path: &Path, choice: Choice<'_>) -> Result<BTreeSet<String>> {
            let io = |error: std::io::Error| failed(path, error);
            let mut file = File::open(path).map_err(io)?;
            let length = file.metadata().map_err(io)?.len();
            let mut start = vec![0; length.min(4096) as usize];
            file.read_exact(&mut start).map_err(io)?;
            let invalid = |why: String| {
                let is = what_it_is(&start).map(|is| format!("; {is}")).unwrap_or_default();
                failed(path, format!("not a valid safetensors file ({length} bytes): {why}{is}"))
            };
            let header_len = header_len(&start, length).map_err(invalid)?;
            let mut header = vec![0; header_len];
            file.seek(SeekFrom::Start(8)).map_err(io)?;
            file.read_exact(&mut header).map_err(io)?;
            let data_start = 8 + header_len as u64;
            let metadata = tensors(&header, length - data_start).map_err(invalid)?;
            let names = metadata.tensors().into_keys().collect();
            for (name, info) in metadata.tensors() {
                let mut data = None;
                if choice(&name) == Wanted::Values {
                    let (first, end) = info.data_offsets;
                    let mut bytes = vec![0; end - first];
                    file.seek(SeekFrom::Start(data_start + first as u64)).map_err(io)?;
                    file.read_exact(&mut bytes).map_err(io)?;
                    data = Some(bytes);
                }
                self.take(name, info.dtype, &info.shape, data.as_deref())?;
            }
            Ok(names)
        }
    }
}
