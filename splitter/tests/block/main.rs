//! A guest's disk over real rings and a real vhost-user connection: a driver VM's disk service as it should be, and as it must not be.
#![allow(clippy::unwrap_used)]

#[path = "../common/mod.rs"]
mod common;
mod guest;
mod hostile;
mod lives;
mod medium;
mod random;
mod sessions;
mod vm;
