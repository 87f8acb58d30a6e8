//! Calls whose results have names: graphs, `generate`, `join`, `recent`, `next`.

use dsgc_ir::DType;
use dsgc_ir::diag::{Diag, nearest};
use dsgc_ir::stage::{Generate, Sampling, Statement};

use crate::expr::{Arg, Expr, ExprKind, Word};
use crate::literal::Constant;
use crate::schema::words;

use super::types::{Entry, Extent, Shape, Table, Value, shown};
use super::{Env, Planned, Scope, forget, forward_graph};

/// Functions whose results have names.
const FUNCTIONS: [&str; 5] = ["generate", "join", "recent", "next", "cached"];

impl Planned {
    /// A statement that is a call.
    pub(super) fn call(
        &mut self,
        scope: &Scope<'_>,
        name: Option<&Word>,
        call: &Expr,
        env: &mut Env,
        out: &mut Vec<Statement>,
    ) {
        let ExprKind::Call { function, args } = &call.kind else { return };
        match (function.text.as_str(), name) {
            ("update", None) => {
                let update = self.update(scope, call, args, env, out);
                out.extend(update.map(Statement::Update));
            }
            ("average", None) => {
                let average = self.average(scope, call, args);
                out.extend(average.map(Statement::Call));
            }
            ("update" | "average", Some(name)) => {
                let diag = Diag::error(format!("`{}` has no result to name", function.text)).label(name.span, "");
                self.errors.push(diag.help(format!("write `- {call}`")));
            }
            (_, None) if scope.graph(&function.text).is_none() && !FUNCTIONS.contains(&function.text.as_str()) => {
                self.unknown_function::<()>(scope, function);
            }
            (_, None) if FUNCTIONS.contains(&function.text.as_str()) && function.text != "cached" => {
                let diag = Diag::error(format!("nothing is done with the result of `{}`", function.text));
                self.errors.push(diag.label(call.span, "").help(format!("name it: `- rows: {call}`")));
            }
            (_, name) => {
                if let Some(name) = name {
                    let taken = scope.values.contains_key(&name.text)
                        || scope.states.contains(&name.text)
                        || scope.sources.iter().any(|s| s.name == name.text)
                        || env.iter().any(|(n, _)| *n == name.text);
                    if taken {
                        let diag = Diag::error(format!("`{}` has two meanings", name.text)).label(name.span, "");
                        self.errors.push(diag.help("give the result another name"));
                        return;
                    }
                }
                let path = name.map(|n| n.text.clone());
                if let Some(value) = self.result(scope, call, path, env, out) {
                    match name {
                        Some(name) => env.push((name.text.clone(), value)),
                        None => forget(out),
                    }
                }
            }
        }
    }

    pub(super) fn unknown_function<T>(&mut self, scope: &Scope<'_>, function: &Word) -> Option<T> {
        let known = scope.graphs.iter().map(|g| g.name.text.as_str()).chain(FUNCTIONS).chain(["update", "average"]);
        let diag = Diag::error(format!("unknown function `{}` in a plan", function.text)).label(function.span, "");
        let near = nearest(&function.text, known);
        self.error(match near {
            Some(near) => diag.help(format!("write `{near}`")),
            None => {
                let graphs: Vec<&str> = scope.graphs.iter().map(|g| g.name.text.as_str()).collect();
                diag.help(format!("this recipe has {}", words(&graphs)))
            }
        })
    }

