/// `P = softmax(S)` over rows of `width`, and `LSE = ln Σ exp S`. A score of −∞ is a masked key; a row
/// of nothing else gives weights 0 and LSE −∞.
pub fn softmax(s: &[f64], width: usize) -> (Vec<f64>, Vec<f64>) {
    if width == 0 {
        return (Vec::new(), Vec::new());
    }
    let mut weights = Vec::with_capacity(s.len());
    let mut lse = Vec::with_capacity(s.len() / width);
    for row in s.chunks(width) {
        let visible = || row.iter().copied().filter(|&x| x != f64::NEG_INFINITY);
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
