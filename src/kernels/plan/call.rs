//! An attention call as kernels bind it: its operands and rules of masking, where they lie, what is folded.

use super::super::capabilities::Capabilities;
use super::super::catalogue::{self, FoldSource, Rules};
use super::super::params;
use super::{AttentionOperands, Binding, MINUS_INFINITY, Part, Planner, Slot, Window, strides4, window};
use crate::error::{Error, Result};
use crate::problem::{Band, Layout, MaskMeaning, NO_BOUND, Problem};

/// Sizes of the slices along batch, heads, query rows and keys.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slices {
    pub batch: usize,
    pub heads: usize,
    pub rows: usize,
    pub keys: usize,
}

/// A call and how its rules of masking reach the kernels.
pub(super) struct Call<'a> {
    pub problem: &'a Problem,
    pub operands: &'a AttentionOperands<'a>,
    pub rules: Rules,
    /// Masks and biases become one bias first.
    pub fold_rules: bool,
    /// Bands too.
    pub fold_bands: bool,
    /// Whether these passes give the output and the LSE, or only weights and scores.
    pub output: bool,
    pub align: u64,
}

impl<'a> Call<'a> {
    /// Reads the rules where they lie as long as the adapter has storage buffers for them beside `others`.
    pub fn new(
        problem: &'a Problem,
        operands: &'a AttentionOperands<'a>,
        adapter: &Capabilities,
        others: u32,
    ) -> Call<'a> {
        let mut rules = Rules {
            bands: problem.bands.len() > 1,
            masks: operands.masks.len() as u32,
            bias: !operands.biases.is_empty(),
            banded: !problem.is_unbanded(),
            relative: operands.relative.as_ref().map(|relative| relative.kind),
            // No pass reads rules and a sink.
            sink: false,
        };
        // Metal's compiler needs one of eight for itself.
        let most = adapter.max_storage_buffers.min(7);
        let too_many = |rules: Rules| others + rules.buffers() > most;
        let fold_rules = rules.masks > 2 || operands.biases.len() > 1 || too_many(rules);
        if fold_rules {
            (rules.masks, rules.bias) = (0, true);
        }
        let fold_bands = fold_rules && too_many(rules);
        if fold_bands {
            (rules.bands, rules.banded) = (false, false);
        }
        Call { problem, operands, rules, fold_rules, fold_bands, output: true, align: adapter.offset_alignment }
    }

    /// Folded bands do not say where each query stands, which a bias by distance must know.
    pub(super) fn check_relative(&self, adapter: &Capabilities) -> Result<()> {
        if self.rules.relative.is_none() || !self.fold_bands || self.problem.bands.len() == 1 {
            return Ok(());
        }
        Err(Error::Unsupported {
            what: "a bias by distance with offsets or lengths per batch entry".into(),
            adapter: adapter.adapter.clone(),
            needs: format!("more storage buffers per kernel than {}", adapter.max_storage_buffers),
        })
    }

    /// The table that kernels or the folding read, where bands differ or are folded.
    pub fn band_table(&self) -> Vec<[i32; 4]> {
        if !self.rules.bands && !self.fold_bands {
            return Vec::new();
        }
        self.problem.bands.iter().map(|band| [band.keys, band.lo, band.hi, band.offset]).collect()
    }

    /// Masks and biases.
    pub(super) fn lists(&self) -> impl Iterator<Item = &'a Layout> {
        let Call { operands, .. } = *self;
        operands.masks.iter().map(|(layout, _)| *layout).chain(operands.biases.iter().copied())
    }

    /// The axes along which any folded rule differs, as long as in the slice.
    pub(super) fn folded_shape(&self, slices: Slices) -> [usize; 4] {
        let full = [slices.batch, slices.heads, slices.rows, slices.keys.min(self.problem.ruled_keys())];
        let mut shape = [1; 4];
        for layout in self.lists() {
            for axis in 0..4 {
                if layout.strides()[axis] != 0 && layout.shape()[axis] > 1 {
                    shape[axis] = full[axis];
                }
            }
        }
        if self.fold_bands {
            (shape[2], shape[3]) = (full[2], full[3]);
            if self.problem.bands.len() > 1 {
                shape[0] = full[0];
            }
        }
        shape
    }

    /// Bytes of the largest binding of an operand or rule at these slice sizes.
    pub(super) fn largest_operand(&self, slices: Slices) -> u64 {
        let Slices { batch, heads, rows, keys } = slices;
        let heads_kv = match self.problem.group() {
            // Slices of whole groups begin with one.
            group if heads.is_multiple_of(group) => heads / group,
            group => most_groups(heads, group),
        }
        .min(self.problem.heads_kv);
        let size = |layout: &Layout, counts: [usize; 4], element: u64| self.binding_size(layout, counts, element);
        let whole = usize::MAX >> 32;
        let dims = |layout: &Layout| layout.shape()[3].min(whole);
        let operands = self.operands;
        let ruled = keys.min(self.problem.ruled_keys());
        let masks = operands.masks.iter().map(|(layout, _)| size(layout, [batch, heads, rows, ruled], 1));
        let biases = operands.biases.iter().map(|layout| size(layout, [batch, heads, rows, ruled], 4));
        let folded =
            if self.fold_rules { self.folded_shape(slices).iter().map(|&n| n as u64).product::<u64>() * 4 } else { 0 };
        let sink = operands.sink.map_or(0, |sink| size(sink, [heads, 1, 1, 1], 4));
        [
            sink,
            size(&operands.q, [batch, heads, rows, dims(&operands.q)], operands.q.element()),
            size(&operands.k, [batch, heads_kv, keys, dims(&operands.k)], operands.k.element()),
            size(&operands.v, [batch, heads_kv, keys, dims(&operands.v)], operands.v.element()),
            size(&operands.output, [batch, heads, rows, dims(&operands.output)], operands.output.element()),
            folded,
        ]
        .into_iter()
        .chain(masks)
        .chain(biases)
        .max()
        .unwrap_or(0)
    }

    pub(super) fn binding_size(&self, layout: &Layout, counts: [usize; 4], element: u64) -> u64 {
        let parts = counts.map(|count| Part { start: 0, count });
        // The start of a later slice may lie anywhere within the alignment.
        window(layout, &parts, element, self.align).size.saturating_add(self.align)
    }

    pub(super) fn band(&self) -> [i32; 4] {
        let band = self.problem.bands[0];
        let open = Band { keys: NO_BOUND, lo: -NO_BOUND, hi: NO_BOUND, ..band };
        let band = if self.fold_bands || self.problem.bands.len() > 1 { open } else { band };
        [band.keys, band.lo, band.hi, band.offset]
    }

    /// Binds the sinks of a slice's heads, where there are any; gives the first one's place and the stride.
    pub(super) fn bind_sink(&self, bindings: &mut Vec<Binding>, h: Part) -> [u32; 2] {
        let Some(sink) = self.operands.sink else { return [0; 2] };
        let at = window(sink, &[h], 4, self.align);
        bindings.push(Binding { binding: 10, slot: Slot::Sink, offset: at.offset, size: at.size });
        [at.first as u32, sink.strides()[0] as u32]
    }

    /// Binds the rules for a slice, after folding them if they must be.
    pub(super) fn bind_rules(
        &self,
        planner: &mut Planner<'_>,
        [b, h, i]: [Part; 3],
        j: Part,
        slices: Slices,
    ) -> Result<BoundRules> {
        let Call { problem, operands, rules, .. } = *self;
        let mut bound = BoundRules::default();
        if rules.bands {
            let size = (problem.batch * 16) as u64;
            bound.bindings.push(Binding { binding: 4, slot: Slot::Bands, offset: 0, size });
        }
        if let Some(relative) = &operands.relative {
            let every = Part { start: 0, count: relative.layout.shape()[3] };
            let part = window(relative.layout, &[b, h, i, every], 4, self.align);
            let (offset, size) = (part.offset, part.size);
            bound.bindings.push(Binding { binding: 12, slot: Slot::Relative, offset, size });
            bound.relative = BoundRelative {
                strides: strides4(relative.layout),
                first: part.first as u32,
                low: relative.low,
                high: relative.high,
                factor: relative.factor,
            };
        }
        let parts = [b, h, i, j.within(problem.ruled_keys())];
        if self.fold_rules {
            let folded = self.fold(planner, parts, slices)?;
            let size = planner.plan.scratch[1];
            bound.bindings.push(Binding { binding: 7, slot: Slot::Scratch(1), offset: 0, size });
            bound.bias = BoundRule { strides: folded, ..Default::default() };
            return Ok(bound);
        }
        for (n, &(layout, meaning)) in operands.masks.iter().enumerate() {
            let part = window(layout, &parts, 1, self.align);
            bound.bindings.push(Binding {
                binding: 5 + n as u32,
                slot: Slot::Mask(n),
                offset: part.offset,
                size: part.size,
            });
            bound.masks[n] = BoundRule {
                strides: strides4(layout),
                first: part.first as u32,
                keeps: u32::from(meaning == MaskMeaning::Keep),
            };
        }
        if let Some(&layout) = operands.biases.first() {
            let part = window(layout, &parts, 4, self.align);
            bound.bindings.push(Binding { binding: 7, slot: Slot::Bias(0), offset: part.offset, size: part.size });
            bound.bias = BoundRule { strides: strides4(layout), first: part.first as u32, keeps: 0 };
        }
        Ok(bound)
    }

    /// Folds every rule of a slice into Scratch(1); returns its strides.
    fn fold(&self, planner: &mut Planner<'_>, parts: [Part; 4], slices: Slices) -> Result<[u32; 4]> {
        let Call { problem, operands, .. } = *self;
        let limits = self.folded_shape(slices);
        let mut shape = [1; 4];
        for axis in 0..4 {
            shape[axis] = if limits[axis] > 1 { parts[axis].count.max(1) } else { 1 };
        }
        let folded = Layout::contiguous(&shape)?;
        let total = folded.len() as u64;
        let bands = self.fold_bands.then(|| {
            let per_batch = usize::from(problem.bands.len() > 1);
            Layout::strided(&problem.mask_shape(), &[per_batch, 0, 0, 0], 0, problem.bands.len())
        });
        let bands = bands.transpose()?;
        let sources = (operands.biases.iter().enumerate())
            .map(|(n, &layout)| (FoldSource::Bias, Slot::Bias(n), layout, 4, 0))
            .chain(operands.masks.iter().enumerate().map(|(n, &(layout, meaning))| {
                (FoldSource::Mask, Slot::Mask(n), layout, 1, u32::from(meaning == MaskMeaning::Keep))
            }))
            .chain(bands.iter().map(|layout| (FoldSource::Bands, Slot::Bands, layout, 16, 0)));
        for (n, (source, slot, layout, element, keeps)) in sources.enumerate() {
            let part = match slot {
                // A table is bound whole.
                Slot::Bands => Window {
                    offset: 0,
                    size: (problem.bands.len() * 16) as u64,
                    first: (parts[0].start * layout.strides()[0]) as u64,
                },
                _ => window(layout, &parts, element, self.align),
            };
            planner.push(
                catalogue::fold(source, n > 0),
                total.div_ceil(64),
                |workgroups| params::Fold {
                    source_strides: strides4(layout),
                    shape: shape.map(|n| n as u32),
                    source_offset: part.first as u32,
                    keeps,
                    total: total as u32,
                    workgroups,
                    minus_infinity: MINUS_INFINITY,
                    row_0: parts[2].start as u32,
                    key_0: parts[3].start as u32,
                    pad: 0,
                },
                vec![
                    Binding { binding: 1, slot, offset: part.offset, size: part.size },
                    Binding { binding: 2, slot: Slot::Scratch(1), offset: 0, size: planner.plan.scratch[1] },
                ],
            )?;
        }
        Ok(strides4(&folded))
    }
}