    /// The value of a call; its statements are added to `out`. A value that nobody named gets a name of ours, which no
    /// user can write.
    pub(super) fn result(
        &mut self,
        scope: &Scope<'_>,
        call: &Expr,
        name: Option<String>,
        env: &Env,
        out: &mut Vec<Statement>,
    ) -> Option<Value> {
        let ExprKind::Call { function, args } = &call.kind else { return None };
        let named = name.is_some();
        let path = name.unwrap_or_else(|| {
            self.unnamed += 1;
            format!("{}#{}", function.text, self.unnamed)
        });
        let (value, statement) = match function.text.as_str() {
            "generate" => self.generate(scope, call, args, path, env, out)?,
            "next" => {
                let [source] = self.args(call, args, ["source"])?;
                let source = self.source(scope, source)?;
                let rows = self.batch_sizes.get(&source.name).copied().unwrap_or(source.batch_size);
                let table = self.table(&path, rows);
                (source.batch(path.clone(), &table), Statement::Next { name: path, source: source.name.clone() })
            }
            "join" => self.join(scope, call, args, path, env, out)?,
            "recent" => {
                let [table, rows] = self.args(call, args, ["table", "rows"])?;
                let value = self.argument(scope, table, env, out)?;
                let rows = self.count(scope, rows, "rows", 1)?;
                if value.table.is_none() {
                    let diag = Diag::error(format!("found `{table}`, which has no rows, expected a table"));
                    return self.error(diag.label(table.span, ""));
                }
                let from = value.path.clone();
                let fields =
                    value.fields.into_iter().filter(|(_, s)| s.dims.first() == Some(&Extent::Rows(1))).collect();
                let value = Value { path: path.clone(), fields, table: Some(self.table(&path, rows)) };
                (value, Statement::Recent { name: path, table: from, rows })
            }
            "cached" => {
                let (call, when) = self.cached(scope, call, args)?;
                let (value, call) = self.graph_call(scope, call, named.then_some(path), when, env, out)?;
                (value, Statement::Call(call))
            }
            _ => {
                // A result without a name is needed by its own call only where it is an argument.
                let (value, call) = self.graph_call(scope, call, Some(path), false, env, out)?;
                (value, Statement::Call(call))
            }
        };
        out.push(statement);
        Some(value)
    }

