//! The uniform block of every kernel, field by field as in its shader file.
//! A test compares names, offsets and sizes with naga's reflection.

use bytemuck::{Pod, Zeroable};

macro_rules! params {
    ($(#[$doc:meta])* $name:ident { $($field:ident : $ty:ty),* $(,)? }) => {
        $(#[$doc])*
        #[allow(missing_docs)]
        #[repr(C)]
        #[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
        pub struct $name {
            $(pub $field: $ty),*
        }

        impl $name {
            /// Name, offset and size of each field.
            pub fn fields() -> Vec<(&'static str, usize, usize)> {
                vec![$((stringify!($field), std::mem::offset_of!($name, $field), std::mem::size_of::<$ty>())),*]
            }
        }
    };
}

params! {
    /// `scores.wgsl`
    Scores {
        q_strides: [u32; 4],
        k_strides: [u32; 4],
        s_strides: [u32; 4],
        mask_a_strides: [u32; 4],
        mask_b_strides: [u32; 4],
        bias_strides: [u32; 4],
        relative_strides: [u32; 4],
        band: [i32; 4],
        q_offset: u32,
        k_offset: u32,
        s_offset: u32,
        mask_a_offset: u32,
        mask_b_offset: u32,
        bias_offset: u32,
        mask_a_keeps: u32,
        mask_b_keeps: u32,
        batch_0: u32,
        head_0: u32,
        head_kv_0: u32,
        row_0: u32,
        key_0: u32,
        heads: u32,
        group: u32,
        len_q: u32,
        len_k: u32,
        ruled_keys: u32,
        dim: u32,
        chunks: u32,
        row_blocks: u32,
        key_blocks: u32,
        keys_per_block: u32,
        workgroups: u32,
        minus_infinity: u32,
        scale: f32,
        softcap: f32,
        pad: u32,
        relative_offset: u32,
        relative_low: i32,
        relative_high: i32,
        relative_factor: f32,
    }
}

params! {
    /// `weighted_sum.wgsl`
    WeightedSum {
        p_strides: [u32; 4],
        v_strides: [u32; 4],
        o_strides: [u32; 4],
        mask_a_strides: [u32; 4],
        mask_b_strides: [u32; 4],
        bias_strides: [u32; 4],
        band: [i32; 4],
        p_offset: u32,
        v_offset: u32,
        o_offset: u32,
        mask_a_offset: u32,
        mask_b_offset: u32,
        bias_offset: u32,
        mask_a_keeps: u32,
        mask_b_keeps: u32,
        batch_0: u32,
        head_0: u32,
        head_kv_0: u32,
        row_0: u32,
        key_0: u32,
        heads: u32,
        group: u32,
        len_q: u32,
        len_k: u32,
        ruled_keys: u32,
        dim: u32,
        row_blocks: u32,
        column_blocks: u32,
        workgroups: u32,
        minus_infinity: u32,
        not_a_number: u32,
        sink_offset: u32,
        sink_stride: u32,
        pad_0: u32,
        pad_1: u32,
    }
}

params! {
    /// `flash.wgsl`
    Flash {
        q_strides: [u32; 4],
        k_strides: [u32; 4],
        v_strides: [u32; 4],
        o_strides: [u32; 4],
        mask_a_strides: [u32; 4],
        mask_b_strides: [u32; 4],
        bias_strides: [u32; 4],
        relative_strides: [u32; 4],
        band: [i32; 4],
        q_offset: u32,
        k_offset: u32,
        v_offset: u32,
        o_offset: u32,
        mask_a_offset: u32,
        mask_b_offset: u32,
        bias_offset: u32,
        mask_a_keeps: u32,
        mask_b_keeps: u32,
        batch_0: u32,
        row_0: u32,
        key_0: u32,
        heads_kv: u32,
        group: u32,
        len_q: u32,
        len_k: u32,
        ruled_keys: u32,
        dim_k: u32,
        dim_v: u32,
        row_blocks: u32,
        splits: u32,
        keys_per_split: u32,
        o_split_stride: u32,
        lse_offset: u32,
        lse_strides: [u32; 3],
        workgroups: u32,
        minus_infinity: u32,
        not_a_number: u32,
        scale: f32,
        softcap: f32,
        tile_batch_stride: u32,
        tile_head_stride: u32,
        tiles: u32,
        sink_stride: u32,
        relative_offset: u32,
        relative_low: i32,
        relative_high: i32,
        relative_factor: f32,
        sink_offset: u32,
        pad_0: u32,
        pad_1: u32,
        pad_2: u32,
    }
}

params! {
    /// `merge.wgsl`
    Merge {
        o_strides: [u32; 4],
        lse_strides: [u32; 3],
        lse_offset: u32,
        o_offset: u32,
        heads: u32,
        len_q: u32,
        rows: u32,
        splits: u32,
        dim: u32,
        row_stride: u32,
        total: u32,
        workgroups: u32,
        minus_infinity: u32,
        not_a_number: u32,
        a_offset: u32,
        b_offset: u32,
        pad_0: u32,
        pad_1: u32,
        pad_2: u32,
        a_strides: [u32; 4],
        b_strides: [u32; 4],
        a_lse_strides: [u32; 3],
        a_lse_offset: u32,
        b_lse_strides: [u32; 3],
        b_lse_offset: u32,
    }
}

params! {
    /// `inspect.wgsl`
    Inspect {
        kept_strides: [u32; 4],
        walked_strides: [u32; 4],
        out_strides: [u32; 4],
        lse_strides: [u32; 4],
        mask_a_strides: [u32; 4],
        mask_b_strides: [u32; 4],
        bias_strides: [u32; 4],
        relative_strides: [u32; 4],
        band: [i32; 4],
        kept_offset: u32,
        walked_offset: u32,
        out_offset: u32,
        lse_offset: u32,
        mask_a_offset: u32,
        mask_b_offset: u32,
        bias_offset: u32,
        mask_a_keeps: u32,
        mask_b_keeps: u32,
        batch_0: u32,
        head_0: u32,
        head_kv_0: u32,
        row_0: u32,
        key_0: u32,
        heads: u32,
        group: u32,
        len_q: u32,
        len_k: u32,
        ruled_keys: u32,
        dim: u32,
        kept_blocks: u32,
        splits: u32,
        split_rows: u32,
        workgroups: u32,
        minus_infinity: u32,
        not_a_number: u32,
        scale: f32,
        softcap: f32,
        relative_offset: u32,
        relative_low: i32,
        relative_high: i32,
        relative_factor: f32,
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
    /// `project.wgsl`
    Project {
        x_strides: [u32; 4],
        w_strides: [u32; 4],
        y_strides: [u32; 4],
        x_offset: u32,
        w_offset: u32,
        y_offset: u32,
        bias_offset: u32,
        bias_stride: u32,
        rows: u32,
        len: u32,
        dim_in: u32,
        dim_out: u32,
        chunks: u32,
        row_blocks: u32,
        out_blocks: u32,
        outs_per_block: u32,
        workgroups: u32,
        pad_0: u32,
        pad_1: u32,
    }
}

params! {
    /// `append.wgsl`
    Append {
        y_offset: u32,
        y_batch_stride: u32,
        row_offset: u32,
        row_stride: u32,
        width: u32,
        batch: u32,
        workgroups: u32,
        pad: u32,
    }
}

params! {
    /// `mean_heads.wgsl`
    MeanHeads {
        p_strides: [u32; 4],
        a_strides: [u32; 4],
        p_offset4: u32,
        a_offset4: u32,
        heads: u32,
        len_q: u32,
        width4: u32,
        total: u32,
        workgroups: u32,
        factor: f32,
    }
}

params! {
    /// `fold.wgsl`
    Fold {
        source_strides: [u32; 4],
        shape: [u32; 4],
        source_offset: u32,
        keeps: u32,
        total: u32,
        workgroups: u32,
        minus_infinity: u32,
        row_0: u32,
        key_0: u32,
        pad: u32,
    }
}

params! {
    /// `copy.wgsl`
    Copy {
        x_strides: [u32; 4],
        shape: [u32; 4],
        x_offset: u32,
        y_offset: u32,
        y_row_stride: u32,
        total: u32,
        workgroups: u32,
        fill: u32,
        pad_0: u32,
        pad_1: u32,
    }
}

params! {
    /// `probe.wgsl`
    Probe {
        factor: f32,
        summand: f32,
        rounds: u32,
        workgroups: u32,
    }
}

params! {
    /// `scatter.wgsl`
    Scatter {
        x_strides: [u32; 4],
        y_strides: [u32; 4],
        x_offset: u32,
        y_offset: u32,
        heads: u32,
        len: u32,
        dim: u32,
        rows: u32,
        place_0: u32,
        total: u32,
        workgroups: u32,
        pad_0: u32,
        pad_1: u32,
        pad_2: u32,
    }
}

params! {
    /// `classify.wgsl`
    Classify {
        mask_a_strides: [u32; 4],
        mask_b_strides: [u32; 4],
        bias_strides: [u32; 4],
        mask_a_offset: u32,
        mask_b_offset: u32,
        bias_offset: u32,
        mask_a_keeps: u32,
        mask_b_keeps: u32,
        heads_kv: u32,
        group: u32,
        len_q: u32,
        len_k: u32,
        ruled_keys: u32,
        rows_per_block: u32,
        row_blocks: u32,
        tiles: u32,
        total: u32,
        workgroups: u32,
        minus_infinity: u32,
    }
}

params! {
    /// `rotate.wgsl`
    Rotate {
        x_strides: [u32; 4],
        y_strides: [u32; 4],
        x_offset: u32,
        y_offset: u32,
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
        workgroups: u32,
        pad_0: u32,
        pad_1: u32,
        pad_2: u32,
    }
}

params! {
    /// `add_positions.wgsl`
    AddPositions {
        x_strides: [u32; 3],
        x_offset: u32,
        table_strides: [u32; 2],
        table_offset: u32,
        y_offset: u32,
        len: u32,
        dim: u32,
        row_0: u32,
        rows_batch_stride: u32,
        total: u32,
        workgroups: u32,
        pad_0: u32,
        pad_1: u32,
    }
}

params! {
    /// `relative.wgsl`
    Relative {
        x_strides: [u32; 4],
        x_offset: u32,
        y_offset: u32,
        heads: u32,
        len_q: u32,
        len_k: u32,
        distance_0: u32,
        total: u32,
        workgroups: u32,
        factor: f32,
        pad_0: u32,
        pad_1: u32,
        pad_2: u32,
    }
}

params! {
    /// `normalise.wgsl`
    Normalise {
        x_strides: [u32; 4],
        x_offset: u32,
        y_offset: u32,
        w_offset: u32,
        w_stride: u32,
        bias_offset: u32,
        bias_stride: u32,
        heads: u32,
        len: u32,
        dim: u32,
        rows: u32,
        workgroups: u32,
        epsilon: f32,
    }
}

params! {
    /// `gate.wgsl`
    Gate {
        x_strides: [u32; 3],
        x_offset: u32,
        g_strides: [u32; 3],
        g_offset: u32,
        y_offset: u32,
        len: u32,
        dim: u32,
        total: u32,
        workgroups: u32,
        not_a_number: u32,
        pad_0: u32,
        pad_1: u32,
    }
}
