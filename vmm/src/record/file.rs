//! The file of `umbra run --events`: what earlier runs have written stays in it.
//!
//! Invariant: a run's first event, which has the number 1, begins a line, also where the run before was killed in the midst
//! of one.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;

/// Opens `path` for the events of a run, behind what is there. It may be a pipe or a terminal.
///
/// # Errors
///
/// It cannot be made, or not be written.
pub fn open(path: &Path) -> io::Result<File> {
    let mut file = OpenOptions::new().append(true).create(true).open(path)?;
    if file.metadata()?.is_file() && ends_in_mid_line(path)? {
        file.write_all(b"\n")?;
    }
    Ok(file)
}

fn ends_in_mid_line(path: &Path) -> io::Result<bool> {
    // The file may be for writing alone.
    let Ok(mut file) = File::open(path) else { return Ok(false) };
    if file.metadata()?.len() == 0 {
        return Ok(false);
    }
    file.seek(SeekFrom::End(-1))?;
    let mut last = [0];
    file.read_exact(&mut last)?;
    Ok(last != *b"\n")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs;

    use super::*;
    use crate::record::events::{Events, Verbosity};

    #[test]
    fn a_second_run_adds_to_what_the_first_has_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events");
        for run in ["first", "second"] {
            let mut events = Events::new(Verbosity::Quiet, Some(open(&path).unwrap()));
            events.warn(run.into());
            events.warn("more".into());
            events.finish();
            if run == "first" {
                // As if it was killed.
                open(&path).unwrap().write_all(b"{\"seq\":3,\"ev").unwrap();
            }
        }
        let text = fs::read_to_string(&path).unwrap();
        let lines: Vec<_> = text.lines().map(serde_json::from_str::<serde_json::Value>).collect();
        assert_eq!(lines.len(), 5, "{text}");
        assert!(lines[2].is_err(), "half a line stays by itself");
        let begins: Vec<_> =
            lines.iter().flatten().filter(|line| line["seq"] == 1).map(|line| line["what"].clone()).collect();
        assert_eq!(begins, ["first", "second"]);
    }

    #[test]
    fn a_place_that_is_no_file_is_taken_as_it_is() {
        assert!(open("/dev/null".as_ref()).is_ok());
        assert!(open("/proc/no/such".as_ref()).is_err());
    }
}
