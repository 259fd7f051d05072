//! Positional methods on every device, compared with the formulas in f64.

use crate::kit::{self, Order, assert_close, bits, devices, gpus, noise, place, wide};
use half::{bf16, f16};
use rand::SeedableRng;
use rand_pcg::Pcg64;
use wgpu_attention::position::alibi::{self, slopes};
use wgpu_attention::position::shaw::RelativeKeys;
use wgpu_attention::position::t5::{self, Buckets};
use wgpu_attention::position::{
    LongRope, Pairing, PositionTable, Rotary, RotaryConfig, RotaryScaling, TokenPositions, Yarn, sinusoidal,
    sinusoidal_halves,
};
use wgpu_attention::problem::{Layout, Rows};
use wgpu_attention::reference::{self, View};
use wgpu_attention::{Align, Attention, Dtype, Element, HostTensor, Result, Tensor, Weights, project};

fn layout(shape: &[usize]) -> Layout {
    Layout::contiguous(shape).unwrap()
}

#[track_caller]
fn refused<T>(result: Result<T>, parts: &[&str]) {
    let Err(error) = result else { panic!("{parts:?} was accepted") };
    for part in parts {
        assert!(error.to_string().contains(part), "\"{part}\" is not in: {error}");
    }
}

#[test]
fn sinusoids_are_the_formula_rounded_once() {
    for dim in [1, 2, 3, 7, 64, 65] {
        for (start, len) in [(0, 9), (131_000, 72), (5, 0)] {
            let table = sinusoidal(start, len, dim).unwrap();
            assert_eq!(table.shape(), [len, dim]);
            let halves = sinusoidal_halves(start, len, dim).unwrap();
            for (n, (&x, &y)) in table.data().iter().zip(halves.data()).enumerate() {
                let (p, d) = ((start + n / dim) as f64, n % dim);
                let angle = p / 10_000f64.powf(2.0 * (d / 2) as f64 / dim as f64);
                let want = if d % 2 == 0 { angle.sin() } else { angle.cos() };
                assert_eq!(x, want as f32, "[{p}, {d}] of {dim}");
                let half = dim / 2;
                let frequency = |i: usize| 1.0 / 10_000f64.powf(i as f64 / (half.max(2) - 1) as f64);
                let want = match d {
                    d if d < half => (p * frequency(d)).sin(),
                    d if d < 2 * half => (p * frequency(d - half)).cos(),
                    _ => 0.0,
                };
                assert!((f64::from(y) - want).abs() < 1e-7, "halves [{p}, {d}] of {dim}: {y} instead of {want}");
            }
        }
    }
    // The offset moves the rows.
    assert_eq!(sinusoidal(3, 4, 6).unwrap().data(), &sinusoidal(0, 7, 6).unwrap().data()[18..]);
    refused(sinusoidal(0, 4, 0), &["dim ≥ 1"]);
    refused(sinusoidal(0, 1 << 30, 1), &["1073741824"]);
    refused(sinusoidal(0, 1 << 29, 1 << 20), &["sinusoids"]);
}

/// Kinds of token positions: the positions of a call, and the table row that each token reads.
fn placements(batch: usize, len: usize) -> Vec<(TokenPositions, Rows)> {
    let each: Vec<usize> = (0..batch).map(|b| (7 * b) % 5).collect();
    let scattered = |n: usize| (n * 13 + 4) % 29;
    let shared: Vec<usize> = (0..len).map(scattered).collect();
    let all: Vec<usize> = (0..batch * len).map(scattered).collect();
    let narrow = |rows: &[usize]| rows.iter().map(|&row| row as u32).collect::<Vec<_>>();
    let from_each: Vec<usize> = each.iter().flat_map(|&start| start..start + len).collect();
    vec![
        (TokenPositions::From(3), Rows::From(3)),
        (TokenPositions::FromEach(each), Rows::Each { rows: narrow(&from_each), per_batch: true }),
        (TokenPositions::Given(shared.clone()), Rows::Each { rows: narrow(&shared), per_batch: false }),
        (TokenPositions::Given(all.clone()), Rows::Each { rows: narrow(&all), per_batch: batch > 1 }),
    ]
}

#[test]
fn a_table_is_added_at_any_positions() {
    let mut rng = Pcg64::seed_from_u64(1);
    for (name, device) in devices() {
        for (lead, len, dim) in [(vec![], 5, 3), (vec![2], 7, 8), (vec![2, 3], 4, 5), (vec![1], 1, 1)] {
            let batch: usize = lead.iter().product();
            let shape = [lead.as_slice(), &[len, dim]].concat();
            let (x, table) = (noise(&mut rng, batch * len * dim), noise(&mut rng, 32 * dim));
            let learned = PositionTable::learned(&Tensor::from_slice(&device, &[32, dim], &table).unwrap()).unwrap();
            let tensor = Tensor::from_slice(&device, &shape, &x).unwrap();
            for (positions, rows) in placements(batch, len) {
                let (x64, table64) = (wide(&x), wide(&table));
                let (x3, table2) = (layout(&[batch, len, dim]), layout(&[32, dim]));
                let view = View { data: &x64, layout: &x3 };
                let truth = reference::add_positions(view, View { data: &table64, layout: &table2 }, &rows);
                let sum = learned.add(&tensor, &positions).unwrap();
                assert_eq!(sum.shape(), shape);
                assert_close(&format!("{shape:?} {positions:?} on {name}"), &sum, &truth, 1e-7);
            }
        }
    }
}

