//! Characters to tokens. Words of other languages (`&&`, `!`, `^`) are answered with ours here.

use dsgc_ir::diag::Diag;

use crate::text::Text;

/// A token and where its characters stand in the scalar.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Token {
    pub kind: Kind,
    pub at: usize,
    pub len: usize,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Kind {
    Int(i64),
    Float(f64),
    Str(String),
    /// A name or one of the words of the language, with dots.
    Word(String),
    /// An operator or a bracket.
    Sign(&'static str),
    End,
}

/// Longest first.
const SIGNS: &[&str] =
    &["...", "**", "==", "!=", "<=", ">=", "(", ")", "[", "]", ",", ":", "+", "-", "*", "/", "<", ">", "=", "."];

/// Signs of other languages: what is found, and what to write.
const FOREIGN: &[(&str, &str)] = &[
    ("&&", "write `and`"),
    ("||", "write `or`"),
    ("<>", "write `!=`"),
    ("//", "write `/`; sizes must divide without a rest"),
    ("->", "types have no arrow: an output's type follows from its expression"),
    ("&", "write `and`"),
    ("|", "write `or`"),
    ("!", "write `not`"),
    ("~", "write `not`"),
    ("^", "write `**` for a power"),
    ("@", "write `linear(x, w)` for a product with a parameter"),
    ("?", "write `a if condition else b`"),
    ("{", "a record stands as a YAML mapping of its own, not inside an expression"),
    ("}", "a record stands as a YAML mapping of its own, not inside an expression"),
];

pub(super) fn lex(text: &Text) -> Result<Vec<Token>, Diag> {
    let chars: Vec<char> = text.text.chars().collect();
    let mut tokens = Vec::new();
    let mut at = 0;
    while let Some(&c) = chars.get(at) {
        if c.is_whitespace() {
            at += 1;
            continue;
        }
        let starts_number = c.is_ascii_digit() || (c == '.' && chars.get(at + 1).is_some_and(|d| d.is_ascii_digit()));
        let (kind, len) = if starts_number {
            number(text, &chars, at)?
        } else if is_word_start(c) {
            word(text, &chars, at)?
        } else if c == '"' || c == '\'' {
            string(text, &chars, at)?
        } else {
            sign(text, &chars, at)?
        };
        tokens.push(Token { kind, at, len });
        at += len;
    }
    let end = tokens.last().map_or(0, |t: &Token| t.at + t.len);
    tokens.push(Token { kind: Kind::End, at: end, len: 1 });
    Ok(tokens)
}

fn is_word_start(c: char) -> bool {
    c.is_alphabetic() || c == '_'
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

fn run(chars: &[char], from: usize, wanted: impl Fn(char) -> bool) -> usize {
    chars[from.min(chars.len())..].iter().take_while(|c| wanted(**c)).count()
}

fn number(text: &Text, chars: &[char], at: usize) -> Result<(Kind, usize), Diag> {
    let digit = |c: char| c.is_ascii_digit();
    let mut len = run(chars, at, digit);
    let mut float = false;
    if chars.get(at + len) == Some(&'.') && chars.get(at + len + 1).is_some_and(|c| digit(*c)) {
        float = true;
        len += 1 + run(chars, at + len + 1, digit);
    }
    if matches!(chars.get(at + len), Some('e' | 'E')) {
        let sign = usize::from(matches!(chars.get(at + len + 1), Some('+' | '-')));
        let digits = run(chars, at + len + 1 + sign, digit);
        if digits > 0 {
            float = true;
            len += 1 + sign + digits;
        }
    }
    let raw: String = chars[at..at + len].iter().collect();
    let glued = run(chars, at + len, is_word);
    if glued > 0 {
        let name: String = chars[at + len..at + len + glued].iter().collect();
        return Err(Diag::error(format!("found `{raw}{name}`, expected a number or a name"))
            .label(text.span_of(at, len + glued), "")
            .help(format!("write `{raw} * {name}` for a product; names begin with a letter")));
    }
    let bad =
        || Diag::error(format!("found the number `{raw}`, which is out of range")).label(text.span_of(at, len), "");
    if float {
        let x: f64 = raw.parse().map_err(|_| bad())?;
        if x.is_finite() { Ok((Kind::Float(x), len)) } else { Err(bad()) }
    } else {
        Ok((Kind::Int(raw.parse().map_err(|_| bad())?), len))
    }
}

fn word(text: &Text, chars: &[char], at: usize) -> Result<(Kind, usize), Diag> {
    let mut len = run(chars, at, is_word);
    while chars.get(at + len) == Some(&'.') {
        // `x...` is left to the parser; a dot otherwise goes on with a name, or with a layer's number.
        let part = run(chars, at + len + 1, is_word);
        if part == 0 {
            if chars.get(at + len + 1) == Some(&'.') {
                break;
            }
            let name: String = chars[at..at + len].iter().collect();
            return Err(Diag::error(format!("found `{name}.`, expected a name after the dot"))
                .label(text.span_of(at + len, 1), ""));
        }
        len += 1 + part;
    }
    Ok((Kind::Word(chars[at..at + len].iter().collect()), len))
}

fn string(text: &Text, chars: &[char], at: usize) -> Result<(Kind, usize), Diag> {
    let quote = chars[at];
    let len = run(chars, at + 1, |c| c != quote);
    if at + 1 + len >= chars.len() {
        return Err(Diag::error(format!("the quote `{quote}` is not closed")).label(text.span_of(at, 1), ""));
    }
    Ok((Kind::Str(chars[at + 1..at + 1 + len].iter().collect()), len + 2))
}

fn sign(text: &Text, chars: &[char], at: usize) -> Result<(Kind, usize), Diag> {
    let starts = |s: &str| s.chars().enumerate().all(|(i, c)| chars.get(at + i) == Some(&c));
    // `!=` is ours although `!` is not, `->` is foreign although `-` is ours.
    let ours = SIGNS.iter().find(|s| starts(s));
    let foreign = FOREIGN.iter().find(|(s, _)| starts(s));
    match (ours, foreign) {
        (Some(sign), None) => Ok((Kind::Sign(sign), sign.chars().count())),
        (Some(sign), Some((other, _))) if sign.len() >= other.len() => Ok((Kind::Sign(sign), sign.chars().count())),
        (_, Some((other, help))) => Err(Diag::error(format!("found `{other}`, which is not an operator"))
            .label(text.span_of(at, other.chars().count()), "")
            .help(*help)),
        (None, None) => {
            Err(Diag::error(format!("found `{}`, expected an expression", chars[at])).label(text.span_of(at, 1), ""))
        }
    }
}
