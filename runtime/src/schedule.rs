//! The learning rate over optimizer steps.

use std::f64::consts::PI;

use dsgc_ir::stage::{Schedule, ScheduleKind};

/// The learning rate of a step, which counts from 0, where the whole training has `total` steps.
///
/// The formulas are those of transformers' `get_scheduler` (optimization.py): a linear rise from 0 over the warm-up, in
/// which the first step uses 0, then `constant`, `linear` or `0.5 * (1 + cos(pi * t))`, where `t` goes from 0 to 1
/// between the warm-up and the last step.
pub fn learning_rate(schedule: &Schedule, step: u64, total: u64) -> f64 {
    let warmup = warmup(schedule, total);
    let peak = schedule.learning_rate;
    if step < warmup {
        return peak * step as f64 / warmup as f64;
    }
    let mut progress = (step - warmup) as f64 / total.saturating_sub(warmup).max(1) as f64;
    if schedule.clamp {
        progress = progress.min(1.0);
    }
    peak * match schedule.kind {
        ScheduleKind::Constant => 1.0,
        ScheduleKind::Linear => (1.0 - progress).max(0.0),
        ScheduleKind::Cosine => 0.5 * (1.0 + (PI * progress).cos()),
    }
}

/// Steps of the warm-up: given, or the share of all steps, rounded up as transformers' `get_warmup_steps` does.
fn warmup(schedule: &Schedule, total: u64) -> u64 {
    match schedule.warmup_steps {
        0 => (schedule.warmup_ratio * total as f64).ceil() as u64,
        steps => steps,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cosine(warmup_steps: u64, clamp: bool) -> Schedule {
        Schedule { learning_rate: 9.65e-6, kind: ScheduleKind::Cosine, warmup_steps, warmup_ratio: 0.0, clamp }
    }

    #[test]
    fn the_cosine_is_that_of_transformers() {
        // Computed with transformers' get_cosine_schedule_with_warmup.
        let with_warmup = [
            (0, 0.0),
            (1, 9.65e-8),
            (50, 4.825e-6),
            (100, 9.65e-6),
            (101, 9.649832474e-6),
            (200, 8.069459190e-6),
            (288, 4.845103635e-6),
            (400, 9.596521324e-7),
            (476, 1.675258591e-10),
            (477, 0.0),
            (478, 1.675258591e-10),
        ];
        for (step, expected) in with_warmup {
            let found = learning_rate(&cosine(100, false), step, 477);
            assert!((found - expected).abs() <= 1e-9 * 9.65e-6, "step {step}: {found:e}, expected {expected:e}");
        }
        for (step, expected) in [(1, 9.649999560e-6), (4, 9.649992967e-6), (3680, 4.825e-6)] {
            let found = learning_rate(&cosine(0, false), step, 7360);
            assert!((found - expected).abs() <= 1e-9 * 9.65e-6, "step {step}: {found:e}, expected {expected:e}");
        }
    }

    #[test]
    fn a_clamped_schedule_stays_at_its_end() {
        assert_eq!(learning_rate(&cosine(100, true), 478, 477), 0.0);
        let linear = Schedule { kind: ScheduleKind::Linear, ..cosine(10, true) };
        assert_eq!(learning_rate(&linear, 10, 30), 9.65e-6);
        assert!((learning_rate(&linear, 20, 30) - 4.825e-6).abs() < 1e-20);
        assert_eq!(learning_rate(&linear, 31, 30), 0.0);
    }

    #[test]
    fn a_ratio_is_a_share_of_all_steps() {
        let schedule = Schedule { warmup_steps: 0, warmup_ratio: 0.03, ..cosine(0, true) };
        assert_eq!(learning_rate(&schedule, 0, 101), 0.0);
        assert_eq!(learning_rate(&schedule, 4, 101), 9.65e-6, "0.03 of 101 steps are 4");
    }
}
