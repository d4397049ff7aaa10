//! Logs: to stderr, quiet by default, each line with the VM and the life that it is about.
//!
//! The supervisor and the VMs' processes have event loops, which must not wait for a stderr that is held: a thread writes
//! their lines. Other commands write theirs themselves.
//!
//! Warnings and errors of libraries are limited as those of a device are ([`LogLimit`]): some libraries (`virtio-queue`) log an
//! error each time a VM's driver is wrong.
//!
//! A VM's process is about that VM alone. The supervisor's lines are about the VM whose span they are in (`vm`, made where
//! the supervisor turns to one), or about none.

use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::Instant;

use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::writer::BoxMakeWriter;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, FormattedFields};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use umbra_splitter::log_limit::LogLimit;

use crate::base::background_writer::{BackgroundWriter, PATIENCE};
use crate::base::lock::lock;
use crate::base::untrusted_text::whole_line;
use crate::base::wall;

/// Environment variable: what is logged, as `debug` or `umbra_vmm::vfio=trace`.
const FILTER: &str = "UMBRA_LOG";
/// Without it: warnings and errors.
const DEFAULT: LevelFilter = LevelFilter::WARN;

/// Bytes of lines that wait for a stderr that takes none: some thousand lines.
const BUFFER: usize = 512 << 10;

/// The lines' way to stderr, where a thread writes them.
static QUEUE: OnceLock<BackgroundWriter> = OnceLock::new();

/// Who writes the lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WrittenBy {
    /// Whoever logs.
    Caller,
    /// A thread of its own.
    Thread,
}

/// Starts logging; lines that are about no VM are about `subject`. What is wrong with the filter that the user asks for, if anything is:
/// the usual one is in its place.
pub(super) fn init(subject: &str, written_by: WrittenBy) -> Option<String> {
    let asked = std::env::var(FILTER).unwrap_or_default();
    let (filter, refused) = match filter(&asked) {
        Ok(filter) => (filter, None),
        Err(why) => {
            let what = format!("{FILTER}={asked} is no log filter ({why}); one is `debug`, or `umbra_vmm::vfio=trace`");
            (Targets::new().with_default(DEFAULT), Some(what))
        }
    };
    let (format, libraries) = (Lines { subject: subject.into() }, Libraries::new());
    let queue = match written_by {
        WrittenBy::Caller => None,
        WrittenBy::Thread => queue_to_stderr().ok().map(|queue| QUEUE.get_or_init(|| queue)),
    };
    let writer = match queue {
        Some(queue) => BoxMakeWriter::new(move || Queued(queue)),
        None => BoxMakeWriter::new(io::stderr),
    };
    let lines = tracing_subscriber::fmt::layer().with_writer(writer).with_ansi(false).event_format(format);
    tracing_subscriber::registry().with(lines).with(libraries).with(filter).init();
    refused
}

/// The filter that is `asked` for; nothing asks for [`DEFAULT`].
fn filter(asked: &str) -> Result<Targets, String> {
    match asked.trim() {
        "" => Ok(Targets::new().with_default(DEFAULT)),
        asked => asked.parse().map_err(|error| format!("{error}")),
    }
}

/// Waits a bounded time until all lines are written.
pub(super) fn finish() {
    if let Some(queue) = QUEUE.get() {
        queue.finish(PATIENCE);
    }
}

/// Writes past the lock of [`io::stderr`], which others would wait for while stderr is held.
fn queue_to_stderr() -> io::Result<BackgroundWriter> {
    let stderr = File::from(io::stderr().as_fd().try_clone_to_owned()?);
    // With stderr gone there is nowhere to report that.
    BackgroundWriter::start("log", BUFFER, stderr, mark, |_| {})
}

/// What stands in the log in place of `lost` bytes, which may end within a line.
fn mark(lost: u64) -> String {
    format!("\numbra: {lost} bytes of the log are lost here: they were not taken in time\n")
}

