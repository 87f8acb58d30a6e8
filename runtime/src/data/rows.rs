//! Texts out of `.jsonl` files (one object a line, read line by line) and `.json` files (a list of objects, read whole).
//!
//! Only the columns asked for are kept. Every mistake is told with file, line and column; the first [`SHOWN`] come at
//! once, the rest as a number.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use dsgc_ir::diag::{Diag, Span, nearest};
use serde_json::value::RawValue;

/// Mistakes of a file that are told one by one: enough to see a pattern, few enough to read.
const SHOWN: usize = 10;

/// The rows of a file, or its first `most`: for each the texts of `columns`, in that order. `span` is where the user
/// named the file.
pub(super) fn read(
    path: &str,
    columns: &[String],
    most: Option<usize>,
    span: Span,
) -> Result<Vec<Vec<String>>, Vec<Diag>> {
    let most = most.unwrap_or(usize::MAX);
    let mut reader = Reader { path, columns, most, rows: Vec::new(), errors: Vec::new(), more: 0 };
    let done = match Path::new(path).extension().and_then(|e| e.to_str()) {
        Some("jsonl") => reader.lines(),
        Some("json") => reader.list(),
        _ => Err(Diag::error(format!("found the data file `{path}`, expected one that ends in `.jsonl` or `.json`"))
            .help("convert it, e.g. with `datasets`: `load_dataset(..)[\"train\"].to_json(\"train.jsonl\")`")),
    };
    match done {
        Err(diag) => reader.errors.push(diag),
        Ok(()) if reader.rows.is_empty() && reader.errors.is_empty() => {
            reader.errors.push(Diag::error(format!("there are no rows in `{path}`")));
        }
        Ok(()) => {}
    }
    if reader.errors.is_empty() {
        return Ok(reader.rows);
    }
    if reader.more > 0 {
        reader.errors.push(Diag::error(format!("there are {} more errors in `{path}`", reader.more)));
    }
    Err(reader.errors.into_iter().map(|e| e.label(span, "")).collect())
}

/// The columns of a file's first row, in its order; what is wrong with the file otherwise.
pub fn columns_of_file(path: &str) -> Result<Vec<String>, Diag> {
    if let Some(first) = first_row(path)
        && let Ok(row) = serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(&first)
    {
        return Ok(row.into_iter().map(|(column, _)| column).collect());
    }
    // Whatever stands in the way has its message in `read`.
    let errors = read(path, &[], None, Span::NONE).err().unwrap_or_default();
    Err(errors.into_iter().next().unwrap_or_else(|| Diag::error(format!("found no first row in `{path}`"))))
}

/// The text of the first row.
fn first_row(path: &str) -> Option<String> {
    if Path::new(path).extension().is_some_and(|e| e == "jsonl") {
        let mut lines = BufReader::new(File::open(path).ok()?).lines().map_while(Result::ok);
        return lines.find(|line| !line.trim().is_empty()).map(|line| line.trim_start_matches('\u{feff}').into());
    }
    let text = std::fs::read_to_string(path).ok()?;
    let rows: Vec<&RawValue> = serde_json::from_str(text.trim_start_matches('\u{feff}')).ok()?;
    rows.first().map(|row| row.get().into())
}

struct Reader<'a> {
    path: &'a str,
    columns: &'a [String],
    most: usize,
    rows: Vec<Vec<String>>,
    errors: Vec<Diag>,
    more: usize,
}

