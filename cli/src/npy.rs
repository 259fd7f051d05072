//! NumPy's `.npy` format (`numpy.lib.format`, versions 1 to 3): a header, which is a Python dict, and the elements.
//! What a header claims is checked before anything is allocated.

use std::borrow::Cow;

use safetensors::Dtype;

const MAGIC: &[u8] = b"\x93NUMPY";
/// The longest header, NumPy's own limit.
const HEADER: usize = 10_000;
/// Brackets in a header; a plain array needs three.
const BRACKETS: usize = 16;

/// An array as it is in a file.
#[derive(Debug)]
pub struct Npy<'a> {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// The first axis is the innermost.
    pub is_fortran: bool,
    /// The elements, little-endian, as many as the shape says.
    pub data: Cow<'a, [u8]>,
}

/// Why a file gives no array.
#[derive(Debug)]
pub enum Fault {
    /// It is not in the format.
    Format(String),
    /// It holds elements of a type that is not read, by NumPy's name.
    Type(String),
    /// Its shape is larger than what can be addressed.
    Shape(wgpu_attention::Error),
}

fn bad<T>(what: impl Into<String>) -> Result<T, Fault> {
    Err(Fault::Format(what.into()))
}

pub fn parse(bytes: &[u8]) -> Result<Npy<'_>, Fault> {
    let (start, length) = match bytes.strip_prefix(MAGIC) {
        Some([1, 0, a, b, ..]) => (10, usize::from(u16::from_le_bytes([*a, *b]))),
        Some([2 | 3, 0, a, b, c, d, ..]) => (12, u32::from_le_bytes([*a, *b, *c, *d]) as usize),
        Some([version, minor, _, _, ..]) => return bad(format!("version {version}.{minor} is not read")),
        _ => return bad("it does not start like one"),
    };
    let header = (length <= HEADER).then(|| bytes.get(start..start + length)).flatten();
    let Some(header) = header else { return bad(format!("its header claims {length} bytes")) };
    if header.iter().filter(|x| b"([{".contains(x)).count() > BRACKETS {
        return bad("its header is not that of a plain array");
    }
    let Ok(text) = std::str::from_utf8(header) else { return bad("its header is not text") };
    let Header { descr, is_fortran, shape } = Header::parse(text).map_err(Fault::Format)?;
    let other_type = || Fault::Type(descr.to_string());
    let (order, code) = descr.split_at_checked(1).ok_or_else(other_type)?;
    let (dtype, size) = match code {
        "b1" => (Dtype::BOOL, 1),
        "i1" => (Dtype::I8, 1),
        "u1" => (Dtype::U8, 1),
        "i2" => (Dtype::I16, 2),
        "u2" => (Dtype::U16, 2),
        "i4" => (Dtype::I32, 4),
        "u4" => (Dtype::U32, 4),
        "i8" => (Dtype::I64, 8),
        "u8" => (Dtype::U64, 8),
        "f2" => (Dtype::F16, 2),
        "f4" => (Dtype::F32, 4),
        "f8" => (Dtype::F64, 8),
        // What ml_dtypes writes as bfloat16: NumPy itself has no name for it.
        "V2" => (Dtype::BF16, 2),
        _ => return Err(other_type()),
    };
    let is_swapped = match order {
        "<" => false,
        // The bytes of a type without a name have no order.
        "|" if size == 1 || dtype == Dtype::BF16 => false,
        ">" => size > 1 && dtype != Dtype::BF16,
        _ => return Err(other_type()),
    };
    let count = wgpu_attention::problem::checked_len(&shape).map_err(Fault::Shape)?;
    let data = &bytes[start + length..];
    if count.checked_mul(size) != Some(data.len()) {
        return bad(format!("shape {shape:?} of {size}-byte elements does not fit {} bytes of data", data.len()));
    }
    if dtype == Dtype::BOOL
        && let Some(byte) = data.iter().find(|&&byte| byte > 1)
    {
        return bad(format!("{byte} is no bool"));
    }
    let data = match is_swapped {
        false => Cow::Borrowed(data),
        true => Cow::Owned(data.chunks_exact(size).flat_map(|element| element.iter().rev().copied()).collect()),
    };
    Ok(Npy { dtype, shape, is_fortran, data })
}

/// A row-major array as NumPy writes it; `descr` is its name of the type.
pub fn format(descr: &str, shape: &[usize], data: impl IntoIterator<Item = u8>) -> Vec<u8> {
    let axes: String = shape.iter().map(|n| format!("{n}, ")).collect();
    // A comma behind the only axis makes a tuple.
    let axes = if shape.len() == 1 { axes.trim_end_matches(' ') } else { axes.trim_end_matches(", ") };
    let mut header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({axes}), }}");
    // With the ten bytes before it, whole lines of 64.
    let length = (header.len() + 11).next_multiple_of(64) - 10;
    header.extend(std::iter::repeat_n(' ', length - 1 - header.len()));
    header.push('\n');
    let mut bytes = [MAGIC, &[1, 0]].concat();
    bytes.extend((length as u16).to_le_bytes());
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    bytes
}

