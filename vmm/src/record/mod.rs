//! What is kept and shown of a machine's run: events, the log that they go into, time lines, crash reports, status, metrics,
//! and the page of a machine's past.

pub mod archive;
pub mod crash_report;
pub mod events;
pub mod file;
pub mod health;
pub mod history;
pub mod log;
pub mod metrics;
pub mod parts;
pub mod recent;
pub mod schema;
pub mod status;
pub(crate) mod status_text;
pub mod threads;
pub mod timeline;
mod words;
pub mod writer;