impl Reader<'_> {
    fn lines(&mut self) -> Result<(), Diag> {
        let mut file = BufReader::new(File::open(self.path).map_err(|e| self.unreadable(e))?);
        let (mut bytes, mut number) = (Vec::new(), 0);
        loop {
            bytes.clear();
            if self.rows.len() == self.most {
                return Ok(());
            }
            if file.read_until(b'\n', &mut bytes).map_err(|e| self.unreadable(e))? == 0 {
                return Ok(());
            }
            number += 1;
            match std::str::from_utf8(&bytes) {
                Ok(text) => {
                    let text = if number == 1 { text.trim_start_matches('\u{feff}') } else { text };
                    // An empty line holds no row; most files end with one.
                    if !text.trim().is_empty() {
                        self.row(text, text.trim_end(), number);
                    }
                }
                Err(e) => self.error((number, e.valid_up_to() + 1), "found bytes that are no UTF-8", None),
            }
        }
    }

    fn list(&mut self) -> Result<(), Diag> {
        let text = std::fs::read_to_string(self.path).map_err(|e| self.unreadable(e))?;
        let text = text.trim_start_matches('\u{feff}');
        if text.trim().is_empty() {
            return Ok(());
        }
        if !text.trim_start().starts_with('[') {
            let help = "if each line is an object, name the file `.jsonl`";
            self.error((1, 1), &format!("found {}, expected a list of objects", kind(text)), Some(help.to_owned()));
            return Ok(());
        }
        match serde_json::from_str::<Vec<&RawValue>>(text) {
            Ok(rows) => {
                // Lines are counted along with the rows, not from the start for each of them.
                let (mut line, mut counted) = (1, 0);
                for row in rows.iter().take(self.most).map(|r| r.get()) {
                    let start = offset(text, row);
                    line += text[counted..start].matches('\n').count();
                    counted = start;
                    self.row(text, row, line);
                }
            }
            Err(e) => self.error((e.line(), e.column()), &without_place(&e), None),
        }
        Ok(())
    }

    /// Takes one row, which is a part of `text` and begins in this line.
    fn row(&mut self, text: &str, row: &str, line: usize) {
        let place = |part: &str| {
            let (from, to) = (offset(text, row), offset(text, part));
            let line = line + text[from..to].matches('\n').count();
            (line, text[..to].chars().rev().take_while(|&c| c != '\n').count() + 1)
        };
        let start = row.trim_start();
        if !start.starts_with('{') {
            return self.error(place(start), &format!("found {}, expected an object", kind(start)), None);
        }
        let fields: BTreeMap<String, &RawValue> = match serde_json::from_str(row) {
            Ok(fields) => fields,
            // `e.line()` counts from the row's first line.
            Err(e) => return self.error((line + e.line().max(1) - 1, e.column()), &without_place(&e), None),
        };
        let (mut texts, columns) = (Vec::with_capacity(self.columns.len()), self.columns);
        for column in columns {
            let Some(value) = fields.get(column) else {
                let help = match nearest(column, fields.keys().map(String::as_str)) {
                    Some(near) => format!("the nearest column is `{near}`: name it under `fields` of the data"),
                    None => {
                        let names: Vec<&str> = fields.keys().map(String::as_str).collect();
                        format!("name one of its columns under `fields` of the data: {}", names.join(", "))
                    }
                };
                self.error(place(start), &format!("found no column `{column}` in this row"), Some(help));
                continue;
            };
            match serde_json::from_str::<String>(value.get()) {
                Ok(text) => texts.push(text),
                Err(e) => {
                    let found =
                        if value.get().starts_with('"') { without_place(&e) } else { kind(value.get()).to_owned() };
                    self.error(place(value.get()), &format!("found {found} as `{column}`, expected a string"), None);
                }
            }
        }
        if texts.len() == columns.len() {
            self.rows.push(texts);
        }
    }

    fn error(&mut self, (line, column): (usize, usize), message: &str, help: Option<String>) {
        if self.errors.len() == SHOWN {
            self.more += 1;
            return;
        }
        let diag = Diag::error(format!("{}:{line}:{column}: {message}", self.path));
        self.errors.push(match help {
            Some(help) => diag.help(help),
            None => diag,
        });
    }

    fn unreadable(&self, error: std::io::Error) -> Diag {
        Diag::error(format!("cannot read the data file `{}`: {error}", self.path))
    }
}

/// Where `part`, a slice of `text`, begins in it.
fn offset(text: &str, part: &str) -> usize {
    part.as_ptr() as usize - text.as_ptr() as usize
}

/// What a JSON value is, by its first character.
fn kind(json: &str) -> &'static str {
    match json.trim_start().chars().next() {
        Some('{') => "an object",
        Some('[') => "a list",
        Some('"') => "a string",
        Some('n') => "null",
        Some('t' | 'f') => "a truth value",
        Some('-' | '0'..='9') => "a number",
        _ => "no JSON",
    }
}

