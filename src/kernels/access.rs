//! How kernels read and write operands: four elements at a time or one by one, stored as f32 or packed
//! two to a word as f16 or bf16.
//!
//! Halves are unpacked with 32-bit arithmetic everywhere: no adapter needs a feature for it, and where
//! the feature is there, a word for two halves costs no more than two loads.

use super::specialise::Changes;
use crate::problem::{Dtype, Layout};

/// How a kernel reads or writes one operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// Four neighbouring elements at a time.
    pub wide: bool,
    /// What the buffer holds.
    pub stored: Dtype,
}

impl Access {
    /// f32, four at a time.
    pub const WIDE: Access = Access { wide: true, stored: Dtype::F32 };
    /// f32, one by one: what the shader files do as they stand.
    pub const NARROW: Access = Access { wide: false, stored: Dtype::F32 };

    fn element(self) -> &'static str {
        match (self.stored, self.wide) {
            (Dtype::F16 | Dtype::BF16, true) => "vec2<u32>",
            (Dtype::F16 | Dtype::BF16, false) => "u32",
            (_, true) => "vec4<f32>",
            (_, false) => "f32",
        }
    }
}

/// A strided operand and what its buffer holds.
#[derive(Clone, Copy, Debug)]
pub struct Operand<'a> {
    /// Shape and strides, in elements.
    pub layout: &'a Layout,
    /// The type of an element in the buffer.
    pub stored: Dtype,
}

impl<'a> From<&'a Layout> for Operand<'a> {
    fn from(layout: &'a Layout) -> Operand<'a> {
        Operand { layout, stored: Dtype::F32 }
    }
}

impl std::ops::Deref for Operand<'_> {
    type Target = Layout;
    fn deref(&self) -> &Layout {
        self.layout
    }
}

impl Operand<'_> {
    /// Four elements at a time where the layout allows it.
    pub fn access(&self) -> Access {
        Access { wide: is_wide(self.layout), stored: self.stored }
    }
    /// Bytes of an element.
    pub fn element(&self) -> u64 {
        self.stored.stored_size()
    }
}

/// True when rows may be read four elements at a time.
pub fn is_wide(layout: &Layout) -> bool {
    let (Some((&dim, lead)), Some((&step, strides))) = (layout.shape().split_last(), layout.strides().split_last())
    else {
        return false;
    };
    let used = lead.iter().zip(strides).filter(|&(&n, _)| n > 1);
    dim.is_multiple_of(4)
        && dim > 0
        && step == 1
        && layout.offset().is_multiple_of(4)
        && used.into_iter().all(|(_, s)| s.is_multiple_of(4))
}

/// Four elements of a buffer by one load: `four`.
fn load_of_four(buffer: &str) -> String {
    format!("let four = {buffer}[at / 4u + d4];")
}

/// The same as [`load`] and [`fours`] wrote it, by words of 64 bits: software adapters load word by word, and a word of
/// 64 bits costs as much as one of 32.
pub fn in_words_of_64_bits(changes: &Changes) -> Changes {
    let mut changes = changes.clone();
    for Read { buffer, alias, .. } in [Q, K, V, X, KEPT, WALKED, GATE, TABLE, W] {
        let Some(element) = changes.aliases.get_mut(alias) else { continue };
        let value;
        (*element, value) = match *element {
            "vec4<f32>" => (
                "vec2<u64>",
                "bitcast<vec4<f32>>(vec4<u32>(u32(words.x), u32(words.x >> 32u), u32(words.y), u32(words.y >> 32u)))",
            ),
            "vec2<u32>" => ("u64", "vec2<u32>(u32(words), u32(words >> 32u))"),
            _ => continue,
        };
        let loads = format!("let words = {buffer}[at / 4u + d4];\n    let four = {value};");
        for body in changes.blocks.values_mut() {
            *body = body.replace(&load_of_four(buffer), &loads).into();
        }
    }
    changes
}

/// An operand that kernels read through `load_x(at, d4) -> vec4<f32>`.
pub struct Read {
    /// The buffer's name: `x` for `load_x` and `XElem`.
    pub buffer: &'static str,
    load: &'static str,
    alias: &'static str,
    /// The stride between elements of a row.
    step: &'static str,
}

