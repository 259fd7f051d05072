//! Random shapes, including empty ones and misfits, drawn and shrunk by proptest: every device returns the truth, or an
//! error with the numbers.

use crate::kit::{Call, Order, devices};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::{Config, RngAlgorithm, TestError, TestRng, TestRunner};
use wgpu_attention::problem::{MaskMeaning, Positions};
use wgpu_attention::{Device, Error};

const CASES: u32 = 200;
const TOLERANCE: f64 = 3e-6;

/// A shape of one to five axes that broadcasts to the scores of a call; `ones` selects the axes of length 1.
fn spread(full: [usize; 4], rank: usize, ones: [bool; 5]) -> Vec<usize> {
    let full = [1, full[0], full[1], full[2], full[3]];
    (5 - rank..5).map(|axis| if ones[axis] { 1 } else { full[axis] }).collect()
}

fn calls() -> impl Strategy<Value = Call> {
    let dims = || select(vec![0usize, 1, 3, 8, 33, 64]);
    let sizes = (0..=3usize, 0..=3usize, 0..=3usize, 0..=40usize, 0..=70usize, dims(), dims());
    let orders = select(vec![Order::Bhsd, Order::Bshd, Order::Bhds, Order::Packed]);
    let positions = (any::<bool>(), option::of(0..9usize), option::of(0..9usize), option::of(vec(0..=72usize, 0..=4)));
    let spreads = || vec((1..=5usize, any::<[bool; 5]>()), 0..=2);
    let meanings = select(vec![MaskMeaning::Keep, MaskMeaning::Hide]);
    // One axis of one operand, set to another size.
    let misfit = prop_oneof![2 => Just(None), 1 => (0..7usize, 0..4usize, 0..=5usize).prop_map(Some)];
    (sizes, orders, positions, spreads(), meanings, spreads(), misfit, any::<u32>()).prop_map(
        |(sizes, order, (causal, window_left, window_right, lengths), masks, meaning, biases, misfit, seed)| {
            let (batch, heads_kv, group, len_q, len_k, dim_k, dim_v) = sizes;
            let full = [batch, heads_kv * group, len_q, len_k];
            let mut call = Call {
                q: [batch, heads_kv * group, len_q, dim_k],
                k: [batch, heads_kv, len_k, dim_k],
                v: [batch, heads_kv, len_k, dim_v],
                order,
                positions: Positions {
                    causal,
                    window_left,
                    window_right,
                    key_lengths: lengths,
                    ..Positions::default()
                },
                masks: masks.into_iter().map(|(rank, ones)| (spread(full, rank, ones), meaning)).collect(),
                biases: biases.into_iter().map(|(rank, ones)| spread(full, rank, ones)).collect(),
                seed: seed.into(),
                ..Call::plain(full, full, full)
            };
            if let Some((which, axis, size)) = misfit {
                let operands = [&mut call.q[..], &mut call.k[..], &mut call.v[..]].into_iter();
                let masks = call.masks.iter_mut().map(|(shape, _)| &mut shape[..]);
                let biases = call.biases.iter_mut().map(|shape| &mut shape[..]);
                if let Some(shape) = operands.chain(masks).chain(biases).nth(which) {
                    shape[axis % shape.len()] = size;
                }
            }
            call
        },
    )
}

/// Whether a call is valid by PyTorch's rules for `scaled_dot_product_attention` with `enable_gqa`.
fn fits(call: &Call) -> bool {
    let ([b, hq, lq, dk], [bk, hkv, lk, dk2], [bv, hv, lv, _]) = (call.q, call.k, call.v);
    let grouped = if hkv == 0 { hq == 0 } else { hq % hkv == 0 };
    let spreads = |shape: &Vec<usize>| {
        let full = [b, hq, lq, lk];
        shape.len() <= 4 && shape.iter().rev().zip(full.iter().rev()).all(|(&n, &to)| n == to || n == 1)
    };
    let lengths = call.positions.key_lengths.as_ref();
    (b, b, lk, hkv, dk) == (bk, bv, lv, hv, dk2)
        && grouped
        && lengths.is_none_or(|lengths| lengths.len() == b && lengths.iter().all(|&len| len <= lk))
        && call.masks.iter().all(|(shape, _)| spreads(shape))
        && call.biases.iter().all(spreads)
}

/// Panics if the call does not behave as it should.
fn check(name: &str, device: &Device, call: &Call) {
    let data = call.data();
    let got = call.run(device, &data, call.attention().lse(true));
    match (fits(call), got) {
        (true, Ok(got)) => {
            let (truth, _) = call.truth(&data);
            truth.hold(&format!("a call on {name}"), &got, TOLERANCE);
        }
        (false, Err(error @ (Error::Shape(_) | Error::Value(_)))) => {
            let message = error.to_string();
            assert!(message.contains(|c: char| c.is_ascii_digit()), "no numbers in \"{message}\"");
        }
        (true, Err(error)) => panic!("refused on {name}: {error}"),
        (false, Err(error)) => panic!("another kind of error on {name}: {error:?}"),
        (false, Ok(got)) => panic!("taken on {name}, with an output of {:?}", got.output.shape()),
    }
}

#[test]
fn every_shape_is_computed_or_refused() {
    for (name, device) in devices() {
        let config = Config { cases: CASES, failure_persistence: None, ..Config::default() };
        let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
        let (computed, refused) = (std::cell::Cell::new(0), std::cell::Cell::new(0));
        let outcome = runner.run(&calls(), |call| {
            let counter = if fits(&call) { &computed } else { &refused };
            counter.set(counter.get() + 1);
            check(&name, &device, &call);
            Ok(())
        });
        if let Err(TestError::Fail(why, call)) = &outcome {
            panic!("{why}; the smallest such call: {call:#?}");
        }
        outcome.unwrap();
        println!("{name}: {} calls computed, {} refused", computed.get(), refused.get());
        assert!(computed.get() >= CASES / 5 && refused.get() >= CASES / 5, "{} {}", computed.get(), refused.get());
    }
}
