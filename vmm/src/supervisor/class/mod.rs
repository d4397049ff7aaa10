//! What the supervisor does differently for each device class.

pub(in crate::supervisor) mod carrier;
pub(in crate::supervisor) mod settings;
mod sound;