#[test]
fn embeddings_and_tables_of_any_strides_and_halves() {
    let mut rng = Pcg64::seed_from_u64(2);
    let (len, batch, dim) = (6, 3, 10);
    for (name, device) in devices() {
        // [len, batch, dim] viewed as [batch, len, dim], and the table transposed and stored as bf16.
        let x: Vec<f16> = noise(&mut rng, len * batch * dim).into_iter().map(f16::from_f32).collect();
        let table: Vec<bf16> = noise(&mut rng, dim * 9).into_iter().map(bf16::from_f32).collect();
        let placed = Tensor::from_slice(&device, &[len, batch, dim], &x).unwrap().permute(&[1, 0, 2]).unwrap();
        let transposed = Tensor::from_slice(&device, &[dim, 9], &table).unwrap().permute(&[1, 0]).unwrap();
        let sum = PositionTable::learned(&transposed).unwrap().add(&placed, &TokenPositions::From(2)).unwrap();
        assert_eq!(sum.dtype(), Dtype::F16);
        let got = sum.with_dtype(Dtype::F32).unwrap().download().unwrap();
        for (n, got) in got.into_iter().enumerate() {
            let (b, i, d) = (n / dim / len, n / dim % len, n % dim);
            let want = x[(i * batch + b) * dim + d].to_f32() + table[d * 9 + i + 2].to_f32();
            assert_eq!(got, want, "[{b}, {i}, {d}] on {name}");
        }
        let sinusoids = PositionTable::sinusoidal(&device, 20, dim).unwrap();
        let zeros = Tensor::from_slice(&device, &[4, dim], &[0f32; 40]).unwrap();
        let sum = sinusoids.add(&zeros, &TokenPositions::From(16)).unwrap().download().unwrap();
        assert_eq!(sum, sinusoidal(16, 4, dim).unwrap().data(), "{name}");
    }
}

#[test]
fn positions_that_do_not_fit_are_named() {
    for (_, device) in devices() {
        let table = PositionTable::sinusoidal(&device, 8, 4).unwrap();
        let x = Tensor::from_slice(&device, &[2, 3, 4], &[0f32; 24]).unwrap();
        let add = |positions| table.add(&x, &positions);
        refused(add(TokenPositions::From(6)), &["position 8", "0 to 7"]);
        refused(add(TokenPositions::From(usize::MAX)), &["is beyond the table"]);
        refused(add(TokenPositions::FromEach(vec![0, 9])), &["position 11", "0 to 7"]);
        refused(add(TokenPositions::FromEach(vec![0])), &["1 first positions", "batch of 2"]);
        refused(add(TokenPositions::Given(vec![0, 8, 1])), &["position 8"]);
        refused(add(TokenPositions::Given(vec![0; 4])), &["4 positions for 3 tokens", "batch of 2"]);
        refused(table.add(&x.narrow(2, 0, 3).unwrap(), &TokenPositions::From(0)), &["3 wide", "[8, 4]"]);
        refused(table.add(&x.reshape(&[24]).unwrap(), &TokenPositions::From(0)), &["[.., len, dim]"]);
        refused(PositionTable::learned(&x), &["[max_len, dim]"]);
        let bools = Tensor::from_bools(&device, &[2, 4], &[false; 8]).unwrap();
        refused(PositionTable::learned(&bools), &["bool"]);
        refused(table.add(&bools, &TokenPositions::From(0)), &["bool"]);
        // There are no tokens, so none can be beyond the table.
        let empty = Tensor::from_slice::<f32>(&device, &[2, 0, 4], &[]).unwrap();
        assert_eq!(table.add(&empty, &TokenPositions::From(99)).unwrap().shape(), [2, 0, 4]);
    }
}

/// Cosines and sines in f64, `[rows, pairs]`.
fn angles(config: &RotaryConfig, rows: usize) -> [Vec<f64>; 2] {
    let frequencies = config.frequencies(rows).unwrap();
    let angles = (0..rows).flat_map(|p| frequencies.iter().map(move |f| p as f64 * f));
    angles.map(f64::sin_cos).map(|(sin, cos)| (cos, sin)).unzip::<_, _, Vec<_>, Vec<_>>().into()
}

