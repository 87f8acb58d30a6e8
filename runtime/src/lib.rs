//! Runs planned programs: sessions, data, training, checkpoints, metrics.
//!
//! ```text
//! Planned + Device --Session::open--> weights in the device, rows as tokens
//! Session::run --plan--> batches --calls--> graphs --> Event: data, evaluated, step, saved
//! ```
//!
//! [`data`] turns files of rows into batches of tokens; [`Session`] walks the plan and tells an observer what happens;
//! [`calls`] runs graphs on the parts of a batch, and a [`Decoder`] continues sequences. [`MetricsFile`] is an observer.
//! Where several ranks run a program, each has a session; what belongs to all of them is in `rank`.
//! A [`Scorer`] and a [`Generator`] run a model without training it.

pub mod calls;
mod checkpoint;
pub mod data;
mod evaluate;
mod generate;
mod generator;
mod metrics;
pub mod mpi;
mod pieces;
mod plan;
mod rank;
mod roles;
mod schedule;
mod score;
mod session;
mod steps;
mod values;

pub use checkpoint::{Checkpoint, Keeper, stage_of};
pub use generate::{Decoder, Next};
pub use generator::Generator;
pub use metrics::MetricsFile;
pub use pieces::in_pieces;
pub use rank::on_threads;
pub use schedule::learning_rate;
pub use score::{Score, Scorer};
pub use session::{Ended, Event, Metrics, Observer, Session};
