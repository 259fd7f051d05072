//! Tensor files: `.safetensors`, `.npz`, `.npy`. Headers are checked against the file's actual size before anything is
//! allocated.

use std::collections::BTreeMap;
use std::io::{Cursor, Read, Write};
use std::path::Path;

use half::{bf16, f16};
use safetensors::{SafeTensors, tensor::Metadata};
use zip::write::SimpleFileOptions;

use crate::array::{Array, Values};
use crate::error::{Error, Result, fail, usage};
use crate::npy::{self, Fault};
use crate::recognise::{HEAD, recognise};

/// Named arrays of one file, or of a folder of `.npy` files.
pub struct TensorFile {
    /// As the user wrote it, for messages.
    pub path: String,
    source: Source,
}

enum Source {
    Safetensors { bytes: Vec<u8>, data: usize, metadata: Metadata },
    Arrays(BTreeMap<String, Array>),
}

/// [`read_named`], where a file is given.
pub fn read_optional(text: &Option<String>) -> Result<Option<Array>> {
    text.as_ref().map(|text| read_named(text)).transpose()
}

pub fn read_bytes(path: &Path) -> Result<Vec<u8>> {
    if path.is_dir() {
        fail!("{} is a folder; a file is needed", path.display());
    }
    std::fs::read(path).map_err(|error| Error::Failed(format!("cannot read {}: {error}", path.display())))
}

/// The error for layer weights that the library could not read: what the file is instead and how to convert it, if that
/// is known. The error for a shard listed in an index is the library's own.
pub fn explain(path: &Path, error: wgpu_attention::Error) -> Error {
    let start = if extension(path) == "json" { None } else { beginning(path).ok() };
    let problem = start.and_then(|(head, length)| what_instead(path, &head, length, "safetensors"));
    Error::Failed(problem.map_or_else(|| error.to_string(), |problem| format!("{}: {problem}", path.display())))
}

/// The bytes that identify a file, including the whole header of a safetensors file, and the file's length.
fn beginning(path: &Path) -> std::io::Result<(Vec<u8>, u64)> {
    let mut file = std::fs::File::open(path)?;
    let mut head = Vec::new();
    (&mut file).take(HEAD as u64).read_to_end(&mut head)?;
    if let [a, b, c, d, 0, 0, 0, 0, b'{', ..] = head[..] {
        // The longest header that safetensors allows.
        let header = u64::from(u32::from_le_bytes([a, b, c, d])).min(100_000_000);
        file.take((8 + header).saturating_sub(HEAD as u64)).read_to_end(&mut head)?;
    }
    Ok((head, std::fs::metadata(path)?.len()))
}

fn extension(path: &Path) -> String {
    path.extension().map(|ending| ending.to_string_lossy().to_lowercase()).unwrap_or_default()
}

impl TensorFile {
    /// Opens a file by its ending, or a folder of `.npy` files.
    pub fn open(path: &Path) -> Result<TensorFile> {
        let shown = path.display().to_string();
        if path.is_dir() {
            return open_folder(path);
        }
        match extension(path).as_str() {
            "safetensors" => TensorFile::from_safetensors(shown, read_bytes(path)?),
            "npz" => Ok(TensorFile { source: Source::Arrays(read_npz(&shown, read_bytes(path)?)?), path: shown }),
            "npy" => {
                let array = read_npy(&shown, &read_bytes(path)?)?;
                let stem = path.file_stem().map(|stem| stem.to_string_lossy().to_string()).unwrap_or_default();
                Ok(TensorFile { source: Source::Arrays(BTreeMap::from([(stem, array)])), path: shown })
            }
            _ => {
                let (head, _) =
                    beginning(path).map_err(|error| Error::Failed(format!("cannot read {shown}: {error}")))?;
                let is = recognise(path, &head, None).map_or(String::new(), |is| format!("; {is}"));
                usage!("{shown}: the ending must be .safetensors, .npz or .npy{is}")
            }
        }
    }

