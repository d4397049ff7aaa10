//! Logs: to stderr, quiet by default, each line with the VM and the life that it is about.
//!
//! A VM's process is about that VM alone. The supervisor's lines are about the VM whose span they are in (`vm`, made where
//! the supervisor turns to one), or about none.

use std::fmt;

use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, FormattedFields};
use tracing_subscriber::registry::LookupSpan;

use crate::base::untrusted_text::whole_line;
use crate::base::wall;

/// Warnings and errors.
const DEFAULT: &str = "warn";

/// Starts logging; lines that are about no VM are about `subject`. `UMBRA_LOG` takes a filter, as `debug` or
/// `umbra_vmm::vfio=trace`.
pub(super) fn init(subject: &str) {
    let filter = EnvFilter::try_from_env("UMBRA_LOG").unwrap_or_else(|_| EnvFilter::new(DEFAULT));
    let format = Lines { subject: subject.into() };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .event_format(format)
        .init();
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
        writeln!(writer, "{}", whole_line(&fields))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

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
}
