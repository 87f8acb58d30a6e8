//! `compile`: reports that add up.

use serde_json::Value;

use super::{Workplace, has};

fn json(place: &Workplace, args: &[&str]) -> Vec<Value> {
    let text = place.out(&[&["compile", "pipeline.yaml", "--json"], args].concat());
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e} in\n{text}"))
}

/// Parameters of OPT: embeddings with two more positions, layers of 12 h^2 + 13 h (here ffn = 2 h: 8 h^2 + 11 h), the last norm.
const PARAMETERS: u64 = 640 * 16 + 66 * 16 + 2 * (8 * 16 * 16 + 11 * 16) + 2 * 16;

#[test]
fn the_report_adds_up() {
    let place = Workplace::new();
    let stages = json(&place, &[]);
    let names: Vec<&str> = stages.iter().filter_map(|s| s["stage"].as_str()).collect();
    assert_eq!(names, ["sft", "more"]);
    for stage in &stages {
        assert_eq!(stage["recipe"], "sft");
        assert_eq!(stage["parameters"], PARAMETERS);
        assert_eq!(stage["trained_parameters"], PARAMETERS);

        let passes = stage["passes"].as_array().expect("passes");
        let names: Vec<&str> = passes.iter().filter_map(|p| p["pass"].as_str()).collect();
        has(
            &names.join(" "),
            &["infer", "canonicalize", "simplify", "autodiff", "rematerialize", "order", "plan_memory"],
        );
        for pair in passes.windows(2) {
            for what in ["ops", "kernels", "bytes", "live_bytes"] {
                assert_eq!(pair[0][format!("{what}_after")], pair[1][format!("{what}_before")], "{what}");
            }
        }
        // Scores of the last place are cut before the product with the vocabulary.
        let simplify = passes.iter().find(|p| p["pass"] == "simplify").expect("it runs");
        assert_eq!(simplify["matched"]["slice of row of product"], 1, "{simplify}");
        assert!(simplify["bytes_after"].as_u64() < simplify["bytes_before"].as_u64(), "{simplify}");
        let graphs = stage["graphs"].as_array().expect("graphs");
        let ops: u64 = graphs.iter().filter_map(|g| g["ops"].as_u64()).sum();
        assert_eq!(passes.last().expect("a pass")["ops_after"], ops);

        let memory = |what: &str| stage["memory"][what].as_u64().expect("bytes");
        assert_eq!(memory("peak"), memory("persistent") + memory("values") + memory("scratch"));
        // Parameters and both moments of AdamW, in single precision.
        assert!(memory("persistent") >= 12 * PARAMETERS, "{}", memory("persistent"));
        let largest = graphs.iter().filter_map(|g| g["value_bytes"].as_u64()).max().expect("a graph");
        assert!((largest..largest + 4096).contains(&memory("values")), "{largest} of {}", memory("values"));
        // What lives at once is what the plan needs, but for gaps.
        let live = passes.last().expect("a pass")["live_bytes_after"].as_f64().expect("a number");
        let planned = memory("values") as f64;
        assert!((0.95 * planned..=planned).contains(&live), "{live} live, {planned} planned");
    }
    // Twice a product per parameter of a matrix and token forwards, twice that backwards; attention and the rest on top.
    let products = (640 * 16 + 2 * 8 * 16 * 16) as f64;
    for (stage, rows) in stages.iter().zip([8.0, 4.0]) {
        let flops = stage["updates"][0]["flops_per_step"].as_f64().expect("a number");
        let least = 6.0 * products * rows * 48.0;
        assert!((least..1.5 * least).contains(&flops), "{flops} beside {least}");
    }
}

#[test]
fn the_report_is_the_same_in_words() {
    let place = Workplace::new();
    let words = place.out(&["compile", "pipeline.yaml", "--stage", "more"]);
    has(
        &words,
        &[
            "stage more (recipe sft)",
            "parameters      15,776 (15,776 trained)",
            "    model         15,776 trained",
            "GFLOP per step",
            "ops before -> after",
        ],
    );
    has(&words, &["infer", "autodiff", "plan_memory", "graphs", "model.loss.step", "peak memory", "KiB"]);
    assert!(!words.contains("stage sft"));
}

#[test]
fn the_planned_program_is_a_program() {
    let place = Workplace::new();
    let text = place.out(&["compile", "pipeline.yaml", "--stage", "sft", "--emit", "ir"]);
    let program = dsgc_ir::parse(&text).unwrap_or_else(|e| panic!("{e}"));
    dsgc_ir::verify::verify(&program).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(program.to_string().trim_end(), text.trim_end());
    assert_eq!(program.stage.name, "sft");
}

