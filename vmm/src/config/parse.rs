//! From the text of a machine file to a [`Machine`], and from each mistake to the line that has it.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};

use thiserror::Error;
use toml::de::{DeTable, DeValue};

use super::metrics_address::Address;

use super::check::closest;
use super::{Console, DEFAULT_DISK_DRIVER_MEMORY, DEFAULT_DRIVER_MEMORY, Machine, PathStep};

/// Largest machine file in bytes: a bound on what is read, far above any real one.
const MAX_FILE: u64 = 1 << 20;

/// Why a file is no machine.
#[derive(Debug, Error)]
pub enum SpecError {
    /// The file cannot be read.
    #[error("read the machine file {}", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not a text of reasonable size.
    #[error("{}: {what}", path.display())]
    NotText {
        /// Which file.
        path: PathBuf,
        /// Why not.
        what: String,
    },
    /// The text has a mistake.
    #[error("{}:{line}: {what}", path.display())]
    Mistake {
        /// Which file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// What is wrong.
        what: String,
    },
}

impl Machine {
    /// Reads a machine file.
    ///
    /// # Errors
    ///
    /// The file cannot be read, or its text has a mistake.
    pub fn read(path: &Path) -> Result<Self, SpecError> {
        let fail = |source| SpecError::Read { path: path.into(), source };
        let mut bytes = Vec::new();
        // A device says nothing of its size.
        File::open(path).and_then(|file| file.take(MAX_FILE + 1).read_to_end(&mut bytes)).map_err(fail)?;
        if bytes.len() as u64 > MAX_FILE {
            let what = format!("is too long for a machine file, which has {MAX_FILE} bytes at most");
            return Err(SpecError::NotText { path: path.into(), what });
        }
        let text = String::from_utf8(bytes).map_err(|_| SpecError::NotText {
            path: path.into(),
            what: "is no UTF-8 text, so no machine file".into(),
        })?;
        Self::parse(&text, path)
    }

    /// Parses the text of the machine file `path`. Relative paths in it are relative to the file's folder.
    ///
    /// # Errors
    ///
    /// The first mistake, with its line.
    pub fn parse(text: &str, path: &Path) -> Result<Self, SpecError> {
        let mistake = |at: usize, what: String| SpecError::Mistake { path: path.into(), line: line_of(text, at), what };
        let mut machine: Self = toml::from_str(text).map_err(|error| {
            let span: Range<usize> = error.span().unwrap_or_default();
            mistake(span.start, in_words(error.message(), text.get(span).unwrap_or_default()))
        })?;
        machine.check().map_err(|problem| {
            let at = locate(text, &problem.at).unwrap_or(0);
            let other = locate(text, &problem.other).map(|at| format!(" (line {})", line_of(text, at)));
            mistake(at, format!("{problem}{}", other.unwrap_or_default()))
        })?;
        machine.fill_in();
        machine.resolve_paths(path.parent().unwrap_or(Path::new("")));
        Ok(machine)
    }

    /// Fills in what depends on other tables.
    fn fill_in(&mut self) {
        let with_disks: Vec<_> = self.driver.keys().filter(|name| self.serves_disks(name)).cloned().collect();
        for (name, driver) in &mut self.driver {
            let default = if with_disks.contains(name) { DEFAULT_DISK_DRIVER_MEMORY } else { DEFAULT_DRIVER_MEMORY };
            driver.memory.get_or_insert(default);
        }
    }

    /// Makes relative paths relative to `base`.
    fn resolve_paths(&mut self, base: &Path) {
        let resolve = |path: &mut PathBuf| *path = base.join(&*path);
        if let Some(Address::Socket(path)) = &mut self.metrics {
            resolve(path);
        }
        for guest in self.guest.values_mut() {
            resolve(&mut guest.kernel);
            guest.initrd.iter_mut().for_each(resolve);
            guest.disk.iter_mut().filter_map(|disk| disk.path.as_mut()).for_each(resolve);
            guest.port.iter_mut().for_each(|port| resolve(&mut port.socket));
            if let Console::File(path) = &mut guest.console {
                resolve(path);
            }
        }
        self.driver.values_mut().for_each(|driver| resolve(&mut driver.image));
    }
}