    /// The call in `cached(call, when=condition)`, and whether it is cached.
    fn cached<'e>(&mut self, scope: &Scope<'_>, call: &Expr, args: &'e [Arg]) -> Option<(&'e Expr, bool)> {
        let mut when = true;
        for arg in args.iter().filter(|a| a.name.is_some()) {
            match (arg.name.as_ref().map(|n| n.text.as_str()), self.constant(scope, &arg.value)?) {
                (Some("when"), Constant::Bool(yes)) => when = yes,
                (Some("when"), found) => {
                    let diag = Diag::error(format!("found `{found}`, expected `true` or `false`"));
                    return self.error(diag.label(arg.value.span, ""));
                }
                _ => return self.unknown_argument(arg, "cached(graph(batch), when=true)"),
            }
        }
        let plain: Vec<&Arg> = args.iter().filter(|a| a.name.is_none()).collect();
        match &plain[..] {
            [Arg { value: inner, .. }] if matches!(inner.kind, ExprKind::Call { .. }) => Some((inner, when)),
            _ => {
                let diag =
                    Diag::error(format!("found `{call}`, expected a call of a graph to keep")).label(call.span, "");
                self.error(diag.help("write `cached(reference(batch))`"))
            }
        }
    }

    fn join(
        &mut self,
        scope: &Scope<'_>,
        call: &Expr,
        args: &[Arg],
        path: String,
        env: &Env,
        out: &mut Vec<Statement>,
    ) -> Option<(Value, Statement)> {
        let (mut fields, mut parts, mut table): (Vec<(String, Shape)>, Vec<String>, Option<Table>) =
            (Vec::new(), Vec::new(), None);
        for arg in args {
            if arg.name.is_some() {
                return self.unknown_argument(arg, "join(a, b.member)");
            }
            let value = self.argument(scope, &arg.value, env, out)?;
            match (&table, &value.table) {
                (Some(a), Some(b)) if a.id != b.id => {
                    let diag = Diag::error(format!("found rows of `{}` beside those of `{}`", b.name, a.name));
                    return self.error(diag.label(arg.value.span, ""));
                }
                (None, Some(of)) => table = Some(of.clone()),
                _ => {}
            }
            // A member that is one tensor keeps its own name.
            let own = value.path.rsplit('.').next().unwrap_or_default().to_string();
            for (field, shape) in value.fields {
                let name = if field.is_empty() { own.clone() } else { field };
                if fields.iter().any(|(known, _)| *known == name) {
                    let diag = Diag::error(format!("found a second `{name}` in `{call}`")).label(arg.value.span, "");
                    return self.error(diag);
                }
                fields.push((name, shape));
            }
            parts.push(value.path);
        }
        Some((Value { path: path.clone(), fields, table }, Statement::Join { name: path, parts }))
    }

    fn generate(
        &mut self,
        scope: &Scope<'_>,
        call: &Expr,
        args: &[Arg],
        path: String,
        env: &Env,
        out: &mut Vec<Statement>,
    ) -> Option<(Value, Statement)> {
        const USAGE: &str = "generate(role, prompt, max_new_tokens=, samples=, temperature=, top_k=, top_p=, greedy=)";
        let plain: Vec<&Arg> = args.iter().filter(|a| a.name.is_none()).collect();
        let [role, prompt] = plain[..] else {
            let diag = Diag::error(format!("found `{call}`, expected a role and prompts")).label(call.span, "");
            return self.error(diag.help(format!("it is `{USAGE}`")));
        };
        let role = self.role(scope, &role.value)?;
        let sequence = self.argument(scope, &prompt.value, env, out)?;
        let (Some(table), Some((_, tokens)), true) =
            (sequence.table.clone(), sequence.fields.iter().find(|(name, _)| name == "tokens"), sequence.is_sequence())
        else {
            let diag = Diag::error(format!("found `{}`, expected a sequence of a batch", prompt.value));
            let members = sequence.members().join(", ");
            return self.error(diag.label(prompt.value.span, "").help(format!("it holds {members}")));
        };
        let Some(Extent::Range(low, high)) = tokens.dims.get(1).copied() else {
            let diag = Diag::error(format!("found {} as prompts, expected tokens", shown(tokens)));
            return self.error(diag.label(prompt.value.span, ""));
        };
        let (mut samples, mut new, mut greedy) = (1, None, false);
        let mut sampling = Sampling { temperature: 1.0, top_k: 0, top_p: 1.0 };
        for arg in args.iter() {
            let Some(name) = &arg.name else { continue };
            match name.text.as_str() {
                "samples" => samples = self.count(scope, &arg.value, "answers", 1)?,
                "max_new_tokens" => new = Some(self.count(scope, &arg.value, "new tokens", 1)?),
                "top_k" => sampling.top_k = self.count(scope, &arg.value, "as `top_k`", 0)?,
                "temperature" => {
                    sampling.temperature = self.number(scope, &arg.value, "temperature", 0.0..=f64::MAX)?
                }
                "top_p" => sampling.top_p = self.number(scope, &arg.value, "top_p", f64::MIN_POSITIVE..=1.0)?,
                "greedy" => match self.constant(scope, &arg.value)? {
                    Constant::Bool(yes) => greedy = yes,
                    found => {
                        let diag = Diag::error(format!("found `{found}`, expected `true` or `false`"));
                        return self.error(diag.label(arg.value.span, ""));
                    }
                },
                _ => return self.unknown_argument(arg, USAGE),
            }
        }
        let Some(new) = new else {
            let diag = Diag::error("`generate` misses `max_new_tokens`").label(call.span, "");
            return self.error(diag.help(format!("it is `{USAGE}`")));
        };
        if greedy {
            sampling = Sampling { temperature: 0.0, top_k: 0, top_p: 1.0 };
        }
        let Some(pad) = scope.ids.pad else {
            return self
                .error(Diag::error("`generate` needs a tokenizer with a padding or end token").label(call.span, ""));
        };
        let all = match samples {
            1 => table,
            _ => Table { samples, ..self.table(&path, table.rows * samples) },
        };
        let answer = new as i64;
        let whole = Value::sequence(path.clone(), &all, (low + answer, high + answer));
        let mut fields = whole.fields.clone();
        fields.extend(whole.fields.into_iter().map(|(name, shape)| (format!("seq.{name}"), shape)));
        let answers = Shape { dtype: DType::Bool, dims: vec![Extent::Rows(1), Extent::Range(answer, answer)] };
        fields.push(("answer".into(), answers));
        let forward = forward_graph(&role);
        self.enter(Entry {
            graph: forward.clone(),
            batch: Some("B".into()),
            rows: scope.micro_batch_size,
            ranges: vec![dsgc_ir::DimRange { symbol: "T".into(), min: 1, max: high + answer }],
        });
        let generate = Generate {
            name: path.clone(),
            role,
            prompt: sequence.path,
            samples,
            max_new_tokens: new,
            sampling,
            stop: scope.ids.eos,
            pad,
            forward,
            prompt_width: high as usize,
            rows: scope.micro_batch_size.min(all.rows / samples),
            steps: None,
        };
        Some((Value { path, fields, table: Some(all) }, Statement::Generate(generate)))
    }
}
