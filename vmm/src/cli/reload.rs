//! `umbra reload`: has a machine read its file again, and says of each key that differs what becomes of it.

use anyhow::bail;
use serde::Serialize;

use super::connection::{Connection, UNEXPECTED};
use crate::config::changes::{Change, Effect};
use crate::record::status_text::{Column, table};
use crate::supervisor::front::protocol::{Request, Response};

/// Arguments of `umbra reload`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "What can change as the machine runs is taken over, all at once, or nothing where the file has a mistake. SIGHUP to \
                        `umbra run` does the same, and says so as an event."
)]
pub struct Args {
    /// Only say what differs, and what would become of it.
    #[arg(long)]
    check: bool,
    /// The machine, where several run.
    #[arg(long, value_name = "MACHINE")]
    name: Option<String>,
    /// Print the answer as JSON.
    #[arg(long)]
    json: bool,
}

/// The answer.
#[derive(Debug, Serialize)]
struct Answer {
    name: String,
    check: bool,
    changes: Vec<Change>,
}

/// Runs the command.
///
/// # Errors
///
/// No machine answers, or its file has a mistake, or asks for what this host does not have.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let mut machine = Connection::open(args.name.as_deref())?;
    // A file may be on a file system that takes its time.
    machine.wait_for_ever()?;
    let Response::Reloaded { changes } = machine.ask(&Request::Reload { check: args.check })? else {
        bail!(UNEXPECTED)
    };
    let answer = Answer { name: machine.name, check: args.check, changes };
    if args.json { super::print_json(&answer) } else { super::print(&answer.text()) }
}

impl Answer {
    fn text(&self) -> String {
        if self.changes.is_empty() {
            return format!("{}: nothing in its file differs", self.name);
        }
        let columns: [Column<Change>; 4] = [
            ("KEY", |change| change.key.clone()),
            ("RUNS WITH", |change| change.before.clone().unwrap_or_else(|| "-".into())),
            ("FILE", |change| change.after.clone().unwrap_or_else(|| "removed".into())),
            ("TAKES EFFECT", when),
        ];
        let would = if self.check { "nothing was changed: this is what `umbra reload` would do" } else { "" };
        format!("{}{would}", table(&columns, &self.changes))
    }
}

/// When a change takes effect, and what to do for it.
fn when(change: &Change) -> String {
    let when = match change.effect {
        Effect::Now => "now",
        Effect::NextProcess => "in processes that are started from now on",
        Effect::NextStart => "with the guest's next start",
        Effect::NextLife => "with the driver VM's next life",
        Effect::Command => "not by this",
        Effect::NextRun => "not before the machine is started again",
    };
    change.remedy.as_ref().map_or_else(|| when.into(), |remedy| format!("{when}: {remedy}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_key_has_a_line_that_says_when() {
        let change = |key: &str, before: Option<&str>, after: Option<&str>, effect, remedy: Option<&str>| Change {
            key: key.into(),
            before: before.map(Into::into),
            after: after.map(Into::into),
            effect,
            remedy: remedy.map(Into::into),
        };
        let changes = vec![
            change("guest.web.cpus", Some("1"), Some("2"), Effect::NextStart, Some("`umbra reboot web`")),
            change("guest.db", None, Some("added"), Effect::Now, None),
            change("driver.nic1", Some("there"), None, Effect::NextRun, None),
        ];
        let answer = Answer { name: "m".into(), check: true, changes };
        let expected = "\
KEY             RUNS WITH  FILE     TAKES EFFECT
guest.web.cpus  1          2        with the guest's next start: `umbra reboot web`
guest.db        -          added    now
driver.nic1     there      removed  not before the machine is started again
nothing was changed: this is what `umbra reload` would do";
        assert_eq!(answer.text(), expected);
        let none = Answer { changes: vec![], ..answer };
        assert_eq!(none.text(), "m: nothing in its file differs");
    }
}
