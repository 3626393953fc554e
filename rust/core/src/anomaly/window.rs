//! A sliding count over `N` slots with an exponentially weighted baseline of whole windows.

/// Weight of one finished window in the baseline once it has settled.
const ALPHA: f64 = 0.05;
/// Share of the remembered peak that is left after one window.
const PEAK_KEPT: f64 = 0.9998;
/// After so many events in a row from before the window, the clock itself is taken to have stepped.
const STEP_AFTER: u8 = 3;

/// Counts of the last `N` slots, and what is usual for a whole window.
#[derive(Debug, Clone)]
pub(super) struct Window<const N: usize> {
    outliers_teach: bool,
    slots: [u32; N],
    head: i64,
    started: bool,
    late: u8,
    tumbling: u32,
    mean: f64,
    variance: f64,
    peak: f64,
    finished: u32,
}

impl<const N: usize> Window<N> {
    #[allow(clippy::cast_possible_wrap)] // a handful of slots
    const WIDTH: i64 = N as i64;

    /// A window without history. `outliers_teach` says whether a window far above the usual moves the
    /// baseline a little (a new level of work) or not at all (failures: an attack must not become usual).
    pub(super) const fn new(outliers_teach: bool) -> Self {
        Self {
            outliers_teach,
            slots: [0; N],
            head: 0,
            started: false,
            late: 0,
            tumbling: 0,
            mean: 0.0,
            variance: 0.0,
            peak: 0.0,
            finished: 0,
        }
    }

    /// Moves the window to `slot` and adds `amount` to it; `floor` is the rate below which a window
    /// never counts as an outlier when it is learned.
    pub(super) fn add(&mut self, slot: i64, amount: u32, floor: f64) {
        if !self.started {
            self.started = true;
            self.head = slot;
        } else if slot > self.head {
            self.late = 0;
            self.advance(slot, floor);
        } else if self.head.saturating_sub(slot) >= Self::WIDTH {
            self.late += 1;
            if self.late < STEP_AFTER {
                return;
            }
            // The clock went back: what was counted lies in a future that did not happen.
            *self = Self {
                head: slot,
                slots: [0; N],
                tumbling: 0,
                late: 0,
                ..self.clone()
            };
        } else {
            self.late = 0;
        }
        let cell = &mut self.slots[slot.rem_euclid(Self::WIDTH) as usize];
        *cell = cell.saturating_add(amount);
        self.tumbling = self.tumbling.saturating_add(amount);
    }

    fn advance(&mut self, slot: i64, floor: f64) {
        if slot.saturating_sub(self.head) >= Self::WIDTH {
            self.slots = [0; N];
        } else {
            for passed in self.head + 1..=slot {
                self.slots[passed.rem_euclid(Self::WIDTH) as usize] = 0;
            }
        }
        let windows = slot
            .div_euclid(Self::WIDTH)
            .saturating_sub(self.head.div_euclid(Self::WIDTH));
        if windows > 0 {
            self.learn(f64::from(self.tumbling), floor);
            self.learn_idle(windows - 1);
            self.tumbling = 0;
        }
        self.head = slot;
    }

    /// Takes one finished window into the baseline; an outlier counts as the edge of the usual at most.
    fn learn(&mut self, count: f64, floor: f64) {
        let edge = self.mean + 3.0 * self.variance.max(self.mean).max(floor).sqrt() + floor;
        let shown = match (count > edge, self.outliers_teach) {
            (true, true) => edge,
            (true, false) => self.mean,
            (false, _) => count,
        };
        let weight = ALPHA.max(1.0 / (f64::from(self.finished) + 1.0));
        let off = shown - self.mean;
        self.mean += weight * off;
        self.variance = (1.0 - weight) * (self.variance + weight * off * off);
        self.peak = (self.peak * PEAK_KEPT).max(count);
        self.finished = self.finished.saturating_add(1);
    }

    fn learn_idle(&mut self, windows: i64) {
        let mut left = windows;
        // While the baseline is young each window weighs differently; afterwards there is a closed form.
        while left > 0 && f64::from(self.finished) < 1.0 / ALPHA {
            self.learn(0.0, 0.0);
            left -= 1;
        }
        if left > 0 {
            let kept = (1.0 - ALPHA).powf(left as f64);
            let mean = self.mean * kept;
            self.variance = kept * (self.variance + self.mean * (self.mean - mean));
            self.mean = mean;
            self.peak *= PEAK_KEPT.powf(left as f64);
            self.finished = self
                .finished
                .saturating_add(u32::try_from(left).unwrap_or(u32::MAX));
        }
    }

    /// Events in the window that ends with the newest slot.
    pub(super) fn count(&self) -> u32 {
        self.slots
            .iter()
            .fold(0, |sum, slot| sum.saturating_add(*slot))
    }

    /// Events in a usual window.
    pub(super) const fn mean(&self) -> f64 {
        self.mean
    }

    /// The busiest window remembered; it fades over days.
    pub(super) const fn peak(&self) -> f64 {
        self.peak
    }

    /// Windows that the baseline has seen.
    pub(super) const fn finished(&self) -> u32 {
        self.finished
    }

    /// Variance over mean, at least 1: how much burstier than a Poisson process this entity is.
    pub(super) fn overdispersion(&self) -> f64 {
        if self.mean > 0.0 {
            (self.variance / self.mean).clamp(1.0, 100.0)
        } else {
            1.0
        }
    }

    pub(super) const fn head(&self) -> i64 {
        self.head
    }
}

#[cfg(test)]
mod tests {
    use super::Window;

    #[test]
    fn counts_slide_out_of_the_window() {
        let mut window = Window::<6>::new(true);
        for slot in 0..6 {
            window.add(slot, 1, 1.0);
        }
        assert_eq!(window.count(), 6);
        window.add(8, 1, 1.0);
        assert_eq!(window.count(), 4);
        window.add(100, 1, 1.0);
        assert_eq!(window.count(), 1);
    }

    #[test]
    fn baseline_is_the_mean_of_steady_traffic() {
        let mut window = Window::<6>::new(true);
        for slot in 0..6 * 200 {
            window.add(slot, 2, 1.0);
        }
        assert!((window.mean() - 12.0).abs() < 0.01, "{}", window.mean());
        assert!(window.overdispersion() < 1.5);
    }

    #[test]
    fn an_idle_stretch_has_the_same_effect_in_one_step_as_window_by_window() {
        let mut jump = Window::<6>::new(true);
        for slot in 0..6 * 40 {
            jump.add(slot, 1, 1.0);
        }
        let mut walk = jump.clone();
        jump.add(6 * 60, 0, 1.0);
        for window in 40..=60 {
            walk.add(6 * window, 0, 0.0);
        }
        assert!(
            (jump.mean() - walk.mean()).abs() < 1e-9,
            "{} {}",
            jump.mean(),
            walk.mean()
        );
        assert!((jump.variance - walk.variance).abs() < 1e-9);
    }

    #[test]
    fn late_events_do_not_disturb_but_a_clock_that_stepped_back_does_not_stop_the_count() {
        let mut window = Window::<6>::new(true);
        window.add(1_000, 5, 1.0);
        window.add(10, 1, 1.0);
        window.add(1_000, 1, 1.0);
        assert_eq!(window.count(), 6, "one late event is left out");
        for _ in 0..10 {
            window.add(20, 1, 1.0);
        }
        assert_eq!(window.head(), 20);
        assert_eq!(window.count(), 8, "after three in a row the new time holds");
    }
}
