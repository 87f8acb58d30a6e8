//! The graph of dsgc: this documentation is its specification.
//!
//! A [`Program`] is what one stage of a pipeline runs: parameters and states, graphs over them, and the host side
//! ([`stage::Stage`]) that says which graph is called when. Programs have a text form (`.dsg`): `Display` writes it,
//! [`parse()`] reads it, and writing what was read gives the same text.
//!
//! # Values and ops
//!
//! A [`Graph`] is a list of ops in program order; every op takes values defined earlier and defines new ones (SSA).
//! Ids are dense numbers, so tables about a graph are vectors. A value has a [`Type`]: an element type and dims.
//! Dims are numbers or polynomials over symbols ([`Dim`]); symbols are declared by the graph with a range and bound
//! when it is launched. Shapes never depend on data: lengths are values and masks, capacity is a dim.
//!
//! The ops are the rows of one table ([`op`]); [`mod@infer`] gives their result types, the interpreter their
//! meaning. Broadcasting is explicit ([`Op::Broadcast`]): elementwise ops take operands of one type. Late in the
//! pipeline elementwise ops are joined to regions around at most one reduction each ([`Op::Fused`]), whose meaning is that
//! of the ops in their [`Body`].
//!
//! # State
//!
//! Parameters and states belong to the program. A graph sees one through [`Op::Read`], which gives the value it had
//! when the graph began, and changes it through [`Op::Write`], at most once, after all reads. In-place update is a
//! fact of the memory plan, never an op. States are zero when a session begins.
//!
//! # Randomness
//!
//! Random numbers come from keys, which are operands: threefry2x32 (Salmon et al. 2011) with the counter (first
//! coordinate, linear index of the rest). An element depends on its key and its coordinates and on nothing else, so
//! cutting a tensor along its first dim leaves every number unchanged.
//!
//! # Sites
//!
//! Every op carries a [`Site`]: the user's line it comes from and how ([`Loc`]), what it is computed for
//! ([`Phase`]), and which instance of a repeated layer it belongs to ([`Tag`]). Derived ops inherit it.
//!
//! # Levels
//!
//! One IR, a stricter verifier each time: *logical* is what frontends make and most passes rewrite; *partitioned* is what
//! one rank of a [`Mesh`] runs: a state with a [`Placement`] is the rank's part of it, and what ranks send to each other are
//! ops ([`Class::Collective`]); *planned* has a buffer for every value and state, and only the verifier can make a
//! [`Planned`], which is all that `runtime` takes. A program for one rank goes from the first to the last.

pub mod body;
pub mod cost;
pub mod diag;
pub mod dim;
pub mod factors;
#[cfg(feature = "fuzz")]
pub mod fuzz;
mod graph;
pub mod held;
pub mod infer;
pub mod mesh;
pub mod op;
mod parse;
pub mod print;
mod program;
mod quantized;
pub mod schedule;
pub mod segment;
pub mod stage;
mod target;
mod tensor;
pub mod trained;
mod types;
pub mod verify;

pub use body::{Along, Body, ProductPart, Reduction, Step};
pub use dim::{Bindings, Dim, Symbol};
pub use graph::{
    Buffer, Builder, DimRange, Graph, Loc, OpData, OpId, Phase, Reason, Region, Site, StateId, Tag, Value,
};
pub use mesh::{Axis, Cut, Mesh, Placement};
pub use op::{Class, Op};
pub use parse::parse;
pub use program::{Arena, Level, Program, State, StateKind};
pub use quantized::Quantized;
pub use target::Target;
pub use tensor::{Data, Tensor};
pub use types::{DType, DimList, Type};
pub use verify::Planned;