#[derive(Debug, PartialEq)]
struct Header<'a> {
    /// NumPy's name of the type; for records the text of their list.
    descr: &'a str,
    is_fortran: bool,
    shape: Vec<usize>,
}

impl<'a> Header<'a> {
    fn parse(text: &'a str) -> Result<Header<'a>, String> {
        let mut reader = Reader { rest: text.trim() };
        let (mut descr, mut is_fortran, mut shape) = (None, None, None);
        reader.expect("{")?;
        while !reader.take("}") {
            let key = reader.text()?;
            reader.expect(":")?;
            match key {
                "descr" if reader.rest.starts_with('[') => descr = Some(reader.list()?),
                "descr" => descr = Some(reader.text()?),
                "fortran_order" => is_fortran = Some(reader.bool()?),
                "shape" => shape = Some(reader.shape()?),
                _ => return Err(format!("its header has a key '{}'", key.escape_debug())),
            }
            if !reader.take(",") {
                reader.expect("}")?;
                break;
            }
        }
        if !reader.rest.is_empty() {
            return Err(reader.unexpected("nothing more"));
        }
        let missing = |key: &str| format!("its header has no '{key}'");
        Ok(Header {
            descr: descr.ok_or_else(|| missing("descr"))?,
            is_fortran: is_fortran.ok_or_else(|| missing("fortran_order"))?,
            shape: shape.ok_or_else(|| missing("shape"))?,
        })
    }
}

/// Of Python's literals, those that headers are made of.
struct Reader<'a> {
    rest: &'a str,
}

impl<'a> Reader<'a> {
    fn take(&mut self, token: &str) -> bool {
        match self.rest.strip_prefix(token) {
            Some(rest) => {
                self.rest = rest.trim_start();
                true
            }
            None => false,
        }
    }

    fn expect(&mut self, token: &str) -> Result<(), String> {
        if self.take(token) { Ok(()) } else { Err(self.unexpected(token)) }
    }

    fn unexpected(&self, expected: &str) -> String {
        let found: String = self.rest.chars().take(10).collect();
        format!("its header has \"{}\" where {expected} belongs", found.escape_debug())
    }

