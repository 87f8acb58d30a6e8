//! Rows of a pipeline bound to the sources of a recipe.

use dsgc_ir::diag::{Diag, Span};
use dsgc_ir::stage::{Held, Longer, Packing, Part, Sequence, Shuffle, Side, Source, Split};

use crate::expr::Word;
use crate::literal::Constant;
use crate::pipeline::DataSource;
use crate::recipe::{DataDecl, DataForm};
use crate::schema::words;

use super::Places;
use super::documents::Documents;
use super::models::FoundTokenizer;
use super::settings::{Decided, Layers, Provenance, Range, Rule, parsed};

const fn rule(key: &'static str, default: &'static str) -> Rule {
    Rule { key, default, range: Range::Any }
}

/// Defaults of [`crate::pipeline::DATA_SOURCE`], but for `path`, `fields` and `split`, which have none.
const RULES: &[Rule] = &[
    rule("eval", "none"),
    Rule { key: "max_rows", default: "none", range: Range::AtLeast(1.0) },
    rule("chat_template", "none"),
    rule("shuffle", "each_epoch"),
    rule("prefix", "''"),
    rule("separator", "''"),
    rule("train_on_prompt", "true"),
    rule("longer", "truncate"),
    rule("pad_to_max", "false"),
];

/// What the stage says of every source.
pub(super) struct Frame<'a> {
    /// The stage.
    pub stage: &'a str,
    /// All stages of the pipeline.
    pub stages: &'a [String],
    /// The recipe's name.
    pub recipe: &'a str,
    /// Longest row in tokens.
    pub max_length: usize,
    /// Whether every batch is that long.
    pub fixed_width: bool,
    pub batch_size: usize,
    pub micro_batch_size: usize,
    /// Where the stage asks for several texts in a row, if it does.
    pub packing: Option<Span>,
    /// Whether texts of a batch may share rows, if the recipe allows it.
    pub shared_rows: bool,
    pub tokenizer: &'a FoundTokenizer,
}

/// A source with the settings that made it, for `--resolved`.
pub(super) struct BoundSource {
    pub source: Source,
    /// The entry of `data`.
    pub set: String,
    pub decided: Vec<Decided>,
}

