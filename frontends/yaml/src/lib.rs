//! The YAML language of dsgc, and its standard library.
//!
//! ```text
//! text --node--> spanned tree --document, expr--> syntax trees --load, lower--> ir::Program, one for each stage
//! ```
//!
//! [`document::parse`] reads one of the four kinds of documents (a pipeline, a model, a recipe, functions) into a
//! syntax tree in which every name, number and expression knows its line and column. Nothing is looked up yet. All
//! errors of a file are collected and come as [`Diag`](dsgc_ir::diag::Diag)s; [`render`] shows them with the lines
//! they speak of.
//!
//! [`load::load`] makes programs of a pipeline: it finds the documents that it names, decides every setting, binds models
//! and rows, and has [`lower`] turn the graphs into those of the IR. [`load::check`] does as much as can be done with a
//! document of any kind.
//!
//! The keys of every mapping stand in a [`schema::Table`] beside its reader. Readers know no other keys, and what a
//! key means is written there and nowhere else.

pub mod document;
pub mod eval;
pub mod expr;
pub mod foreign;
pub mod functions;
pub mod graph;
pub mod library;
pub mod literal;
pub mod load;
pub mod lower;
pub mod model;
pub mod node;
pub mod pipeline;
pub mod plan;
mod reader;
pub mod recipe;
pub mod render;
pub mod schema;
pub mod text;
mod yaml_error;
