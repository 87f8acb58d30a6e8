//! What changes models and states: `update`, `average`, `set`.

use dsgc_ir::diag::Diag;
use dsgc_ir::stage::{Call, Operand, Statement, Term, Update};
use dsgc_ir::{DType, Dim, Type};

use crate::expr::{Arg, BinaryOp, Expr, ExprKind, UnaryOp, Word};
use crate::schema::words;

use super::called::{contains_call, names_of};
use super::types::{Extent, shown};
use super::{Env, Planned, Scope};

impl Planned {
    pub(super) fn update(
        &mut self,
        scope: &Scope<'_>,
        call: &Expr,
        args: &[Arg],
        env: &Env,
        out: &mut Vec<Statement>,
    ) -> Option<Update> {
        let [role, loss] = args else {
            let diag = Diag::error(format!("found {} arguments of `update`, expected a role and a loss", args.len()));
            return self.error(diag.label(call.span, "").help("write `update(role, loss(batch))`"));
        };
        let role = self.trained_role(scope, &role.value);
        let mut terms = Vec::new();
        self.terms(scope, &loss.value, 1.0, env, &mut terms, out)?;
        Some(Update { role: role?, terms, steps: None })
    }

    /// The losses of a sum.
    fn terms(
        &mut self,
        scope: &Scope<'_>,
        loss: &Expr,
        weight: f64,
        env: &Env,
        terms: &mut Vec<Term>,
        out: &mut Vec<Statement>,
    ) -> Option<()> {
        let is_call = |e: &Expr| contains_call(e);
        match &loss.kind {
            ExprKind::Binary(op @ (BinaryOp::Add | BinaryOp::Sub), a, b) => {
                let right = if *op == BinaryOp::Sub { -weight } else { weight };
                let first = self.terms(scope, a, weight, env, terms, out);
                let second = self.terms(scope, b, right, env, terms, out);
                first.and(second)
            }
            ExprKind::Unary(UnaryOp::Neg, a) => self.terms(scope, a, -weight, env, terms, out),
            ExprKind::Binary(BinaryOp::Mul, a, b) if is_call(a) != is_call(b) => {
                let (factor, loss) = if is_call(a) { (b, a) } else { (a, b) };
                let factor = self.number(scope, factor, "the weight of a loss", 0.0..=f64::MAX)?;
                self.terms(scope, loss, weight * factor, env, terms, out)
            }
            ExprKind::Call { .. } => {
                let (value, call) = self.graph_call(scope, loss, None, false, env, out)?;
                if value.member("loss").is_none() {
                    let graph = scope.graph(&call.graph);
                    let diag = Diag::error(format!("graph `{}` has no output `loss`", call.graph))
                        .label(loss.span, "`update` needs it");
                    return self.error(match graph {
                        Some(graph) => diag.label(graph.name.span, "defined here"),
                        None => diag,
                    });
                }
                terms.push(Term { weight, graph: call.graph, args: call.args });
                Some(())
            }
            _ => {
                let diag = Diag::error(format!("found `{loss}`, expected a call of a graph")).label(loss.span, "");
                self.error(diag.help("a loss is `a(batch)`, or a sum such as `a(batch) + 0.5 * b(more)`"))
            }
        }
    }

    pub(super) fn average(&mut self, scope: &Scope<'_>, call: &Expr, args: &[Arg]) -> Option<Call> {
        let [of, from, decay] = self.args(call, args, ["average", "of", "decay"])?;
        let role = self.role(scope, of)?;
        let from = self.role(scope, from)?;
        let decay = self.number(scope, decay, "decay", 0.0..=1.0)?;
        let graph = crate::lower::average_graph(&role);
        let average = crate::lower::Average { role, of: from, decay };
        if !self.averages.contains(&average) {
            self.averages.push(average);
        }
        Some(Call { name: None, graph, args: Vec::new(), cached: false, steps: None })
    }

    pub(super) fn set(&mut self, scope: &Scope<'_>, values: &[(Word, Expr)], env: &Env) -> Option<Statement> {
        let mut inputs: Vec<(String, Type)> = Vec::new();
        let mut args = Vec::new();
        for (name, expr) in values {
            if !scope.states.contains(&name.text) {
                let known: Vec<&str> = scope.states.iter().map(String::as_str).collect();
                let diag = Diag::error(format!("found `{}`, expected a state", name.text)).label(name.span, "");
                return self.error(match known.is_empty() {
                    true => diag.help(format!("declare it: `state: {{{}: {{init: 0.0}}}}`", name.text)),
                    false => diag.help(format!("this recipe has {}", words(&known))),
                });
            }
            for found in names_of(expr) {
                let first = found.split('.').next().unwrap_or_default();
                if inputs.iter().any(|(known, _)| *known == found) || !env.iter().any(|(name, _)| name == first) {
                    continue;
                }
                let value = self.named(scope, &found, expr.span, env)?;
                let Some(dims) = value.tensor().map(|shape| shape.dims.as_slice()) else {
                    let diag = Diag::error(format!("found the record `{found}`, expected one value"));
                    return self.error(diag.label(expr.span, "").help(format!("it holds {}", words(&value.members()))));
                };
                let dims: Option<Vec<Dim>> = dims
                    .iter()
                    .map(|d| match d {
                        Extent::Range(a, b) if a == b => Some(Dim::from(*a)),
                        _ => None,
                    })
                    .collect();
                let Some(dims) = dims else {
                    let shape = value.tensor().map_or(String::new(), shown);
                    let diag =
                        Diag::error(format!("found {shape} in the new value of a state, expected a fixed shape"));
                    return self.error(diag.label(expr.span, "").help("let a graph take its mean or sum"));
                };
                let dtype = value.tensor().map_or(DType::F32, |shape| shape.dtype);
                inputs.push((found.clone(), Type::new(dtype, dims)));
                args.push((found, Operand::Path(value.path)));
            }
        }
        let graph = crate::lower::set_graph(self.sets.len());
        self.sets.push(crate::lower::Set { values: values.to_vec(), inputs });
        Some(Statement::Call(Call { name: None, graph, args, cached: false, steps: None }))
    }

    fn trained_role(&mut self, scope: &Scope<'_>, expr: &Expr) -> Option<String> {
        if let ExprKind::List(_) = &expr.kind {
            let diag = Diag::error("`update` of several models at once is not part of this version");
            return self.error(diag.label(expr.span, "").help("write one `update` for each"));
        }
        let name = self.role(scope, expr)?;
        if scope.roles.contains(&(name.clone(), true)) {
            return Some(name);
        }
        let diag = Diag::error(format!("found an update of `{name}`, which is not trained"));
        self.error(diag.label(expr.span, "").help(format!("write `{name}: {{..., trained: true}}` under `models`")))
    }
}
