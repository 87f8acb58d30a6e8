//! When a wait for another rank has lasted too long.
//!
//! Neither a network that is cut nor a device that hangs says so; only that nothing comes does. So a wait without progress ends
//! the run after ten times the median of the last ones, and two minutes at least.

use std::collections::VecDeque;
use std::fmt::Display;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use dsgc_ir::diag::Diag;

/// The variable that sets the least time of a wait that ends a run, in seconds.
const VARIABLE: &str = "DSGC_WAIT_SECONDS";

/// Its value where it is not set.
pub(super) const DEFAULT: Duration = Duration::from_secs(120);

/// How often the usual time a wait may take.
const TIMES: u32 = 10;

/// How many of the last waits say what is usual.
const LAST: usize = 64;

/// The least time without progress after which a wait ends the run: `DSGC_WAIT_SECONDS`, or 120 s.
pub fn wait_limit() -> Result<Duration, Diag> {
    let Ok(text) = std::env::var(VARIABLE) else { return Ok(DEFAULT) };
    let seconds = text.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    seconds.ok_or_else(|| Diag::error(format!("`{VARIABLE}` is `{text}`, expected a number of seconds")))
}

/// Watches over the waits of one rank.
pub struct Watch {
    rank: usize,
    least: Duration,
    waits: Mutex<VecDeque<Duration>>,
    at: Mutex<At>,
}

/// Where a rank is.
#[derive(Default)]
struct At {
    /// What it does: a step.
    doing: String,
    /// What it sends or waits for within that, if anything yet.
    what: String,
}

impl Watch {
    /// With the least time of a wait that is too long.
    pub fn new(rank: usize, least: Duration) -> Watch {
        Watch { rank, least, waits: Mutex::default(), at: Mutex::default() }
    }

    /// What the rank does until it says otherwise, for the message.
    pub fn begin(&self, what: &str) {
        *self.at.lock().unwrap_or_else(PoisonError::into_inner) = At { doing: what.into(), what: String::new() };
    }

    /// What it sends or waits for within that.
    pub fn note(&self, what: &str) {
        let mut at = self.at.lock().unwrap_or_else(PoisonError::into_inner);
        at.what.clear();
        at.what.push_str(what);
    }

    /// What was said last of both, as the end of a message.
    pub fn place(&self) -> String {
        let at = self.at.lock().unwrap_or_else(PoisonError::into_inner);
        match [at.what.as_str(), at.doing.as_str()] {
            ["", ""] => String::new(),
            ["", at] | [at, ""] => format!(", at {at}"),
            [what, doing] => format!(", at {what}, {doing}"),
        }
    }

    /// A wait that has ended after this time.
    pub fn waited(&self, time: Duration) {
        let mut waits = self.waits.lock().unwrap_or_else(PoisonError::into_inner);
        if waits.len() == LAST {
            waits.pop_front();
        }
        waits.push_back(time);
    }

    /// The least time of a wait that may be too long.
    pub fn least(&self) -> Duration {
        self.least
    }

    /// Whether a wait of this time is too long.
    pub fn is_late(&self, time: Duration) -> bool {
        if time < self.least {
            return false;
        }
        let waits = self.waits.lock().unwrap_or_else(PoisonError::into_inner);
        let mut sorted: Vec<Duration> = waits.iter().copied().collect();
        sorted.sort_unstable();
        sorted.get(sorted.len() / 2).is_none_or(|median| time >= TIMES * *median)
    }

    /// Why the run ends after a wait of this time for something.
    pub fn late(&self, time: Duration, what: impl Display) -> String {
        let (rank, seconds, place) = (self.rank, time.as_secs_f64(), self.place());
        format!("rank {rank} has waited {seconds:.1} s for {what}{place}; `{VARIABLE}` sets how long it may take")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_is_late_beside_the_last_ones() {
        let watch = Watch::new(3, Duration::from_secs(2));
        assert!(!watch.is_late(Duration::from_secs(1)) && watch.is_late(Duration::from_secs(2)));
        (0..40).for_each(|_| watch.waited(Duration::from_secs(1)));
        assert!(!watch.is_late(Duration::from_secs(9)) && watch.is_late(Duration::from_secs(10)));
        // What was long ago is not usual.
        (0..LAST).for_each(|_| watch.waited(Duration::ZERO));
        assert!(watch.is_late(Duration::from_secs(2)));
        watch.begin("step 7 of `sft`");
        let late = || watch.late(Duration::from_millis(2500), "8 bytes from rank 1");
        assert!(late().starts_with("rank 3 has waited 2.5 s for 8 bytes from rank 1, at step 7 of `sft`; "));
        watch.note("`all_reduce` %g in @sft.grad");
        assert!(late().contains(" from rank 1, at `all_reduce` %g in @sft.grad, step 7 of `sft`; "));
        // What was sent in the last step is not what this one waits for.
        watch.begin("step 8 of `sft`");
        assert!(late().contains(" from rank 1, at step 8 of `sft`; "));
    }
}