/// Binds an entry of `data` to a source of the recipe.
pub(super) fn bind(
    documents: &mut Documents<'_>,
    decl: &DataDecl,
    set: &DataSource,
    frame: &Frame<'_>,
    places: &Places,
) -> Option<BoundSource> {
    let layers = Layers::new(&places.sets).with(&set.settings);
    let mut decided: Vec<Decided> = RULES.iter().map(|rule| layers.decide(rule, &mut documents.errors)).collect();
    if let (Some(longer), Some(own)) = (decl.longer, decided.iter_mut().find(|d| d.key == "longer"))
        && own.from == Provenance::Default
    {
        let word = match longer {
            Longer::Truncate => "truncate",
            Longer::Drop => "drop",
        };
        *own = Decided { key: "longer".into(), node: parsed(word), from: Provenance::Recipe(frame.recipe.into()) };
    }
    let find = |key: &str| decided.iter().find(|d| d.key == key).unwrap_or_else(|| panic!("bug: no rule for `{key}`"));
    let not_yet = |what: &str, span: Span| Diag::error(format!("{what} is not part of this version")).label(span, "");
    if find("chat_template").constant() != Constant::None {
        documents.error(not_yet("`chat_template`", find("chat_template").node.span));
    }
    let path = places.path(&set.path);
    let columns = match documents.host.columns(&path) {
        Ok(columns) => columns,
        Err(diag) => {
            documents.error(diag.label(set.path.span, ""));
            return None;
        }
    };
    let form = fitting(documents, decl, set, &columns)?;
    if let Some((field, kind)) = form.fields.iter().find(|f| f.1.text == "chat") {
        documents.error(not_yet(&format!("the field `{}` of type `chat`", field.text), kind.span));
    }
    let eoc = form.sequences.iter().flat_map(|s| &s.1).find(|part| part.text == "eoc");
    let facts = &frame.tokenizer.facts;
    if let (Some(part), None) = (eoc, facts.eos) {
        documents.error(
            Diag::error(format!("the tokenizer in `{}` names no token that ends a text", frame.tokenizer.folder))
                .label(set.name.span, "")
                .label(part.span, "`eoc` stands for it")
                .help("write its `eos_token` into `tokenizer_config.json`"),
        );
    }
    let pad_id = match (facts.pad, facts.eos) {
        (Some(pad), _) => pad,
        (None, Some(eos)) => {
            let warning = Diag::warning(format!(
                "the tokenizer in `{}` names no padding token: its end token {eos} is used",
                frame.tokenizer.folder
            ));
            if !documents.warnings.contains(&warning) {
                documents.warnings.push(warning);
            }
            eos
        }
        (None, None) => {
            documents.error(
                Diag::error(format!("the tokenizer in `{}` names no padding token", frame.tokenizer.folder))
                    .label(set.name.span, "")
                    .help("write a `pad_token` into `tokenizer_config.json`"),
            );
            return None;
        }
    };
    let asked = decl.packed.as_ref().map(|packed| ("packed", packed.span)).or(frame.packing.map(|at| ("packing", at)));
    if let Some((key, span)) = asked
        && (form.sequences.len() != 1 || decl.pad == Some(Side::Left))
    {
        let many = form.sequences.len() != 1;
        let why = if many { "has several sequences in a row already" } else { "is padded on the left" };
        let diag = Diag::error(format!("`{key}` puts texts into one row, and `{}` {why}", decl.name.text));
        documents.error(
            diag.label(span, "").label(decl.name.span, "the source of the recipe").help(format!("leave `{key}` out")),
        );
    }
    let pad_to_max = frame.fixed_width || find("pad_to_max").constant() == Constant::Bool(true);
    let held = held(documents, find("eval"), places);
    let split = split(documents, set, frame);
    let source = Source {
        name: decl.name.text.clone(),
        path: path.display().to_string(),
        span: set.path.span,
        eval: held?,
        max_rows: find("max_rows").count().map(|n| n as usize),
        fields: form
            .fields
            .iter()
            .map(|(field, _)| (field.text.clone(), column(set, &field.text).to_string()))
            .collect(),
        sequences: form.sequences.iter().map(|(name, parts)| sequence(name, parts)).collect(),
        tokenizer: frame.tokenizer.folder.clone(),
        pad: decl.pad.unwrap_or(Side::Right),
        pad_id,
        eoc_id: facts.eos.unwrap_or(pad_id),
        max_length: frame.max_length,
        longer: if find("longer").text() == "drop" { Longer::Drop } else { Longer::Truncate },
        packing: match (&decl.packed, frame.packing) {
            (Some(_), _) => Packing::Blocks,
            (None, Some(_)) => Packing::Texts,
            (None, None) if decl.shared_rows && frame.shared_rows && !pad_to_max => Packing::Batch,
            (None, None) => Packing::None,
        },
        pad_to_max,
        same_length: decl.same_length,
        split: split?,
        shuffle: match find("shuffle").text() {
            "none" => Shuffle::None,
            "deepspeed_chat" => Shuffle::DeepspeedChat,
            _ => Shuffle::EachEpoch,
        },
        prefix: find("prefix").text().to_string(),
        separator: find("separator").text().to_string(),
        train_on_prompt: find("train_on_prompt").constant() == Constant::Bool(true),
        batch_size: frame.batch_size,
        micro_batch_size: frame.micro_batch_size,
    };
    Some(BoundSource { source, set: set.name.text.clone(), decided })
}

/// The column of a field: as the pipeline says, else the one of its name.
fn column<'a>(set: &'a DataSource, field: &'a str) -> &'a str {
    set.fields.iter().find(|(f, _)| f.text == field).map_or(field, |(_, column)| &column.text)
}

