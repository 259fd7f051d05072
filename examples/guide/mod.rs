//! Shared code of the lessons: their `main`, random numbers, least squares, a real layer, and drawing.
#![allow(dead_code, reason = "each lesson uses its part")]

pub mod draw;

use std::process::ExitCode;

use image::RgbImage;
use rand::RngExt;
use rand_pcg::Pcg64;
use wgpu_attention::Device;

pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Writes its results to the text and returns its picture.
pub type Lesson = fn(&Device, &mut String) -> Result<RgbImage>;

/// Runs a lesson on the best adapter (or the CPU backend) and prints its results.
pub fn main(lesson: Lesson) -> ExitCode {
    let run = || -> Result<()> {
        let arguments: Vec<String> = std::env::args().skip(1).collect();
        let path = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
            [] => None,
            ["--picture", path] => Some(path),
            _ => return Err("usage: cargo run --release --example lesson_N [-- --picture FILE.png]".into()),
        };
        let device = Device::new()?;
        eprintln!("on {}", device.name());
        let mut text = String::new();
        let picture = lesson(&device, &mut text)?;
        print!("{text}");
        if let Some(path) = path {
            picture.save(path).map_err(|error| format!("cannot write {path}: {error}"))?;
            eprintln!("picture written to {path}");
        }
        Ok(())
    };
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// Random signs, +1 or −1.
pub fn signs(rng: &mut Pcg64, len: usize) -> Vec<f32> {
    (0..len).map(|_| if rng.random::<bool>() { 1.0 } else { -1.0 }).collect()
}

pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// The largest difference between two lists of numbers, for display only, not as a test.
pub fn difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// A matrix, one line per row.
pub fn rows(values: &[f32], columns: usize) -> Vec<String> {
    let cells = |row: &[f32]| row.iter().map(|&x| format!("{:6.2}", tidy(x))).collect::<String>();
    values.chunks_exact(columns).map(cells).collect()
}

/// Avoids −0.00.
pub fn tidy(x: f32) -> f32 {
    if x.abs() < 0.005 { 0.0 } else { x }
}

/// Ridge regression: the `[features, targets]` matrix W that minimises `‖X·W − Y‖² + ridge·‖W‖²`, where X is
/// `[samples, features]` and Y is `[samples, targets]`, row-major. Uses Cholesky on the normal equations.
pub fn least_squares(x: &[f64], y: &[f64], features: usize, targets: usize, ridge: f64) -> Vec<f64> {
    let (n, m) = (features, targets);
    let mut a = vec![0.0; n * n];
    let mut b = vec![0.0; n * m];
    for (x, y) in x.chunks_exact(n).zip(y.chunks_exact(m)) {
        for i in 0..n {
            for j in 0..=i {
                a[i * n + j] += x[i] * x[j];
            }
            for t in 0..m {
                b[i * m + t] += x[i] * y[t];
            }
        }
    }
    for i in 0..n {
        a[i * n + i] += ridge;
        for j in 0..=i {
            let sum: f64 = (0..j).map(|k| a[i * n + k] * a[j * n + k]).sum();
            let rest = a[i * n + j] - sum;
            a[i * n + j] = if i == j { rest.sqrt() } else { rest / a[j * n + j] };
        }
    }
    for t in 0..m {
        for i in 0..n {
            let sum: f64 = (0..i).map(|k| a[i * n + k] * b[k * m + t]).sum();
            b[i * m + t] = (b[i * m + t] - sum) / a[i * n + i];
        }
        for i in (0..n).rev() {
            let sum: f64 = (i + 1..n).map(|k| a[k * n + i] * b[k * m + t]).sum();
            b[i * m + t] = (b[i * m + t] - sum) / a[i * n + i];
        }
    }
    b
}
