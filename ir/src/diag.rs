//! What a user is told: messages that point into their own files.
//!
//! A [`Diag`] is one fact: a message (lower case, no full stop, found before expected), labels that
//! point at the places involved, and help that says what to write instead. Rendering with source
//! snippets is the program's business; [`Diag`]'s `Display` is the plain form used in tests and logs.

use std::fmt;

/// A stretch of one line of a source file. Lines and columns count from 1; columns and lengths are
/// in characters. The default (line 0) means "no place".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub struct Span {
    /// Index into the table of sources (see [`Sources`]).
    pub source: u32,
    /// Line, from 1.
    pub line: u32,
    /// First column, from 1.
    pub column: u32,
    /// Length in characters, at least 1 when rendered.
    pub len: u32,
}

impl Span {
    /// The place of something that has none, such as a default.
    pub const NONE: Span = Span { source: 0, line: 0, column: 0, len: 0 };

    /// Whether this points anywhere.
    pub fn is_some(&self) -> bool {
        self.line != 0
    }
}

/// The files that spans point into: YAML documents, the standard library, `.dsg` files.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    files: Vec<(String, String)>,
}

impl Sources {
    /// Adds a file and returns its index. The same name with the same text is added once.
    pub fn add(&mut self, name: impl Into<String>, text: impl Into<String>) -> u32 {
        let (name, text) = (name.into(), text.into());
        if let Some(at) = self.files.iter().position(|f| f.0 == name && f.1 == text) {
            return at as u32;
        }
        self.files.push((name, text));
        (self.files.len() - 1) as u32
    }

    /// The name of a file as the user gave it; `?` for an unknown index.
    pub fn name(&self, source: u32) -> &str {
        self.files.get(source as usize).map_or("?", |f| &f.0)
    }

    /// The text of a file; empty for an unknown index.
    pub fn text(&self, source: u32) -> &str {
        self.files.get(source as usize).map_or("", |f| &f.1)
    }

    /// The byte range of a span in its file's text, clamped to the text.
    pub fn bytes(&self, span: Span) -> std::ops::Range<usize> {
        let text = self.text(span.source);
        let start_of_line = |n: usize| {
            if n == 0 { Some(0) } else { text.match_indices('\n').nth(n - 1).map(|(i, _)| i + 1) }
        };
        let Some(line_start) = start_of_line(span.line.saturating_sub(1) as usize) else {
            return text.len()..text.len();
        };
        let after =
            |from: usize, chars: usize| text[from..].char_indices().nth(chars).map_or(text.len(), |(i, _)| from + i);
        let start = after(line_start, span.column.saturating_sub(1) as usize);
        start..after(start, span.len.max(1) as usize)
    }

    /// Names of all files in index order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.files.iter().map(|f| f.0.as_str())
    }
}

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// The program cannot be compiled or run.
    Error,
    /// It can, but probably not as meant.
    Warning,
}

/// A place, and what is to be said about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Label {
    /// Where.
    pub span: Span,
    /// What is there; may be empty for the first label, whose text is then the message.
    pub text: String,
}

/// One message to the user. The first label is the primary place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diag {
    /// How bad it is.
    pub severity: Severity,
    /// One fact, lower case, no full stop.
    pub message: String,
    /// The places involved, the one at fault first.
    pub labels: Vec<Label>,
    /// What to write instead; one entry per suggestion.
    pub help: Vec<String>,
}

impl Diag {
    /// An error without a place yet.
    pub fn error(message: impl Into<String>) -> Diag {
        Diag { severity: Severity::Error, message: message.into(), labels: Vec::new(), help: Vec::new() }
    }

    /// A warning without a place yet.
    pub fn warning(message: impl Into<String>) -> Diag {
        Diag { severity: Severity::Warning, ..Diag::error(message) }
    }

    /// Adds a place. Spans that point nowhere are left out.
    pub fn label(mut self, span: Span, text: impl Into<String>) -> Diag {
        if span.is_some() {
            self.labels.push(Label { span, text: text.into() });
        }
        self
    }

    /// Adds a suggestion.
    pub fn help(mut self, text: impl Into<String>) -> Diag {
        self.help.push(text.into());
        self
    }

    /// The plain form with file names: `file:line:column: error: message`.
    pub fn plain(&self, sources: &Sources) -> String {
        let at =
            self.labels.first().map(|l| format!("{}:{}:{}: ", sources.name(l.span.source), l.span.line, l.span.column));
        format!("{}{self}", at.unwrap_or_default())
    }
}

impl fmt::Display for Diag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.severity {
            Severity::Error => "error",
            Severity::Warning => "warning",
        };
        write!(f, "{kind}: {}", self.message)?;
        for label in self.labels.iter().filter(|l| !l.text.is_empty()) {
            write!(f, "\n  {}:{}: {}", label.span.line, label.span.column, label.text)?;
        }
        for help in &self.help {
            write!(f, "\n  help: {help}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Diag {}

/// The known word nearest to `word` by edit distance, if it is near enough to be a misspelling.
pub fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let limit = (word.chars().count() / 3).max(1);
    known
        .into_iter()
        .map(|k| (edit_distance(word, k), k))
        .filter(|(d, _)| *d <= limit)
        .min_by_key(|(d, _)| *d)
        .map(|(_, k)| k)
}

/// The known words by edit distance from `word`, the nearest first, as many as `count`.
pub fn closest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>, count: usize) -> Vec<&'a str> {
    let mut all: Vec<(usize, &str)> = known.into_iter().map(|k| (edit_distance(word, k), k)).collect();
    all.sort_by_key(|(distance, _)| *distance);
    all.truncate(count);
    all.into_iter().map(|(_, k)| k).collect()
}

/// Optimal string alignment distance: insertions, deletions, substitutions and swaps of neighbours.
fn edit_distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut rows = vec![vec![0; b.len() + 1]; a.len() + 1];
    for i in 0..=a.len() {
        for j in 0..=b.len() {
            rows[i][j] = if i == 0 || j == 0 {
                i + j
            } else {
                let step = usize::from(a[i - 1] != b[j - 1]);
                let mut best = (rows[i - 1][j] + 1).min(rows[i][j - 1] + 1).min(rows[i - 1][j - 1] + step);
                if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                    best = best.min(rows[i - 2][j - 2] + 1);
                }
                best
            };
        }
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_find_their_bytes_beside_multibyte_characters() {
        let mut sources = Sources::default();
        let s = sources.add("a.yaml", "é: 1\nkey: wörd\n");
        let span = Span { source: s, line: 2, column: 6, len: 4 };
        assert_eq!(&sources.text(s)[sources.bytes(span)], "wörd");
    }

    #[test]
    fn nearest_accepts_misspellings_only() {
        let known = ["learning_rate", "num_epochs"];
        assert_eq!(nearest("lerning_rate", known), Some("learning_rate"));
        assert_eq!(nearest("epochs", known), None);
    }
}
