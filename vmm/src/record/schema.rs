//! The version of what programs read: each JSON object that Umbra prints or sends has it as `schema` (`docs/programs.md`).

use serde::Serialize;

/// The number. A field that goes, or means something else, raises it; fields that are added do not.
pub const SCHEMA: u32 = 1;

/// `value`, an object in JSON, with its `schema` as the last field.
#[derive(Debug, Serialize)]
pub struct Versioned<'a, T> {
    #[serde(flatten)]
    value: &'a T,
    schema: u32,
}

impl<'a, T> Versioned<'a, T> {
    /// `value` in the present version.
    pub fn new(value: &'a T) -> Self {
        Self { value, schema: SCHEMA }
    }
}