    pub fn from_safetensors(path: String, bytes: Vec<u8>) -> Result<TensorFile> {
        // `deserialize` checks offsets and shapes against the file's length.
        if let Err(error) = SafeTensors::deserialize(&bytes) {
            return Err(unreadable(Path::new(&path), &bytes, "safetensors", &error.to_string()));
        }
        let (header, metadata) =
            SafeTensors::read_metadata(&bytes).map_err(|error| Error::Failed(format!("{path}: {error}")))?;
        Ok(TensorFile { path, source: Source::Safetensors { data: header + 8, bytes, metadata } })
    }

    pub fn names(&self) -> Vec<String> {
        match &self.source {
            Source::Safetensors { metadata, .. } => {
                let mut names: Vec<String> = metadata.tensors().into_keys().collect();
                names.sort();
                names
            }
            Source::Arrays(arrays) => arrays.keys().cloned().collect(),
        }
    }

    fn names_or_nothing(&self) -> String {
        const SHOWN: usize = 12;
        let names = self.names();
        match names.len() {
            0 => "nothing".into(),
            n if n <= SHOWN => names.join(", "),
            n => format!("{} and {} more", names[..SHOWN].join(", "), n - SHOWN),
        }
    }

    /// An entry of the safetensors header's `__metadata__`.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        match &self.source {
            Source::Safetensors { metadata, .. } => metadata.metadata().as_ref()?.get(key).map(String::as_str),
            Source::Arrays(_) => None,
        }
    }

    /// The array called `name`, if there is one.
    pub fn get(&self, name: &str) -> Result<Option<Array>> {
        match &self.source {
            Source::Arrays(arrays) => Ok(arrays.get(name).cloned()),
            Source::Safetensors { bytes, data, metadata } => {
                let Some(info) = metadata.info(name) else { return Ok(None) };
                let (start, end) = info.data_offsets;
                let values = decode(&bytes[data + start..data + end], info.dtype)
                    .map_err(|reason| Error::Failed(format!("{}: {name} {reason}", self.path)))?;
                Array::new(&info.shape, values).map(Some)
            }
        }
    }

    /// Like [`TensorFile::get`], but a missing tensor is an error that lists what was found.
    pub fn need(&self, name: &str) -> Result<Array> {
        match self.get(name)? {
            Some(array) => Ok(array),
            None => {
                // numpy.savez names unnamed arrays like this.
                let way_out = match self.names().iter().any(|found| found.starts_with("arr_")) {
                    true => format!("; in Python, numpy.savez(file, {name}=…) gives an array its name"),
                    false => String::new(),
                };
                fail!("{} holds no tensor \"{name}\"; found {}{way_out}", self.path, self.names_or_nothing())
            }
        }
    }

    /// The tensor called `name`; without a name, the only tensor.
    pub fn single(&self, name: Option<&str>) -> Result<Array> {
        match (name, self.names().as_slice()) {
            (Some(name), _) => self.need(name),
            (None, [only]) => self.need(only),
            (None, _) => usage!("{} holds {}; choose one with {}:NAME", self.path, self.names_or_nothing(), self.path),
        }
    }

    /// Fails unless every tensor is one of `known`, because a misspelt mask must not be ignored.
    pub fn expect_only(&self, known: &[&str]) -> Result<()> {
        match self.names().iter().find(|name| !known.contains(&name.as_str())) {
            None => Ok(()),
            Some(odd) => fail!("{} holds an unknown tensor \"{odd}\"; known names are {}", self.path, known.join(", ")),
        }
    }
}

/// `FILE` or `FILE:NAME`.
pub fn read_named(text: &str) -> Result<Array> {
    let whole = Path::new(text);
    if whole.exists() {
        return TensorFile::open(whole)?.single(None);
    }
    match text.rsplit_once(':') {
        Some((file, name)) if Path::new(file).exists() => TensorFile::open(Path::new(file))?.single(Some(name)),
        _ => fail!("cannot read {text}: no such file (FILE, or FILE:NAME for one tensor of several)"),
    }
}

