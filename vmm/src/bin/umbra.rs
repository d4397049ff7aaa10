//! The `umbra` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    umbra_vmm::cli::main()
}
