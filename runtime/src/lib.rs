//! Runs planned programs: sessions, data, training, checkpoints, metrics.
//!
//! [`data`] turns files of rows into batches of tokens.

pub mod data;