fn open_folder(folder: &Path) -> Result<TensorFile> {
    let shown = folder.display().to_string();
    let entries = std::fs::read_dir(folder).map_err(|error| Error::Failed(format!("cannot read {shown}: {error}")))?;
    let mut arrays = BTreeMap::new();
    for path in entries.flatten().map(|entry| entry.path()).filter(|path| extension(path) == "npy") {
        let name = path.file_stem().map(|stem| stem.to_string_lossy().to_string()).unwrap_or_default();
        arrays.insert(name, read_npy(&path.display().to_string(), &read_bytes(&path)?)?);
    }
    if arrays.is_empty() {
        fail!("{shown} holds no .npy files; q.npy, k.npy and v.npy are needed");
    }
    Ok(TensorFile { path: shown, source: Source::Arrays(arrays) })
}

/// The error for a file whose contents do not match its extension: what it is instead and how to convert it, if that is
/// known, else the reader's `reason`.
fn unreadable(path: &Path, bytes: &[u8], ending: &'static str, reason: &str) -> Error {
    let problem = what_instead(path, bytes, bytes.len() as u64, ending).unwrap_or_else(|| reason.to_string());
    let kind = if ending == "safetensors" { "safetensors".into() } else { format!(".{ending}") };
    Error::Failed(format!("{} is not a valid {kind} file ({} bytes): {problem}", path.display(), bytes.len()))
}

/// What is wrong with a file of `length` bytes that does not match its extension: it is something else, or cut off.
fn what_instead(path: &Path, head: &[u8], length: u64, ending: &'static str) -> Option<String> {
    let problem = recognise(path, &head[..head.len().min(HEAD)], Some(ending));
    problem.or_else(|| if ending == "safetensors" { cut_off(head, length) } else { None })
}

/// Reports that a safetensors file of `length` bytes is truncated, as by an interrupted download.
fn cut_off(head: &[u8], length: u64) -> Option<String> {
    let header = usize::try_from(u64::from_le_bytes(head.get(..8)?.try_into().ok()?)).ok()?;
    let json: serde_json::Value = serde_json::from_slice(head.get(8..)?.get(..header)?).ok()?;
    let needed = json.as_object()?.values().filter_map(|entry| entry["data_offsets"][1].as_u64()).max()?;
    let data = length.checked_sub(8 + header as u64)?;
    (needed > data)
        .then(|| format!("the file is truncated: its header describes {needed} bytes of data, but it has {data}"))
}

/// Decodes little-endian elements; the error says why they cannot be read.
fn decode(bytes: &[u8], dtype: safetensors::Dtype) -> Result<Values, String> {
    use safetensors::Dtype as D;
    macro_rules! numbers {
        ($type:ty) => {
            bytes.chunks_exact(size_of::<$type>()).map(|x| <$type>::from_le_bytes(x.try_into().expect("exact chunks")))
        };
    }
    Ok(match dtype {
        D::BOOL => Values::Bool(bytes.iter().map(|&x| x != 0).collect()),
        D::U8 => Values::Int(bytes.iter().map(|&x| x.into()).collect()),
        D::I8 => Values::Int(numbers!(i8).map(i64::from).collect()),
        D::I16 => Values::Int(numbers!(i16).map(i64::from).collect()),
        D::U16 => Values::Int(numbers!(u16).map(i64::from).collect()),
        D::I32 => Values::Int(numbers!(i32).map(i64::from).collect()),
        D::U32 => Values::Int(numbers!(u32).map(i64::from).collect()),
        D::I64 => Values::Int(numbers!(i64).collect()),
        D::U64 => unsigned(numbers!(u64))?,
        D::F16 => Values::F16(numbers!(f16).collect()),
        D::BF16 => Values::BF16(numbers!(bf16).collect()),
        D::F32 => Values::F32(numbers!(f32).collect()),
        D::F64 => Values::F64(numbers!(f64).collect()),
        other => {
            return Err(format!(
                "is {other:?}, which is not supported; use floats (F32, F16, BF16, F64), integers or BOOL: in PyTorch, \
                 x.to(torch.float32) before save_file"
            ));
        }
    })
}

