//! How kernels read and write operands: four elements at a time or one by one, stored as f32 or packed two to a word as
//! f16 or bf16.
//!
//! f16 and bf16 are always unpacked with 32-bit arithmetic. No adapter needs a feature for it, and even with the
//! feature, one word for two halves costs no more than two loads.

use super::specialise::{Body, Changes};
use crate::problem::{Dtype, Layout};

/// How a kernel reads or writes one operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// Reads four adjacent elements at a time.
    pub wide: bool,
    /// The type in the buffer.
    pub stored: Dtype,
}

impl Access {
    /// f32, four at a time.
    pub const WIDE: Access = Access { wide: true, stored: Dtype::F32 };
    /// f32, one by one; what the shader files do unchanged.
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

/// A strided operand and the type in its buffer.
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
    /// Four elements at a time if the layout allows it.
    pub fn access(&self) -> Access {
        Access { wide: is_wide(self.layout), stored: self.stored }
    }
    /// Bytes of an element.
    pub fn element(&self) -> u64 {
        self.stored.stored_size()
    }
}

/// True if rows may be read four elements at a time.
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

/// A buffer that kernels read: the blocks that load four elements and one element of it, and its element type.
pub struct Read {
    four: &'static str,
    one: &'static str,
    alias: &'static str,
}

macro_rules! read {
    ($buffer:literal, $alias:literal) => {
        Read { four: concat!("load_", $buffer), one: concat!("element_", $buffer), alias: $alias }
    };
}

/// Queries.
pub const Q: Read = read!("q", "QElem");
/// Keys.
pub const K: Read = read!("k", "KElem");
/// Values.
pub const V: Read = read!("v", "VElem");
/// The rows that a kernel works on.
pub const X: Read = read!("x", "XElem");
/// The operand that `inspect.wgsl` keeps in registers.
pub const OUTER: Read = read!("outer", "OuterElem");
/// The operand that `inspect.wgsl` iterates over.
pub const INNER: Read = read!("inner", "InnerElem");
/// The tokens' second operand: added to them, or gating them.
pub const Z: Read = read!("z", "ZElem");
/// The weight of a projection.
pub const W: Read = read!("w", "WElem");

/// The first factor of a sum over rows.
pub const A: Read = read!("a", "AElem");
/// The second one.
pub const B: Read = read!("b", "BElem");

const READS: [Read; 10] = [Q, K, V, X, OUTER, INNER, Z, W, A, B];

/// Sets how `read` is loaded.
pub fn load(changes: Changes, read: &Read, access: Access) -> Changes {
    let (block, part) = match (access.wide, access.stored) {
        (true, Dtype::F16) => (read.four, "load_wide(of_f16)"),
        (true, Dtype::BF16) => (read.four, "load_wide(of_bf16)"),
        (true, _) => (read.four, "load_wide(of_f32)"),
        (false, Dtype::F16) => (read.one, "element_f16"),
        (false, Dtype::BF16) => (read.one, "element_bf16"),
        (false, _) => return changes,
    };
    changes.alias(read.alias, access.element()).part(block, part)
}

/// Sets how `o` is stored: `store_o(at, d4, value, add)`. f16 and bf16 are stored only in whole fours.
pub fn store(changes: Changes, access: Access) -> Changes {
    let part = match access {
        Access::NARROW => return changes,
        Access { stored: Dtype::F16, .. } => "store_wide(of_f16 to_f16)",
        Access { stored: Dtype::BF16, .. } => "store_wide(of_bf16 to_bf16)",
        _ => "store_wide(of_f32 to_f32)",
    };
    changes.alias("OElem", access.element()).part("store_o", part)
}

/// Sets how whole fours of `y` are stored.
pub fn store_fours(changes: Changes, access: Access) -> Changes {
    let part = match access.stored {
        Dtype::F16 => "store_fours(y to_f16)",
        Dtype::BF16 => "store_fours(y to_bf16)",
        _ => return changes,
    };
    changes.alias("YElem", access.element()).part("store_fours_y", part)
}

/// The same changes, with wide loads in 64-bit words.
pub fn in_words_of_64_bits(changes: &Changes) -> Changes {
    let mut changes = changes.clone();
    for Read { four, alias, .. } in READS {
        let (element, part) = match changes.blocks.get(four) {
            Some(Body::Part("load_wide(of_f32)")) => ("vec2<u64>", "load_wide(of_f32_words)"),
            Some(Body::Part("load_wide(of_f16)")) => ("u64", "load_wide(of_f16_words)"),
            Some(Body::Part("load_wide(of_bf16)")) => ("u64", "load_wide(of_bf16_words)"),
            _ => continue,
        };
        changes = changes.alias(alias, element).part(four, part);
    }
    changes
}

/// `/wide` if every operand is read in fours, else the letters of those that are; then the f16 and bf16 operands.
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
