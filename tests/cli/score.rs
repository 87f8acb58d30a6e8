//! `score`: log-probabilities and logits of given texts.

use std::fs;

use serde_json::Value;

use super::{Workplace, has};

/// A workplace with a trained model in `runs/sft`.
fn trained() -> Workplace {
    let place = Workplace::new();
    place.out(&["run", "pipeline.yaml", "--stage", "sft"]);
    place
}

fn logp(out: &str) -> Vec<Vec<f64>> {
    out.lines()
        .map(|line| {
            let value: Value = serde_json::from_str(line).unwrap_or_else(|e| panic!("{e} in {line}"));
            value["logp"].as_array().expect("a list").iter().filter_map(Value::as_f64).collect()
        })
        .collect()
}

#[test]
fn log_probabilities_are_those_of_the_logits() {
    let place = trained();
    place.write("rows.in", "{\"tokens\": [17, 300, 5, 639]}\n\n{\"tokens\": [0, 1]}\n");
    let found = logp(&place.out(&["score", "runs/sft", "--input", "rows.in", "--logits", "logits.safetensors"]));
    assert_eq!(found.iter().map(Vec::len).collect::<Vec<_>>(), [3, 1]);
    let bytes = fs::read(place.path("logits.safetensors")).expect("the logits");
    let tensors = safetensors::SafeTensors::deserialize(&bytes).expect("a whole file");
    assert_eq!(tensors.len(), 2);
    for (row, tokens) in [vec![17usize, 300, 5, 639], vec![0, 1]].iter().enumerate() {
        let logits = tensors.tensor(&format!("row.{row}")).expect("logits of a row");
        assert_eq!(logits.shape(), [tokens.len(), 640]);
        let logits: Vec<f64> =
            logits.data().as_chunks::<4>().0.iter().map(|b| f64::from(f32::from_le_bytes(*b))).collect();
        for (at, next) in tokens.iter().skip(1).enumerate() {
            let of = &logits[at * 640..(at + 1) * 640];
            let expected = of[*next] - of.iter().map(|x| x.exp()).sum::<f64>().ln();
            assert!((found[row][at] - expected).abs() < 1e-5, "{} of {expected}", found[row][at]);
        }
    }
}

#[test]
fn a_text_is_scored_as_its_tokens() {
    let place = trained();
    let text = "Question: What is 5 plus 15?\nAnswer:";
    let tokenizer = dsgc_hf::Tokenizer::load(place.path("tokenizer")).expect("the tokenizer");
    let tokens = tokenizer.encode(text).expect("tokens").ids;
    place.write(
        "rows.in",
        &format!("{}\n{}\n", serde_json::json!({"text": text}), serde_json::json!({"tokens": tokens})),
    );
    let found = logp(&place.out(&["score", "runs/sft", "--input", "rows.in"]));
    assert_eq!(found[0].len(), tokens.len() - 1);
    assert_eq!(found[0], found[1]);
    // A byte order mark and the line ends of Windows change nothing.
    place.write("windows.in", &format!("\u{feff}{}", place.read("rows.in").replace('\n', "\r\n")));
    assert_eq!(logp(&place.out(&["score", "runs/sft", "--input", "windows.in"])), found);
    // The interpreter says the same; in doubles, to the digits of single precision.
    for device in ["interp", "interp-f64"] {
        let other = logp(&place.out(&["score", "runs/sft", "--input", "rows.in", "--device", device]));
        for (a, b) in found.concat().iter().zip(other.concat()) {
            assert!((a - b).abs() < 1e-5, "{device}: {b}, on the cpu {a}");
        }
    }
}

#[test]
fn wrong_rows_come_with_their_place() {
    let place = trained();
    let refused = |rows: &str| {
        place.write("rows.in", rows);
        place.refused(&["score", "runs/sft", "--input", "rows.in"])
    };
    let errors = refused("{\"tokens\": [1, 2]}\n{\"tok\": 1}\nnope\n{\"tokens\": [3], \"text\": \"\"}\n{}\n");
    has(&errors, &["`tok`", "--> rows.in:2:", "--> rows.in:3:2", "either `tokens` or `text`", "--> rows.in:4:"]);
    has(&errors, &["either `tokens` or `text`", "--> rows.in:5:"]);
    assert!(!errors.contains("at line 1"), "the place within a line is no place in the file:\n{errors}");
    let token = refused("{\"tokens\": [1, 2]}\n\n{\"tokens\": [1, 640]}\n{\"tokens\": [3]}\n");
    has(&token, &["error: found the token 640", "expected one of 0 to 639", "--> rows.in:3:"]);
    has(&token, &["error: found 1 tokens", "--> rows.in:4:"]);
    has(&refused("{\"tokens\": [1, -1]}\n"), &["found the token -1", "--> rows.in:1:"]);
    has(&refused("\n\n"), &["found no row in `rows.in`"]);
    let long = vec!["1"; 65].join(",");
    has(&refused(&format!("{{\"tokens\": [{long}]}}\n")), &["65 tokens", "64 positions"]);
    let many = refused(&"nope\n".repeat(100));
    assert!(many.matches("--> rows.in:").count() == 10 && many.contains("90 more"), "{many}");
}

#[test]
fn a_model_that_is_none_is_told() {
    let place = Workplace::new();
    place.write("rows.in", "{\"tokens\": [1, 2]}\n");
    has(&place.refused(&["score", "absent", "--input", "rows.in"]), &["error", "`absent`"]);
    has(&place.refused(&["score", "tokenizer", "--input", "rows.in"]), &["error", "config.json"]);
    has(&place.refused(&["score", "tokenizer", "--input", "absent.in"]), &["error: cannot read `absent.in`"]);
    has(&place.refused(&["score", "tokenizer"]), &["--input"]);
}
