//! Messages with the lines they speak of.
//!
//! ```text
//! error: unknown key `lerning_rate` in a stage
//!  --> a.yaml:4:5
//!   |
//! 4 |     lerning_rate: 1e-5
//!   |     ^^^^^^^^^^^^
//!   |
//!   = help: write `learning_rate`
//! ```

use annotate_snippets::{AnnotationKind, Level, Renderer, Snippet};
use dsgc_ir::diag::{Diag, Severity, Sources};

/// How messages are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// For files, pipes and tests.
    Plain,
    /// For terminals.
    Colour,
}

/// All messages of a document, one under the other, without a line break at the end.
pub fn render(diags: &[Diag], sources: &Sources, look: Look) -> String {
    let renderer = match look {
        Look::Plain => Renderer::plain(),
        Look::Colour => Renderer::styled(),
    };
    let texts: Vec<String> = diags.iter().map(|d| one(&renderer, d, sources)).collect();
    texts.join("\n\n")
}

fn one(renderer: &Renderer, diag: &Diag, sources: &Sources) -> String {
    let level = match diag.severity {
        Severity::Error => Level::ERROR,
        Severity::Warning => Level::WARNING,
    };
    // A snippet per file, that of the primary place first.
    let mut files: Vec<u32> = Vec::new();
    for label in &diag.labels {
        if !files.contains(&label.span.source) {
            files.push(label.span.source);
        }
    }
    let mut group = annotate_snippets::Group::with_title(level.primary_title(diag.message.as_str()));
    for source in files {
        let annotations = diag.labels.iter().enumerate().filter(|(_, l)| l.span.source == source).map(|(i, label)| {
            let kind = if i == 0 { AnnotationKind::Primary } else { AnnotationKind::Context };
            let text = Some(label.text.as_str()).filter(|t| !t.is_empty());
            kind.span(sources.bytes(label.span)).label(text)
        });
        group = group.element(
            Snippet::source(sources.text(source)).path(sources.name(source)).fold(true).annotations(annotations),
        );
    }
    for help in &diag.help {
        group = group.element(Level::HELP.message(help.as_str()));
    }
    renderer.render(&[group])
}
