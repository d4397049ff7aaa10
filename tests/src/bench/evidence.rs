//! What a test host does at the moment in which its scenario fails: whether it still runs scripts, what its processes wait for, and
//! whether the emulator's processors run at all. Without it, a machine that stands still cannot be told from one that is waited for.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs;
use std::time::Duration;

use super::{Bench, patience};

/// Name of the file in the bench's folder.
pub(super) const FILE: &str = "failed.log";

/// How long the emulator's threads are watched.
const WATCH: Duration = Duration::from_secs(1);
/// Longest time for an answer of the test host, as on the reference machine.
const ANSWER: Duration = Duration::from_secs(10);

/// State and kernel function of each process, the kernel stacks of those of Umbra, and the kernel's last words.
const SCRIPT: &str = "for p in /proc/[0-9]*; do
  words=$(tr '\\0' ' ' <$p/cmdline | cut -c1-100); [ -n \"$words\" ] || continue
  echo \"${p#/proc/} $(sed -n 's/^State:.//p' $p/status) $(cat $p/wchan): $words\"
  case $words in *umbra*) for t in $p/task/*; do echo \"  $(cat $t/comm)\"; sed 's/^/    /' $t/stack; done;; esac
done 2>/dev/null
dmesg | tail -n 40";

/// Clock ticks that each thread of process `pid` has run, by number, with its name and what it does in the kernel.
fn threads(pid: u32) -> BTreeMap<OsString, (String, u64)> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let thread = |task: fs::DirEntry| {
        let stat = fs::read_to_string(task.path().join("stat")).ok()?;
        let (name, rest) = stat.split_once('(')?.1.rsplit_once(") ")?;
        let fields: Vec<_> = rest.split(' ').collect();
        // proc_pid_stat(5): state is the third field, utime and stime the 14th and 15th.
        let ran = fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?;
        let waits = fs::read_to_string(task.path().join("wchan")).unwrap_or_default();
        Some((task.file_name(), (format!("{name} ({} {waits})", fields.first()?), ran)))
    };
    tasks.filter_map(thread).collect()
}

/// Looks at the test host, which takes some seconds; more where it does not answer.
pub(super) fn of(bench: &mut Bench) -> String {
    let mut text = String::new();
    let before = threads(bench.qemu.id());
    std::thread::sleep(WATCH);
    for (thread, (name, after)) in threads(bench.qemu.id()) {
        let Some((_, before)) = before.get(&thread) else { continue };
        let _ = writeln!(text, "emulator's thread {name}: {} clock ticks in {WATCH:?}", after.saturating_sub(*before));
    }
    let answers = bench.exec.hello(patience::scaled(ANSWER));
    let said = answers.map_err(|error| error.to_string()).and_then(|()| {
        let output = bench.run_for(SCRIPT, ANSWER).map_err(|error| error.to_string())?;
        Ok(output.stdout)
    });
    text.push_str(&said.unwrap_or_else(|error| format!("the test host answers no more: {error}\n")));
    text
}
