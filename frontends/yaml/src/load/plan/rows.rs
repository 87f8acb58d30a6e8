//! What a `for` runs over: batches of a source, or minibatches of a table.

use dsgc_ir::DType;
use dsgc_ir::diag::Diag;
use dsgc_ir::stage::{Rows, Statement};

use crate::expr::{Arg, Expr, ExprKind, Word};
use crate::literal::Constant;

use super::types::{Extent, Shape, Value, shown};
use super::{Env, Planned, Scope};

impl Planned {
    /// What a `for` runs over.
    pub(super) fn rows(
        &mut self,
        scope: &Scope<'_>,
        expr: &Expr,
        batch: &Word,
        env: &Env,
        outermost: bool,
        out: &mut Vec<Statement>,
    ) -> Option<(Rows, Value)> {
        if let ExprKind::Call { function, args } = &expr.kind {
            return match function.text.as_str() {
                "batches" => {
                    let [source, size] = self.args(expr, args, ["source", "size"])?;
                    let rows = self.count(scope, size, "rows", 1)?;
                    let name = self.source(scope, source)?.name.clone();
                    if let Some(other) = self.batch_sizes.insert(name.clone(), rows).filter(|other| *other != rows) {
                        let diag = Diag::error(format!("found batches of {rows} rows of `{name}`, and of {other}"));
                        self.errors.push(diag.label(expr.span, "the second"));
                    }
                    self.rows_of_source(scope, source, batch, env, outermost)
                }
                "minibatches" => self.minibatches(scope, expr, args, batch, env, out),
                _ => {
                    let diag = Diag::error(format!("found `{expr}`, expected rows")).label(expr.span, "");
                    self.error(diag.help("write a source, `batches(source, rows)` or `minibatches(table, rows)`"))
                }
            };
        }
        self.rows_of_source(scope, expr, batch, env, outermost)
    }

    fn rows_of_source(
        &mut self,
        scope: &Scope<'_>,
        expr: &Expr,
        batch: &Word,
        env: &Env,
        outermost: bool,
    ) -> Option<(Rows, Value)> {
        if !outermost {
            let source = expr.name().unwrap_or("source");
            let diag = Diag::error("found a loop over a source inside of a loop").label(expr.span, "");
            return self.error(match env.iter().any(|(name, _)| name == source) {
                true => diag.help(format!("write `minibatches({source}, rows)` to cut a table by rows")),
                false => diag.help(format!("write `- more: next({source})` for its next batch")),
            });
        }
        let source = self.source(scope, expr)?;
        let rows = self.batch_sizes.get(&source.name).copied().unwrap_or(source.batch_size);
        let table = self.table(&batch.text, rows);
        Some((Rows::Source(source.name.clone()), source.batch(batch.text.clone(), &table)))
    }

    fn minibatches(
        &mut self,
        scope: &Scope<'_>,
        expr: &Expr,
        args: &[Arg],
        batch: &Word,
        env: &Env,
        out: &mut Vec<Statement>,
    ) -> Option<(Rows, Value)> {
        let (named, plain): (Vec<&Arg>, Vec<&Arg>) = args.iter().partition(|a| a.name.is_some());
        let plain: Vec<Arg> = plain.into_iter().cloned().collect();
        let [table, size] = self.args(expr, &plain, ["table", "rows"])?;
        // A table may be written where it is used: `minibatches(join(a, b), 8)`.
        let value = self.argument(scope, table, env, out)?;
        let size = self.count(scope, size, "rows", 1)?;
        let Some(of) = value.table.clone() else {
            let diag = Diag::error(format!("found `{table}`, which has no rows, expected a table"));
            return self.error(diag.label(table.span, ""));
        };
        let (mut keep, mut shuffle) = (None, true);
        for arg in named {
            match arg.name.as_ref().map(|n| n.text.as_str()) {
                Some("where") => {
                    let mask = self.argument(scope, &arg.value, env, out)?;
                    let expected = Shape { dtype: DType::Bool, dims: vec![Extent::Rows(1)] };
                    let fits = mask.tensor() == Some(&expected) && mask.table.as_ref().is_some_and(|t| t.id == of.id);
                    if !fits {
                        let found = mask.tensor().map_or("a record".into(), shown);
                        let diag = Diag::error(format!("found {found}, expected bool[rows] of `{table}`"));
                        return self.error(diag.label(arg.value.span, ""));
                    }
                    keep = Some(mask.path);
                }
                Some("shuffle") => match self.constant(scope, &arg.value)? {
                    Constant::Bool(yes) => shuffle = yes,
                    found => {
                        let diag = Diag::error(format!("found `{found}`, expected `true` or `false`"));
                        return self.error(diag.label(arg.value.span, ""));
                    }
                },
                _ => return self.unknown_argument(arg, "minibatches(table, rows, where=mask, shuffle=true)"),
            }
        }
        let path = value.path.clone();
        let table = self.table(&batch.text, size.min(of.rows));
        // What has no rows is no part of a table of rows.
        let fields = value.fields.into_iter().filter(|(_, s)| s.dims.first() == Some(&Extent::Rows(1))).collect();
        let value = Value { path: batch.text.clone(), fields, table: Some(table) };
        Some((Rows::Minibatches { table: path, size, keep, shuffle }, value))
    }
}
