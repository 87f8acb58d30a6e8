//! `generate` and `chat`: what a folder's model says.

use std::io::Write;
use std::process::Stdio;

use super::{Ended, Workplace, has};

/// A workplace with a trained model in `runs/sft`.
fn trained() -> Workplace {
    let place = Workplace::new();
    place.out(&["run", "pipeline.yaml", "--stage", "sft"]);
    place
}

/// Runs `chat` on lines of a standard input.
fn chat(place: &Workplace, args: &[&str], input: &str) -> Ended {
    let mut command = place.command(&[&["chat", "runs/sft"], args].concat());
    let pipes = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = pipes.spawn().expect("the program starts");
    child.stdin.take().expect("it is piped").write_all(input.as_bytes()).expect("it is read");
    let ended = child.wait_with_output().expect("it ends");
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    Ended { code: ended.status.code(), out: text(&ended.stdout), err: text(&ended.stderr) }
}

#[test]
fn a_text_is_continued_as_its_tokens() {
    let place = trained();
    let prompt = "Question: What is 5 plus 15?\nAnswer:";
    let tokenizer = dsgc_hf::Tokenizer::load(place.path("tokenizer")).expect("the tokenizer");
    let ids = tokenizer.encode(prompt).expect("tokens").ids.iter().map(i32::to_string).collect::<Vec<_>>().join(",");
    let more = ["--max-new-tokens", "9"];
    let generate = |args: &[&str]| place.out(&[&["generate", "runs/sft"], args, &more].concat());
    let tokens = generate(&["--tokens", &ids]);
    let answer: Vec<i32> = tokens.trim().split(',').map(|id| id.parse().expect("an id")).collect();
    assert_eq!(answer.len(), 9, "{tokens}");
    assert_eq!(generate(&["--prompt", prompt]), tokenizer.decode(&answer).expect("text") + "\n");
    // The interpreter says the same.
    assert_eq!(generate(&["--tokens", &ids, "--device", "interp"]), tokens);
    // Most likely tokens are the same for every seed, drawn ones are not.
    assert_eq!(generate(&["--tokens", &ids, "--seed", "7"]), tokens);
    let drawn = |seed| generate(&["--tokens", &ids, "--temperature", "1.5", "--seed", seed]);
    assert_eq!(drawn("7"), drawn("7"));
    assert_ne!(drawn("7"), drawn("8"));
    assert_eq!(generate(&["--tokens", &ids, "--temperature", "3", "--top-k", "1"]), tokens);
    assert_eq!(generate(&["--tokens", &ids, "--temperature", "3", "--top-p", "1e-9"]), tokens);
}

#[test]
fn what_cannot_be_continued_is_said() {
    let place = trained();
    let refused = |args: &[&str]| place.refused(&[&["generate"], args].concat());
    has(&refused(&["runs/sft"]), &["--prompt"]);
    has(&refused(&["runs/sft", "--prompt", "a", "--tokens", "1"]), &["cannot be used with"]);
    has(&refused(&["runs/sft", "--tokens", "1,640"]), &["found the token 640, expected one of 0 to 639"]);
    has(&refused(&["runs/sft", "--tokens", "1,-2"]), &["found the token -2"]);
    has(
        &refused(&["runs/sft", "--tokens", "1,2", "--max-new-tokens", "63"]),
        &["found a prompt of 2 tokens and 63 new ones, but `runs/sft` has 64 positions", "--max-new-tokens"],
    );
    has(&refused(&["runs/sft", "--prompt", "a", "--temperature", "cold"]), &["cold", "0 or more"]);
    has(&refused(&["runs/sft", "--prompt", "a", "--top-p", "0"]), &["more than 0"]);
    has(&refused(&["nowhere", "--prompt", "a"]), &["there is no folder `nowhere`"]);
}

#[test]
fn a_conversation_is_one_text_whose_beginning_is_not_computed_again() {
    let place = trained();
    let questions = ["What is 5 plus 15?", "Is 7 odd?"];
    let most = ["--max-new-tokens", "5"];
    let both = chat(&place, &most, &(questions.join("\n") + "\n"));
    assert_eq!((both.code, both.err.as_str()), (Some(0), ""));
    // The template of the example, by hand; the second answer is that to the whole text, computed in one go.
    let first = chat(&place, &most, &format!("{}\n", questions[0])).out;
    let text = format!("Question: {}\nAnswer: {}</s>\nQuestion: {}\nAnswer:", questions[0], first.trim(), questions[1]);
    let second = place.out(&["generate", "runs/sft", "--prompt", &text, "--max-new-tokens", "5"]);
    assert_eq!(both.out, format!("{first}{second}"));
    // What was said before `/clear` is not known any more.
    let cleared = chat(&place, &most, &format!("{}\n/clear\n\n{}\n/quit\nnot read\n", questions[1], questions[0]));
    let only = chat(&place, &most, &format!("{}\n", questions[1])).out;
    assert_eq!(cleared.out, format!("{only}{first}"));
}

#[test]
fn a_conversation_forgets_its_beginning_where_there_is_no_room() {
    let place = trained();
    let lines = "Is 7 odd?\n".repeat(4);
    let ended = chat(&place, &["--context", "40", "--max-new-tokens", "8"], &lines);
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    has(&ended.err, &["note: the oldest of the conversation is forgotten: 2 messages"]);
    let long = chat(&place, &["--context", "8"], "Which is larger, 20 or 7?\n");
    assert_eq!(long.code, Some(1));
    has(&long.err, &["found a message of", "room for 7", "--context"]);
}

#[test]
fn a_template_comes_from_the_folder_a_file_or_us() {
    let place = trained();
    place.write("other.jinja", "{{ bos_token }}{{ messages[-1].content }}");
    let given = chat(&place, &["--template", "other.jinja", "--max-new-tokens", "5"], "Is 7 odd?\n");
    let whole = place.out(&["generate", "runs/sft", "--prompt", "Is 7 odd?", "--max-new-tokens", "5"]);
    assert_eq!((given.out, given.err), (whole, String::new()));
    place.write("broken.jinja", "{% for %}");
    let broken = chat(&place, &["--template", "broken.jinja"], "Is 7 odd?\n");
    has(&broken.err, &["the chat template cannot be rendered", "chat template:1"]);
    place.write("runs/sft/tokenizer_config.json", r#"{"eos_token": "</s>"}"#);
    has(&chat(&place, &["--max-new-tokens", "5"], "Hello\n").err, &["`runs/sft` has no chat template"]);
}
