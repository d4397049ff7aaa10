//! What the threads of a process have used, as the host's kernel counts (proc(5), `/proc/PID/task`).
//!
//! It costs those threads nothing. Threads of one name are one entry: the name says what they do.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// The name of the first thread of a process, the event loop of a VM.
const LOOP: &str = "loop";

/// The threads of one name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThreadUsage {
    /// What they do: `loop`, `vcpu0`, ...
    pub role: String,
    /// Time on a processor, ns.
    pub cpu_ns: u64,
    /// Time in which they wanted a processor and had none, ns.
    pub waited_ns: u64,
    /// Times that they went to sleep: each is a wake-up later.
    pub sleeps: u64,
    /// Times that a processor was taken from them.
    pub preempted: u64,
}

/// The threads of process `pid`; none if it is gone.
pub fn of(pid: u32) -> Vec<ThreadUsage> {
    let mut roles = BTreeMap::<String, ThreadUsage>::new();
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    for task in tasks {
        let first = task.file_name().to_str() == Some(&pid.to_string());
        // One that has ended meanwhile is left out.
        let Some(usage) = of_thread(&task.path(), first) else { continue };
        let sum = roles.entry(usage.role.clone()).or_default();
        *sum = ThreadUsage {
            role: usage.role,
            cpu_ns: sum.cpu_ns + usage.cpu_ns,
            waited_ns: sum.waited_ns + usage.waited_ns,
            sleeps: sum.sleeps + usage.sleeps,
            preempted: sum.preempted + usage.preempted,
        };
    }
    roles.into_values().collect()
}

fn of_thread(task: &Path, first: bool) -> Option<ThreadUsage> {
    let name = fs::read_to_string(task.join("comm")).ok()?;
    let times = fs::read_to_string(task.join("schedstat")).ok()?;
    let status = fs::read_to_string(task.join("status")).ok()?;
    let mut times = times.split_whitespace().map_while(|word| word.parse().ok());
    let count = |field: &str| status.lines().find_map(|line| line.strip_prefix(field))?.trim().parse().ok();
    Some(ThreadUsage {
        role: if first { LOOP.into() } else { name.trim().into() },
        cpu_ns: times.next()?,
        waited_ns: times.next()?,
        sleeps: count("voluntary_ctxt_switches:")?,
        preempted: count("nonvoluntary_ctxt_switches:")?,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::mpsc::channel;
    use std::thread;

    use super::*;

    #[test]
    fn threads_of_a_name_are_one_entry_and_the_first_is_the_loop() {
        let (sender, ends) = channel::<()>();
        let receiver = std::sync::Arc::new(std::sync::Mutex::new(ends));
        let (up, ups) = channel();
        let threads: Vec<_> = (0..2)
            .map(|_| {
                let (receiver, up) = (receiver.clone(), up.clone());
                let body = move || {
                    up.send(()).unwrap();
                    let _ = receiver.lock().unwrap().recv();
                };
                thread::Builder::new().name("of-a-name".into()).spawn(body).unwrap()
            })
            .collect();
        ups.recv().unwrap();
        ups.recv().unwrap();
        let pid = std::process::id();
        let all = of(pid);
        let named: Vec<_> = all.iter().filter(|thread| thread.role == "of-a-name").collect();
        assert!(matches!(named[..], [one] if one.cpu_ns > 0), "{all:?}");
        assert_eq!(all.iter().filter(|thread| thread.role == LOOP).count(), 1);
        drop(sender);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(of(u32::MAX), Vec::new());
    }
}
