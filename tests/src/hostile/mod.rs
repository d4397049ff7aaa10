//! The hostile driver VM: a program in it that does what one would do that was taken over, beside a guest that must not notice
//! (`umbra-bench hostile`).
//!
//! [`plan`] says what each life does, from a seed; [`vm`] does it, in the driver VM; [`campaign`] watches from outside.

mod bystander;
pub mod campaign;
mod host;
pub mod plan;
pub mod report;
pub mod vm;
