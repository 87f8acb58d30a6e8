use std::path::Path;

use dsgc_ir::stage::{Longer, Packing, Part, Sequence, Side, Split};
use dsgc_ir::{Data, Tensor};

use super::*;

/// One token for each word; `<s>` begins every text, `_` is any unknown word.
fn tokenizer(dir: &Path) -> Tokenizer {
    let special = |id: u32, text: &str| {
        serde_json::json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
                           "normalized": false, "special": true})
    };
    let json = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "decoder": null,
        "added_tokens": [special(0, "<pad>"), special(1, "<s>"), special(2, "</s>")],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "model": {"type": "WordLevel", "unk_token": "_",
            "vocab": {"<pad>": 0, "<s>": 1, "</s>": 2, "_": 3, "x": 10, "y": 11, "z": 12}}
    });
    std::fs::write(dir.join("tokenizer.json"), json.to_string()).unwrap();
    Tokenizer::load(dir).unwrap()
}

fn sequence(name: &str, fields: &[&str]) -> Sequence {
    let fields = fields.iter().map(|f| Part::Field((*f).to_owned()));
    Sequence { name: name.to_owned(), parts: fields.chain([Part::Eoc]).collect() }
}

fn source() -> Source {
    Source {
        fields: [("prompt".to_owned(), "question".to_owned())].into(),
        sequences: vec![sequence("chosen", &["prompt", "good"]), sequence("rejected", &["prompt", "bad"])],
        eoc_id: 2,
        max_length: 8,
        separator: " ".to_owned(),
        shuffle: Shuffle::None,
        ..Source::default()
    }
}

const PAIRS: &str = r#"{"question": "x y", "good": "z", "bad": "z z z"}
{"question": "x", "good": "y y", "bad": "z"}
"#;

/// Opens a source over a file with this text.
fn open(source: Source, text: &str) -> Result<Dataset, Vec<String>> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("d.jsonl").display().to_string();
    std::fs::write(&path, text).unwrap();
    let tokenizer = tokenizer(dir.path());
    let errors = |es: Vec<Diag>| es.iter().map(|e| e.to_string().replace(&path, "d.jsonl")).collect();
    Dataset::open(&Source { path: path.clone(), ..source }, 1234, &tokenizer).map_err(errors)
}

fn ints(batch: &Batch, name: &str) -> Vec<Vec<i32>> {
    let tensor: &Tensor = &batch.tensors[name];
    let numbers = match &tensor.data {
        Data::I32(v) => v.clone(),
        Data::Bool(v) => v.iter().map(|&b| i32::from(b)).collect(),
        other => panic!("{other:?}"),
    };
    numbers.chunks(tensor.shape[1]).map(<[i32]>::to_vec).collect()
}

#[test]
fn rows_are_padded_to_their_longest() {
    let data = open(source(), PAIRS).unwrap();
    let batch = data.batch(&[0, 1]);
    assert_eq!(batch.rows, 2);
    assert_eq!(ints(&batch, "chosen.tokens"), [[1, 10, 11, 12, 2], [1, 10, 11, 11, 2]]);
    assert_eq!(ints(&batch, "rejected.tokens"), [[1, 10, 11, 12, 12, 12, 2], [1, 10, 12, 2, 0, 0, 0]]);
    assert_eq!(ints(&batch, "rejected.segment"), [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]]);
    assert_eq!(ints(&data.batch(&[1]), "rejected.tokens"), [[1, 10, 12, 2]]);
}

#[test]
fn only_answers_are_trained_unless_prompts_are_too() {
    let data = open(source(), PAIRS).unwrap();
    assert_eq!(ints(&data.batch(&[0, 1]), "chosen.trained"), [[0, 0, 0, 1, 1], [0, 0, 1, 1, 1]]);
    let data = open(Source { train_on_prompt: true, ..source() }, PAIRS).unwrap();
    assert_eq!(ints(&data.batch(&[0, 1]), "rejected.trained"), [[1; 7], [1, 1, 1, 1, 0, 0, 0]]);
    let alone = Source { sequences: vec![sequence("prompt", &["prompt"])], ..source() };
    assert_eq!(ints(&open(alone, PAIRS).unwrap().batch(&[0]), "prompt.trained"), [[1, 1, 1, 1]]);
}

#[test]
fn padding_goes_where_it_is_told() {
    let left = Source { pad: Side::Left, pad_id: 9, ..source() };
    let batch = open(left, PAIRS).unwrap().batch(&[1, 0]);
    assert_eq!(ints(&batch, "rejected.tokens")[0], [9, 9, 9, 1, 10, 12, 2]);
    assert_eq!(ints(&batch, "rejected.segment")[0], [0, 0, 0, 1, 1, 1, 1]);
    assert_eq!(ints(&batch, "rejected.trained")[0], [0, 0, 0, 0, 0, 1, 1]);
    let same = Source { same_length: true, ..source() };
    assert_eq!(open(same, PAIRS).unwrap().batch(&[0, 1]).tensors["chosen.tokens"].shape, [2, 7]);
    let max = Source { pad_to_max: true, ..source() };
    assert_eq!(open(max, PAIRS).unwrap().batch(&[0]).tensors["chosen.trained"].shape, [1, 8]);
}

