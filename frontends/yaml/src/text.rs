//! A scalar with the place of each of its characters.
//!
//! What YAML decodes is not what stands in the file: quotes and escapes vanish, folded lines are joined, block scalars
//! lose their indentation. An expression error must still point at its own line and column, so a [`Text`] keeps a map
//! from characters of the decoded text to places of the file, as a short list of runs.

use dsgc_ir::diag::Span;

/// How a scalar is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// Without quotes.
    Plain,
    /// `'...'`.
    Single,
    /// `"..."`.
    Double,
    /// `|` or `>`.
    Block,
}

/// A scalar: a key, a name, a number or an expression.
#[derive(Clone, Debug)]
pub struct Text {
    /// The decoded text, otherwise raw: `on` is the name `on`.
    pub text: String,
    /// Where it stands; of several lines, the first.
    pub span: Span,
    /// How it is written.
    pub style: Style,
    /// Whether it stands inside `{}` or `[]`, where YAML cuts at commas.
    pub flow: bool,
    runs: Vec<Run>,
}

/// From character `at` of the decoded text on, characters stand side by side from this place.
#[derive(Clone, Copy, Debug)]
struct Run {
    at: u32,
    line: u32,
    column: u32,
}

impl Text {
    /// A scalar decoded to `text` from `raw`, whose first character stands at `start`.
    pub(crate) fn new(text: String, raw: &str, start: Span, style: Style, flow: bool) -> Text {
        let runs = align(&text, raw, start, style);
        // Block scalars end with line breaks that are no part of the first line's content.
        let first_line = raw.split(['\n', '\r']).next().unwrap_or_default().trim_end();
        let span = Span { len: (first_line.chars().count() as u32).max(1), ..start };
        Text { text, span, style, flow, runs }
    }

    /// Whether quotes say that this is text, whatever it looks like.
    pub fn is_quoted(&self) -> bool {
        matches!(self.style, Style::Single | Style::Double)
    }

    /// The place of `len` characters of the decoded text from character `at` on, as far as they stand on one line.
    pub fn span_of(&self, at: usize, len: usize) -> Span {
        let (line, column) = self.place(at);
        let (end_line, end_column) = self.place(at + len.max(1) - 1);
        let len = if end_line == line && end_column >= column { end_column - column + 1 } else { len.max(1) as u32 };
        Span { line, column, len, ..self.span }
    }

    fn place(&self, at: usize) -> (u32, u32) {
        let at = at as u32;
        let after = self.runs.partition_point(|r| r.at <= at);
        match after.checked_sub(1).and_then(|i| self.runs.get(i)) {
            Some(run) => (run.line, run.column + (at - run.at)),
            None => (self.span.line, self.span.column + at),
        }
    }
}

/// Walks over the raw text, a character of the decoded one at a time.
struct Cursor<'a> {
    raw: std::iter::Peekable<std::str::Chars<'a>>,
    line: u32,
    column: u32,
}

impl Cursor<'_> {
    fn next(&mut self) -> Option<char> {
        let c = self.raw.next()?;
        if c == '\n' || (c == '\r' && self.raw.peek() != Some(&'\n')) {
            self.line += 1;
            self.column = 1;
        } else if c != '\r' {
            self.column += 1;
        }
        Some(c)
    }

    fn skip_while(&mut self, wanted: impl Fn(char) -> bool) {
        while self.raw.peek().is_some_and(|c| wanted(*c)) {
            self.next();
        }
    }
}

/// Finds the place of every decoded character. White space is matched loosely (folding turns line breaks and
/// indentation into single spaces); every other character stands in the raw text in the same order.
fn align(text: &str, raw: &str, start: Span, style: Style) -> Vec<Run> {
    let mut cursor = Cursor { raw: raw.chars().peekable(), line: start.line, column: start.column };
    if matches!(style, Style::Single | Style::Double) {
        cursor.next();
    }
    let mut runs: Vec<Run> = Vec::new();
    let mut expected = (0, 0);
    let mut count = 0;
    for (at, c) in text.chars().enumerate() {
        if style == Style::Double {
            skip_escaped_break(&mut cursor);
        }
        let escaped = style == Style::Double && cursor.raw.peek() == Some(&'\\');
        if !escaped && !c.is_whitespace() {
            cursor.skip_while(char::is_whitespace);
            if style == Style::Double {
                skip_escaped_break(&mut cursor);
            }
        }
        let place = (cursor.line, cursor.column);
        if place != expected || at == 0 {
            runs.push(Run { at: at as u32, line: place.0, column: place.1 });
        }
        expected = (place.0, place.1 + 1);
        if style == Style::Double && cursor.raw.peek() == Some(&'\\') {
            skip_escape(&mut cursor);
        } else if cursor.raw.peek() == Some(&c) {
            cursor.next();
            if style == Style::Single && c == '\'' {
                cursor.next();
            }
        }
        count = at + 1;
    }
    // The place just behind the last character, for "expected more here".
    if (cursor.line, cursor.column) != expected || count == 0 {
        runs.push(Run { at: count as u32, line: cursor.line, column: cursor.column });
    }
    runs
}

/// `\` at the end of a line in double quotes joins two lines and stands for nothing.
fn skip_escaped_break(cursor: &mut Cursor<'_>) {
    loop {
        let mut ahead = cursor.raw.clone();
        if ahead.next() != Some('\\') || !matches!(ahead.next(), Some('\n' | '\r')) {
            return;
        }
        cursor.next();
        cursor.skip_while(char::is_whitespace);
    }
}

/// One escape sequence, two where they are a surrogate pair.
fn skip_escape(cursor: &mut Cursor<'_>) {
    cursor.next();
    let digits = match cursor.next() {
        Some('x') => 2,
        Some('u') => 4,
        Some('U') => 8,
        _ => 0,
    };
    let mut code = 0;
    for _ in 0..digits {
        code = code * 16 + cursor.next().and_then(|c| c.to_digit(16)).unwrap_or(0);
    }
    if (0xD800..0xDC00).contains(&code) {
        for _ in 0..6 {
            cursor.next();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(raw: &str, text: &str, style: Style, wanted: char, place: (u32, u32)) {
        let start = Span { source: 0, line: 1, column: 5, len: 1 };
        let text = Text::new(text.into(), raw, start, style, false);
        let at = text.text.chars().position(|c| c == wanted).unwrap_or(text.text.chars().count());
        let span = text.span_of(at, 1);
        assert_eq!((span.line, span.column), place);
    }

    #[test]
    fn decoded_characters_know_their_place() {
        check("a + b", "a + b", Style::Plain, 'b', (1, 9));
        check("'it''s b'", "it's b", Style::Single, 'b', (1, 12));
        check(r#""a\tb""#, "a\tb", Style::Double, 'b', (1, 9));
        check(r#""\u00e9b""#, "éb", Style::Double, 'b', (1, 12));
        check("\"a \\\n   b\"", "a b", Style::Double, 'b', (2, 4));
        check("a\n   b", "a b", Style::Plain, 'b', (2, 4));
        check("if\n      a\n    b\n", "if\n  a\nb\n", Style::Block, 'b', (3, 5));
    }

    #[test]
    fn the_end_of_a_text_has_a_place() {
        check("'a'", "a", Style::Single, '?', (1, 7));
        check("''", "", Style::Single, '?', (1, 6));
    }
}
