//! Finds the micro batch with which a stage fits its memory.
//!
//! Rows of a call change no number, so a user whose stage does not fit wants to know how many do. Fewer rows can mean other
//! graphs, since a batch that was one call becomes several with accumulators between them; so every answer is that of the
//! whole pipeline.

use dsgc_ir::Program;
use dsgc_ir::diag::Diag;
use dsgc_ir::stage::Statement;

use crate::pipeline::{PIPELINE, PassContext, run_one};

/// The messages of a stage that does not fit, with the help that the most rows per call which do are.
pub(crate) fn with_help(errors: Vec<Diag>, program: &Program, context: &PassContext) -> Vec<Diag> {
    let help = match rows_that_fit(program, context) {
        Some(rows) => format!("`micro_batch_size: {rows}` fits, and changes no numbers"),
        None if most_rows(program) > 1 => "even `micro_batch_size: 1` needs more".into(),
        None => "it needs a smaller model, shorter rows or more memory".into(),
    };
    let kept = program.stage.memory.keep_all;
    let auto = |error: Diag| match kept {
        true => error.help("`gradient_checkpointing: auto` keeps less, and computes the rest again"),
        false => error,
    };
    errors.into_iter().map(|error| auto(error.help(help.clone()))).collect()
}

/// The most rows per call, fewer than the program asks for, with which it fits.
fn rows_that_fit(program: &Program, context: &PassContext) -> Option<usize> {
    let (mut fit, mut many) = (0, most_rows(program));
    while fit + 1 < many {
        let middle = fit.midpoint(many);
        match fits(with_rows(program, middle), context) {
            true => fit = middle,
            false => many = middle,
        }
    }
    (fit > 0).then_some(fit)
}

fn most_rows(program: &Program) -> usize {
    program.stage.sources.iter().map(|s| s.micro_batch_size).max().unwrap_or(0)
}

fn fits(program: Program, context: &PassContext) -> bool {
    let mut quiet = PassContext::new(context.target);
    quiet.numerics = context.numerics;
    PIPELINE.iter().try_fold(program, |program, pass| run_one(pass, program, &quiet)).is_ok()
}

/// The program with no more rows per call than these.
fn with_rows(program: &Program, rows: usize) -> Program {
    let mut program = program.clone();
    for source in &mut program.stage.sources {
        source.micro_batch_size = source.micro_batch_size.min(rows);
    }
    limit_generations(&mut program.stage.plan, rows);
    program.stage.evaluate.iter_mut().for_each(|evaluate| limit_generations(&mut evaluate.body, rows));
    program
}

fn limit_generations(plan: &mut [Statement], rows: usize) {
    for statement in plan {
        match statement {
            Statement::For { body, .. } | Statement::Repeat { body, .. } => limit_generations(body, rows),
            Statement::Generate(generate) => generate.rows = generate.rows.min(rows),
            Statement::Call(_)
            | Statement::Next { .. }
            | Statement::Join { .. }
            | Statement::Recent { .. }
            | Statement::Update(_) => {}
        }
    }
}