#[test]
fn rotation_is_the_formula_for_every_order_width_and_position() {
    for (name, device) in devices() {
        for (shape, dim) in [
            ([2, 3, 5, 8], 8),
            ([2, 2, 3, 20], 8),
            ([1, 2, 3, 24], 16),
            ([2, 2, 7, 9], 4),
            ([1, 1, 1, 2], 2),
            ([3, 4, 3, 13], 6),
            ([1, 2, 20, 64], 64),
        ] {
            for pairing in [Pairing::HalfSplit, Pairing::Interleaved] {
                for order in [Order::Bhsd, Order::Bshd, Order::Bhds, Order::Packed] {
                    let config = RotaryConfig::new(dim).pairing(pairing);
                    let rotary = Rotary::new(&device, &config, 64).unwrap();
                    let data = noise(&mut Pcg64::seed_from_u64(dim as u64), shape.iter().product());
                    let x = place(&device, shape, &data, order, 1).unwrap();
                    let [cos, sin] = angles(&config, 64);
                    let table = layout(&[64, dim / 2]);
                    let (x64, x4) = (wide(&data), layout(&shape));
                    for (positions, rows) in placements(shape[0], shape[2]) {
                        let truth = reference::rotate(
                            View { data: &x64, layout: &x4 },
                            View { data: &cos, layout: &table },
                            View { data: &sin, layout: &table },
                            pairing == Pairing::Interleaved,
                            &rows,
                        );
                        let y = rotary.rotate(&x, &positions).unwrap();
                        let what = format!("{shape:?} {dim} {pairing:?} {order:?} {positions:?} on {name}");
                        assert_eq!(y.shape(), shape);
                        assert_close(&what, &y, &truth, 3e-7);
                    }
                }
            }
        }
    }
}

fn halves_turn<T: Element>() {
    let shape = [2, 3, 5, 12];
    let data: Vec<T> = noise(&mut Pcg64::seed_from_u64(3), 360).into_iter().map(T::from_f32).collect();
    let floats: Vec<f32> = data.iter().map(|x| x.to_f32()).collect();
    for (name, device) in devices() {
        for pairing in [Pairing::HalfSplit, Pairing::Interleaved] {
            let rotary = Rotary::new(&device, &RotaryConfig::new(8).pairing(pairing), 16).unwrap();
            for order in [Order::Bhsd, Order::Bshd, Order::Bhds, Order::Packed] {
                let rotate = |x: &Tensor| rotary.rotate(x, &TokenPositions::FromEach(vec![1, 9])).unwrap();
                let y = rotate(&place(&device, shape, &data, order, 2).unwrap());
                assert_eq!(y.dtype(), T::DTYPE);
                let expected = rotate(&place(&device, shape, &floats, order, 2).unwrap()).download().unwrap();
                // The same bits as f32 of the same values, rounded when downloaded.
                let exact = y.clone().with_dtype(Dtype::F32).unwrap().download().unwrap();
                assert_eq!(bits(&exact), bits(&expected), "{order:?} on {name}");
                let rounded: Vec<f32> = expected.iter().map(|&x| T::from_f32(x).to_f32()).collect();
                assert_eq!(y.download().unwrap(), rounded);
            }
        }
    }
}

#[test]
fn halves_are_rotated_in_f32() {
    halves_turn::<f16>();
    halves_turn::<bf16>();
}

#[test]
fn ranks_and_empty_tensors() {
    for (_, device) in devices() {
        let rotary = Rotary::new(&device, &RotaryConfig::new(4), 8).unwrap();
        let data = noise(&mut Pcg64::seed_from_u64(4), 2 * 3 * 2 * 5 * 6);
        let five = Tensor::from_slice(&device, &[2, 3, 2, 5, 6], &data).unwrap();
        let rotated = rotary.rotate(&five, &TokenPositions::From(2)).unwrap();
        assert_eq!(rotated.shape(), [2, 3, 2, 5, 6]);
        let all = rotated.download().unwrap();
        let three = five.select(0, 1).unwrap().select(0, 2).unwrap();
        let part = rotary.rotate(&three, &TokenPositions::From(2)).unwrap();
        assert_eq!(part.shape(), [2, 5, 6]);
        assert_eq!(bits(&part.download().unwrap()), bits(&all[300..]));
        let two = three.select(0, 1).unwrap();
        let part = rotary.rotate(&two, &TokenPositions::From(2)).unwrap();
        assert_eq!(part.shape(), [5, 6]);
        assert_eq!(bits(&part.download().unwrap()), bits(&all[330..]));
        for shape in [[0, 2, 3, 6], [2, 0, 3, 6], [2, 2, 0, 6]] {
            let empty = Tensor::from_slice::<f32>(&device, &shape, &[]).unwrap();
            assert_eq!(rotary.rotate(&empty, &TokenPositions::From(0)).unwrap().shape(), shape);
        }
    }
}

#[test]
fn far_positions_are_as_exact_as_near_ones() {
    let rows = 131_072;
    for base in [1e4, 5e5] {
        let [cos, sin] = RotaryConfig::new(8).base(base).tables(rows).unwrap();
        for (position, (cos, sin)) in cos.data().chunks(4).zip(sin.data().chunks(4)).enumerate() {
            for i in 0..4 {
                let angle = position as f64 / base.powf(2.0 * i as f64 / 8.0);
                for (got, want) in [(cos[i], angle.cos()), (sin[i], angle.sin())] {
                    // Near a zero, the 53 bits of the angle are the limit.
                    let allowed = 1e-6 * want.abs() + 4.0 * f64::EPSILON * angle;
                    let off = (f64::from(got) - want).abs();
                    assert!(off <= allowed, "position {position}, pair {i}: {got} instead of {want}");
                }
            }
        }
    }
    // A kernel must not recompute angles from the position.
    for (name, device) in devices() {
        let rotary = Rotary::new(&device, &RotaryConfig::new(4), rows).unwrap();
        let x = Tensor::from_slice(&device, &[1, 4], &[1.0f32, 1.0, 0.0, 0.0]).unwrap();
        let y = rotary.rotate(&x, &TokenPositions::From(rows - 1)).unwrap().download().unwrap();
        let (s, c) = 131_071f64.sin_cos();
        let (t, d) = 1_310.71f64.sin_cos();
        assert_eq!(y, [c as f32, d as f32, s as f32, t as f32], "{name}");
    }
}