#[test]
fn changes_are_told_with_their_rules() {
    let place = Workplace::new();
    let changes = place.out(&["compile", "pipeline.yaml", "--stage", "more", "--emit", "changes"]);
    has(&changes, &["simplify: @", "forward", "  =>  contract (layer_norm (slice %", "by slice of row of product"]);
    let listed = json(&place, &["--stage", "more", "--emit", "changes"]).remove(0);
    let lines: Vec<&str> = listed.as_array().expect("a list").iter().filter_map(Value::as_str).collect();
    assert_eq!(lines.join("\n").lines().count(), changes.trim_end().lines().count());
}

#[test]
fn the_plan_says_what_is_called_when() {
    let place = Workplace::new();
    let words = place.out(&["compile", "pipeline.yaml", "--emit", "plan"]);
    has(
        &words,
        &[
            "stage sft",
            "role model: opt (trained)",
            "2 x micro-batches of 4",
            "evaluate text.eval",
            "for batch in",
            "update model",
        ],
    );
    has(&words, &["call model.loss.grad per micro-batch", "call model.apply", "save model", "stage more", "runs/sft"]);
    let plan = json(&place, &["--emit", "plan"]);
    assert_eq!((&plan[0]["max_steps"], &plan[1]["num_epochs"]), (&Value::from(3), &Value::from(0.5)));
}

#[test]
fn the_table_of_memory_fills_the_regions_of_the_report() {
    let place = Workplace::new();
    let report = json(&place, &["--stage", "more"]).remove(0);
    let table = json(&place, &["--stage", "more", "--emit", "memory"]).remove(0);
    let rows = table.as_array().expect("rows");
    let number = |row: &Value, key: &str| row[key].as_u64().unwrap_or_else(|| panic!("{key} of {row}"));
    let end = |row: &Value| number(row, "offset") + number(row, "bytes");
    for region in ["persistent", "values"] {
        let last = rows.iter().filter(|r| r["region"] == region).map(end).max().expect("a value");
        // Regions end at a whole cache line.
        assert!((last..last + 64).contains(&number(&report["memory"], region)), "{region}: {last}");
    }
    let mut states: Vec<&Value> = rows.iter().filter(|r| r["region"] == "persistent").collect();
    assert!(states.len() >= 3 * 36, "parameters and two moments of each: {}", states.len());
    states.sort_by_key(|r| number(r, "offset"));
    for pair in states.windows(2) {
        assert!(end(pair[0]) <= number(pair[1], "offset"), "{}\n{}", pair[0], pair[1]);
    }
    for row in rows.iter().filter(|r| r["region"] == "values") {
        assert!(number(row, "from") <= number(row, "to"), "{row}");
    }
    has(
        &place.out(&["compile", "pipeline.yaml", "--emit", "memory"]),
        &["parameters and state", "@model/", "graph @model.loss", "f32["],
    );
}

#[test]
fn memory_can_be_had_for_time() {
    let place = Workplace::new();
    let peak = |sets: &[&str]| {
        let args: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
        let report = json(&place, &[&["--stage", "more"], &args[..]].concat()).remove(0);
        report["memory"]["peak"].as_u64().expect("bytes")
    };
    let (kept, least) = (peak(&[]), peak(&["compile.gradient_checkpointing=true"]));
    assert!(least < kept, "{least} of {kept}");
    assert_eq!(peak(&["compile.gradient_checkpointing=auto"]), kept);
    let limit = format!("compile.memory={} KiB", kept.midpoint(least).div_ceil(1024));
    assert!((least..=kept.midpoint(least) + 1024).contains(&peak(&[&limit])));
    let changes = ["compile", "pipeline.yaml", "--stage", "more", "--emit", "changes", "--set", &limit];
    has(&place.out(&changes), &["rematerialize: @model.loss.step, model.decoder.layers 0: keeps ", "for the gradient"]);
    let refused = |limit: &str| place.refused(&["compile", "pipeline.yaml", "--stage", "more", "--set", limit]);
    let missed = refused("compile.memory=100KiB");
    has(&missed, &["needs at least", "`memory` allows 100.00 KiB", "parameters and state", "micro_batch_size"]);
    let limits = ["--set", "compile.gradient_checkpointing=false", "--set", &limit];
    let missed = place.refused(&[&["compile", "pipeline.yaml", "--stage", "more"][..], &limits].concat());
    has(&missed, &["needs at least", "`gradient_checkpointing: auto` keeps less, and computes the rest again"]);
    let word = "compile.gradient_checkpointing=always";
    has(&refused(word), &["found `always`, expected one of `true`, `false` and `auto`", "--set:1:32"]);
    has(&refused("compile.memory=2"), &["found `2` as `memory`, expected a size", "2GiB"]);
}

