//! The shadow between a guest and disks that are made up.

pub(super) mod broken;
mod disk;
mod history;
mod host;
mod lives;
mod log;
mod model;
mod outages;
mod plan;
mod random;
mod rules;
mod seeds;
