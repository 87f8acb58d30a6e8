//! The pass `simplify`: its rules one by one against the interpreter, and what it promises of programs.

mod draw;
mod gradients;
mod programs;
mod rules;