/// Unsigned 64-bit integers, which are lengths or masks here.
fn unsigned(numbers: impl Iterator<Item = u64>) -> Result<Values, String> {
    let signed = |x| i64::try_from(x).map_err(|_| format!("holds {x}; the largest integer allowed is {}", i64::MAX));
    numbers.map(signed).collect::<Result<_, _>>().map(Values::Int)
}

/// Reads one NumPy array; `shown` names its source in messages.
fn read_npy(shown: &str, bytes: &[u8]) -> Result<Array> {
    let npy = npy::parse(bytes).map_err(|fault| match fault {
        Fault::Format(what) => unreadable(Path::new(shown), bytes, "npy", &what),
        Fault::Type(name) => Error::Failed(format!("{shown} {}", other_type(&name))),
        Fault::Shape(error) => error.into(),
    })?;
    let values = decode(&npy.data, npy.dtype).map_err(|reason| Error::Failed(format!("{shown} {reason}")))?;
    if !npy.is_fortran {
        return Array::new(&npy.shape, values);
    }
    // Column-major is row-major of the reversed shape.
    let axes: Vec<usize> = (0..npy.shape.len()).rev().collect();
    let reversed: Vec<usize> = npy.shape.iter().rev().copied().collect();
    Array::new(&reversed, values)?.permute(&axes)
}

/// For an unsupported NumPy type: what the elements are, and how to convert them.
fn other_type(name: &str) -> String {
    let code = name.trim_start_matches(['<', '>', '|', '=']);
    let (kind, size) = code.split_at(code.chars().next().map_or(0, char::len_utf8));
    let bits = size.parse::<u32>().ok().and_then(|bytes| bytes.checked_mul(8)).unwrap_or(0);
    let (is, way_out) = match (kind, size) {
        ("c", _) => (format!("complex{bits}"), "save x.real and x.imag separately, each as float32"),
        ("f", "1") => ("float8".into(), "save x.astype('float32')"),
        ("f", _) => (format!("float{bits}"), "save x.astype('float32')"),
        ("V", "1") => ("single bytes without a type (float8 or int4 of ml_dtypes)".into(), "save x.astype('float32')"),
        ("V", _) => (format!("{size} bytes each without a type"), "save x.astype('float32')"),
        ("O", _) => ("Python objects".into(), "save numpy.array(x.tolist(), dtype='float32')"),
        ("U" | "S" | "a", _) => ("strings".into(), "save numbers: x.astype('float32') if the strings are numbers"),
        ("M" | "m", _) => ("dates or times".into(), "save x.astype('int64')"),
        ("[" | "(", _) => ("records of several fields".into(), "save each field as an array: x['name']"),
        _ => ("elements of an unknown type".into(), "save x.astype('float32')"),
    };
    format!("holds {is} ('{name}'); use float32, float16, bfloat16, float64, integers or bool: in Python, {way_out}")
}

fn read_npz(path: &str, bytes: Vec<u8>) -> Result<BTreeMap<String, Array>> {
    let head = bytes[..bytes.len().min(HEAD)].to_vec();
    let bad = |error: &dyn std::fmt::Display| unreadable(Path::new(path), &head, "npz", &error.to_string());
    let mut archive = zip::ZipArchive::new(Cursor::new(bytes)).map_err(|error| bad(&error))?;
    let mut files = Vec::new();
    for file in archive.file_names() {
        let file = file.map_err(|error| bad(&error))?;
        if file.ends_with(".npy") {
            files.push(file.into_owned());
        }
    }
    // Sorted, so that an error always names the same entry.
    files.sort();
    if files.is_empty() && !archive.is_empty() {
        return Err(bad(&"it holds no arrays (no .npy files)"));
    }
    let mut arrays = BTreeMap::new();
    for file in files {
        let mut entry = archive.by_name(&file).map_err(|error| bad(&error))?;
        // Grow with the bytes actually unpacked, not with the size that the entry claims.
        let mut unpacked = Vec::new();
        entry.read_to_end(&mut unpacked).map_err(|error| bad(&error))?;
        let name = file.strip_suffix(".npy").unwrap_or(&file);
        arrays.insert(name.to_string(), read_npy(&format!("{path}: {name}"), &unpacked)?);
    }
    Ok(arrays)
}

