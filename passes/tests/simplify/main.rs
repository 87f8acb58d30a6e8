//! The pass `simplify`: its rules one by one against the interpreter, and what it promises of programs.

mod draw;
mod programs;
mod rules;
