//! A call as data, with its results.

use super::Recording;
use super::gpu::buffer_of;
use crate::call::Attended;
use crate::error::Result;
use crate::gpu::ExportedCall;

impl Recording {
    /// What `record` records, as data. The recording must be one for a step.
    pub async fn export(mut self, record: impl FnOnce(&mut Recording) -> Result<Attended>) -> Result<ExportedCall> {
        let Attended { output, lse, weights, scores } = record(&mut self)?;
        let steps = self.steps("a call is exported from an adapter; the CPU backend has no kernels")?;
        let results = [("output", Some(output)), ("lse", lse), ("weights", weights), ("scores", scores)];
        let results: Vec<_> = (results.iter())
            .filter_map(|(name, tensor)| tensor.as_ref().map(|x| (*name, buffer_of(x), x.operand(), x.dtype())))
            .collect();
        steps.export(&results).await
    }
}