    fn skip(&mut self, length: usize) -> &'a str {
        let (taken, rest) = self.rest.split_at(length);
        self.rest = rest.trim_start();
        taken
    }

    /// A text in quotes; names of types have nothing that is escaped.
    fn text(&mut self) -> Result<&'a str, String> {
        let mut chars = self.rest.chars();
        let quote = chars.next().filter(|quote| "'\"".contains(*quote));
        let end = quote.and_then(|quote| chars.as_str().find(quote));
        let text = end.map(|end| &self.rest[1..=end]).filter(|text| !text.contains(['\\', '\n']));
        let text = text.ok_or_else(|| self.unexpected("a text"))?;
        self.skip(text.len() + 2);
        Ok(text)
    }

    fn bool(&mut self) -> Result<bool, String> {
        match (self.take("True"), self.take("False")) {
            (true, false) => Ok(true),
            (false, true) => Ok(false),
            _ => Err(self.unexpected("True or False")),
        }
    }

    /// Lengths of axes, in a tuple or in a list.
    fn shape(&mut self) -> Result<Vec<usize>, String> {
        let close = if self.take("[") { "]" } else { ")" };
        if close == ")" {
            self.expect("(")?;
        }
        let mut shape = Vec::new();
        while !self.take(close) {
            let digits = self.rest.bytes().take_while(u8::is_ascii_digit).count();
            let length = self.rest[..digits].parse().map_err(|_| self.unexpected("the length of an axis"))?;
            self.skip(digits);
            shape.push(length);
            if !self.take(",") {
                self.expect(close)?;
                break;
            }
        }
        Ok(shape)
    }

    /// A list as it stands, to its closing bracket.
    fn list(&mut self) -> Result<&'a str, String> {
        let mut depth = 0;
        let mut quote = None;
        for (at, c) in self.rest.char_indices() {
            match (quote, c) {
                (Some(open), _) if c == open => quote = None,
                (Some(_), _) => {}
                (None, '\'' | '"') => quote = Some(c),
                (None, '[' | '(') => depth += 1,
                (None, ']' | ')') => depth -= 1,
                _ => {}
            }
            if depth == 0 {
                return Ok(self.skip(at + 1));
            }
        }
        Err("its header has a list without an end".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_header(header: &str, data: &[u8]) -> Vec<u8> {
        [MAGIC, &[1, 0], &(header.len() as u16).to_le_bytes(), header.as_bytes(), data].concat()
    }

    #[test]
    fn headers_as_numpy_has_written_them() {
        let header = |descr, is_fortran, shape: &[usize]| Header { descr, is_fortran, shape: shape.to_vec() };
        for (text, want) in [
            ("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3, 4), }   \n", header("<f4", false, &[2, 3, 4])),
            ("{'descr': '|u1', 'fortran_order': True, 'shape': (5,), }\n", header("|u1", true, &[5])),
            ("{'descr': '>f8', 'fortran_order': False, 'shape': (), }\n", header(">f8", false, &[])),
            ("{\"shape\":[7,0],\"descr\":\"<i8\",\"fortran_order\":True}", header("<i8", true, &[7, 0])),
            (
                "{'descr': [('a]', '<f4', (2, 3)), ('b', '<i8')], 'fortran_order': False, 'shape': (1,), }",
                header("[('a]', '<f4', (2, 3)), ('b', '<i8')]", false, &[1]),
            ),
        ] {
            assert_eq!(Header::parse(text), Ok(want), "{text}");
        }
    }

    #[test]
    fn other_headers_are_refused() {
        for (text, says) in [
            ("", "where { belongs"),
            ("{", "where a text belongs"),
            ("{'descr': '<f4', 'fortran_order': False}", "no 'shape'"),
            ("{'descr': '<f4', 'shape': (1,)}", "no 'fortran_order'"),
            ("{'shape': (1,), 'fortran_order': False}", "no 'descr'"),
            ("{'descr': '<f4', 'fortran_order': 0, 'shape': (1,)}", "True or False"),
            ("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}", "\"-1,)}\" where the length of an axis"),
            ("{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999,)}", "the length of an axis"),
            ("{'descr': '<f4', 'fortran_order': False, 'shape': (1 2)}", "where ) belongs"),
            ("{'descr': '<f4', 'fortran_order': False, 'shape': (1,)} 1", "nothing more"),
            ("{'descr': '<\\x664', 'fortran_order': False, 'shape': (1,)}", "where a text belongs"),
            ("{'descr': '<f4, 'fortran_order': False, 'shape': (1,)}", "where } belongs"),
            ("{'descr': [('a', '<f4'}", "a list without an end"),
            ("{'descr': ('<f4', (2,)), 'fortran_order': False, 'shape': (1,)}", "where a text belongs"),
            ("{'more': 1}", "a key 'more'"),
        ] {
            let error = Header::parse(text).unwrap_err();
            assert!(error.contains(says), "{text}: {error}");
        }
    }

    #[test]
    fn elements_in_either_order_of_bytes() {
        let read = |descr: &str, data: &[u8]| {
            let header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': (1,), }}");
            let bytes = with_header(&header, data);
            parse(&bytes).map(|npy| (npy.dtype, npy.data.into_owned()))
        };
        assert_eq!(read("<f4", &[1, 2, 3, 4]).unwrap(), (Dtype::F32, vec![1, 2, 3, 4]));
        assert_eq!(read(">f4", &[1, 2, 3, 4]).unwrap(), (Dtype::F32, vec![4, 3, 2, 1]));
        assert_eq!(read("|i1", &[1]).unwrap(), (Dtype::I8, vec![1]));
        assert_eq!(read("|V2", &[1, 2]).unwrap(), (Dtype::BF16, vec![1, 2]));
        for descr in ["|f4", "=f4", "f4", "", "é", "<c8", "|O", "<f16", "<M8[ns]"] {
            assert!(matches!(read(descr, &[0; 4]), Err(Fault::Type(name)) if name == descr), "{descr}");
        }
        assert!(matches!(read("|b1", &[2]), Err(Fault::Format(what)) if what == "2 is no bool"));
        assert!(matches!(read("<f4", &[0; 5]), Err(Fault::Format(what)) if what.contains("[1] of 4-byte")));
    }

    #[test]
    fn what_is_written_is_read() {
        for shape in [&[][..], &[0], &[3], &[2, 3], &[1; 20]] {
            let data = vec![7; 4 * shape.iter().product::<usize>()];
            let bytes = format("<f4", shape, data.iter().copied());
            let npy = parse(&bytes).unwrap();
            assert_eq!((npy.dtype, &npy.shape[..], npy.is_fortran), (Dtype::F32, shape, false));
            assert_eq!((npy.data.as_ref(), (bytes.len() - data.len()) % 64), (&data[..], 0));
        }
    }
}
