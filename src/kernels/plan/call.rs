//! An attention call as kernels bind it: where its operands and masking rules are, and which rules are combined.

use super::super::access::Operand;
use super::super::capabilities::Capabilities;
use super::super::catalogue::{self, BiasSource, Rules};
use super::super::params::{self, View};
use super::slice::{Part, window};
use super::{AttentionOperands, Binding, MINUS_INFINITY, Planner, RelativeOperand, Slot, Window};
use crate::error::{Error, Result};
use crate::problem::{Band, Layout, MaskMeaning, NO_BOUND, Problem, checked_len};

/// Sizes of the slices along batch, heads, query rows and keys.
pub(super) type Sizes = [usize; 4];

/// A call, and how its masking rules reach the kernels.
pub(super) struct Call<'a> {
    pub problem: &'a Problem,
    pub operands: &'a AttentionOperands<'a>,
    pub rules: Rules,
    /// Whether masks and biases are first combined into one bias.
    pub combine: bool,
    /// Whether bands are combined too.
    pub combine_bands: bool,
    /// Whether these passes produce the output and the LSE, or only weights and scores.
    pub output: bool,
    pub align: u64,
}

impl<'a> Call<'a> {
    /// Reads the rules directly if the adapter has enough storage buffers for them and `others`.
    pub fn new(
        problem: &'a Problem,
        operands: &'a AttentionOperands<'a>,
        adapter: &Capabilities,
        others: u32,
    ) -> Call<'a> {
        let mut rules = Rules {
            bands: problem.bands.len() > 1,
            masks: operands.masks.len() as u32,
            biases: operands.biases.len() as u32,
            banded: !problem.is_unbanded(),
            relative: operands.relative.as_ref().map(|relative| relative.kind),
            // No pass reads both rules and a sink.
            sink: false,
        };
        let too_many = |rules: Rules| others + rules.buffers() > adapter.max_storage_buffers;
        let combine = rules.masks > 2 || rules.biases > 2 || too_many(rules);
        if combine {
            (rules.masks, rules.biases) = (0, 1);
        }
        let combine_bands = combine && too_many(rules);
        if combine_bands {
            (rules.bands, rules.banded) = (false, false);
        }
        Call { problem, operands, rules, combine, combine_bands, output: true, align: adapter.offset_alignment }
    }

    /// Combined bands do not contain the positions of queries, which a bias by distance needs.
    pub(super) fn check_relative(&self, adapter: &Capabilities) -> Result<()> {
        if self.rules.relative.is_none() || !self.combine_bands || self.problem.bands.len() == 1 {
            return Ok(());
        }
        Err(Error::Unsupported {
            what: "a bias by distance with offsets or lengths per batch entry".into(),
            adapter: adapter.adapter.clone(),
            needs: format!("more storage buffers per kernel than {}", adapter.max_storage_buffers),
        })
    }

    /// The table that kernels or the combining kernel read, if bands differ or are combined.
    pub fn band_table(&self) -> Vec<[i32; 4]> {
        if !self.rules.bands && !self.combine_bands {
            return Vec::new();
        }
        self.problem.bands.iter().map(|band| [band.keys, band.lo, band.hi, band.offset]).collect()
    }

    /// Masks and biases.
    pub(super) fn lists(&self) -> impl Iterator<Item = &'a Layout> {
        let Call { operands, .. } = *self;
        operands.masks.iter().map(|(layout, _)| *layout).chain(operands.biases.iter().copied())
    }

    /// The axes along which any combined rule varies, with the lengths of the slice.
    pub(super) fn combined_shape(&self, [batch, heads, rows, keys]: Sizes) -> [usize; 4] {
        let full = [batch, heads, rows, keys.min(self.problem.maskable_keys())];
        let mut shape = [1; 4];
        for layout in self.lists() {
            for axis in 0..4 {
                if layout.strides()[axis] != 0 && layout.shape()[axis] > 1 {
                    shape[axis] = full[axis];
                }
            }
        }
        if self.combine_bands {
            (shape[2], shape[3]) = (full[2], full[3]);
            if self.problem.bands.len() > 1 {
                shape[0] = full[0];
            }
        }
        shape
    }

    /// Bytes of the working memory of combined rules.
    pub(super) fn combined_bytes(&self, sizes: Sizes) -> Result<u64> {
        let shape = if self.combine { self.combined_shape(sizes) } else { [0; 4] };
        Ok(((checked_len(&shape)? * 4) as u64).next_multiple_of(16).max(16))
    }

    /// Bytes of the largest binding of an operand or rule at these slice sizes.
    pub(super) fn largest_operand(&self, sizes: Sizes) -> u64 {
        let [batch, heads, rows, keys] = sizes;
        let heads_kv = match self.problem.group() {
            // Slices of whole groups start with a whole group.
            group if heads.is_multiple_of(group) => heads / group,
            group => most_groups(heads, group),
        }
        .min(self.problem.heads_kv);
        let operands = self.operands;
        let square = [batch, heads, rows, keys.min(self.problem.maskable_keys())];
        let combined =
            if self.combine { self.combined_shape(sizes).iter().map(|&n| n as u64).product::<u64>() * 4 } else { 0 };
        let masks = operands.masks.iter().map(|(layout, _)| self.binding_size(layout, &square, 1));
        let biases = operands.biases.iter().map(|layout| self.binding_size(layout, &square, 4));
        let sink = operands.sink.map(|sink| self.binding_size(sink, &[heads], 4));
        let of = |operand: &Operand<'_>, counts: [usize; 3]| self.binding_size(operand, &counts, operand.element());
        [
            combined,
            of(&operands.q, [batch, heads, rows]),
            of(&operands.k, [batch, heads_kv, keys]),
            of(&operands.v, [batch, heads_kv, keys]),
            of(&operands.output, [batch, heads, rows]),
        ]
        .into_iter()
        .chain(sink)
        .chain(masks)
        .chain(biases)
        .max()
        .unwrap_or(0)
    }

    pub(super) fn binding_size(&self, layout: &Layout, counts: &[usize], element: u64) -> u64 {
        let parts: Vec<Part> = counts.iter().copied().map(Part::whole).collect();
        // The start of a later slice may be anywhere within the alignment.
        window(layout, &parts, element, self.align).size.saturating_add(self.align)
    }

    pub(super) fn window(&self, operand: Operand<'_>, parts: &[Part]) -> Window {
        window(&operand, parts, operand.element(), self.align)
    }

    /// The layout of the LSE, row-major, and the window of a part of it.
    pub(super) fn lse(&self, parts: &[Part]) -> Result<(Layout, Window)> {
        let Problem { batch, heads_q, len_q, .. } = *self.problem;
        let layout = Layout::contiguous(&[batch, heads_q, len_q])?;
        let at = window(&layout, parts, 4, self.align);
        Ok((layout, at))
    }

    /// The kernels' parameters for the rules.
    pub(super) fn rules(&self, bound: &BoundRules) -> params::Rules {
        params::Rules {
            band: self.band(),
            scale: self.problem.scale,
            softcap: self.problem.softcap.unwrap_or(1.0),
            maskable_keys: self.problem.maskable_keys() as u32,
            ..bound.rules
        }
    }

    /// The kernels' parameters for a slice.
    pub(super) fn slice(&self, [b, h, i]: [Part; 3], j: Part) -> params::Slice {
        let head_kv = h.grouped(self.problem.group());
        params::Slice {
            batch_0: if self.problem.bands.len() > 1 { b.start as u32 } else { 0 },
            head_0: h.start as u32,
            head_kv_0: head_kv.start as u32,
            row_0: i.start as u32,
            key_0: j.start as u32,
            heads: h.count as u32,
            heads_kv: head_kv.count as u32,
            group: self.problem.group() as u32,
            len_q: i.count as u32,
            len_k: j.count as u32,
            ..Default::default()
        }
    }

    fn band(&self) -> [i32; 4] {
        let band = self.problem.bands[0];
        let open = Band { keys: NO_BOUND, lo: -NO_BOUND, hi: NO_BOUND, ..band };
        let band = if self.combine_bands || self.problem.bands.len() > 1 { open } else { band };
        [band.keys, band.lo, band.hi, band.offset]
    }

    /// Binds the sinks of a slice's heads, if any; returns the position of the first and the stride.
    pub(super) fn bind_sink(&self, bindings: &mut Vec<Binding>, h: Part) -> [u32; 2] {
        let Some(sink) = self.operands.sink else { return [0; 2] };
        let at = window(sink, &[h], 4, self.align);
        bindings.push(Binding::new("sink", Slot::Sink, at));
        [at.first as u32, sink.strides()[0] as u32]
    }

    /// Binds the rules for a slice, after combining them if necessary.
    pub(super) fn bind_rules(
        &self,
        planner: &mut Planner<'_>,
        [b, h, i]: [Part; 3],
        j: Part,
        sizes: Sizes,
    ) -> Result<BoundRules> {
        let Call { problem, operands, rules, .. } = *self;
        let mut bound = BoundRules::default();
        if rules.bands {
            bound.bindings.push(Binding::whole("bands", Slot::Bands, (problem.batch * 16) as u64));
        }
        if let Some(relative) = &operands.relative {
            let at = window(relative.layout, &[b, h, i], 4, self.align);
            bound.bindings.push(Binding::new("relative", Slot::Relative, at));
            let View { strides, offset, .. } = View::new(relative.layout, at);
            let RelativeOperand { low, high, factor, .. } = *relative;
            bound.rules.relative = params::Relative { strides, offset, low, high, factor, ..Default::default() };
        }
        let parts = [b, h, i, j.within(problem.maskable_keys())];
        if self.combine {
            bound.rules.bias_a = View::strided(self.combine_rules(planner, parts, sizes)?, 0);
            bound.bindings.push(Binding::whole("bias_a", Slot::Scratch(1), planner.plan.scratch[1]));
            return Ok(bound);
        }
        for (n, &(layout, meaning)) in operands.masks.iter().enumerate() {
            let at = window(layout, &parts, 1, self.align);
            bound.bindings.push(Binding::new(["mask_a", "mask_b"][n], Slot::Mask(n), at));
            let keeps = u32::from(meaning == MaskMeaning::Keep);
            let mask = params::Mask { view: View::new(layout, at), keeps, ..Default::default() };
            *[&mut bound.rules.mask_a, &mut bound.rules.mask_b][n] = mask;
        }
        for (n, &layout) in operands.biases.iter().enumerate() {
            let at = window(layout, &parts, 4, self.align);
            bound.bindings.push(Binding::new(["bias_a", "bias_b"][n], Slot::Bias(n), at));
            *[&mut bound.rules.bias_a, &mut bound.rules.bias_b][n] = View::new(layout, at);
        }
        Ok(bound)
    }

    /// Combines every rule of a slice in Scratch(1); returns the strides of the result.
    fn combine_rules(&self, planner: &mut Planner<'_>, parts: [Part; 4], sizes: Sizes) -> Result<[u32; 4]> {
        let Call { problem, operands, .. } = *self;
        let limits = self.combined_shape(sizes);
        let mut shape = [1; 4];
        for axis in 0..4 {
            shape[axis] = if limits[axis] > 1 { parts[axis].count.max(1) } else { 1 };
        }
        let combined = Layout::contiguous(&shape)?;
        let total = combined.len() as u64;
        let bands = self.combine_bands.then(|| {
            let per_batch = usize::from(problem.bands.len() > 1);
            Layout::strided(&problem.mask_shape(), &[per_batch, 0, 0, 0], 0, problem.bands.len())
        });
        let bands = bands.transpose()?;
        let sources = (operands.biases.iter().enumerate())
            .map(|(n, &layout)| (BiasSource::Bias, Slot::Bias(n), layout, 4, 0))
            .chain(operands.masks.iter().enumerate().map(|(n, &(layout, meaning))| {
                (BiasSource::Mask, Slot::Mask(n), layout, 1, u32::from(meaning == MaskMeaning::Keep))
            }))
            .chain(bands.iter().map(|layout| (BiasSource::Bands, Slot::Bands, layout, 16, 0)));
        for (n, (source, slot, layout, element, keeps)) in sources.enumerate() {
            let at = match slot {
                // A table is bound as a whole.
                Slot::Bands => Window {
                    offset: 0,
                    size: (problem.bands.len() * 16) as u64,
                    first: (parts[0].start * layout.strides()[0]) as u64,
                },
                _ => window(layout, &parts, element, self.align),
            };
            planner.push(
                catalogue::combine_biases(source, n > 0),
                total,
                params::CombineBiases {
                    source: View::new(layout, at),
                    shape: shape.map(|n| n as u32),
                    keeps,
                    total: total as u32,
                    minus_infinity: MINUS_INFINITY,
                    row_0: parts[2].start as u32,
                    key_0: parts[3].start as u32,
                    ..Default::default()
                },
                vec![
                    Binding::new("source", slot, at),
                    Binding::whole("combined", Slot::Scratch(1), planner.plan.scratch[1]),
                ],
            )?;
        }
        // Along an axis of one entry, the whole slice reads that entry.
        let strides: Vec<u32> = combined
            .strides()
            .iter()
            .zip(shape)
            .map(|(&stride, len)| if len > 1 { stride as u32 } else { 0 })
            .collect();
        Ok(strides.try_into().expect("four axes"))
    }
}

/// The most groups of `group` heads that `heads` consecutive heads can belong to.
pub(super) fn most_groups(heads: usize, group: usize) -> usize {
    heads.saturating_sub(1).div_ceil(group) + 1
}

/// Masks and biases of a slice, as bound for kernels.
#[derive(Clone, Debug, Default)]
pub(super) struct BoundRules {
    pub bindings: Vec<Binding>,
    pub rules: params::Rules,
}