#[test]
fn a_rotated_product_depends_only_on_the_distance() {
    for (name, device) in devices() {
        let rotary = Rotary::new(&device, &RotaryConfig::new(16), 1000).unwrap();
        let data = noise(&mut Pcg64::seed_from_u64(5), 32);
        let q = Tensor::from_slice(&device, &[1, 16], &data[..16]).unwrap();
        let k = Tensor::from_slice(&device, &[1, 16], &data[16..]).unwrap();
        let product = |at: usize, back: usize| -> f32 {
            let rotate = |x, at| rotary.rotate(x, &TokenPositions::From(at)).unwrap().download().unwrap();
            rotate(&q, at).iter().zip(rotate(&k, at - back)).map(|(a, b)| a * b).sum()
        };
        for back in [0, 1, 7] {
            assert!((product(7, back) - product(907, back)).abs() < 3e-5, "{back} back on {name}");
        }
        assert!((product(7, 0) - product(7, 7)).abs() > 1e-2, "{name}");
    }
}

/// Formulas from the papers and transformers' `modeling_rope_utils`, in f64.
#[test]
fn scalings_are_those_of_the_papers() {
    let (dim, base) = (32, 10_000f64);
    let plain: Vec<f64> = (0..16).map(|i| base.powf(-2.0 * f64::from(i) / 32.0)).collect();
    let config = |scaling| RotaryConfig::new(dim).base(base).scaling(scaling);
    let close = |got: Vec<f64>, want: &[f64]| {
        assert_eq!(got.len(), want.len());
        for (n, (a, b)) in got.iter().zip(want).enumerate() {
            assert!((a / b - 1.0).abs() < 1e-13, "pair {n}: {a} instead of {b}");
        }
    };
    close(config(RotaryScaling::None).frequencies(1).unwrap(), &plain);
    let divided: Vec<f64> = plain.iter().map(|f| f / 4.0).collect();
    close(config(RotaryScaling::Linear { factor: 4.0 }).frequencies(1).unwrap(), &divided);

    let ntk = config(RotaryScaling::DynamicNtk { factor: 2.0, original_len: 64 });
    close(ntk.frequencies(64).unwrap(), &plain);
    let grown = base * 7f64.powf(32.0 / 30.0); // 2 · 256 / 64 − 1
    let want: Vec<f64> = (0..16).map(|i| grown.powf(-2.0 * f64::from(i) / 32.0)).collect();
    close(ntk.frequencies(256).unwrap(), &want);

    // 64 positions: pair 0 makes 10 full rotations and pair 4 one, so the ramp goes from pair 0 (32 rotations would be
    // before it) to pair 5, the first integer after that of one rotation.
    let yarn = config(RotaryScaling::Yarn(Yarn::new(4.0, 64)));
    let ramp = |i: usize| (i as f64 / 5.0).min(1.0);
    let want: Vec<f64> = plain.iter().enumerate().map(|(i, f)| f * (1.0 - ramp(i)) + f / 4.0 * ramp(i)).collect();
    close(yarn.frequencies(1).unwrap(), &want);
    assert!((yarn.attention_factor().unwrap() - (0.1 * 4f64.ln() + 1.0)).abs() < 1e-15);
    let deep = Yarn { mscale: Some(0.7), mscale_all_dim: Some(1.4), ..Yarn::new(40.0, 4096) };
    let want = (0.07 * 40f64.ln() + 1.0) / (0.14 * 40f64.ln() + 1.0);
    assert!((config(RotaryScaling::Yarn(deep)).attention_factor().unwrap() - want).abs() < 1e-15);
    let given = Yarn { attention_factor: Some(0.5), ..Yarn::new(4.0, 64) };
    assert_eq!(config(RotaryScaling::Yarn(given)).attention_factor().unwrap(), 0.5);
    let bare = Yarn { truncate: false, ..Yarn::new(4.0, 64) };
    let high = 32.0 * (64.0 / std::f64::consts::TAU).ln() / (2.0 * base.ln());
    let want = plain[2] * (1.0 - 2.0 / high) + plain[2] / 4.0 * (2.0 / high);
    close(config(RotaryScaling::Yarn(bare)).frequencies(1).unwrap()[2..3].to_vec(), &[want]);

    let llama = RotaryScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_len: 256 };
    let want: Vec<f64> = plain
        .iter()
        .map(|f| match std::f64::consts::TAU / f {
            wavelength if wavelength < 64.0 => *f,
            wavelength if wavelength > 256.0 => f / 8.0,
            wavelength => {
                let smooth = (256.0 / wavelength - 1.0) / 3.0;
                (1.0 - smooth) * f / 8.0 + smooth * f
            }
        })
        .collect();
    assert!(want.iter().zip(&plain).any(|(a, b)| a != b && *a != b / 8.0), "a ramp is there");
    close(config(llama).frequencies(1).unwrap(), &want);

    let long = LongRope {
        short_factor: (0..16).map(|i| 1.0 + 0.05 * f64::from(i)).collect(),
        long_factor: (0..16).map(|i| 1.0 + 0.5 * f64::from(i)).collect(),
        original_len: 64,
        factor: 4.0,
        attention_factor: None,
    };
    let by = |factors: &[f64]| plain.iter().zip(factors).map(|(f, by)| f / by).collect::<Vec<_>>();
    let longrope = config(RotaryScaling::LongRope(long.clone()));
    close(longrope.frequencies(64).unwrap(), &by(&long.short_factor));
    close(longrope.frequencies(65).unwrap(), &by(&long.long_factor));
    let want = (1.0 + 4f64.ln() / 64f64.ln()).sqrt();
    assert!((longrope.attention_factor().unwrap() - want).abs() < 1e-15);
    let [cos, sin] = longrope.tables(80).unwrap();
    let angle = 79.0 * plain[3] / long.long_factor[3];
    assert_eq!(cos.data()[79 * 16 + 3], (want * angle.cos()) as f32);
    assert_eq!(sin.data()[79 * 16 + 3], (want * angle.sin()) as f32);
}

