//! The plan of a compiled stage in words.

use dsgc_ir::stage::{CallSteps, Operand, Operands, Rows, Stage, Statement, UpdateSteps};

/// The plan of a stage, as a reader would tell it.
pub fn plan_text(stage: &Stage) -> String {
    let mut lines = vec![format!("stage {} -> {}", stage.name, stage.output_dir)];
    for role in &stage.roles {
        let trained = if role.trained { "trained" } else { "frozen" };
        lines.push(format!("  role {}: {} ({trained}) from {:?}", role.name, role.model.family, role.origin));
    }
    for source in &stage.sources {
        let accumulation = source.batch_size.div_ceil(source.micro_batch_size.max(1));
        lines.push(format!(
            "  source {}: {}, {} rows per step = {} x micro-batches of {}, up to {} tokens",
            source.name, source.path, source.batch_size, accumulation, source.micro_batch_size, source.max_length
        ));
    }
    for evaluate in &stage.evaluate {
        lines.push(format!("  evaluate {}.eval", evaluate.source));
        statements(&evaluate.body, 2, &mut lines);
    }
    statements(&stage.plan, 1, &mut lines);
    for role in &stage.save {
        lines.push(format!("  save {role}"));
    }
    lines.join("\n")
}

fn statements(plan: &[Statement], depth: usize, lines: &mut Vec<String>) {
    let indent = "  ".repeat(depth);
    for statement in plan {
        match statement {
            Statement::For { batch, rows, body } => {
                let rows = match rows {
                    Rows::Source(source) => source.clone(),
                    Rows::Minibatches { table, size, keep, shuffle } => {
                        let keep = keep.as_ref().map_or(String::new(), |keep| format!(" where {keep}"));
                        format!("minibatches of {size} of {table}{keep}{}", if *shuffle { ", shuffled" } else { "" })
                    }
                };
                lines.push(format!("{indent}for {batch} in {rows}"));
                statements(body, depth + 1, lines);
            }
            Statement::Repeat { times, body } => {
                lines.push(format!("{indent}repeat {times}"));
                statements(body, depth + 1, lines);
            }
            Statement::Call(call) => {
                let name = call.name.as_ref().map_or(String::new(), |name| format!("{name} = "));
                let kept = if call.cached { ", kept per row" } else { "" };
                lines.push(format!("{indent}{name}{}({}){kept}", call.graph, operands(&call.args)));
                match call.steps.as_ref().expect("the passes filled it in") {
                    CallSteps::Whole => {}
                    CallSteps::Split { count, rows, finish } => {
                        parts(count.iter().chain([rows]), &indent, lines);
                        lines.extend(finish.iter().map(|graph| format!("{indent}  call {graph}")));
                    }
                    CallSteps::Joined(joined) => {
                        let roles: Vec<&str> = joined.updates.iter().map(|u| u.role.as_str()).collect();
                        let when = if joined.keep.is_some() { " where all rows are kept" } else { "" };
                        lines.push(format!(
                            "{indent}  call {}{when}: with the first update of {}",
                            joined.graph,
                            roles.join(" and of ")
                        ));
                    }
                }
            }
            Statement::Generate(generate) => {
                let steps = generate.steps.as_ref().expect("the passes filled it in");
                let gather = steps.gather.as_ref().map(|gather| format!("{gather}, ")).unwrap_or_default();
                lines.push(format!(
                    "{indent}{} = generate {} x {} from {}, {} rows at once, up to {} tokens: {gather}{}, then {}",
                    generate.name,
                    generate.samples,
                    generate.role,
                    generate.prompt,
                    generate.rows,
                    generate.max_new_tokens,
                    steps.prefill,
                    steps.step
                ));
            }
            Statement::Next { name, source } => lines.push(format!("{indent}{name} = next of {source}")),
            Statement::Join { name, parts } => lines.push(format!("{indent}{name} = join {}", parts.join(", "))),
            Statement::Recent { name, table, rows } => {
                lines.push(format!("{indent}{name} = the newest {rows} rows of {table}"));
            }
            Statement::Update(update) => {
                let terms: Vec<String> = update
                    .terms
                    .iter()
                    .map(|term| match term.weight {
                        1.0 => term.graph.clone(),
                        weight => format!("{weight} * {}", term.graph),
                    })
                    .collect();
                lines.push(format!("{indent}update {} on {}", update.role, terms.join(" + ")));
                match update.steps.as_ref().expect("the passes filled it in") {
                    UpdateSteps::Whole { step } => lines.push(format!("{indent}  call {step}")),
                    UpdateSteps::Split { terms, squares, apply } => {
                        for term in terms {
                            parts(term.count.iter().chain([&term.grad]), &indent, lines);
                            lines.push(format!("{indent}  call {}", term.finish));
                        }
                        lines.extend(squares.iter().map(|squares| format!("{indent}  call {squares}")));
                        let when = if squares.is_some() { " after the updates beside it are so far" } else { "" };
                        lines.push(format!("{indent}  call {apply}{when}"));
                    }
                }
            }
        }
    }
}

fn parts<'a>(graphs: impl Iterator<Item = &'a String>, indent: &str, lines: &mut Vec<String>) {
    lines.extend(graphs.map(|graph| format!("{indent}  call {graph} per micro-batch")));
}

/// What a call gets; of the tensors of a sequence, its name once.
fn operands(args: &Operands) -> String {
    let mut shown: Vec<String> = Vec::new();
    for (_, operand) in args {
        let text = match operand {
            Operand::Path(path) => path.rsplit_once('.').map_or(path.as_str(), |(record, _)| record).to_string(),
            Operand::State(name) => format!("state {name}"),
            Operand::Number(n) => n.to_string(),
        };
        if !shown.contains(&text) {
            shown.push(text);
        }
    }
    shown.join(", ")
}
