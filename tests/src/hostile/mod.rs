//! The hostile driver VM, or guest: a program in it that does what one would do that was taken over, beside a guest that must not notice
//! (`umbra-bench hostile`).
//!
//! [`plan`] says what each life does, from a seed; [`vm`] does it, in the VM that attacks; [`campaign`] watches from outside.

mod bystander;
pub mod campaign;
mod guest;
mod host;
pub mod plan;
pub mod report;
pub mod vm;