/// The first form whose columns the file has.
fn fitting<'d>(
    documents: &mut Documents<'_>,
    decl: &'d DataDecl,
    set: &DataSource,
    columns: &[String],
) -> Option<&'d DataForm> {
    let mut good = true;
    for (field, column) in &set.fields {
        if !decl.forms.iter().any(|form| form.fields.iter().any(|f| f.0.text == field.text)) {
            let known: Vec<&str> = decl.forms.iter().flat_map(|f| &f.fields).map(|f| f.0.text.as_str()).collect();
            let diag = Diag::error(format!("source `{}` has no field `{}`", decl.name.text, field.text));
            documents.error(
                diag.label(field.span, "")
                    .label(decl.name.span, "the source")
                    .help(format!("its fields are {}", words(&known))),
            );
            good = false;
        } else if !columns.contains(&column.text) {
            let near = dsgc_ir::diag::nearest(&column.text, columns.iter().map(String::as_str));
            let diag =
                Diag::error(format!("found no column `{}` in `{}`", column.text, set.path.text)).label(column.span, "");
            documents.error(match near {
                Some(near) => diag.help(format!("write `{near}`")),
                None => diag.help(format!("its columns are {}", words(columns))),
            });
            good = false;
        }
    }
    if !good {
        return None;
    }
    let used =
        |form: &&DataForm| set.fields.iter().all(|(given, _)| form.fields.iter().any(|f| f.0.text == given.text));
    let fits = |form: &&DataForm| {
        used(form) && form.fields.iter().all(|(f, _)| columns.iter().any(|c| c == column(set, &f.text)))
    };
    let form = decl.forms.iter().find(fits);
    if form.is_none() {
        let wanted: Vec<String> = decl
            .forms
            .iter()
            .filter(used)
            .map(|form| words(&form.fields.iter().map(|f| column(set, &f.0.text)).collect::<Vec<_>>()))
            .collect();
        let message =
            format!("found the columns {} in `{}`, expected {}", words(columns), set.path.text, wanted.join(", or "));
        let missing = decl.forms.iter().filter(used).flat_map(|form| &form.fields);
        let missing = missing.map(|f| f.0.text.as_str()).find(|f| !columns.iter().any(|c| c == column(set, f)));
        documents.error(
            Diag::error(message)
                .label(set.path.span, "")
                .help(format!("say which column it is: `fields: {{{}: COLUMN}}`", missing.unwrap_or("FIELD"))),
        );
    }
    form
}

fn sequence(name: &Word, parts: &[Word]) -> Sequence {
    let part = |word: &Word| match word.text.as_str() {
        "eoc" => Part::Eoc,
        field => Part::Field(field.into()),
    };
    Sequence { name: name.text.clone(), parts: parts.iter().map(part).collect() }
}

fn held(documents: &mut Documents<'_>, eval: &Decided, places: &Places) -> Option<Option<Held>> {
    match eval.constant() {
        Constant::None => Some(None),
        Constant::Str(path) => {
            let word = Word { span: eval.node.span, text: path };
            let path = places.path(&word);
            if let Err(diag) = documents.host.columns(&path) {
                documents.error(diag.label(word.span, ""));
                return None;
            }
            Some(Some(Held::Path(path.display().to_string())))
        }
        value => {
            let share = value.number().unwrap_or(f64::NAN);
            if share > 0.0 && share < 1.0 {
                return Some(Some(Held::Share(share)));
            }
            documents.error(
                Diag::error(format!("found {value} for `eval`, expected more than 0 and less than 1"))
                    .label(eval.node.span, "")
                    .help("0.1 holds out a tenth of the rows; a text names another file"),
            );
            None
        }
    }
}

fn split(documents: &mut Documents<'_>, set: &DataSource, frame: &Frame<'_>) -> Option<Option<Split>> {
    if set.split.is_empty() {
        return Some(None);
    }
    if let Some((stage, share)) = set.split.iter().find(|(_, share)| !(*share > 0.0 && share.is_finite())) {
        documents.error(
            Diag::error(format!("found {share} as the share of `{}`, expected more than 0", stage.text))
                .label(stage.span, ""),
        );
        return None;
    }
    for (stage, _) in set.split.iter().filter(|(stage, _)| !frame.stages.contains(&stage.text)) {
        let warning =
            Diag::warning(format!("`{}` is no stage of this pipeline: its share of the rows is left out", stage.text));
        let warning = warning.label(stage.span, "");
        if !documents.warnings.contains(&warning) {
            documents.warnings.push(warning);
        }
    }
    let Some(part) = set.split.iter().position(|(stage, _)| stage.text == frame.stage) else {
        let shares: Vec<&str> = set.split.iter().map(|(stage, _)| stage.text.as_str()).collect();
        let at = set.split.first().map_or(set.name.span, |(stage, _)| stage.span);
        documents.error(
            Diag::error(format!("data `{}` is split, and stage `{}` has no share", set.name.text, frame.stage))
                .label(at, format!("shares of {}", words(&shares)))
                .help(format!("write `{}: SHARE` under `split`", frame.stage)),
        );
        return None;
    };
    Some(Some(Split { parts: set.split.iter().map(|(_, share)| *share).collect(), part }))
}
