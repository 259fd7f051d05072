//! The uniform block of every kernel, field by field as in its shader file. A test compares names, offsets and sizes
//! with naga's reflection.

use bytemuck::{Pod, Zeroable};

use super::plan::Window;
use crate::problem::Layout;

/// The name, offset and size of every number in a block; members of nested structs follow a dot.
pub type Fields = Vec<(String, usize, usize)>;

/// A type that a uniform block may contain.
pub trait Member {
    /// Adds its fields, which start at `offset`.
    fn list(name: &str, offset: usize, to: &mut Fields);
}

macro_rules! numbers {
    ($($ty:ty),*) => {
        $(impl Member for $ty {
            fn list(name: &str, offset: usize, to: &mut Fields) {
                to.push((name.into(), offset, size_of::<$ty>()));
            }
        })*
    };
}
numbers!(u32, i32, f32, [u32; 4], [i32; 4]);

macro_rules! params {
    ($(#[$doc:meta])* $name:ident { $($field:ident : $ty:ty),* $(,)? }) => {
        params!($(#[$doc])* $name { $($field: $ty),* } 0);
    };
    // Nested structs end with padding words that no shader reads, so that their size is a multiple of 16 bytes.
    ($(#[$doc:meta])* $name:ident { $($field:ident : $ty:ty),* $(,)? } $padding:literal) => {
        $(#[$doc])*
        #[allow(missing_docs)]
        #[repr(C)]
        #[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
        pub struct $name {
            $(pub $field: $ty,)*
            pub padding: [u32; $padding],
        }

        impl Member for $name {
            fn list(name: &str, offset: usize, to: &mut Fields) {
                $({
                    let path = if name.is_empty() { stringify!($field).into() } else { format!("{name}.{}", stringify!($field)) };
                    <$ty>::list(&path, offset + std::mem::offset_of!($name, $field), to);
                })*
            }
        }
    };
}

params! {
    /// A strided operand: three axes of rows, and the axis of a row.
    View { strides: [u32; 4], offset: u32 } 3
}

params! {
    /// A boolean mask.
    Mask { view: View, keeps: u32 } 3
}

params! {
    /// A bias by distance.
    Relative { strides: [u32; 4], offset: u32, low: i32, high: i32, factor: f32 }
}

params! {
    /// The rules that hide keys, and what is added to scores: `parts/rules.wgsl`.
    Rules {
        band: [i32; 4],
        mask_a: Mask,
        mask_b: Mask,
        bias_a: View,
        bias_b: View,
        relative: Relative,
        scale: f32,
        softcap: f32,
        maskable_keys: u32,
    } 1
}

params! {
    /// The part of a call that a dispatch works on.
    Slice {
        batch_0: u32,
        head_0: u32,
        head_kv_0: u32,
        row_0: u32,
        key_0: u32,
        heads: u32,
        heads_kv: u32,
        group: u32,
        len_q: u32,
        len_k: u32,
    } 2
}

params! {
    /// `scores.wgsl`
    Scores {
        q: View,
        k: View,
        s: View,
        rules: Rules,
        slice: Slice,
        dim: u32,
        chunks: u32,
        row_blocks: u32,
        key_blocks: u32,
        keys_per_block: u32,
        workgroups: u32,
        minus_infinity: u32,
    }
}

params! {
    /// `weighted_sum.wgsl`
    WeightedSum {
        p: View,
        v: View,
        o: View,
        rules: Rules,
        slice: Slice,
        dim: u32,
        row_blocks: u32,
        column_blocks: u32,
        sink_offset: u32,
        sink_stride: u32,
        workgroups: u32,
        minus_infinity: u32,
        not_a_number: u32,
    }
}

params! {
    /// `flash.wgsl`, `flash_tiled.wgsl`
    Flash {
        q: View,
        k: View,
        v: View,
        o: View,
        lse: View,
        block_mask: View,
        rules: Rules,
        slice: Slice,
        dim_k: u32,
        dim_v: u32,
        row_blocks: u32,
        splits: u32,
        keys_per_split: u32,
        o_split_stride: u32,
        sink_offset: u32,
        sink_stride: u32,
        workgroups: u32,
        minus_infinity: u32,
        not_a_number: u32,
    }
}

params! {
    /// `merge.wgsl`
    Merge {
        o: View,
        lse: View,
        a: View,
        b: View,
        a_lse: View,
        b_lse: View,
        heads: u32,
        len: u32,
        rows: u32,
        splits: u32,
        dim: u32,
        row_stride: u32,
        total: u32,
        minus_infinity: u32,
        not_a_number: u32,
    }
}

params! {
    /// `inspect.wgsl`
    Inspect {
        outer: View,
        inner: View,
        o: View,
        lse: View,
        rules: Rules,
        slice: Slice,
        dim: u32,
        outer_blocks: u32,
        splits: u32,
        split_rows: u32,
        workgroups: u32,
        minus_infinity: u32,
        not_a_number: u32,
    }
}

params! {
    /// `softmax.wgsl`
    Softmax {
        rows: u32,
        width4: u32,
        row_stride4: u32,
        s_offset4: u32,
        lse_offset: u32,
        workgroups: u32,
        minus_infinity: u32,
        not_a_number: u32,
        len_q: u32,
        heads: u32,
        sink_offset: u32,
        sink_stride: u32,
    }
}

params! {
    /// `project.wgsl`, `matvec.wgsl`
    Project {
        x: View,
        y: View,
        w: View,
        bias: View,
        rows: u32,
        len: u32,
        dim_in: u32,
        dim_out: u32,
        chunks: u32,
        all_chunks: u32,
        chunk_0: u32,
        row_blocks: u32,
        out_blocks: u32,
        outs_per_block: u32,
        workgroups: u32,
    }
}

params! {
    /// `mean_heads.wgsl`
    MeanHeads { p: View, a: View, heads: u32, len_q: u32, width4: u32, total: u32, factor: f32 }
}

params! {
    /// `combine_biases.wgsl`
    CombineBiases {
        source: View,
        shape: [u32; 4],
        keeps: u32,
        total: u32,
        minus_infinity: u32,
        row_0: u32,
        key_0: u32,
    }
}

params! {
    /// `copy.wgsl`
    Copy { x: View, y: View, shape: [u32; 4], columns: u32, total: u32, fill: u32 }
}

params! {
    /// `probe.wgsl`
    Probe { factor: f32, summand: f32, rounds: u32, workgroups: u32 }
}

params! {
    /// `scatter.wgsl`
    Scatter { x: View, y: View, heads: u32, len: u32, dim: u32, rows: u32, place_0: u32, total: u32 }
}

params! {
    /// `block_mask.wgsl`
    BlockMask {
        rules: Rules,
        slice: Slice,
        rows_per_block: u32,
        row_blocks: u32,
        key_blocks: u32,
        total: u32,
        minus_infinity: u32,
    }
}

params! {
    /// `rotate.wgsl`
    Rotate {
        x: View,
        y: View,
        angles_offset: u32,
        row_stride: u32,
        pairs: u32,
        dim: u32,
        units: u32,
        heads: u32,
        len: u32,
        row_0: u32,
        rows_batch_stride: u32,
        total: u32,
        sine_factor: f32,
    }
}

params! {
    /// `tokens.wgsl`
    Tokens {
        x: View,
        z: View,
        y_offset: u32,
        heads: u32,
        len: u32,
        dim: u32,
        row_0: u32,
        rows_batch_stride: u32,
        total: u32,
        not_a_number: u32,
    }
}

params! {
    /// `relative.wgsl`
    RelativeBias {
        x: View,
        y_offset: u32,
        heads: u32,
        len: u32,
        len_k: u32,
        distance_0: u32,
        total: u32,
        factor: f32,
    }
}

params! {
    /// `normalise.wgsl`
    Normalise {
        x: View,
        w: View,
        bias: View,
        y_offset: u32,
        heads: u32,
        len: u32,
        dim: u32,
        rows: u32,
        workgroups: u32,
        epsilon: f32,
    }
}

params! {
    /// `row_dots.wgsl`
    RowDots {
        a: View,
        b: View,
        d_lse: View,
        d: View,
        heads: u32,
        len: u32,
        dim: u32,
        total: u32,
        factor: f32,
    }
}

params! {
    /// `score_gradients.wgsl`
    ScoreGradients {
        lse: View,
        d: View,
        d_weights: View,
        heads: u32,
        len: u32,
        width4: u32,
        keys: u32,
        total: u32,
        scale: f32,
        softcap: f32,
        d_weights_factor: f32,
        minus_infinity: u32,
        not_a_number: u32,
    }
}

params! {
    /// `transposed_sum.wgsl`
    TransposedSum {
        p: View,
        x: View,
        y_offset: u32,
        y_head_stride: u32,
        y_batch_stride: u32,
        heads_kv: u32,
        group: u32,
        len_q: u32,
        len_k: u32,
        dim: u32,
        key_blocks: u32,
        column_blocks: u32,
        workgroups: u32,
    }
}

params! {
    /// `sum_axis.wgsl`
    SumAxis {
        x: View,
        y: View,
        shape: [u32; 4],
        count: u32,
        step: u32,
        total: u32,
        factor: f32,
    }
}

params! {
    /// `distance_sums.wgsl`
    DistanceSums {
        x: View,
        y: View,
        heads: u32,
        len: u32,
        keys: u32,
        columns: u32,
        low: i32,
        high: i32,
        offsets: u32,
        offset_stride: u32,
        total: u32,
        factor: f32,
    }
}

params! {
    /// `sink_gradients.wgsl`
    SinkGradients {
        lse: View,
        d: View,
        y_offset: u32,
        heads: u32,
        len: u32,
        sink_offset: u32,
        sink_stride: u32,
        total: u32,
        minus_infinity: u32,
    }
}

impl View {
    /// A part of an operand, whose axes are the last of four; an operand `[b, i, d]` has one head.
    pub(super) fn new(layout: &Layout, at: Window) -> View {
        let mut strides = [0; 4];
        let axes: &[usize] = match layout.rank() {
            1 => &[3],
            2 => &[2, 3],
            3 => &[0, 2, 3],
            _ => &[0, 1, 2, 3],
        };
        for ((&axis, &stride), &len) in axes.iter().zip(layout.strides()).zip(layout.shape()) {
            // The stride of an axis of length 1 is arbitrary and unused, but rows are read in fours, also beyond their
            // end.
            strides[axis] = if len > 1 || axis == 3 { stride as u32 } else { 0 };
        }
        View::strided(strides, at.first)
    }

    pub(super) fn strided(strides: [u32; 4], offset: u64) -> View {
        View { strides, offset: offset as u32, ..View::default() }
    }
}
