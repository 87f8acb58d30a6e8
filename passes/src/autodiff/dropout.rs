//! Dropout where an update trains a role: which elements are left out depends on the update's key, the number of the
//! row in the optimizer batch, and the place in the row, so that it is the same however the batch is cut.
//!
//! ```text
//!                                          %k = fold %dropout.key data=3
//! %y = dropout %x p=0.1 stream=3    =>     %u = row_uniform %k, %dropout.row shape=[B, T, 64]
//!                                          %y = %x * where(0.1 <= %u, 1 / 0.9, 0)
//! ```

use dsgc_ir::diag::Diag;
use dsgc_ir::{Builder, DType, Dim, Graph, Op, OpData, Program, Symbol, Type, Value};

use crate::rebuild::Rebuild;

/// Name of the input with the key of the update, `key[]`.
pub const KEY: &str = "dropout.key";
/// Name of the input with the numbers of the rows in the optimizer batch, `i32[B]`.
pub const ROW: &str = "dropout.row";

/// The loss graph of a role's update with its dropout written out.
pub fn live(graph: &Graph, program: &Program, role: &str) -> Result<Graph, Diag> {
    let of_role = |op: &OpData| matches!(&op.op, Op::Dropout { role: of, .. } if of == role);
    let Some((_, first)) = graph.ops().find(|(_, op)| of_role(op)) else { return Ok(graph.clone()) };
    let Some(batch) = graph.batch.clone() else { return Err(without_rows(first, &graph.name)) };
    let mut rebuild = Rebuild::same(graph);
    let key = rebuild.new.input(KEY, Type::scalar(DType::Key));
    let row = rebuild.new.input(ROW, Type::new(DType::I32, [Dim::symbol(&batch)]));
    for (_, op) in graph.ops() {
        let (true, Op::Dropout { p, stream, .. }) = (of_role(op), &op.op) else {
            rebuild.copy(op, program);
            continue;
        };
        let x = rebuild.get(op.args[0]);
        let shape = rebuild.new.ty(x).dims.clone();
        let copies = copies(&shape, &batch).ok_or_else(|| without_rows(op, &graph.name))?;
        let mut b = Builder::new(&mut rebuild.new, op.site.clone());
        let rows = numbers(&mut b, row, copies);
        let key = b.one(Op::Fold { data: *stream }, &[key]);
        let drawn = b.one(Op::RowUniform { shape: shape.clone() }, &[key, rows]);
        let low = b.fill(*p, &shape);
        let stays = b.one(Op::Le {}, &[low, drawn]);
        let (factor, zero) = (b.fill(1.0 / (1.0 - p), &shape), b.fill(0.0, &shape));
        let factor = b.one(Op::Where {}, &[stays, factor, zero]);
        // A narrow factor would be off by more than what is left out.
        let wide = b.cast(x, DType::F32);
        let left = b.one(Op::Mul {}, &[wide, factor]);
        let left = b.cast(left, b.ty(x).dtype);
        rebuild.new.set_name(left, graph.name_of(op.result()));
        rebuild.set(op.result(), left);
    }
    Ok(rebuild.finish())
}

/// How many rows of a value belong to one of the batch: its first dim is so many times the batch.
fn copies(shape: &[Dim], batch: &Symbol) -> Option<i64> {
    let (factor, symbol) = shape.first()?.as_scaled_symbol()?;
    (symbol == batch).then_some(factor)
}

/// The numbers of the rows of a value that has all rows of the batch so many times, one time after the other: the
/// copies of a row have numbers of their own.
fn numbers(b: &mut Builder, row: Value, copies: i64) -> Value {
    if copies == 1 {
        return row;
    }
    let dims = b.ty(row).dims;
    let fill = |b: &mut Builder, value: i64| {
        let scalar = b.one(Op::Const { value: value as f64, dtype: DType::I32 }, &[]);
        b.stretch(scalar, &dims)
    };
    let times = fill(b, copies);
    let first = b.one(Op::Mul {}, &[row, times]);
    let all: Vec<Value> = (0..copies)
        .map(|copy| {
            let copy = fill(b, copy);
            b.one(Op::Add {}, &[first, copy])
        })
        .collect();
    b.one(Op::Concat { axis: 0 }, &all)
}

fn without_rows(op: &OpData, graph: &str) -> Diag {
    Diag::error(format!("found dropout in `{graph}` on a value whose first dim does not count rows"))
        .label(op.site.loc.span, "of this value")
        .help("which elements are left out depends on the row, so that micro-batches change nothing")
}