macro_rules! read {
    ($buffer:literal, $alias:literal, $step:literal) => {
        Read { buffer: $buffer, load: concat!("load_", $buffer), alias: $alias, step: concat!("params.", $step) }
    };
}

/// Queries.
pub const Q: Read = read!("q", "QElem", "q_strides.w");
/// Keys.
pub const K: Read = read!("k", "KElem", "k_strides.w");
/// Values.
pub const V: Read = read!("v", "VElem", "v_strides.w");
/// The input of a projection, or of a gate.
pub const X: Read = read!("x", "XElem", "x_strides.z");
/// What `inspect.wgsl` keeps in registers.
pub const KEPT: Read = read!("kept", "KeptElem", "kept_strides.w");
/// What `inspect.wgsl` walks over.
pub const WALKED: Read = read!("walked", "WalkedElem", "walked_strides.w");
/// Rows on their way into a cache, or to be normalised.
pub const ROWS: Read = read!("x", "XElem", "x_strides.w");
/// What a gate is the sigmoid of.
pub const GATE: Read = read!("g", "GElem", "g_strides.z");
/// A table of positions.
pub const TABLE: Read = read!("table", "TableElem", "table_strides.y");
/// The weight of a projection.
pub const W: Read = read!("w", "WElem", "w_strides.y");

/// Rewrites how `read` is loaded. `width` is the number of elements of a row; lanes from it on are 0,
/// which a wide read needs only where `padded` (a WGSL condition) may hold.
pub fn load(changes: Changes, read: &Read, width: &str, padded: &str, access: Access) -> Changes {
    if access == Access::NARROW {
        return changes;
    }
    let Read { buffer, load, alias, step } = read;
    let body = if access.wide {
        let value = unpacked(access.stored);
        let four = load_of_four(buffer);
        format!(
            "fn {load}(at: u32, d4: u32) -> vec4<f32> {{
    {four}
    return select({value}, vec4<f32>(), {padded} && d4 * 4u >= {width});
}}"
        )
    } else {
        format!(
            "{}
fn {load}(at: u32, d4: u32) -> vec4<f32> {{
    let d = d4 * 4u;
    let step = {step};
    let first = at + d * step;
    return select(
        vec4<f32>(),
        vec4<f32>(one_{buffer}(first), one_{buffer}(first + step), one_{buffer}(first + 2u * step), one_{buffer}(first + 3u * step)),
        vec4<u32>(d, d + 1u, d + 2u, d + 3u) < vec4<u32>({width}),
    );
}}",
            one(buffer, access.stored)
        )
    };
    changes.alias(alias, access.element()).block(load, body)
}

/// `one_x(at) -> f32`: one half of a word.
fn one(buffer: &str, stored: Dtype) -> String {
    let value = match stored {
        Dtype::BF16 => "bitcast<f32>(word << 16u)",
        _ => "unpack2x16float(word).x",
    };
    format!(
        "fn one_{buffer}(at: u32) -> f32 {{
    let word = {buffer}[at / 2u] >> (16u * (at % 2u));
    return {value};
}}"
    )
}

/// Rewrites how a kernel that reads single elements of `x` does so: `element(at) -> f32`.
pub fn element(changes: Changes, stored: Dtype) -> Changes {
    match stored {
        Dtype::F16 | Dtype::BF16 => changes
            .alias("XElem", "u32")
            .block("element", format!("{}\nfn element(at: u32) -> f32 {{ return one_x(at); }}", one("x", stored))),
        _ => changes,
    }
}

/// The same for whole fours: `load_x(at, d4) -> vec4<f32>` in the place of `element`.
pub fn fours(changes: Changes, stored: Dtype) -> Changes {
    let (four, value) = (load_of_four("x"), unpacked(stored));
    changes.alias("XElem", Access { wide: true, stored }.element()).block(
        "element",
        format!(
            "fn load_x(at: u32, d4: u32) -> vec4<f32> {{
    {four}
    return {value};
}}"
        ),
    )
}

