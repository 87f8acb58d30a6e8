//! The names of a plan: tensors by their whole path.
//!
//! ```text
//! batch of the source `text`, bound as `batch`   ->  batch.text.tokens, batch.text.segment, batch.text.trained
//! call `exp: experience(..)` that gives rows.keep  ->  exp.rows.keep
//! ```
//!
//! A record is a prefix, so `exp.rows` is all whose paths begin with `exp.rows.`; the first dim of its tensors counts
//! rows, and numbers in it belong to all of them.

use std::collections::BTreeMap;
use std::rc::Rc;

use dsgc_ir::Tensor;
use dsgc_ir::diag::Diag;

use crate::calls::Named;

/// Tensors by path. A copy shares them, which is how the names of a loop's body vanish at its end.
#[derive(Clone, Debug, Default)]
pub struct Values {
    tensors: BTreeMap<String, Rc<Tensor>>,
    origins: BTreeMap<String, Origin>,
}

/// Where the rows of a batch come from.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Origin {
    /// The source.
    pub source: String,
    /// Whether they are held out.
    pub held: bool,
    /// Their numbers in the source.
    pub rows: Vec<usize>,
}

impl Values {
    /// Gives a record a name; what had it before goes away.
    pub fn bind(&mut self, name: &str, record: Named) {
        let prefix = format!("{name}.");
        self.tensors.retain(|path, _| !path.starts_with(&prefix));
        self.origins.remove(name);
        self.tensors.extend(record.into_iter().map(|(member, t)| (format!("{prefix}{member}"), Rc::new(t))));
    }

    /// Gives a name to rows of a source.
    pub fn bind_rows(&mut self, name: &str, record: Named, origin: Origin) {
        self.bind(name, record);
        self.origins.insert(name.into(), origin);
    }

    /// The batch of a source that a path leads into, with its name.
    pub fn origin(&self, path: &str) -> Option<(&str, &Origin)> {
        let inside = |name: &str| path.strip_prefix(name).is_some_and(|rest| rest.starts_with('.'));
        self.origins.iter().find(|(name, _)| inside(name)).map(|(name, origin)| (name.as_str(), origin))
    }

    /// The tensor of a path.
    pub fn tensor(&self, path: &str) -> Result<&Tensor, Diag> {
        let found = self.tensors.get(path).map(Rc::as_ref);
        found.ok_or_else(|| {
            let diag = Diag::error(format!("found no tensor `{path}` when the plan ran"));
            diag.help(format!("there are: {}", self.tensors.keys().cloned().collect::<Vec<_>>().join(", ")))
        })
    }

    /// A record by its path: its tensors by the rest of their paths.
    pub fn record(&self, path: &str) -> Result<Named, Diag> {
        let members = self.tensors.iter().filter_map(|(whole, tensor)| {
            let member = whole.strip_prefix(path)?.strip_prefix('.')?;
            Some((member.to_string(), tensor.as_ref().clone()))
        });
        let record: Named = members.collect();
        if record.is_empty() {
            // The message that lists what there is.
            self.tensor(path)?;
        }
        Ok(record)
    }

    /// Records side by side; of a path to a tensor, the last part is the member's name.
    pub fn join(&self, parts: &[String]) -> Result<Named, Diag> {
        let mut joined = Named::new();
        for part in parts {
            let members = match self.tensors.get(part) {
                Some(tensor) => {
                    let name = part.rsplit('.').next().unwrap_or(part);
                    Named::from([(name.to_string(), tensor.as_ref().clone())])
                }
                None => self.record(part)?,
            };
            for (name, tensor) in members {
                if joined.contains_key(&name) {
                    return Err(Diag::error(format!("found two members `{name}` in join({})", parts.join(", "))));
                }
                joined.insert(name, tensor);
            }
        }
        Ok(joined)
    }

    /// Tokens of a record without padding: places of its segments that are not 0.
    pub fn tokens(&self, name: &str) -> u64 {
        let prefix = format!("{name}.");
        let segments = self.tensors.iter().filter(|(p, _)| p.starts_with(&prefix) && p.ends_with(".segment"));
        segments.map(|(_, t)| t.to_f64().into_iter().filter(|&s| s != 0.0).count() as u64).sum()
    }
}

/// How many rows the tensors of a record have.
pub fn rows_of(path: &str, record: &Named) -> Result<usize, Diag> {
    let mut extents = record.iter().filter(|(_, t)| !t.shape.is_empty()).map(|(name, t)| (name, t.shape[0]));
    let Some((first, rows)) = extents.next() else {
        return Err(Diag::error(format!("found no tensor with rows in `{path}`")));
    };
    match extents.find(|(_, n)| *n != rows) {
        None => Ok(rows),
        Some((other, n)) => {
            let message = format!("`{path}` is no table: `{first}` has {rows} rows and `{other}` has {n}");
            Err(Diag::error(message).help("a table's members have one row each for the same things"))
        }
    }
}

/// The rows of these numbers of all tensors of a record; numbers stay.
pub fn select(record: &Named, rows: &[usize]) -> Named {
    let pick = |t: &Tensor| if t.shape.is_empty() { t.clone() } else { t.select(rows) };
    record.iter().map(|(name, t)| (name.clone(), pick(t))).collect()
}

/// Puts the rows of a record after those of another with the same members; numbers are the newer ones.
///
/// `what` names the records in the error that is given where their rows have different shapes.
pub fn append(to: &mut Named, more: Named, what: &str) -> Result<(), Diag> {
    for (name, tensor) in more {
        match to.get_mut(&name) {
            Some(so_far) if !tensor.shape.is_empty() => {
                if so_far.shape[1..] != tensor.shape[1..] {
                    let (a, b) = (&so_far.shape[1..], &tensor.shape[1..]);
                    let diag = Diag::error(format!("rows of `{name}` of {what} have the shapes {a:?} and {b:?}"));
                    return Err(diag.help("give the sequences one length, with `width` or `pad_to_max` of the data"));
                }
                so_far.append(&tensor);
            }
            _ => {
                to.insert(name, tensor);
            }
        }
    }
    Ok(())
}
