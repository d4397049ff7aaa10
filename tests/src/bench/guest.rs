//! Scripts in guests that run in the test host: through the test host's exec server and the guest's console port.

use std::time::Duration;

use super::{Bench, BenchError, Output};

/// Where the test host has the sockets of its guests' exec servers.
pub const SOCKETS: &str = "/run/umbra-bench";

/// The socket of guest `name`'s exec server, in the place.
pub fn socket(name: &str) -> String {
    format!("{SOCKETS}/{name}.sock")
}

/// The socket of guest `name`'s second exec server ([`LONG_PORT_NAME`](crate::probe::wire::LONG_PORT_NAME)).
pub fn long_socket(name: &str) -> String {
    format!("{SOCKETS}/{name}.long.sock")
}

fn exec(socket: &str, script: &str, limit: Duration) -> String {
    // Scaled by `umbra-probe` itself, as is every time in its command line.
    format!("umbra-probe exec {socket} {} {}", quote(script), limit.as_secs_f64())
}

/// A guest in a test host.
pub struct Guest<'a> {
    bench: &'a mut Bench,
    name: String,
}

impl<'a> Guest<'a> {
    pub(super) fn new(bench: &'a mut Bench, name: &str) -> Self {
        Self { bench, name: name.into() }
    }

    /// The shell command that runs `script` in the guest.
    pub fn command(name: &str, script: &str, limit: Duration) -> String {
        exec(&socket(name), script, limit)
    }

    /// As [`Self::command`], through a port that nothing else uses: a script that goes on while others are run.
    pub fn long_command(name: &str, script: &str, limit: Duration) -> String {
        exec(&long_socket(name), script, limit)
    }

    /// Runs a script in the guest; waits for the guest to boot if need be.
    ///
    /// # Errors
    /// As [`Bench::run_for`].
    pub fn run_for(&mut self, script: &str, limit: Duration) -> Result<Output, BenchError> {
        let slack = Duration::from_secs(10);
        self.bench.run_for(&Self::command(&self.name, script, limit), limit + slack)
    }

    /// As [`Self::run_for`], with a minute.
    ///
    /// # Errors
    /// As [`Bench::run_for`].
    pub fn run(&mut self, script: &str) -> Result<Output, BenchError> {
        self.run_for(script, Duration::from_secs(60))
    }

    /// Runs a script that has to end with status 0; returns its standard output.
    ///
    /// # Errors
    /// As [`Bench::expect`].
    pub fn expect(&mut self, script: &str, limit: Duration) -> Result<String, BenchError> {
        let slack = Duration::from_secs(10);
        self.bench.expect(&Self::command(&self.name, script, limit), limit + slack)
    }
}

/// Makes one shell word of any text.
pub fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quoted_text_is_one_word() {
        let text = "it's \"$HOME\"; `x` \\";
        let output =
            std::process::Command::new("/bin/sh").args(["-c", &format!("printf %s {}", quote(text))]).output().unwrap();
        assert_eq!(String::from_utf8(output.stdout).unwrap(), text);
    }
}
