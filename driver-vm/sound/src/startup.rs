//! What the start took, from the card's appearance to the first sample: one line in the kernel's log. At its level the
//! console does not show it.

use std::fmt::Write as _;
use std::fs;
use std::sync::Mutex;
use std::time::Instant;

struct Marks {
    since: Instant,
    line: String,
}

static MARKS: Mutex<Option<Marks>> = Mutex::new(None);

/// The card has appeared.
pub fn begin() {
    with(|marks| *marks = Some(Marks { since: Instant::now(), line: String::new() }));
}

/// Something is done.
pub fn mark(what: &str) {
    with(|marks| {
        if let Some(Marks { since, line }) = marks {
            let micros = since.elapsed().as_micros();
            // A String takes everything.
            let _ = write!(line, " {what} {}.{} ms,", micros / 1000, micros / 100 % 10);
        }
    });
}

/// The start is over: writes the line, the first time.
pub fn end() {
    with(|marks| {
        if let Some(marks) = marks.take() {
            log(&format!("since the card is there:{}", marks.line.trim_end_matches(',')));
        }
    });
}

/// Writes a line to the kernel's log, which bounds how many it takes. Works without.
pub fn log(line: &str) {
    // 6: informational.
    let line = format!("<6>umbra-sound: {line}\n");
    let _ = fs::OpenOptions::new()
        .write(true)
        .open("/dev/kmsg")
        .and_then(|mut log| std::io::Write::write_all(&mut log, line.as_bytes()));
}

fn with(act: impl FnOnce(&mut Option<Marks>)) {
    if let Ok(mut marks) = MARKS.lock() {
        act(&mut marks);
    }
}
