//! From documents to programs: what is lowered, its numbers in the interpreter, and what is said about mistakes.

mod setup;

mod documents;
mod heads;
mod mistakes;
mod mutations;
mod numbers;
mod states;
mod text;