#[test]
fn invalid_rotary_options_are_errors() {
    let config = |scaling| RotaryConfig::new(8).scaling(scaling).frequencies(10);
    refused(RotaryConfig::new(7).frequencies(1), &["rotary dimension 7", "even"]);
    refused(RotaryConfig::new(0).tables(1), &["rotary dimension 0"]);
    for base in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        refused(RotaryConfig::new(8).base(base).frequencies(1), &["base ="]);
    }
    for factor in [0.0, -2.0, f64::NAN] {
        refused(config(RotaryScaling::Linear { factor }), &["factor ="]);
        refused(config(RotaryScaling::DynamicNtk { factor, original_len: 4 }), &["factor ="]);
    }
    refused(config(RotaryScaling::DynamicNtk { factor: 2.0, original_len: 0 }), &["original_len = 0"]);
    refused(config(RotaryScaling::Yarn(Yarn::new(2.0, 0))), &["original_len = 0"]);
    refused(
        RotaryConfig::new(8).base(1.0).scaling(RotaryScaling::Yarn(Yarn::new(2.0, 4))).frequencies(1),
        &["base = 1", "YaRN"],
    );
    let llama = |low_freq_factor, high_freq_factor| RotaryScaling::Llama3 {
        factor: 8.0,
        low_freq_factor,
        high_freq_factor,
        original_len: 64,
    };
    refused(config(llama(4.0, 4.0)), &["high_freq_factor = 4", "low_freq_factor = 4"]);
    let long = |factors: usize| {
        RotaryScaling::LongRope(LongRope {
            short_factor: vec![1.0; 4],
            long_factor: vec![1.0; factors],
            original_len: 64,
            factor: 4.0,
            attention_factor: None,
        })
    };
    assert!(config(long(4)).is_ok());
    refused(config(long(3)), &["long_factor has 3 entries", "4 for a rotary dimension of 8"]);
    for (_, device) in devices() {
        refused(Rotary::new(&device, &RotaryConfig::new(7), 4), &["rotary dimension 7"]);
        refused(Rotary::new(&device, &RotaryConfig::new(8), 1 << 40), &["1099511627776"]);
        refused(Rotary::new(&device, &RotaryConfig::new(1 << 20), 1 << 29), &["rotary table"]);
        let rotary = Rotary::new(&device, &RotaryConfig::new(8), 4).unwrap();
        let x = Tensor::from_slice(&device, &[1, 1, 3, 8], &[0f32; 24]).unwrap();
        refused(rotary.rotate(&x, &TokenPositions::From(2)), &["position 4", "0 to 3"]);
        refused(rotary.rotate(&x.narrow(3, 0, 6).unwrap(), &TokenPositions::From(0)), &["dimension 8", "6]"]);
        refused(rotary.rotate(&x.reshape(&[24]).unwrap(), &TokenPositions::From(0)), &["at least two axes"]);
        let table = |shape: &[usize]| HostTensor::new(shape, vec![0.0; shape.iter().product()]).unwrap();
        let given =
            |cos: &[usize], sin: &[usize]| Rotary::from_tables(&device, &table(cos), &table(sin), Pairing::HalfSplit);
        refused(given(&[4, 2], &[4, 3]), &["[4, 2]", "[4, 3]"]);
        refused(given(&[8], &[8]), &["[positions, pairs]"]);
        refused(given(&[4, 0], &[4, 0]), &["at least one pair"]);
        refused(given(&[0, 2], &[0, 2]).unwrap().rotate(&x, &TokenPositions::From(0)), &["position 2"]);
    }
}

