//! Measures an adapter's speed.

use std::time::Instant;

use super::buffers::{GpuBuffer, Purpose};
use super::{Gpu, Steps, lock};
use crate::error::Result;
use crate::kernels::{Slot, plan};
#[cfg(not(target_arch = "wasm32"))]
use crate::wait::wait_for;

/// Minimum seconds of a measurement, so that the cost of a submit is negligible.
const LONG_ENOUGH: f64 = 0.01;

impl Gpu {
    /// The highest rate of f32 operations per second that this adapter reaches in multiply-adds, each of which counts
    /// as two: chains of them in registers, without memory access. Measured at the first call, in about a tenth of a
    /// second, and then cached.
    pub fn multiply_add_ceiling(&self) -> Result<f64> {
        // Held while measuring: two measurements at once would each see half the speed.
        let mut known = lock(&self.0.ceiling);
        if let Some(ceiling) = *known {
            return Ok(ceiling);
        }
        // Compiles.
        self.probe(1)?;
        let mut rounds = 16;
        let mut best = 0f64;
        while rounds < 1 << 28 {
            let (seconds, rate, _) = self.probe(rounds)?;
            if seconds >= LONG_ENOUGH {
                best = rate;
                break;
            }
            // Grow by a factor of eight at most, so that a slow clock ramp-up does not lead to a dispatch of seconds.
            rounds = (f64::from(rounds) * (1.5 * LONG_ENOUGH / seconds.max(1e-9)).clamp(2.0, 8.0)) as u32;
        }
        for _ in 0..9 {
            best = best.max(self.probe(rounds)?.1);
        }
        *known = Some(best);
        Ok(best)
    }

    /// Seconds, operations per second, and the sums.
    fn probe(&self, rounds: u32) -> Result<(f64, f64, GpuBuffer)> {
        let (plan, bytes, operations) = plan::probe(rounds, &self.0.capabilities)?;
        let y = self.allocate("probe", bytes, Purpose::Call)?;
        let mut steps = Steps::for_measuring(self);
        steps.add(plan, &[(Slot::Output, &y)])?;
        self.wait()?;
        let start = Instant::now();
        wait_for(steps.submit())?;
        self.wait()?;
        let seconds = start.elapsed().as_secs_f64();
        Ok((seconds, operations / seconds, y))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::catalogue::Kernel;
    use crate::{GpuOptions, kernels};

    #[test]
    fn the_probe_does_the_work_that_is_counted() {
        for adapter in Gpu::adapters() {
            let gpu = Gpu::with_options(&GpuOptions::adapter(adapter.index.to_string())).unwrap();
            let rounds = 5;
            let (plan, bytes, operations) = plan::probe(rounds, gpu.capabilities()).unwrap();
            let (_, _, y) = gpu.probe(rounds).unwrap();
            let y: Vec<f32> = wait_for(y.read(0..bytes, bytemuck::pod_collect_to_vec)).unwrap();

            let number = |name: &str| -> u32 {
                let source = Kernel::Probe.source().unwrap();
                let line = source.lines().find(|line| line.starts_with(&format!("const {name}:"))).unwrap();
                line.split(['=', 'u']).nth_back(1).unwrap().trim().parse().unwrap()
            };
            let (chains, links) = (number("CHAINS"), number("LINKS"));
            let elements = f64::from(chains) * y.len() as f64;
            assert_eq!(operations, 2.0 * elements * f64::from(links * rounds));
            let workgroup = y.len() / plan.steps[0].workgroups[0] as usize;
            let steps = (links * rounds) as i32;
            for at in [0, 1, workgroup, y.len() / 2, y.len() - 1] {
                let starts = (0..chains).map(|n| (at % workgroup) as f64 + f64::from(n));
                let (factor, summand) = (f64::from(0.999f32), f64::from(0.001f32));
                let decay = factor.powi(steps);
                let sum: f64 = starts.map(|x| x * decay + summand * (1.0 - decay) / (1.0 - factor)).sum();
                assert!((f64::from(y[at]) - sum).abs() < 1e-4 * sum, "{gpu:?} {at}: {} instead of {sum}", y[at]);
            }
            assert!(kernels::variant_source(&plan.steps[0].variant.name).is_ok());
        }
    }
}
