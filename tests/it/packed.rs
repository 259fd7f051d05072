//! Packed variable-length sequences, on every device, against the truth of each sequence alone.

use crate::kit::{self, Call, Order, assert_logs_close, bits, devices};
use half::f16;
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;
use wgpu_attention::kernels::Tile;
use wgpu_attention::problem::{MaskMeaning, Positions};
use wgpu_attention::{Align, Attention, Device, Mask, Method, Tensor, Weights};

const TOLERANCE: f64 = 3e-6;

struct Ragged {
    heads: [usize; 2],
    dims: [usize; 2],
    lens: Vec<[usize; 2]>,
    positions: Positions,
    softcap: Option<f32>,
    sink: bool,
}

impl Ragged {
    fn starts(&self, which: usize) -> Vec<usize> {
        std::iter::once(0)
            .chain(self.lens.iter().scan(0, |sum, lens| {
                *sum += lens[which];
                Some(*sum)
            }))
            .collect()
    }

    /// Sequence `n` as a separate call.
    fn alone(&self, n: usize) -> Call {
        let ([hq, hkv], [dk, dv], [len_q, len_k]) = (self.heads, self.dims, self.lens[n]);
        let align = match &self.positions.align {
            Align::PerBatch(offsets) => Align::Offset(offsets[n]),
            other => other.clone(),
        };
        Call {
            q: [1, hq, len_q, dk],
            k: [1, hkv, len_k, dk],
            v: [1, hkv, len_k, dv],
            order: Order::Bhsd,
            positions: Positions { align, ..self.positions.clone() },
            scale: None,
            softcap: self.softcap,
            masks: vec![],
            biases: vec![],
            sink: self.sink,
            seed: 100 + n as u64,
        }
    }

    fn check(&self, name: &str, device: &Device) {
        let ([hq, hkv], [dk, dv]) = (self.heads, self.dims);
        let (starts_q, starts_k) = (self.starts(0), self.starts(1));
        let calls: Vec<_> = (0..self.lens.len()).map(|n| self.alone(n)).collect();
        let mut data: Vec<_> = calls.iter().map(|call| call.data()).collect();
        let sink = data[0].sink.clone();
        data.iter_mut().for_each(|data| data.sink = sink.clone());
        // Permute [1, h, len, d] to rows [len, h, d] and concatenate the sequences.
        let pack = |which: fn(&kit::Data) -> &Vec<f32>, heads: usize, dim: usize| -> Vec<f32> {
            data.iter()
                .flat_map(|data| {
                    let x = which(data);
                    let len = x.len() / (heads * dim);
                    (0..len).flat_map(move |i| (0..heads).flat_map(move |h| &x[(h * len + i) * dim..][..dim])).copied()
                })
                .collect()
        };
        let (q, k, v) = (pack(|d| &d.q, hq, dk), pack(|d| &d.k, hkv, dk), pack(|d| &d.v, hkv, dv));
        let upload = |x: &[f32], heads: usize, dim: usize| {
            Tensor::from_slice(device, &[x.len() / (heads * dim), heads, dim], x).unwrap()
        };
        let (q, k, v) = (upload(&q, hq, dk), upload(&k, hkv, dk), upload(&v, hkv, dv));
        let mut attention = Attention::new().lse(true).window(self.positions.window_left, self.positions.window_right);
        let align = self.positions.align.clone();
        attention = if self.positions.causal { attention.causal(align) } else { attention.align(align) };
        if let Some(cap) = self.softcap {
            attention = attention.softcap(cap);
        }
        if let Some(sink) = &sink {
            attention = attention.sink(Tensor::from_slice(device, &[hq], sink).unwrap());
        }
        let cut = device.gpu().map(|gpu| {
            let share = gpu.capabilities().subgroup_min.map_or(1, |least| if least >= 8 { 8 } else { 4.min(least) });
            Tile::Registers { workgroup: 8, rows: 2, keys: 4, share }
        });
        for method in [Some(Method::Auto), cut.map(Method::Tile)].into_iter().flatten() {
            let attention = attention.clone().method(method);
            let packed = attention.forward_packed(&q, &k, &v, &starts_q, &starts_k).unwrap();
            let total = *starts_q.last().unwrap();
            assert_eq!(packed.output.shape(), [total, hq, dv]);
            let lse = packed.lse.unwrap();
            assert_eq!(lse.shape(), [hq, total]);
            for (n, call) in calls.iter().enumerate() {
                let what = format!("sequence {n} {:?} on {name}, {method:?}", self.lens[n]);
                let (truth, _) = call.truth(&data[n]);
                let rows = packed.output.narrow(0, starts_q[n], self.lens[n][0]).unwrap();
                let output = rows.permute(&[1, 0, 2]).unwrap();
                let lse = lse.narrow(1, starts_q[n], self.lens[n][0]).unwrap();
                truth.hold_output(&what, &output, TOLERANCE);
                assert_logs_close(&what, &lse, &truth.lse, TOLERANCE);
                let (output, lse) = (output.download().unwrap(), lse.download().unwrap());
                if method != Method::Auto {
                    let alone = call.run(device, &data[n], call.attention().lse(true).method(method)).unwrap();
                    assert_eq!(bits(&alone.output.download().unwrap()), bits(&output), "{what}: same bits alone");
                    assert_eq!(bits(&alone.lse.unwrap().download().unwrap()), bits(&lse), "{what}: same bits alone");
                }
            }
        }
    }
}

