//! `bench`: tables that say what was measured. How fast it was is nobody's business here.

use serde_json::Value;

use super::{Workplace, has};

/// Measures the kernels with this in their name, for no longer than must be.
fn kernels(filter: &str, more: &[&str]) -> Vec<String> {
    let mut args = vec!["bench", "kernels", "--filter", filter, "--seconds", "0.01"];
    args.extend(more);
    args.into_iter().map(String::from).collect()
}

#[test]
fn kernels_are_measured_against_their_limits() {
    let place = Workplace::new();
    let ended = place.run(&kernels("opt-125m norm", &["--json", "--threads", "2"]));
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    let document: Value = serde_json::from_str(&ended.out).unwrap_or_else(|e| panic!("{e} in\n{}", ended.out));

    let machine = &document["machine"];
    assert_eq!(machine["threads"], 2);
    assert!(machine["cores"].as_u64() > Some(0) && machine["instructions"].is_array(), "{machine}");
    let limits = &document["limits"];
    for limit in ["fma_f32", "copy", "read"] {
        for threads in ["one_thread", "all_threads"] {
            let series = &limits[limit][threads];
            let (best, median) = (series["best_per_s"].as_f64(), series["median_per_s"].as_f64());
            assert!(best > Some(1e7) && best >= median && median > Some(0.0), "{limit} {threads}: {series}");
        }
    }

    let kernels = document["kernels"].as_array().expect("a list");
    let names: Vec<&str> = kernels.iter().filter_map(|k| k["name"].as_str()).collect();
    assert_eq!(names, ["layer_norm", "layer_norm_grad"]);
    for kernel in kernels {
        let number = |key: &str| kernel[key].as_f64().unwrap_or_else(|| panic!("{key} of {kernel}"));
        assert_eq!(
            (&kernel["model"], &kernel["family"], &kernel["shape"]),
            (&"opt-125m".into(), &"norm".into(), &"1024x768".into())
        );
        assert!(number("runs") >= 3.0 && number("best_s") > 0.0 && number("best_s") <= number("median_s"), "{kernel}");
        let (work, limit) = match kernel["limit"].as_str() {
            Some("FMA") => (number("flops"), &limits["fma_f32"]),
            Some("copy") => (number("bytes"), &limits["copy"]),
            other => panic!("{other:?}"),
        };
        let share = work / number("best_s") / number("limit_per_s");
        assert!((number("share") - share).abs() < 1e-9 * share, "{kernel}");
        assert!(number("limit_per_s") <= limit["all_threads"]["best_per_s"].as_f64().unwrap_or(0.0), "{kernel}");
    }
    // x, its gradient and the result's, weights and theirs.
    assert_eq!(kernels[1]["bytes"], 4 * (3 * 1024 * 768 + 3 * 768));
}

#[test]
fn kernels_are_a_table_too() {
    let place = Workplace::new();
    let ended = place.run(&kernels("llama-15m attention rope", &[]));
    has(&ended.out, &["cores", "best ms", "share", "llama-15m attention rope", "8x256x6x48", " %", "fma_f32", "copy"]);
    // Debug builds measure nothing of interest, and say so.
    assert_eq!(ended.err.contains("built for debugging"), cfg!(debug_assertions), "{}", ended.err);
}

#[test]
fn kernels_that_do_not_exist_are_told() {
    let place = Workplace::new();
    let ended = place.run(&kernels("abacus", &["--json"]));
    assert_eq!((ended.code, ended.out.as_str()), (Some(1), ""));
    has(&ended.err, &["no kernel has `abacus` in its name", "help", "opt-125m product projection"]);
    has(&place.refused(&["bench", "kernels", "--seconds=-1"]), &["expected a number of seconds"]);
    has(&place.refused(&["bench", "kernels", "--threads", "0"]), &["--threads"]);
}