#[test]
fn slopes_of_any_number_of_heads() {
    // The paper's two examples, and its rule between powers of two.
    assert_eq!(slopes(8).unwrap(), [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625]);
    assert_eq!(slopes(16).unwrap()[0], 0.5f32.sqrt());
    assert_eq!(slopes(1).unwrap(), [0.00390625]);
    assert_eq!(slopes(3).unwrap(), [0.0625, 0.00390625, 0.25]);
    let twelve = slopes(12).unwrap();
    assert_eq!(twelve[..8], slopes(8).unwrap());
    assert_eq!(twelve[8..], [0, 2, 4, 6].map(|n| slopes(16).unwrap()[n]));
    refused(slopes(0), &["at least one head"]);
}

#[test]
fn alibi_costs_its_slope_per_step() {
    for (name, device) in devices() {
        for (heads, len_q, len_k, offset) in
            [(1, 1, 1, 0), (6, 5, 9, 4), (8, 9, 5, -3), (3, 4, 3, 100), (2, 3, 4, -50), (12, 33, 70, 37)]
        {
            let bias = alibi::bias(&device, heads, len_q, len_k, offset).unwrap();
            assert_eq!(bias.shape(), [heads, len_q, len_k]);
            let slopes = slopes(heads).unwrap();
            for (n, got) in bias.download().unwrap().into_iter().enumerate() {
                let (h, i, j) = (n / len_k / len_q, n / len_k % len_q, n % len_k);
                let steps = (i as i64 + offset - j as i64).abs() as f64;
                let want = -f64::from(slopes[h]) * steps;
                assert!((f64::from(got) - want).abs() <= 2e-7 * want.abs(), "[{h}, {i}, {j}] on {name}: {got}, {want}");
            }
        }
        for (len_q, len_k) in [(0, 3), (3, 0)] {
            assert_eq!(alibi::bias(&device, 2, len_q, len_k, 0).unwrap().shape(), [2, len_q, len_k]);
        }
        refused(alibi::bias(&device, 0, 1, 1, 0), &["at least one head"]);
        refused(alibi::bias(&device, 2, 1 << 29, 1, 0), &["536870912"]);
        refused(alibi::bias(&device, 2, 1, 1, i64::MIN), &["offset ="]);
        refused(alibi::bias(&device, 1 << 20, 1 << 28, 1 << 28, 0), &["overflows"]);
        refused(alibi::bias(&device, 8, 1 << 28, 1 << 28, 0), &["a bias needs"]);
    }
}

#[test]
fn buckets_match_t5() {
    // Exact up to 8, then by the logarithm: 8 to 128 in 8 steps.
    let both = Buckets::new(true);
    let expected = [(0, 0), (-1, 1), (-7, 7), (-8, 8), (-11, 8), (-12, 9), (-16, 10), (-32, 12), (-64, 14), (-127, 15)];
    for (distance, bucket) in expected {
        assert_eq!(both.bucket(distance).unwrap(), bucket, "{distance}");
        if distance != 0 {
            assert_eq!(both.bucket(-distance).unwrap(), bucket + 16, "{}", -distance);
        }
    }
    let causal = Buckets::new(false);
    for (distance, bucket) in [(5, 0), (0, 0), (-15, 15), (-16, 16), (-64, 26), (-128, 31), (i64::MIN, 31)] {
        assert_eq!(causal.bucket(distance).unwrap(), bucket, "{distance}");
    }
    assert_eq!(both.bucket(i64::MAX).unwrap(), 31);
    let bad = |bidirectional, num_buckets, max_distance| Buckets { bidirectional, num_buckets, max_distance }.bucket(0);
    refused(bad(true, 2, 128), &["num_buckets = 2", "at least 4"]);
    refused(bad(true, 7, 128), &["num_buckets = 7", "even"]);
    refused(bad(false, 1, 128), &["num_buckets = 1", "at least 2"]);
    refused(bad(false, 32, 16), &["max_distance = 16", "more than 16"]);
}

#[test]
fn t5_gathers_its_table_exactly() {
    for (name, device) in devices() {
        for (bidirectional, heads, len_q, len_k, offset) in
            [(true, 3, 9, 13, 0), (false, 2, 1, 40, 39), (true, 1, 7, 2, -3), (false, 4, 150, 150, 0)]
        {
            let buckets = Buckets::new(bidirectional);
            let values = noise(&mut Pcg64::seed_from_u64(6), 32 * heads);
            let table = Tensor::from_slice(&device, &[32, heads], &values).unwrap();
            let bias = t5::bias(&table, &buckets, len_q, len_k, offset).unwrap();
            assert_eq!(bias.shape(), [heads, len_q, len_k]);
            for (n, got) in bias.download().unwrap().into_iter().enumerate() {
                let (h, i, j) = (n / len_k / len_q, n / len_k % len_q, n % len_k);
                let bucket = buckets.bucket(j as i64 - (i as i64 + offset)).unwrap();
                assert_eq!(got, values[bucket * heads + h], "[{h}, {i}, {j}] on {name}");
            }
        }
        let half: Vec<bf16> = (0..64).map(|x| bf16::from_f32(x as f32)).collect();
        let table = Tensor::from_slice(&device, &[2, 32], &half).unwrap().permute(&[1, 0]).unwrap();
        let bias = t5::bias(&table, &Buckets::new(true), 2, 2, 0).unwrap();
        assert_eq!(bias.download().unwrap(), [0.0, 17.0, 1.0, 0.0, 32.0, 49.0, 33.0, 32.0], "{name}");
        refused(t5::bias(&table, &Buckets { num_buckets: 16, ..Buckets::new(true) }, 2, 2, 0), &["[32, 2]", "16"]);
    }
}