#[test]
fn every_sequence_gives_what_it_gives_alone() {
    let mut rng = Pcg64::seed_from_u64(77);
    for (name, device) in devices() {
        for (n, positions) in [
            Positions::default(),
            Positions { causal: true, align: Align::BottomRight, ..Default::default() },
            Positions { causal: true, align: Align::PerBatch(vec![0, 3, -2, 9, 1, 0, 40]), ..Default::default() },
            Positions { window_left: Some(6), window_right: Some(2), ..Default::default() },
        ]
        .into_iter()
        .enumerate()
        {
            let mut len = |most: usize| rng.random_range(0..most);
            let lens = vec![[0, 5], [len(40), len(60)], [7, 0], [len(90), 33], [1, 1], [0, 0], [len(20), len(150)]];
            let heads = [[4, 2], [3, 3], [6, 1], [2, 2]][n];
            Ragged { heads, dims: [16, 16], lens, positions, softcap: None, sink: n % 2 == 1 }.check(&name, &device);
        }
    }
}

#[test]
fn long_keys_are_split_within_each_sequence() {
    for (name, device) in devices() {
        // 600 keys with few rows are split; 40 keys are not.
        let lens = vec![[3, 600], [9, 40], [1, 1300], [2, 0]];
        let positions = Positions { causal: true, align: Align::BottomRight, ..Default::default() };
        for sink in [false, true] {
            let (lens, positions) = (lens.clone(), positions.clone());
            Ragged { heads: [2, 1], dims: [12, 8], lens, positions, softcap: Some(9.0), sink }.check(&name, &device);
        }
    }
}

#[test]
fn half_types_and_nan_in_a_neighbour() {
    for (name, device) in devices() {
        // The second sequence is all NaN, which must not reach the others.
        let rows = |nan: f32| -> Vec<f16> {
            (0..3 * 4)
                .flat_map(|i| {
                    let value = if (4..8).contains(&i) { nan } else { i as f32 * 0.25 };
                    [f16::from_f32(value); 8]
                })
                .collect()
        };
        let run = |nan: f32| {
            let x = Tensor::from_slice(&device, &[12, 1, 8], &rows(nan)).unwrap();
            let starts = [0, 4, 8, 12];
            let out = Attention::new().forward_packed(&x, &x, &x, &starts, &starts).unwrap().output;
            assert_eq!(out.dtype(), wgpu_attention::Dtype::F16);
            out.download().unwrap()
        };
        let (with, without) = (run(f32::NAN), run(1.0));
        assert_eq!(bits(&with[..32]), bits(&without[..32]), "{name}");
        assert_eq!(bits(&with[64..]), bits(&without[64..]), "{name}");
        assert!(with[32..64].iter().all(|x| x.is_nan()), "{name}");
    }
}

#[test]
fn wrong_offsets_are_errors_with_the_numbers() {
    for (name, device) in devices() {
        let x = Tensor::from_slice(&device, &[6, 2, 4], &[0.5f32; 48]).unwrap();
        let says = |attention: Attention, starts_q: &[usize], starts_k: &[usize], say: &str| {
            let message = attention.forward_packed(&x, &x, &x, starts_q, starts_k).expect_err(say).to_string();
            assert!(message.contains(say), "{name}: {message}");
        };
        let plain = Attention::new();
        says(plain.clone(), &[0, 4, 3, 6], &[0, 2, 4, 6], "cu_seqlens_q[2] = 3 is less than cu_seqlens_q[1] = 4");
        says(plain.clone(), &[0, 6], &[0, 2, 6], "cu_seqlens_q has 2 entries and cu_seqlens_k 3");
        says(plain.clone(), &[0, 5], &[0, 6], "it must go from 0 to the 6 rows there are");
        says(plain.clone(), &[1, 6], &[0, 6], "cu_seqlens_q goes from Some(1)");
        says(plain.clone(), &[], &[], "it must go from 0");
        says(plain.clone().causal(Align::PerBatch(vec![0])), &[0, 3, 6], &[0, 3, 6], "has 1 entries for 2 sequences");
        says(plain.clone().key_lengths(vec![6]), &[0, 6], &[0, 6], "not from key_lengths");
        says(plain.clone().weights(Weights::PerHead), &[0, 6], &[0, 6], "cannot be combined with returned weights");
        let mask = Mask::new(Tensor::from_bools(&device, &[1], &[true]).unwrap(), MaskMeaning::Keep).unwrap();
        says(plain.clone().mask(mask), &[0, 6], &[0, 6], "cannot be combined with a mask");
        let flat = x.reshape(&[12, 4]).unwrap();
        let message = plain.forward_packed(&flat, &x, &x, &[0, 6], &[0, 6]).unwrap_err().to_string();
        assert!(message.contains("[12, 4] must be [total, heads, dim]"), "{name}: {message}");
        // Zero rows are not an error.
        let none = Tensor::from_slice(&device, &[0, 2, 4], &[0f32; 0]).unwrap();
        let out = Attention::new().forward_packed(&none, &x, &x, &[0, 0], &[0, 6]).unwrap().output;
        assert_eq!(out.shape(), [0, 2, 4]);
    }
}
