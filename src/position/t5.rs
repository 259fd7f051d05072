//! T5's relative position bias (Raffel et al. 2020, section 2.1): one learned number per head and distance bucket.

use super::check_table;
use super::relative::{self, Distances, check};
use crate::error::{Result, shape_error, value_error};
use crate::lower::Recording;
use crate::problem::MAX_LEN;
use crate::tensor::Tensor;
#[cfg(not(target_arch = "wasm32"))]
use crate::wait::wait_for;

/// How distances map to buckets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buckets {
    /// Whether half of the buckets are for keys after the query (encoders). If not, all such keys share bucket 0.
    pub bidirectional: bool,
    /// Number of buckets.
    pub num_buckets: usize,
    /// Distances from this one up share the last bucket.
    pub max_distance: usize,
}

impl Buckets {
    /// T5's own: 32 buckets up to a distance of 128.
    pub fn new(bidirectional: bool) -> Buckets {
        Buckets { bidirectional, num_buckets: 32, max_distance: 128 }
    }

    /// Number of buckets per direction, and how many of them hold a single distance.
    fn counts(&self) -> Result<(usize, usize)> {
        let Buckets { bidirectional, num_buckets, max_distance } = *self;
        let each = if bidirectional { num_buckets / 2 } else { num_buckets };
        let exact = each / 2;
        if exact == 0 || bidirectional && num_buckets % 2 != 0 || num_buckets > u32::MAX as usize {
            let rule = if bidirectional { "an even number, at least 4" } else { "at least 2" };
            return Err(value_error!("num_buckets = {num_buckets} must be {rule} (bidirectional: {bidirectional})"));
        }
        if max_distance <= exact {
            return Err(value_error!(
                "max_distance = {max_distance} must be more than {exact}, the number of distances with their own bucket"
            ));
        }
        Ok((each, exact))
    }

    /// The smallest and largest distance that may have their own bucket; all beyond share the last one.
    pub(crate) fn range(&self) -> Result<[i32; 2]> {
        self.counts()?;
        if self.max_distance >= MAX_LEN {
            return Err(value_error!("max_distance = {} must be less than {MAX_LEN}", self.max_distance));
        }
        let far = self.max_distance as i32;
        Ok([-far, if self.bidirectional { far } else { 0 }])
    }

    /// The bucket of `distance`, the key's position minus the query's. The nearest distances have one bucket each;
    /// farther ones share buckets by the logarithm of their distance.
    pub fn bucket(&self, distance: i64) -> Result<usize> {
        let (each, exact) = self.counts()?;
        let mut first = 0;
        let mut away = distance.min(0).unsigned_abs();
        if self.bidirectional {
            away = distance.unsigned_abs();
            first = if distance > 0 { each } else { 0 };
        }
        if away < exact as u64 {
            return Ok(first + away as usize);
        }
        // In f32, as T5 was trained: if the logarithm is a whole number, the last bit decides.
        let ratio = away as f32 / exact as f32;
        let span = (self.max_distance as f64 / exact as f64).ln() as f32;
        let steps = f64::from(ratio).ln() as f32 / span * (each - exact) as f32;
        Ok(first + (exact + steps as usize).min(each - 1))
    }
}

/// For each first distance, from the largest of [`Buckets::range`] down to three below the smallest, the biases of four
/// consecutive distances: `[1, heads, 1, distances · 4]`.
pub(crate) fn by_distance(
    recording: &mut Recording,
    table: &Tensor,
    buckets: &Buckets,
    heads: usize,
) -> Result<Tensor> {
    let [low, high] = buckets.range()?;
    let table = columns_of(table, buckets)?;
    if table.shape()[1] != heads {
        return Err(shape_error!(
            "the table of biases is for {} heads; there are {heads} of queries",
            table.shape()[1]
        ));
    }
    let firsts = (high - low + 4) as usize;
    check_table(&table.device(), "the biases by distance", &[heads, firsts, 4])?;
    // Row `high − first` and column `e` hold the bias of `first + e`.
    let bucket = |distance: i32| buckets.bucket(distance.clamp(low, high).into());
    let columns: Vec<u32> =
        (low - 3..=high + 3).map(|distance| bucket(distance).map(|bucket| bucket as u32)).collect::<Result<_>>()?;
    recording.relative(&table, &columns, [1, heads, firsts, 4], 1.0)?.reshape(&[1, heads, 1, firsts * 4])
}

/// The table `[num_buckets, heads]` as `[1, heads, 1, num_buckets]`.
fn columns_of(table: &Tensor, buckets: &Buckets) -> Result<Tensor> {
    table.expect_float("the table of biases")?;
    buckets.counts()?;
    match *table.shape() {
        [rows, _] if rows == buckets.num_buckets => table.permute(&[1, 0])?.unsqueeze(1)?.unsqueeze(0),
        _ => Err(shape_error!(
            "the table of biases {:?} must be [num_buckets, heads] with num_buckets = {}",
            table.shape(),
            buckets.num_buckets
        )),
    }
}

/// The bias `[heads, len_q, len_k]` for [`Attention::bias`](crate::Attention::bias) from a learned table
/// `[num_buckets, heads]` (any strides; T5's `relative_attention_bias.weight`), on the table's device. Query `i` is at
/// the position of key `i + offset`. T5 does not scale its scores, so set [`Attention::scale`](crate::Attention::scale)
/// to 1.
#[cfg(not(target_arch = "wasm32"))]
pub fn bias(table: &Tensor, buckets: &Buckets, len_q: usize, len_k: usize, offset: i64) -> Result<Tensor> {
    wait_for(bias_async(table, buckets, len_q, len_k, offset))
}

/// Like [`bias`], without blocking.
pub async fn bias_async(table: &Tensor, buckets: &Buckets, len_q: usize, len_k: usize, offset: i64) -> Result<Tensor> {
    let table = columns_of(table, buckets)?;
    let heads = table.shape()[1];
    check(&table.device(), [1, heads, len_q, len_k], offset)?;
    let columns = Distances { len_q, len_k, offset }
        .columns(|distance| buckets.bucket(distance).expect("the buckets are checked above") as u32);
    relative::by_distance(&table, &columns, [1, heads, len_q, len_k], 1.0).await?.select(0, 0)
}
