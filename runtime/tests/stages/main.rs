//! Small stages in text form, run in the interpreter.

mod common;
mod generate;
mod plan;
mod roles;
mod training;
