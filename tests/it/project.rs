//! Projections of few and of many rows.

use crate::kit::{as_gpus, assert_close_to, bits, devices, largest, wide};
use wgpu_attention::problem::Layout;
use wgpu_attention::reference::{self, View};
use wgpu_attention::{Device, Tensor, project};

fn sines(len: usize, step: f32) -> Vec<f32> {
    (0..len).map(|i| (i as f32 * step).sin()).collect()
}

#[test]
fn few_and_many_rows_match_the_truth() {
    for (name, device) in devices().into_iter().chain(as_gpus()) {
        // Multiples of four and odd widths, few and many outputs, with and without a bias.
        for (batch, len, dim_in, dim_out) in
            [(1, 1, 256, 96), (3, 1, 37, 9), (2, 4, 130, 33), (1, 5, 130, 33), (1, 3, 1, 1), (2, 70, 132, 68)]
        {
            let (x, w, b) = (sines(batch * len * dim_in, 0.37), sines(dim_out * dim_in, 0.11), sines(dim_out, 0.7));
            let tensor = |shape: &[usize], data: &[f32]| Tensor::from_slice(&device, shape, data).unwrap();
            let (x_on, w_on, b_on) =
                (tensor(&[batch, len, dim_in], &x), tensor(&[dim_out, dim_in], &w), tensor(&[dim_out], &b));
            for bias in [None, Some(&b_on)] {
                let layouts = [vec![batch, len, dim_in], vec![dim_out, dim_in], vec![dim_out]];
                let [xl, wl, bl] = layouts.map(|shape| Layout::contiguous(&shape).unwrap());
                let (x, w, b) = (wide(&x), wide(&w), wide(&b));
                let view = |data, layout| View { data, layout };
                let truth = reference::project(view(&x, &xl), view(&w, &wl), bias.map(|_| view(&b, &bl)));
                // If products cancel, the sum is no measure of their magnitude.
                let length = |row: &[f64]| row.iter().map(|x| x * x).sum::<f64>().sqrt();
                let most = largest(&w.chunks(dim_in).map(length).collect::<Vec<_>>());
                let scale = |row: usize, _: &[f64]| length(&x[row * dim_in..][..dim_in]) * most;
                let got = project(&x_on, &w_on, bias).unwrap();
                assert_close_to(&format!("{batch} × {len} × {dim_in} to {dim_out}, {name}"), &got, &truth, scale, 1e-6);
                // Column-major, to test other strides.
                let columns = tensor(&[dim_in, dim_out], &transposed(&w, dim_out, dim_in));
                let got = project(&x_on, &columns.permute(&[1, 0]).unwrap(), bias).unwrap();
                assert_close_to(&format!("{dim_in} to {dim_out} by columns, {name}"), &got, &truth, scale, 1e-6);
            }
        }
    }
}

fn transposed(w: &[f64], rows: usize, columns: usize) -> Vec<f32> {
    (0..rows * columns).map(|at| w[at % rows * columns + at / rows] as f32).collect()
}

#[test]
fn a_row_gives_the_same_bits_in_every_batch() {
    for (name, device) in devices().into_iter().chain(as_gpus()) {
        for (len, dim_in) in [(1, 300), (4, 300), (5, 1030), (9, 1030)] {
            let row = len * dim_in;
            let x = sines(70 * row, 0.37);
            let run = |device: &Device, batch: usize| {
                let x = Tensor::from_slice(device, &[batch, len, dim_in], &x[..batch * row]).unwrap();
                let w = Tensor::from_slice(device, &[40, dim_in], &sines(40 * dim_in, 0.11)).unwrap();
                bits(&project(&x, &w, None).unwrap().download().unwrap())[..len * 40].to_vec()
            };
            let alone = run(&device, 1);
            for batch in [2, 9, 70] {
                assert_eq!(run(&device, batch), alone, "{batch} × {len} × {dim_in} on {name}");
            }
        }
    }
}
