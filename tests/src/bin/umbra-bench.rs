//! `umbra-bench`: see [`umbra_tests::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    umbra_tests::cli::main()
}