#[test]
fn long_rows_are_cut_or_dropped_and_counted() {
    let short = Source { max_length: 3, ..source() };
    let data = open(short.clone(), PAIRS).unwrap();
    assert_eq!(ints(&data.batch(&[0]), "chosen.tokens"), [[1, 10, 11]]);
    let expect = DataReport {
        rows: 2,
        dropped: 0,
        truncated: 2,
        tokens: 12,
        trained_tokens: 2,
        rows_without_trained: 1,
        packed: None,
    };
    assert_eq!(*data.report(), expect);

    let data = open(Source { longer: Longer::Drop, max_length: 5, ..source() }, PAIRS).unwrap();
    let expect = DataReport {
        rows: 2,
        dropped: 1,
        truncated: 0,
        tokens: 9,
        trained_tokens: 5,
        rows_without_trained: 0,
        packed: None,
    };
    assert_eq!((data.len(), *data.report()), (1, expect));

    let none = open(Source { max_length: 2, ..source() }, PAIRS).err().unwrap();
    assert!(none[0].contains("none of the 8 tokens of `d.jsonl` is a training target"), "{none:?}");
    let none = open(Source { longer: Longer::Drop, ..short }, PAIRS).err().unwrap();
    assert!(none[0].contains("all 2 rows of `d.jsonl` are dropped, 2 of them for more than 3 tokens"), "{none:?}");
}

/// Ten rows, of which number `i` has an answer of `i` words.
fn ten() -> String {
    (0..10).map(|i| format!("{{\"question\": \"x\", \"good\": \"{}\", \"bad\": \"\"}}\n", "y ".repeat(i))).collect()
}

/// The rows of [`ten`] in a data set, known by the lengths of their answers.
fn lengths(data: &Dataset, eval: bool) -> Vec<usize> {
    let one = |i| if eval { data.eval_batch(&[i]) } else { data.batch(&[i]) };
    let count = if eval { data.eval_len() } else { data.len() };
    (0..count).map(|i| one(i).tensors["chosen.tokens"].shape[1] - 3).collect()
}

#[test]
fn stages_share_a_file() {
    let part = |part| Source { split: Some(Split { parts: vec![2.0, 4.0, 4.0], part }), max_length: 20, ..source() };
    assert_eq!(lengths(&open(part(0), &ten()).unwrap(), false), [7, 2]);
    assert_eq!(lengths(&open(part(1), &ten()).unwrap(), false), [9, 1, 0, 8]);
}

#[test]
fn held_out_rows_are_not_trained_on() {
    let held = Source { eval: Some(Held::Share(0.2)), max_length: 20, ..source() };
    let data = open(held, &ten()).unwrap();
    // The last two of the shuffle, 6 and 3; both sets in the order of the file.
    assert_eq!(lengths(&data, true), [3, 6]);
    assert_eq!(lengths(&data, false), [0, 1, 2, 4, 5, 7, 8, 9]);
    assert_eq!(data.eval_report().unwrap().rows, 2);

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("e.jsonl");
    std::fs::write(&path, ten()).unwrap();
    let split = Some(Split { parts: vec![2.0, 8.0], part: 0 });
    let held = Source { eval: Some(Held::Path(path.display().to_string())), max_length: 20, split, ..source() };
    let data = open(held, &ten()).unwrap();
    assert_eq!((lengths(&data, true), lengths(&data, false)), (vec![7, 2], vec![7, 2]));
}

#[test]
fn epochs_follow_their_shuffle() {
    let with = |shuffle| open(Source { shuffle, max_length: 20, ..source() }, &ten()).unwrap();
    assert_eq!(with(Shuffle::None).epoch(3), (0..10).collect::<Vec<_>>());
    let deepspeed = with(Shuffle::DeepspeedChat);
    assert_eq!(deepspeed.epoch(0), [4, 1, 7, 5, 3, 9, 0, 8, 6, 2]);
    assert_eq!(deepspeed.epoch(1), deepspeed.epoch(0));
    let each = with(Shuffle::EachEpoch);
    assert_ne!(each.epoch(0), each.epoch(1));
    assert_eq!(each.epoch(1), each.epoch(1));
}

#[test]
fn sequences_that_cannot_be_made_are_errors() {
    let middle = Sequence { name: "s".to_owned(), parts: vec![Part::Eoc, Part::Field("good".to_owned())] };
    let bare = Sequence { name: "t".to_owned(), parts: vec![] };
    let errors = open(Source { sequences: vec![middle, bare], max_length: 0, ..source() }, PAIRS).err().unwrap();
    assert_eq!(
        errors,
        [
            "error: sequence `s` has `eoc` before its end\n  help: write it as the last part",
            "error: sequence `t` has no field, expected one at least",
            "error: found a max_length of 0, expected 1 or more",
        ]
    );
    let errors = open(Source { fields: [].into(), ..source() }, PAIRS).err().unwrap();
    assert!(errors[0].contains("d.jsonl:1:1: found no column `prompt`"), "{errors:?}");
}

