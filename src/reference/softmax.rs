/// `P = softmax(S)` over `rows` rows, and `LSE = ln Σ exp S`. A score of −∞ is a masked key; a row with no other scores
/// gives weights 0 and LSE −∞. `sink` gives one extra score per row, without a weight; −∞ means none.
pub fn softmax(s: &[f64], rows: usize, sink: impl Fn(usize) -> f64) -> (Vec<f64>, Vec<f64>) {
    let width = s.len() / rows.max(1);
    let mut weights = Vec::with_capacity(s.len());
    let mut lse = Vec::with_capacity(rows);
    for n in 0..rows {
        let row = &s[n * width..][..width];
        let visible = || row.iter().copied().chain([sink(n)]).filter(|&x| x != f64::NEG_INFINITY);
        let peak = visible().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = visible().map(|x| (x - peak).exp()).sum();
        let empty = visible().next().is_none();
        lse.push(if empty { f64::NEG_INFINITY } else { peak + sum.ln() });
        weights.extend(row.iter().map(|&x| match x {
            f64::NEG_INFINITY => 0.0,
            _ => (x - peak).exp() / sum,
        }));
    }
    (weights, lse)
}
