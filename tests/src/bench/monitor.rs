//! QEMU's monitor (QMP), by which disks of a test host are taken out and put in.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde_json::{Value, json};

use super::patience::scaled;

/// Longest time that QEMU may take for an answer, as on the reference machine: a reset of a controller holds it up for as long as its
/// disk takes.
const ANSWER: Duration = Duration::from_secs(60);

/// A connection.
#[derive(Debug)]
pub(super) struct Monitor {
    stream: BufReader<UnixStream>,
    is_greeted: bool,
}

impl Monitor {
    /// Talks over `stream`, from the first command on.
    pub(super) fn new(stream: UnixStream) -> Self {
        Self { stream: BufReader::new(stream), is_greeted: false }
    }

    /// Has a command done.
    ///
    /// # Errors
    /// QEMU refuses it, does not answer, or is gone.
    pub(super) fn execute(&mut self, command: &str, arguments: &Value) -> io::Result<Value> {
        if !self.is_greeted {
            self.stream.get_ref().set_read_timeout(Some(scaled(ANSWER)))?;
            // It greets by itself.
            self.read()?;
            self.is_greeted = true;
            self.execute("qmp_capabilities", &json!({}))?;
        }
        let line = json!({ "execute": command, "arguments": arguments });
        self.stream.get_mut().write_all(format!("{line}\n").as_bytes())?;
        loop {
            let mut answer = self.read()?;
            if let Some(error) = answer.get("error") {
                return Err(io::Error::other(format!("{command}: {error}")));
            }
            // Events come in between.
            if let Some(answer) = answer.get_mut("return") {
                return Ok(answer.take());
            }
        }
    }

    fn read(&mut self) -> io::Result<Value> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(serde_json::from_str(&line)?)
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn events_are_passed_over_and_refusals_are_errors() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let qemu = thread::spawn(move || {
            theirs.write_all(b"{\"QMP\": {}}\n").unwrap();
            let mut asked = BufReader::new(theirs.try_clone().unwrap()).lines();
            let answers: [&[u8]; 3] = [
                b"{\"return\": {}}\n",
                b"{\"event\": \"DEVICE_DELETED\"}\n{\"return\": {\"n\": 1}}\n",
                b"{\"error\": {\"desc\": \"no such device\"}}\n",
            ];
            answers.map(|answer| {
                let line: Value = serde_json::from_str(&asked.next().unwrap().unwrap()).unwrap();
                theirs.write_all(answer).unwrap();
                line["execute"].as_str().unwrap().to_owned()
            })
        });
        let mut monitor = Monitor::new(ours);
        assert_eq!(monitor.execute("device_del", &json!({"id": "a"})).unwrap(), json!({"n": 1}));
        let refused = monitor.execute("device_del", &json!({"id": "b"})).unwrap_err();
        assert!(refused.to_string().contains("no such device"), "{refused}");
        assert_eq!(qemu.join().unwrap(), ["qmp_capabilities", "device_del", "device_del"]);
        assert!(monitor.execute("quit", &json!({})).is_err(), "it is gone");
    }
}