/// The four elements of a wide read, `four`.
fn unpacked(stored: Dtype) -> &'static str {
    match stored {
        Dtype::F16 => "vec4<f32>(unpack2x16float(four.x), unpack2x16float(four.y))",
        Dtype::BF16 => {
            "bitcast<vec4<f32>>(vec4<u32>(four.x << 16u, four.x & 0xffff0000u, four.y << 16u, four.y & 0xffff0000u))"
        }
        _ => "four",
    }
}

/// `pack_four(x) -> vec2<u32>`, to nearest even by bits: what drivers do with `pack2x16float` differs.
fn pack(stored: Dtype) -> String {
    let half_bits = match stored {
        Dtype::BF16 => {
            "fn half_bits(x: f32) -> u32 {
    let bits = bitcast<u32>(x);
    let is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return select((bits + 0x7fffu + ((bits >> 16u) & 1u)) >> 16u, (bits >> 16u) | 0x40u, is_nan);
}"
        }
        _ => {
            "fn half_bits(x: f32) -> u32 {
    let bits = bitcast<u32>(x);
    let size = bits & 0x7fffffffu;
    // Below 2^-14 a half counts in steps of 2^-24, as an f32 between 0.5 and 1 does.
    let small = bitcast<u32>(bitcast<f32>(size) + 0.5) - 0x3f000000u;
    let normal = (size + 0xfffu + ((size >> 13u) & 1u) - 0x38000000u) >> 13u;
    var half = select(normal, small, size < 0x38800000u);
    half = select(half, 0x7c00u, size >= 0x477ff000u);
    half = select(half, 0x7e00u, size > 0x7f800000u);
    return half | ((bits >> 16u) & 0x8000u);
}"
        }
    };
    format!(
        "{half_bits}
fn pack_four(x: vec4<f32>) -> vec2<u32> {{
    return vec2<u32>(half_bits(x.x) | (half_bits(x.y) << 16u), half_bits(x.z) | (half_bits(x.w) << 16u));
}}
"
    )
}

/// Rewrites how `o` is stored: `store_o(at, d4, value, add)`, where `whole` is a WGSL condition that
/// holds when no lane of `d4` lies behind the row's `width` elements. Halves are stored wide only.
pub fn store(changes: Changes, width: &str, whole: &str, access: Access) -> Changes {
    if access == Access::NARROW {
        return changes;
    }
    let old = unpacked(access.stored);
    let (helpers, new) = match access.stored {
        Dtype::F16 | Dtype::BF16 => (pack(access.stored), "pack_four(sum)"),
        _ => (String::new(), "sum"),
    };
    changes.alias("OElem", access.element()).block(
        "store_o",
        format!(
            "{helpers}fn store_o(at: u32, d4: u32, value: vec4<f32>, add: bool) {{
    if ({whole} || d4 * 4u < {width}) {{
        var sum = value;
        if (add) {{
            let four = o[at / 4u + d4];
            sum += {old};
        }}
        o[at / 4u + d4] = {new};
    }}
}}"
        ),
    )
}

/// Rewrites how whole fours of `y` are stored: `store_y(at, d4, value)`.
pub fn store_fours(changes: Changes, access: Access) -> Changes {
    match access.stored {
        Dtype::F16 | Dtype::BF16 => changes.alias("YElem", access.element()).block(
            "store_y",
            format!(
                "{}fn store_y(at: u32, d4: u32, value: vec4<f32>) {{
    y[at / 4u + d4] = pack_four(value);
}}",
                pack(access.stored)
            ),
        ),
        _ => changes,
    }
}

/// `/wide` when every operand is read in fours, else the letters of those that are; then the halves.
pub fn name(name: &mut String, operands: &[(&str, Access)]) {
    let letters = |which: &dyn Fn(Access) -> bool| -> String {
        operands.iter().filter(|&&(_, access)| which(access)).map(|&(letter, _)| letter).collect()
    };
    let wide = letters(&|access| access.wide);
    if wide.len() == operands.len() {
        name.push_str("/wide");
    } else if !wide.is_empty() {
        name.push_str(&format!("/wide_{wide}"));
    }
    for stored in [Dtype::F16, Dtype::BF16] {
        let halves = letters(&|access| access.stored == stored);
        if !halves.is_empty() {
            name.push_str(&format!("/{stored}_{halves}"));
        }
    }
}
