//! Runs planned programs: sessions, data, training, checkpoints, metrics.
//!
//! ```text
//! Planned + Device --Session::open--> weights in the device, rows as tokens
//! Session::run --plan--> batches --calls--> graphs --> Event: data, evaluated, step, saved
//! ```
//!
//! [`data`] turns files of rows into batches of tokens; [`calls`] runs the graphs of an update on the parts of a
//! batch; [`Session`] walks the plan and tells an observer what happens; [`MetricsFile`] is such an observer.
//! [`Scorer`] runs a model without training it.

pub mod calls;
pub mod data;
mod metrics;
mod schedule;
mod score;
mod session;

pub use metrics::MetricsFile;
pub use schedule::learning_rate;
pub use score::{Score, Scorer};
pub use session::{Event, Metrics, Observer, Session};
