//! Tables worked out once per set of weights: the rotation of round robin, and the alias table.

/// The longest rotation kept; larger sums of weights are scaled down to about that.
const LONGEST: u64 = 4096;

/// One full turn of indices in which each comes as often as its weight says, spread evenly: the k-th visit of
/// a weight w is due at (k + phase) / w of the turn, and visits are made in the order in which they are due.
/// Phases are multiples of the golden ratio, so that light instances do not come all at once. After any t
/// visits an index has come within 1 + n·share of its share of t.
///
/// Weights are reduced by their greatest common divisor, and scaled down where the turn would be longer than
/// 4,096 visits; each index comes at least once.
pub fn rotation(weights: &[u32]) -> Box<[u32]> {
    let weights = reduced(weights);
    let mut visits: Vec<(u64, u64, u32)> = Vec::new();
    for (index, &weight) in weights.iter().enumerate() {
        // Fixed point, 16 bits.
        let phase = u64::from((index as u32).wrapping_mul(0x9E37_79B9) >> 16);
        visits.extend((0..weight).map(|k| ((k << 16) + phase, weight, index as u32)));
    }
    // Fractions are compared by cross multiplication: exact, and the index settles equal ones.
    visits.sort_unstable_by(|a, b| (a.0 * b.1).cmp(&(b.0 * a.1)).then(a.2.cmp(&b.2)));
    visits.into_iter().map(|(_, _, index)| index).collect()
}

fn reduced(weights: &[u32]) -> Vec<u64> {
    let divisor = weights
        .iter()
        .fold(0, |a, &b| gcd(a, u64::from(b.max(1))))
        .max(1);
    let weights: Vec<u64> = weights
        .iter()
        .map(|&w| u64::from(w.max(1)) / divisor)
        .collect();
    let total: u64 = weights.iter().sum();
    let limit = LONGEST.max(weights.len() as u64);
    if total <= limit {
        return weights;
    }
    weights
        .into_iter()
        .map(|w| (w * limit / total).max(1))
        .collect()
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Draws an index with a probability proportional to its weight, in constant time.
#[derive(Debug)]
pub struct Alias {
    /// Per column: the share (of 2³²) that stays with it, and who gets the rest.
    columns: Box<[(u64, u32)]>,
}

impl Alias {
    /// The table for weights of at least 1 each.
    pub fn new(weights: &[u32]) -> Self {
        let count = weights.len() as u64;
        let total: u64 = weights.iter().map(|&w| u64::from(w.max(1))).sum();
        // Whole numbers throughout: a column holds `total` units, an index brings weight × count of them.
        let mut units: Vec<u64> = weights
            .iter()
            .map(|&w| u64::from(w.max(1)) * count)
            .collect();
        let mut columns: Vec<(u64, u32)> = (0..count as u32).map(|own| (1 << 32, own)).collect();
        let (mut small, mut large): (Vec<usize>, Vec<usize>) =
            (0..units.len()).partition(|&i| units[i] < total);
        while let (Some(less), Some(&more)) = (small.pop(), large.last()) {
            let share = (u128::from(units[less]) << 32) / u128::from(total);
            columns[less] = (share as u64, more as u32);
            units[more] -= total - units[less];
            if units[more] < total {
                large.pop();
                small.push(more);
            }
        }
        Self {
            columns: columns.into(),
        }
    }

    /// The index that 64 random bits stand for; the table must not be empty.
    pub fn draw(&self, roll: u64) -> usize {
        let column = super::scale((roll >> 32) as u32, self.columns.len());
        let (share, other) = self.columns[column];
        if roll & 0xFFFF_FFFF < share {
            column
        } else {
            other as usize
        }
    }
}
