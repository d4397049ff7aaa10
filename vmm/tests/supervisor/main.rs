//! The supervisor with real processes and no KVM: this binary, started as `umbra vm`, plays the VMs ([`fake_vm`]).
//!
//! Each case is a function that reads as a sentence; `cargo test --test supervisor NAME` runs those whose name
//! contains NAME.
#![allow(clippy::unwrap_used, missing_docs)]

mod asleep;
mod carriers;
mod cases;
mod cgroups;
mod clients;
mod daily;
mod disks;
mod fake_disk;
mod fake_snapshot;
mod fake_talk;
mod fake_vm;
mod hostile;
mod lives;
mod machine;
mod observers;
mod past;
mod refused;
mod reload;
mod scarce;
mod settings;
mod snapshots;
mod spares;
mod takers;
mod upgrade;
mod users;

use std::panic::catch_unwind;
use std::process::ExitCode;
use std::sync::mpsc;
use std::time::Duration;

/// No case takes more than a few seconds on an idle machine; one that hangs fails with its name.
const TIME_LIMIT: Duration = Duration::from_secs(300);

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    if args.get(1).is_some_and(|word| word == "vm") {
        return fake_vm::main(&args);
    }
    if let [_, word, dir] = &args[..]
        && word == "supervise"
    {
        machine::supervise(dir.as_ref()).unwrap();
        return ExitCode::SUCCESS;
    }
    let filter = args.iter().skip(1).find(|word| !word.starts_with('-'));
    let (mut run, mut failed) = (0, Vec::new());
    for (name, case) in cases::ALL
        .iter()
        .chain(asleep::ALL)
        .chain(carriers::ALL)
        .chain(cgroups::ALL)
        .chain(clients::ALL)
        .chain(daily::ALL)
        .chain(disks::ALL)
        .chain(hostile::ALL)
        .chain(refused::ALL)
        .chain(reload::ALL)
        .chain(scarce::ALL)
        .chain(settings::ALL)
        .chain(snapshots::ALL)
        .chain(spares::ALL)
        .chain(takers::ALL)
        .chain(upgrade::ALL)
        .chain(users::ALL)
        .chain(lives::ALL)
        .chain(observers::ALL)
        .chain(past::ALL)
    {
        if filter.is_some_and(|filter| !name.contains(filter.as_str())) {
            continue;
        }
        let (sender, receiver) = mpsc::channel();
        let _ = std::thread::spawn(move || sender.send(catch_unwind(case).is_ok()));
        let passed = receiver.recv_timeout(TIME_LIMIT).unwrap_or(false);
        println!("test {name} ... {}", if passed { "ok" } else { "FAILED" });
        run += 1;
        if !passed {
            failed.push(*name);
        }
    }
    if !failed.is_empty() {
        println!("\nfailures:\n    {}", failed.join("\n    "));
    }
    // In the words of the usual runner: the suite counts by them.
    let verdict = if failed.is_empty() { "ok" } else { "FAILED" };
    println!(
        "\ntest result: {verdict}. {} passed; {} failed; 0 ignored; 0 measured; 0 filtered out",
        run - failed.len(),
        failed.len()
    );
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
