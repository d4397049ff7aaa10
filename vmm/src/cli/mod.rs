//! The command line of `umbra`.