#[test]
fn what_is_trained_in_place_of_all_is_said_to_change_numbers() {
    let place = Workplace::new();
    let of_role = |set: &str| {
        let words = place.out(&["compile", "pipeline.yaml", "--stage", "more", "--set", set]);
        let line = words.lines().find(|line| line.starts_with("    model ")).map(String::from);
        line.unwrap_or_else(|| panic!("no role in {words}"))
    };
    assert!(!of_role("stages.more.batch_size=4").contains("changes numbers"));
    // Six weights of each layer; a bias of each of them and of its norms, and that of the last norm.
    let lora = of_role("stages.more.lora_r=4");
    assert!(lora.ends_with(" frozen; changes numbers: trains factors of rank 4 beside 12 weights"), "{lora}");
    let frozen = of_role("stages.more.freeze=['*bias']");
    assert!(frozen.ends_with(" frozen; changes numbers: leaves 17 parameters as they are"), "{frozen}");
    let report = json(&place, &["--stage", "more", "--set", "stages.more.lora_r=4"]).remove(0);
    assert_eq!(report["roles"][0]["lora"], serde_json::json!({"rank": 4, "weights": 12}));
}

#[test]
fn an_unknown_stage_is_told() {
    let place = Workplace::new();
    has(&place.refused(&["compile", "pipeline.yaml", "--stage", "stf"]), &["error: unknown stage `stf`", "`sft`"]);
}

#[test]
fn values_that_no_memory_holds_are_told() {
    let place = Workplace::new();
    let refused = |set: &str| place.refused(&["compile", "pipeline.yaml", "--stage", "more", "--set", set]);
    for rows in ["1000000000000", "1000000000000000000"] {
        let err = refused(&format!("stages.more.batch_size={rows}"));
        has(
            &err,
            &["error: found a value of type", "[B, T", "which no memory holds", "help", &format!("`B` up to {rows}")],
        );
    }
    has(&refused("models.base.config.hidden=10000000"), &["error: found a value of type", "which no memory holds"]);
}

#[test]
fn a_batch_of_any_size_can_be_taken_in_parts() {
    let place = Workplace::new();
    let memory = |batch: &str| {
        let report = json(&place, &["--stage", "sft", "--set", batch]).remove(0);
        report["memory"]["peak"].as_u64().expect("bytes")
    };
    assert_eq!(memory("stages.sft.batch_size=1000000000000000000"), memory("stages.sft.batch_size=8"));
}

#[test]
fn places_along_the_pipeline_are_told() {
    let place = Workplace::new();
    let parallel = "compile.parallel={pipeline: 2, microbatches: 4, schedule: 1f1b}";
    let two = ["--stage", "more", "--set", parallel, "--set", "stages.sft.micro_batch_size=2"];
    let report = json(&place, &two).remove(0);
    let pipeline = &report["pipeline"];
    assert_eq!(pipeline["schedule"], "1f1b");
    for (at, found) in pipeline["places"].as_array().expect("places").iter().enumerate() {
        assert_eq!(found["layers"], serde_json::json!({"model.decoder.layers": [at]}));
        assert!(found["held"].as_u64().is_some_and(|bytes| bytes > 0), "{found}");
    }
    assert_eq!(pipeline["places"][0]["peak"], report["memory"]["peak"]);
    let gradient = &pipeline["gradients"][0];
    assert_eq!((&gradient["graph"], &gradient["parts"]), (&Value::from("model.loss.grad"), &Value::from(4)));
    // One of five steps, where places were equally fast.
    assert!(gradient["bubble"].as_f64().is_some_and(|share| (0.15..0.5).contains(&share)), "{gradient}");
    assert!(report["updates"][0]["sent_bytes_per_step"].as_u64().is_some_and(|bytes| bytes > 0));
    let words = place.out(&[&["compile", "pipeline.yaml"], &two[..]].concat());
    has(&words, &["pipeline        1f1b", "    place 1       1 of model.decoder.layers: ", "in 4 parts"]);
    let programs = place.out(&[&["compile", "pipeline.yaml", "--emit", "ir"], &two[..]].concat());
    has(&programs, &["mesh pipeline=2 data=1 tensor=1 place=0", "mesh pipeline=2 data=1 tensor=1 place=1"]);
}
