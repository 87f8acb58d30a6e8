//! What the YAML parser says, in the words of the person who wrote the file.

use dsgc_ir::diag::{Diag, Span};
use granit_parser::{ErrorKind, ScanError};

use crate::node::FLOW_HELP;

/// A message for a syntax error of YAML itself.
pub(crate) fn diag(error: &ScanError, source: u32, text: &str) -> Diag {
    let at = error.marker();
    // Errors at the end of a file are reported behind its last line, where no snippet can be shown.
    let last = text.lines().count().max(1);
    let span = if at.line() > last {
        let column = text.lines().last().map_or(1, |l| l.chars().count() + 1);
        Span { source, line: last as u32, column: column as u32, len: 1 }
    } else {
        Span { source, line: at.line() as u32, column: at.col() as u32 + 1, len: 1 }
    };
    let found = text
        .lines()
        .nth(span.line as usize - 1)
        .and_then(|l| l.chars().nth(span.column as usize - 1))
        .map_or("the end of the line".to_string(), |c| format!("`{c}`"));
    let (message, help) = explain(error.kind(), &found);
    let diag = Diag::error(message).label(span, "");
    if help.is_empty() { diag } else { diag.help(help) }
}

fn explain(kind: &ErrorKind, found: &str) -> (String, &'static str) {
    match kind {
        ErrorKind::MappingValueNotAllowed => (
            "found `:` and a space inside a value".into(),
            "a colon and a space begin a mapping: write `1:]` without the space, or put the value in quotes",
        ),
        ErrorKind::ExpectedFlowMappingSeparator
        | ErrorKind::UnexpectedEofFlowMapping
        | ErrorKind::UnexpectedEofImplicitFlowMapping => (format!("found {found}, expected `,` or `}}`"), FLOW_HELP),
        ErrorKind::ExpectedFlowSequenceSeparator | ErrorKind::UnexpectedEofFlowSequence => {
            (format!("found {found}, expected `,` or `]`"), FLOW_HELP)
        }
        ErrorKind::MisplacedFlowCollectionEnd => (format!("found {found}, which closes nothing"), ""),
        ErrorKind::MismatchedFlowCollectionEnd { open, close } => {
            (format!("found `{close}`, expected the end of `{open}`"), FLOW_HELP)
        }
        ErrorKind::UnclosedFlowCollection { open } => (format!("`{open}` is not closed"), ""),
        ErrorKind::TabNotAllowed | ErrorKind::TabInBlockIndentation | ErrorKind::TabInIndentation => {
            ("found a tab in the indentation, expected spaces".into(), "indent with two spaces")
        }
        ErrorKind::UnexpectedCharacter { character } => {
            (format!("found `{character}`, with which no YAML value can begin"), "put the value in quotes")
        }
        ErrorKind::ExpectedBlockMappingKey => (
            format!("found {found}, expected a key"),
            "keys of one mapping begin at the same column: check the indentation of this line",
        ),
        ErrorKind::ExpectedBlockSequenceEntry => (
            format!("found {found}, expected `-`"),
            "items of one list begin at the same column: check the indentation of this line",
        ),
        ErrorKind::InvalidIndentation => {
            ("found a line that is indented like none before it".into(), "check the indentation of this line")
        }
        ErrorKind::UnknownAnchor => (
            "found an alias without an anchor".into(),
            "`*name` repeats a value marked `&name`: mark one before, or put the value in quotes",
        ),
        ErrorKind::UnclosedQuotedScalar => ("the quote is not closed".into(), ""),
        ErrorKind::SimpleKeyExpected | ErrorKind::InvalidSimpleKey => {
            ("found a line without `:`, expected `key: value`".into(), "")
        }
        other => (format!("not YAML: {other}"), ""),
    }
}