#[test]
fn columns_are_those_of_the_first_row() {
    let dir = tempfile::tempdir().unwrap();
    let columns_of = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        columns_of_file(&path.display().to_string()).map_err(|e| e.message)
    };
    let expected = Ok(vec!["prompt".to_owned(), "chosen".to_owned()]);
    assert_eq!(columns_of("a.jsonl", "\n{\"prompt\": \"x\", \"chosen\": 1}\n{\"other\": 2}\n"), expected);
    assert_eq!(columns_of("a.json", "[{\"prompt\": \"x\", \"chosen\": 1}]"), expected);
    assert!(columns_of("empty.jsonl", "\n").unwrap_err().contains("there are no rows"));
    assert!(columns_of("list.jsonl", "[1]\n").unwrap_err().contains("expected an object"));
    assert!(columns_of("a.parquet", "").unwrap_err().contains("`.jsonl` or `.json`"));
}

#[test]
fn texts_are_packed_into_few_rows() {
    let text: String = ["x y z x", "x", "x y", "x y z", "y"].map(|t| format!("{{\"question\": \"{t}\"}}\n")).concat();
    // With a start and an end: 6, 3, 4, 5 and 3 tokens.
    let one = Source { sequences: vec![sequence("text", &["prompt"])], packing: Packing::Texts, ..source() };
    let data = open(one.clone(), &text).unwrap();
    assert_eq!((data.len(), data.report().packed, data.report().tokens), (3, Some(3), 21));
    let batch = data.batch(&[0, 1, 2]);
    assert_eq!(
        ints(&batch, "text.tokens"),
        [[1, 10, 11, 12, 10, 2, 0, 0], [1, 10, 11, 12, 2, 1, 10, 2], [1, 10, 11, 2, 1, 11, 2, 0]]
    );
    assert_eq!(
        ints(&batch, "text.segment"),
        [[1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 2, 2, 2, 0]]
    );
    // All but first tokens and padding.
    assert_eq!(
        ints(&batch, "text.trained"),
        [[0, 1, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0, 1, 1], [0, 1, 1, 1, 0, 1, 1, 0]]
    );
    // Texts that fill their rows stay alone.
    assert_eq!(open(Source { max_length: 6, ..one }, &text).unwrap().len(), 4);
}

#[test]
fn texts_of_a_batch_share_rows() {
    let text: String = ["x y z x", "x", "x y", "x y z", "y"].map(|t| format!("{{\"question\": \"{t}\"}}\n")).concat();
    let one = Source { sequences: vec![sequence("text", &["prompt"])], packing: Packing::Batch, ..source() };
    let data = open(one, &text).unwrap();
    // With a start and an end: 6, 3, 4, 5 and 3 tokens. Texts are counted, not rows.
    assert_eq!((data.len(), data.report().packed), (5, None));
    let batch = data.batch(&[0, 1, 4]);
    assert_eq!(batch.rows, 2);
    assert_eq!(ints(&batch, "text.tokens"), [[1, 10, 11, 12, 10, 2], [1, 10, 2, 1, 11, 2]]);
    assert_eq!(ints(&batch, "text.segment"), [[1, 1, 1, 1, 1, 1], [1, 1, 1, 2, 2, 2]]);
    assert_eq!(ints(&batch, "text.trained"), [[0, 1, 1, 1, 1, 1], [0, 1, 1, 0, 1, 1]]);
    // No row is longer than the longest text.
    assert_eq!(data.batch(&[1, 4]).rows, 2);
}

#[test]
fn texts_are_cut_into_blocks() {
    let text: String = ["x y z x", "x", "x y z y x y z"].map(|t| format!("{{\"question\": \"{t}\"}}\n")).concat();
    // With a start and an end: 6, 3 and 9 tokens, of which none is lost.
    let source = Source {
        sequences: vec![sequence("text", &["prompt"])],
        packing: Packing::Blocks,
        longer: Longer::Drop,
        max_length: 7,
        ..source()
    };
    let data = open(source, &text).unwrap();
    let report = *data.report();
    assert_eq!((data.len(), report.packed, report.tokens, report.dropped, report.truncated), (3, Some(3), 18, 0, 0));
    let batch = data.batch(&[0, 1, 2]);
    assert_eq!(
        ints(&batch, "text.tokens"),
        [[1, 10, 11, 12, 10, 2, 1], [10, 2, 1, 10, 11, 12, 11], [10, 11, 12, 2, 0, 0, 0]]
    );
    assert_eq!(ints(&batch, "text.segment"), [[1, 1, 1, 1, 1, 1, 2], [1, 1, 2, 2, 2, 2, 2], [1, 1, 1, 1, 0, 0, 0]]);
    assert_eq!(ints(&batch, "text.trained"), [[0, 1, 1, 1, 1, 1, 0], [0, 1, 0, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0, 0]]);
}