#[test]
fn relative_keys_are_the_formula_in_every_order() {
    let (shape, len_k) = ([2, 3, 6, 5], 9);
    let data = noise(&mut Pcg64::seed_from_u64(7), 180);
    let keys = noise(&mut Pcg64::seed_from_u64(8), 25);
    for (name, device) in devices() {
        let table = Tensor::from_slice(&device, &[5, 5], &keys).unwrap();
        let relative = RelativeKeys::new(&table, 3, 1).unwrap();
        let mut placed: Vec<(String, Tensor)> = [Order::Bhsd, Order::Bshd, Order::Bhds, Order::Packed]
            .into_iter()
            .map(|order| (format!("{order:?}"), place(&device, shape, &data, order, 0).unwrap()))
            .collect();
        // Neither batch and heads nor batch and queries can be merged.
        let layout4 = layout(&shape).permute(&[1, 2, 0, 3]).unwrap();
        let odd: Vec<f32> = layout4.positions().map(|at| data[at]).collect();
        let odd = Tensor::from_slice(&device, &[3, 6, 2, 5], &odd).unwrap().permute(&[2, 0, 1, 3]).unwrap();
        placed.push(("heads outermost".into(), odd));
        for (order, q) in placed {
            for (offset, scale) in [(0, None), (3, Some(2.0f32)), (-2, Some(-0.5))] {
                let bias = relative.bias(&q, len_k, offset, scale).unwrap();
                assert_eq!(bias.shape(), [2, 3, 6, 9]);
                let factor = scale.map_or(1.0 / 5f64.sqrt(), f64::from);
                let truth: Vec<f64> = (0..2 * 3 * 6 * 9)
                    .map(|n| {
                        let (row, j) = (n / 9, (n % 9) as i64);
                        let distance = j - (row % 6) as i64 - offset;
                        let key = &keys[((distance.clamp(-3, 1) + 3) * 5) as usize..][..5];
                        let q = &data[row * 5..][..5];
                        factor * q.iter().zip(key).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>()
                    })
                    .collect();
                let what = format!("{order} offset {offset} on {name}");
                // If products cancel, the sum is no measure of their magnitude.
                let length = |row: &[f32]| wide(row).iter().map(|x| x * x).sum::<f64>().sqrt();
                let most = kit::largest(&keys.chunks(5).map(length).collect::<Vec<_>>());
                let scale = |row: usize, _: &[f64]| factor.abs() * length(&data[row * 5..][..5]) * most;
                kit::assert_close_to(&what, &bias, &truth, scale, 3e-7);
            }
        }
        let q = place(&device, shape, &data, Order::Bhsd, 0).unwrap();
        refused(RelativeKeys::new(&table, 3, 2), &["[5, 5]", "6 rows"]);
        refused(RelativeKeys::new(&q, 3, 1), &["[left + right + 1, dim]"]);
        refused(relative.bias(&q, 9, 0, Some(f32::NAN)), &["scale ="]);
        refused(relative.bias(&q, 1 << 29, 0, None), &["536870912"]);
        refused(relative.bias(&q.narrow(3, 0, 4).unwrap(), 9, 0, None), &["as wide as Q [2, 3, 6, 4]"]);
        refused(RelativeKeys::new(&table, usize::MAX, 1), &["left ="]);
        assert_eq!(relative.bias(&q, 0, 0, None).unwrap().shape(), [2, 3, 6, 0]);
        let two = q.select(0, 1).unwrap().select(0, 1).unwrap();
        assert_eq!(relative.bias(&two, 9, 0, None).unwrap().shape(), [6, 9]);
    }
}

#[test]
fn biases_can_be_passed_to_attention_directly() {
    for (name, device) in devices() {
        let data = noise(&mut Pcg64::seed_from_u64(9), 2 * 4 * 7 * 8);
        let x = Tensor::from_slice(&device, &[2, 4, 7, 8], &data).unwrap();
        let bias = alibi::bias(&device, 4, 7, 7, 0).unwrap();
        let attended = Attention::new()
            .causal(Align::TopLeft)
            .scale(0.0)
            .bias(bias)
            .weights(Weights::PerHead)
            .forward(&x, &x, &x)
            .unwrap();
        let weights = attended.weights.unwrap().download().unwrap();
        let slope = f64::from(slopes(4).unwrap()[0]);
        let sum: f64 = (0..7).map(|back| (-slope * f64::from(back)).exp()).sum();
        for back in 0..7u32 {
            let want = (-slope * f64::from(back)).exp() / sum;
            let got = f64::from(weights[6 * 7 + 6 - back as usize]);
            assert!((got - want).abs() < 1e-6, "{back} back on {name}: {got}, {want}");
        }
    }
}