/// Takes whole lines, which the subscriber writes with one call each.
struct Queued(&'static BackgroundWriter);

impl Write for Queued {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.push(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Leaves out what libraries log beyond their allowance.
struct Libraries(Mutex<LogLimit>);

/// Lines of libraries that were left out since one was written.
static LEFT_OUT: AtomicU64 = AtomicU64::new(0);

impl Libraries {
    fn new() -> Self {
        Self(Mutex::default())
    }
}

/// Whether an event is this program's own. What libraries log by the `log` crate has `log` as its target.
fn is_ours(event: &Event<'_>) -> bool {
    event.metadata().target().starts_with("umbra")
}

impl<S: Subscriber> Layer<S> for Libraries {
    fn event_enabled(&self, event: &Event<'_>, _: Context<'_, S>) -> bool {
        // Details are logged for somebody who asked for them.
        if is_ours(event) || *event.metadata().level() > Level::WARN {
            return true;
        }
        let taken = lock(&self.0).take(Instant::now());
        LEFT_OUT.fetch_add(taken.unwrap_or_default(), Ordering::Relaxed);
        taken.is_some()
    }
}

/// `2026-01-02T03:04:05.678Z  WARN nic0.3: the message field=value`.
struct Lines {
    subject: String,
}

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let meta = event.metadata();
        write!(writer, "{} {:>5} ", wall::now(), meta.level())?;
        let span = context.lookup_current();
        let extensions = span.as_ref().map(tracing_subscriber::registry::SpanRef::extensions);
        let vm = extensions.as_ref().and_then(|extensions| extensions.get::<FormattedFields<N>>());
        match vm {
            Some(vm) => write!(writer, "{}: ", vm.fields)?,
            None => write!(writer, "{}: ", self.subject)?,
        }
        if *meta.level() > Level::INFO {
            // For those who look into it: where in the program.
            write!(writer, "[{}] ", meta.target())?;
        }
        // What a VM said may be in them.
        let mut fields = String::new();
        context.format_fields(Writer::new(&mut fields), event)?;
        write!(writer, "{}", whole_line(&fields))?;
        match if is_ours(event) { 0 } else { LEFT_OUT.swap(0, Ordering::Relaxed) } {
            0 => writeln!(writer),
            left_out => writeln!(writer, " (and {left_out} lines of libraries before, left out)"),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn a_filter_is_a_level_or_one_for_each_module() {
        let takes = |asked: &str, module: &str, level: Level| filter(asked).unwrap().would_enable(module, &level);
        assert!(takes("", "umbra_vmm::vfio", Level::WARN) && !takes(" ", "umbra_vmm::vfio", Level::INFO));
        assert!(takes("debug", "umbra_vmm", Level::DEBUG) && !takes("debug", "umbra_vmm", Level::TRACE));
        assert!(takes("umbra_vmm::vfio=trace", "umbra_vmm::vfio", Level::TRACE));
        assert!(takes("warn,umbra_vmm::vfio=trace", "umbra_vmm", Level::WARN));
        assert!(filter("umbra_vmm=loud").is_err());
    }

    #[test]
    fn each_line_names_what_it_is_about() {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(Level::DEBUG)
            .with_writer(move || writer.try_clone().unwrap())
            .with_ansi(false)
            .event_format(Lines { subject: "supervisor".into() })
            .finish();
        tracing::subscriber::with_default(subscriber, || {
            tracing::warn!(count = 3, "of none");
            let _vm = crate::supervisor::run::span("nic0", Some(3)).entered();
            tracing::warn!("of one, \u{1b}[31m\u{202e}\n in one line");
            tracing::debug!("in detail");
        });
        std::io::stdout().flush().unwrap();
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        let lines: Vec<_> = text.lines().map(|line| &line["2026-01-02T03:04:05.678Z ".len()..]).collect();
        assert_eq!(
            lines[..2],
            [" WARN supervisor: of none count=3", r" WARN nic0.3: of one, \x1b[31m\u{202e}\n in one line"]
        );
        assert_eq!(lines[2], format!("DEBUG nic0.3: [{}] in detail", module_path!()));
    }

    #[test]
    fn libraries_say_a_few_lines_and_how_many_more_there_were() {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let format = Lines { subject: "web".into() };
        let lines = tracing_subscriber::fmt::layer();
        let lines = lines.with_writer(move || writer.try_clone().unwrap()).with_ansi(false).event_format(format);
        let libraries = Libraries::new();
        let subscriber = tracing_subscriber::registry().with(lines).with(libraries);
        tracing::subscriber::with_default(subscriber, || {
            (0..100).for_each(|n| tracing::error!(target: "log", "queue {n} is wrong"));
            (0..100).for_each(|n| tracing::warn!("ours {n}"));
        });
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        let count = |word: &str| text.lines().filter(|line| line.contains(word)).count();
        assert_eq!((count("is wrong"), count("ours")), (5, 100), "{text}");
    }

    #[test]
    fn a_stderr_that_nobody_reads_holds_up_nobody_and_the_last_lines_are_kept() {
        let (mut reader, pipe) = std::io::pipe().unwrap();
        let queue = BackgroundWriter::start("log", BUFFER, pipe, mark, |_| {}).unwrap();
        let queue: &'static BackgroundWriter = Box::leak(Box::new(queue));
        let subscriber = tracing_subscriber::fmt()
            .with_writer(move || Queued(queue))
            .with_ansi(false)
            .event_format(Lines { subject: "web".into() })
            .finish();
        // Several times what pipe and buffer hold: this returns, or the test hangs.
        tracing::subscriber::with_default(subscriber, || (0..40_000).for_each(|n| tracing::warn!("line {n}")));
        assert!(queue.lost() > 0);
        let end = format!("web: line {}\n", 39_999);
        let mut text = Vec::new();
        while !text.ends_with(end.as_bytes()) {
            let mut chunk = [0; 4096];
            let read = reader.read(&mut chunk).unwrap();
            text.extend_from_slice(&chunk[..read]);
        }
        let text = String::from_utf8(text).unwrap();
        // A mark for each loss: the thread that writes may be slow before the pipe is full, too.
        let marks = text.split("umbra: ").filter_map(|part| part.split_once(" bytes of the log are lost here"));
        assert_eq!(marks.map(|(lost, _)| lost.parse::<u64>().unwrap()).sum::<u64>(), queue.lost(), "the counts");
    }
}