/// Rejects an output that cannot be written, before any work is done.
pub fn check_output(path: &Path, names: &[&str]) -> Result<()> {
    let shown = path.display();
    match extension(path).as_str() {
        "safetensors" | "npz" => {}
        "npy" if names.len() == 1 => {}
        "npy" => usage!("{shown}: an .npy file holds one tensor, but {} were requested; use .npz", names.join(", ")),
        _ => usage!("{shown}: the ending must be .safetensors, .npz or .npy"),
    }
    check_folder(path)
}

/// Rejects an output whose folder does not exist, before any work is done.
pub fn check_folder(path: &Path) -> Result<()> {
    let folder = parent(path);
    if !folder.is_dir() {
        fail!("cannot write {}: there is no folder {}", path.display(), folder.display());
    }
    Ok(())
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Whether two paths lead to the same file, whether it exists or not. Anything that is not a regular file, such as a
/// device, can be written to any number of times.
pub fn is_same(a: &Path, b: &Path) -> bool {
    let place = |path: &Path| {
        let beside = || Ok(std::fs::canonicalize(parent(path))?.join(path.file_name().unwrap_or_default()));
        std::fs::canonicalize(path).or_else(|_| beside()).unwrap_or_else(|_: std::io::Error| path.into())
    };
    let (a, b) = (place(a), place(b));
    a == b && std::fs::metadata(&a).map_or(true, |there| there.is_file())
}

/// Writes a file atomically: a temporary file in the same folder is renamed into place. Links are followed. A pipe, a
/// device or anything else that is not a regular file is written to directly.
pub fn write_whole(path: &Path, write: impl FnOnce(&mut std::fs::File) -> Result<()>) -> Result<()> {
    let cannot = |error: &dyn std::fmt::Display| Error::Failed(format!("cannot write {}: {error}", path.display()));
    if std::fs::metadata(path).is_ok_and(|there| !there.is_file() && !there.is_dir()) {
        return write(&mut std::fs::OpenOptions::new().write(true).open(path).map_err(|error| cannot(&error))?);
    }
    // The target, if the path is a link.
    let path = &std::fs::canonicalize(path).unwrap_or_else(|_| path.into());
    let mut builder = tempfile::Builder::new();
    builder.prefix(".attn-");
    // Use the user's default permissions, not those of a temporary file.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut file = builder.tempfile_in(parent(path)).map_err(|error| cannot(&error))?;
    write(file.as_file_mut())?;
    file.as_file_mut().sync_all().map_err(|error| cannot(&error))?;
    file.persist(path).map_err(|error| cannot(&error.error))?;
    Ok(())
}

/// Writes bytes atomically.
pub fn write_bytes(path: &Path, bytes: &[u8]) -> Result<()> {
    write_whole(path, |file| {
        file.write_all(bytes).map_err(|error| Error::Failed(format!("cannot write {}: {error}", path.display())))
    })
}

/// Writes indented JSON.
pub fn write_json(path: &Path, value: &serde_json::Value) -> Result<()> {
    write_bytes(path, format!("{value:#}\n").as_bytes())
}

/// JSON has no NaN and no infinity: they become strings.
pub fn json_number(x: f64) -> serde_json::Value {
    if x.is_finite() { x.into() } else { x.to_string().into() }
}

/// Writes a self-contained page: `template` with `data` as JSON in place of `{/* data */}`.
pub fn write_page(path: &Path, template: &str, data: &serde_json::Value) -> Result<()> {
    // Escaped, so that the data cannot contain a tag.
    let data = data.to_string().replace('<', "\\u003c").replace('>', "\\u003e").replace('&', "\\u0026");
    let (before, after) = template.split_once("{/* data */}").expect("the template has a place for the data");
    write_bytes(path, [before, &data, after].concat().as_bytes())
}

/// Writes named arrays in the format that the extension gives.
pub fn write_tensors(path: &Path, arrays: &[(&str, Array)]) -> Result<()> {
    let cannot = |error: &dyn std::fmt::Display| Error::Failed(format!("cannot write {}: {error}", path.display()));
    let is_numpy = extension(path) != "safetensors";
    if is_numpy && let Some((name, _)) = arrays.iter().find(|(_, array)| matches!(array.values(), Values::BF16(_))) {
        anstream::eprintln!(
            "note: {name} is bfloat16, which NumPy has no name for: numpy.load returns two raw bytes per element, and \
             x.view(ml_dtypes.bfloat16) converts them"
        );
    }
    let bytes = match extension(path).as_str() {
        "npz" => npz_bytes(path, arrays)?,
        "npy" => npy_bytes(path, &arrays[0].1)?,
        _ => safetensors_bytes(arrays).map_err(|error| cannot(&error))?,
    };
    write_bytes(path, &bytes)
}

fn npy_bytes(path: &Path, array: &Array) -> Result<Vec<u8>> {
    let shape = array.shape();
    Ok(match array.values() {
        Values::F16(x) => npy::format("<f2", shape, x.iter().flat_map(|x| x.to_le_bytes())),
        Values::F32(x) => npy::format("<f4", shape, x.iter().flat_map(|x| x.to_le_bytes())),
        // As ml_dtypes writes bfloat16, which NumPy has no name for: two untyped bytes.
        Values::BF16(x) => npy::format("<V2", shape, x.iter().flat_map(|x| x.to_le_bytes())),
        other => fail!("cannot write {}: results cannot be of type {}", path.display(), other.type_name()),
    })
}

fn npz_bytes(path: &Path, arrays: &[(&str, Array)]) -> Result<Vec<u8>> {
    let cannot = |what: &dyn std::fmt::Display| Error::Failed(format!("cannot write {}: {what}", path.display()));
    // Not compressed, as with NumPy's own savez.
    let stored = SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    let mut archive = zip::ZipWriter::new(Cursor::new(Vec::new()));
    for (name, array) in arrays {
        let bytes = npy_bytes(path, array)?;
        archive.start_file(format!("{name}.npy"), stored).map_err(|error| cannot(&error))?;
        archive.write_all(&bytes).map_err(|error| cannot(&error))?;
    }
    Ok(archive.finish().map_err(|error| cannot(&error))?.into_inner())
}

fn safetensors_bytes(arrays: &[(&str, Array)]) -> Result<Vec<u8>, safetensors::SafeTensorError> {
    let encoded: Vec<(&str, safetensors::Dtype, &[usize], Vec<u8>)> = arrays
        .iter()
        .map(|(name, array)| {
            use safetensors::Dtype as D;
            let (dtype, bytes) = match array.values() {
                Values::Bool(x) => (D::BOOL, x.iter().map(|&x| u8::from(x)).collect()),
                Values::Int(x) => (D::I64, x.iter().flat_map(|x| x.to_le_bytes()).collect()),
                Values::F16(x) => (D::F16, x.iter().flat_map(|x| x.to_le_bytes()).collect()),
                Values::BF16(x) => (D::BF16, x.iter().flat_map(|x| x.to_le_bytes()).collect()),
                Values::F32(x) => (D::F32, x.iter().flat_map(|x| x.to_le_bytes()).collect()),
                Values::F64(x) => (D::F64, x.iter().flat_map(|x| x.to_le_bytes()).collect()),
            };
            (*name, dtype, array.shape(), bytes)
        })
        .collect();
    let views = encoded
        .iter()
        .map(|(name, dtype, shape, bytes)| {
            Ok((*name, safetensors::tensor::TensorView::new(*dtype, shape.to_vec(), bytes)?))
        })
        .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()?;
    safetensors::serialize(views, None)
}