#[test]
fn a_projection_alone() {
    for (name, device) in devices() {
        let (x, w, b) = (
            noise(&mut Pcg64::seed_from_u64(10), 2 * 3 * 5 * 7),
            noise(&mut Pcg64::seed_from_u64(11), 28),
            [1f32, 2.0, 3.0, 4.0],
        );
        let tensor = Tensor::from_slice(&device, &[2, 3, 5, 7], &x).unwrap();
        let weight = Tensor::from_slice(&device, &[4, 7], &w).unwrap();
        let bias = Tensor::from_slice(&device, &[4], &b).unwrap();
        let y = project(&tensor, &weight, Some(&bias)).unwrap();
        assert_eq!(y.shape(), [2, 3, 5, 4]);
        let (x64, w64, b64) = (wide(&x), wide(&w), wide(&b));
        let (x3, w2, b1) = (layout(&[6, 5, 7]), layout(&[4, 7]), layout(&[4]));
        let view = |data, layout| View { data, layout };
        let truth = reference::project(view(&x64, &x3), view(&w64, &w2), Some(view(&b64, &b1)));
        assert_close(&name, &y, &truth, 1e-6);
        refused(project(&tensor.narrow(3, 0, 6).unwrap(), &weight, None), &["6 wide", "reads 7"]);
        refused(project(&tensor, &weight, Some(&bias.narrow(0, 0, 3).unwrap())), &["[3]", "[4]"]);
        refused(project(&bias, &weight, None), &["[.., len, dim_in]"]);
    }
}

#[test]
fn into_a_callers_encoder() {
    for (name, gpu) in gpus() {
        let rotary = Rotary::new(&gpu, &RotaryConfig::new(8), 16).unwrap();
        let table = PositionTable::sinusoidal(&gpu, 16, 8).unwrap();
        let data = noise(&mut Pcg64::seed_from_u64(12), 2 * 2 * 3 * 8);
        let x = Tensor::from_slice(&gpu, &[2, 2, 3, 8], &data).unwrap();
        let positions = TokenPositions::FromEach(vec![0, 4]);
        let mut encoder = gpu.device().create_command_encoder(&Default::default());
        let sum = table.encode(&gpu, &mut encoder, &x, &TokenPositions::From(5)).unwrap();
        let rotated = rotary.encode(&gpu, &mut encoder, &sum, &positions).unwrap();
        gpu.queue().submit([encoder.finish()]);
        let keys = RelativeKeys::new(&table.tensor().narrow(0, 0, 4).unwrap(), 1, 2).unwrap();
        let mut encoder = gpu.device().create_command_encoder(&Default::default());
        let bias = keys.encode(&gpu, &mut encoder, &x, 5, 1, None).unwrap();
        gpu.queue().submit([encoder.finish()]);
        let alone = keys.bias(&x, 5, 1, None).unwrap();
        assert_eq!(bits(&bias.download().unwrap()), bits(&alone.download().unwrap()), "{name}");
        let apart = rotary.rotate(&table.add(&x, &TokenPositions::From(5)).unwrap(), &positions).unwrap();
        assert_eq!(bits(&rotated.download().unwrap()), bits(&apart.download().unwrap()), "{name}");
    }
}

#[test]
fn work_is_cut_to_small_bindings() {
    let limited = kit::limited(|limits| limits.max_storage_buffer_binding_size = 1 << 12);
    for (name, gpu) in limited {
        // 2 · 3 · 9 rows of 64: each head of a batch entry is 2,304 bytes, two do not fit.
        let shape = [2, 3, 9, 64];
        let data = noise(&mut Pcg64::seed_from_u64(13), shape.iter().product());
        let config = RotaryConfig::new(16);
        for order in [Order::Bhsd, Order::Bshd] {
            for positions in [TokenPositions::From(2), TokenPositions::Given((0..18).map(|n| (n * 7) % 23).collect())] {
                let run = |device: &wgpu_attention::Device| {
                    let x = place(device, shape, &data, order, 0).unwrap();
                    Rotary::new(device, &config, 23).unwrap().rotate(&x, &positions).unwrap()
                };
                let truth = wide(&run(&wgpu_attention::Device::Cpu).download().unwrap());
                assert_close(&format!("rotation {order:?} on {name}"), &run(&(&gpu).into()), &truth, 3e-7);
            }
        }
        let add = |device: &wgpu_attention::Device| {
            let x = Tensor::from_slice(device, &[6, 9, 64], &data).unwrap();
            let table = PositionTable::learned(&Tensor::from_slice(device, &[12, 64], &data[..768]).unwrap()).unwrap();
            table.add(&x, &TokenPositions::From(3)).unwrap().download().unwrap()
        };
        assert_eq!(add(&(&gpu).into()), add(&wgpu_attention::Device::Cpu), "{name}");
        let biases = |device: &wgpu_attention::Device| alibi::bias(device, 5, 30, 40, 10).unwrap().download().unwrap();
        assert_eq!(biases(&(&gpu).into()), biases(&wgpu_attention::Device::Cpu), "{name}");
    }
}