/// serde_json's message without its place, which counts from the start of the row.
fn without_place(error: &serde_json::Error) -> String {
    let text = error.to_string();
    text.rsplit_once(" at line ").map_or(text.clone(), |(message, _)| message.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads columns `a` and `body` of a file; errors come without the folder it lies in.
    fn check(name: &str, text: &str) -> Result<Vec<Vec<String>>, Vec<String>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name).display().to_string();
        std::fs::write(&path, text).unwrap();
        let errors = |es: Vec<Diag>| es.iter().map(|e| e.to_string().replace(&path, name)).collect();
        read(&path, &["a".to_owned(), "body".to_owned()], None, Span::NONE).map_err(errors)
    }

    #[test]
    fn both_formats_give_the_same_rows() {
        let expect = Ok(vec![vec!["1".to_owned(), "é\n".to_owned()], vec!["2".to_owned(), String::new()]]);
        assert_eq!(
            check(
                "d.jsonl",
                "\u{feff}{\"body\": \"é\\n\", \"a\": \"1\"}\r\n\n{\"a\": \"2\", \"body\": \"\", \"c\": 3}\n"
            ),
            expect
        );
        assert_eq!(
            check("d.json", "[{\"body\": \"é\\n\", \"a\": \"1\"},\n {\"a\": \"2\", \"body\": \"\", \"c\": 3}]"),
            expect
        );
    }

    #[test]
    fn of_the_first_rows_nothing_behind_them_is_read() {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in
            [("d.jsonl", "{\"a\": \"1\"}\n{\"a\": \"2\"}\nno row"), ("d.json", r#"[{"a": "1"}, {"a": "2"}, 3]"#)]
        {
            let path = dir.path().join(name).display().to_string();
            std::fs::write(&path, text).unwrap();
            let first = |most| read(&path, &["a".to_owned()], most, Span::NONE);
            assert_eq!(first(Some(2)).unwrap(), [["1"], ["2"]]);
            assert_eq!(first(Some(1)).unwrap(), [["1"]]);
            assert!(first(Some(3)).is_err() && first(None).is_err());
        }
    }

    #[test]
    fn mistakes_have_their_places() {
        let text = "{\"a\": \"\", \"body\": \"\"}\n{\"a\": \"é\", \"body\": null}\n{\"a\": \"x\", \"bdoy\": 1}\n[1]\n{\"a\": }\n";
        let expect = [
            "error: d.jsonl:2:20: found null as `body`, expected a string",
            "error: d.jsonl:3:1: found no column `body` in this row\n  \
             help: the nearest column is `bdoy`: name it under `fields` of the data",
            "error: d.jsonl:4:1: found a list, expected an object",
            "error: d.jsonl:5:7: expected value",
        ];
        assert_eq!(check("d.jsonl", text).unwrap_err(), expect);
    }

    #[test]
    fn mistakes_in_lists_have_their_places() {
        let text = "[\n {\"a\": \"\",\n  \"body\": \"\"},\n {\"a\": \"x\",\n  \"body\": 7}, 5]\n";
        let expect = [
            "error: d.json:5:11: found a number as `body`, expected a string",
            "error: d.json:5:15: found a number, expected an object",
        ];
        assert_eq!(check("d.json", text).unwrap_err(), expect);
        assert!(check("d.json", "[{},\n}").unwrap_err()[0].starts_with("error: d.json:2:1: "));
        assert!(check("d.json", "{}").unwrap_err()[0].contains("found an object, expected a list of objects"));
    }

    #[test]
    fn many_mistakes_are_counted() {
        let errors = check("d.jsonl", &"{\"question\": 1}\n".repeat(8)).unwrap_err();
        assert_eq!(errors.len(), SHOWN + 1);
        assert_eq!(errors[SHOWN], "error: there are 6 more errors in `d.jsonl`");
        assert!(errors[0].contains("name one of its columns under `fields` of the data: question"));
    }

    #[test]
    fn files_without_rows_are_errors() {
        for (name, text) in [("d.jsonl", "\n\n"), ("d.json", "[]"), ("d.json", "")] {
            assert_eq!(check(name, text).unwrap_err(), [format!("error: there are no rows in `{name}`")]);
        }
        assert!(check("d.csv", "a,b").unwrap_err()[0].contains("expected one that ends in `.jsonl` or `.json`"));
        let error = &read("no such file.jsonl", &[], None, Span { line: 3, ..Span::NONE }).unwrap_err()[0];
        assert!(error.message.starts_with("cannot read the data file `no such file.jsonl`"));
        assert_eq!(error.labels[0].span.line, 3);
    }
}
