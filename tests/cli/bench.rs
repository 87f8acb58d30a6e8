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

#[test]
fn comm_measures_threads_where_no_launcher_is() {
    let place = Workplace::new();
    let small = ["bench", "comm", "--largest", "3", "--seconds", "0.01"];
    let text = place.out(&[&small[..], &["--json", "--ranks", "3"]].concat());
    let document: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e} in\n{text}"));
    assert_eq!((&document["ranks"], &document["transport"]), (&3.into(), &"threads of one process".into()));
    let rows = document["collectives"].as_array().expect("a list");
    let names: Vec<&str> = rows.iter().filter_map(|row| row["collective"].as_str()).collect();
    let all = ["copy", "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "pt2pt"];
    assert_eq!(names, all.map(|name| [name; 3]).concat());
    for row in rows {
        let number = |key: &str| row[key].as_f64().unwrap_or_else(|| panic!("{key} of {row}"));
        let gathered = if row["collective"] == "all_gather" { 3.0 } else { 1.0 };
        assert_eq!(number("size_bytes"), number("elements") * 4.0 * gathered, "{row}");
        let bus = match row["collective"].as_str() {
            Some("copy" | "broadcast" | "pt2pt") => 1.0,
            _ => 2.0 / 3.0,
        };
        let (throughput, seconds) = (number("throughput_gbps"), number("seconds"));
        assert!((number("bus_gbps") - bus * throughput).abs() <= 1e-9 * throughput, "{row}");
        let twice = if row["collective"] == "all_reduce" { 2.0 } else { 1.0 };
        assert!((throughput - twice * number("size_bytes") * 8e-9 / seconds).abs() <= 1e-9 * throughput, "{row}");
        assert!(number("trials") >= 3.0, "{row}");
    }

    let table = place.out(&[&small[..], &["--filter", "reduce_scatter"]].concat());
    has(&table, &["2 ranks: threads of one process", "---- reduce_scatter", "Size (Bytes)", "BusBW (Gbps)", "\n64 "]);
    has(&place.refused(&["bench", "comm", "--ranks", "1"]), &["--ranks"]);
}

#[test]
fn launching_needs_a_launcher() {
    let place = Workplace::new();
    let ended = place.command(&["launch", "-n", "2", "bench", "comm"]).env("PATH", place.path("nowhere")).output();
    let ended = ended.expect("the program starts");
    let err = String::from_utf8_lossy(&ended.stderr);
    assert_eq!((ended.status.code(), ended.stdout.len()), (Some(1), 0), "{err}");
    has(&err, &["no launcher of MPI is on the path", "help", "apt install mpich"]);
    let message = place.refused(&["launch", "-n", "2", "--mpirun", "cat", "bench", "comm"]);
    has(&message, &["`cat` is no launcher of Open MPI or MPICH"]);
    has(&place.refused(&["bench", "comm", "--seconds=-1"]), &["expected a number of seconds"]);
}