/// The most groups of `group` heads that `heads` neighbours can belong to.
pub(super) fn most_groups(heads: usize, group: usize) -> usize {
    heads.saturating_sub(1).div_ceil(group) + 1
}

#[derive(Clone, Copy, Debug, Default)]
pub(super) struct BoundRule {
    pub strides: [u32; 4],
    pub first: u32,
    pub keeps: u32,
}

#[derive(Clone, Debug, Default)]
pub(super) struct BoundRules {
    pub bindings: Vec<Binding>,
    pub masks: [BoundRule; 2],
    pub bias: BoundRule,
    pub relative: BoundRelative,
}

#[derive(Clone, Copy, Debug, Default)]
pub(super) struct BoundRelative {
    pub strides: [u32; 4],
    pub first: u32,
    pub low: i32,
    pub high: i32,
    pub factor: f32,
}

/// Where a kernel finds masks and biases, and those by distance where it reads them.
macro_rules! ruled {
    ($params:ident) => {
        ruled!($params,);
    };
    ($params:ident, relative) => {
        ruled!(
            $params,
            relative_strides: strides,
            relative_offset: first,
            relative_low: low,
            relative_high: high,
            relative_factor: factor
        );
    };
    ($params:ident, $($field:ident: $of:ident),*) => {
        impl From<&BoundRules> for params::$params {
            fn from(bound: &BoundRules) -> params::$params {
                let [a, b] = bound.masks;
                params::$params {
                    mask_a_strides: a.strides,
                    mask_b_strides: b.strides,
                    bias_strides: bound.bias.strides,
                    mask_a_offset: a.first,
                    mask_b_offset: b.first,
                    bias_offset: bound.bias.first,
                    mask_a_keeps: a.keeps,
                    mask_b_keeps: b.keeps,
                    $($field: bound.relative.$of,)*
                    ..Default::default()
                }
            }
        }
    };
}
ruled!(Classify);
ruled!(WeightedSum);
ruled!(Scores, relative);
ruled!(Flash, relative);
ruled!(Inspect, relative);