/// The line of byte `at`, from 1.
fn line_of(text: &str, at: usize) -> usize {
    1 + text.bytes().take(at).filter(|b| *b == b'\n').count()
}

/// Ends of the parser's messages, and what a user has to write there.
const HINTS: [(&str, &str); 19] = [
    ("map, expected a sequence", "write it with two brackets, as [[guest.web.net]], once for each"),
    ("expected a sequence", "write a list, as [\"one\", \"two\"]"),
    ("expected a boolean", "write true or false, without quotes"),
    ("expected one of `off`, `terminal`, `file`", CONSOLE_FILE),
    ("expected newtype variant", CONSOLE_FILE),
    ("wanted exactly 1 element", CONSOLE_FILE),
    ("wanted string or table", "write one of its words, in quotes"),
    ("expected u8", "write a whole number from 0 to 255, without quotes"),
    ("expected u16", "write a whole number from 0 to 65535, without quotes"),
    ("expected u32", "write a whole number from 0 to 4294967295, without quotes"),
    ("expected a map", "name each in a table of its own, as [guest.web]"),
    ("expected struct GuestDisk", "write a table, as { path = \"debian.raw\" }"),
    ("expected struct GuestRestart", RESTART),
    ("expected struct Guest", "name each guest in a table of its own, as [guest.web]"),
    ("expected struct Restart", RESTART),
    ("expected struct Driver", "name each driver VM in a table of its own, as [driver.nic0]"),
    ("expected struct Net", "write a table, as { driver = \"nic0\" }"),
    ("expected struct Sound", "write a table, as { driver = \"snd0\" }"),
    ("expected struct Port", "write a table, as { name = \"agent\", socket = \"agent.sock\" }"),
];
const CONSOLE_FILE: &str = "for a file write console = { file = \"web.log\" }";
const RESTART: &str = "write a table, as { limit = 5, interval_s = 60 }";

/// What the parser says of a name that is there twice.
const TWICE: &str = "duplicate key";

/// One sentence out of the parser's message about the text `of`, with what to write instead, or a guess at what a misspelt key was meant
/// to be.
fn in_words(message: &str, of: &str) -> String {
    let line = message.lines().next().unwrap_or("no machine file").trim();
    if line == TWICE {
        return format!("`{of}` is there already, further up: give one of the two another name, or remove it");
    }
    if let Some((_, hint)) = HINTS.iter().find(|(sign, _)| line.contains(sign)) {
        return format!("{line}: {hint}");
    }
    let mut quoted = line.split('`').skip(1).step_by(2);
    let guess = match quoted.next() {
        Some(word) if line.starts_with("unknown ") => closest(word, quoted),
        _ => None,
    };
    match guess {
        Some(guess) => format!("{line}; did you mean `{guess}`?"),
        None => line.into(),
    }
}

/// The byte at which the thing at the end of the way `steps` starts, or the innermost table around it.
fn locate(text: &str, steps: &[PathStep]) -> Option<usize> {
    let root = DeTable::parse(text).ok()?;
    let (first, rest) = steps.split_first()?;
    let PathStep::Key(first) = first else { return None };
    let (key, mut value) = root.get_ref().get_key_value(first.as_str())?;
    let mut at = key.span().start;
    for step in rest {
        let next = match (step, value.get_ref()) {
            (PathStep::Key(key), DeValue::Table(table)) => {
                table.get_key_value(key.as_str()).map(|(key, value)| (key.span().start, value))
            }
            (PathStep::Index(index), DeValue::Array(array)) => {
                array.get(*index).map(|value| (value.span().start, value))
            }
            _ => None,
        };
        let Some(next) = next else { break };
        (at, value) = next;
    }
    Some(at)
}

impl fmt::Display for Machine {
    /// The machine as a file would have it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&toml::to_string(self).map_err(|_| fmt::Error)?)
    }
}

#[cfg(test)]
#[path = "parse_tests.rs"]
mod tests;
