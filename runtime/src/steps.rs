//! How many optimizer steps a role takes: what the learning rate's course is laid out for.

use std::collections::BTreeMap;

use dsgc_ir::stage::{Operand, Rows, Stage, Statement};

/// Optimizer steps of a role per batch of the outermost source, if that has all its rows and every row of a table takes
/// part.
pub(crate) fn updates_of(stage: &Stage, role: &str) -> u64 {
    Count { stage, role, rows: BTreeMap::new() }.statements(&stage.plan)
}

struct Count<'a> {
    stage: &'a Stage,
    role: &'a str,
    /// Most rows of the records so far, by their names.
    rows: BTreeMap<&'a str, usize>,
}

impl<'a> Count<'a> {
    fn statements(&mut self, body: &'a [Statement]) -> u64 {
        body.iter().map(|statement| self.statement(statement)).sum()
    }

    fn statement(&mut self, statement: &'a Statement) -> u64 {
        let (name, rows) = match statement {
            Statement::Update(update) => return u64::from(update.role == self.role),
            Statement::Repeat { times, body } => return times * self.statements(body),
            Statement::For { batch, rows, body } => {
                let (size, times) = match rows {
                    Rows::Source(source) => (self.batch_size(source), 1),
                    Rows::Minibatches { table, size, .. } => (*size, self.rows_of(table).div_ceil((*size).max(1))),
                };
                self.rows.insert(batch, size);
                return times as u64 * self.statements(body);
            }
            Statement::Call(call) => {
                let Some(name) = &call.name else { return 0 };
                let paths = call.args.iter().filter_map(|(_, operand)| match operand {
                    Operand::Path(path) => Some(self.rows_of(path)),
                    Operand::State(_) | Operand::Number(_) => None,
                });
                (name, paths.max().unwrap_or(1))
            }
            Statement::Generate(generate) => (&generate.name, self.rows_of(&generate.prompt) * generate.samples),
            Statement::Next { name, source } => (name, self.batch_size(source)),
            Statement::Join { name, parts } => (name, parts.iter().map(|p| self.rows_of(p)).max().unwrap_or(1)),
            Statement::Recent { name, rows, .. } => (name, *rows),
        };
        self.rows.insert(name, rows);
        0
    }

    fn batch_size(&self, source: &str) -> usize {
        self.stage.sources.iter().find(|s| s.name == source).map_or(1, |s| s.batch_size)
    }

    /// Rows of the record that a path leads into.
    fn rows_of(&self, path: &str) -> usize {
        let name = path.split('.').next().unwrap_or(path);
        self.rows.get(name).copied().unwrap_or(1)
    }
}
