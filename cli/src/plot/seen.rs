//! Attention weights with their tokens, which every picture is drawn from.

use crate::error::{Result, fail, usage};
use crate::font;

/// Weights with their tokens.
pub struct Seen {
    pub title: String,
    /// The numbers of the heads, or none for their mean.
    pub heads: Vec<String>,
    /// `[heads, queries, keys]`
    pub weights: Vec<f32>,
    /// As the user gave them.
    pub queries: Vec<String>,
    pub keys: Vec<String>,
    /// Whether queries and keys are the same tokens.
    pub same: bool,
}

impl Seen {
    pub fn head(&self, n: usize) -> &[f32] {
        let each = self.queries.len() * self.keys.len();
        &self.weights[n * each..][..each]
    }

    /// Keeps `chosen` heads, in that order.
    pub fn choose(&mut self, chosen: &[usize]) -> Result<()> {
        if let Some(head) = chosen.iter().find(|&&head| head >= self.heads.len()) {
            fail!("there is no head {head}: the weights have {}, counted from 0", self.heads.len());
        }
        self.weights = chosen.iter().flat_map(|&head| self.head(head)).copied().collect();
        self.heads = chosen.iter().map(|head| head.to_string()).collect();
        Ok(())
    }

    /// Replaces the heads with their mean.
    pub fn average(&mut self) {
        let count = self.heads.len();
        let each = self.queries.len() * self.keys.len();
        let mean = |n: usize| (0..count).map(|head| f64::from(self.head(head)[n])).sum::<f64>() / count as f64;
        self.weights = (0..each).map(|n| mean(n) as f32).collect();
        self.heads = vec![format!("mean of {count} heads")];
    }

    /// The index of the query named `word`.
    pub fn query(&self, word: &str) -> Result<usize> {
        let named = self.queries.iter().position(|token| token == word);
        let numbered = || word.parse().ok().filter(|&at: &usize| at < self.queries.len());
        match named.or_else(numbered) {
            Some(at) => Ok(at),
            None => usage!(
                "--token {word:?} is neither a token nor its number, 0 to {}; the tokens are {}",
                self.queries.len() - 1,
                listed(&self.queries)
            ),
        }
    }
}

/// `head 3`, or the name of a mean.
pub fn head_name(head: &str) -> String {
    if head.parse::<usize>().is_ok() { format!("head {head}") } else { head.into() }
}

/// The first of them.
fn listed(tokens: &[String]) -> String {
    const SHOWN: usize = 40;
    let first: Vec<String> = tokens.iter().take(SHOWN).map(|token| font::visible(token)).collect();
    let more = tokens.len().saturating_sub(SHOWN);
    if more == 0 { first.join(" ") } else { format!("{} and {more} more", first.join(" ")) }
}
