//! The command line as users meet it: each mistake is one line on stderr that says what to do, and a non-zero exit.
#![allow(clippy::unwrap_used, missing_docs)]

use std::path::Path;
use std::process::{Command, Output, Stdio};

fn umbra(run_dir: &Path, words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_umbra"))
        .args(words)
        .env("UMBRA_RUN_DIR", run_dir)
        .env("UMBRA_STATE_DIR", run_dir.join("state"))
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// Runs `umbra` and expects it to fail with status 1 and one line.
fn error(run_dir: &Path, words: &[&str]) -> String {
    error_of(1, run_dir, words)
}

/// Runs `umbra` and expects it to fail with this status and one line.
fn error_of(status: i32, run_dir: &Path, words: &[&str]) -> String {
    let output = umbra(run_dir, words);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(status), "{words:?}: {stderr}");
    assert_eq!(stderr.lines().count(), 1, "{words:?}: {stderr}");
    stderr.trim().to_owned()
}

/// What systemd is told not to try again (`packaging/umbra@.service`).
const CONFIGURATION: i32 = 78;

#[test]
fn a_service_is_not_started_again_with_a_configuration_that_is_wrong() {
    let unit = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/umbra@.service");
    let unit = std::fs::read_to_string(unit).unwrap();
    assert!(unit.lines().any(|line| line == format!("RestartPreventExitStatus={CONFIGURATION}")), "{unit}");
    let dir = tempfile::tempdir().unwrap();
    error_of(CONFIGURATION, dir.path(), &["run", "--kernel", "/k", "--cpus", "0"]);
}

#[test]
fn a_service_that_may_load_no_modules_has_vfio_pci_loaded_for_it() {
    let unit = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/umbra@.service");
    let unit = std::fs::read_to_string(unit).unwrap();
    assert!(unit.contains("\nProtectKernelModules=true\n") && unit.contains(" run --bind "), "{unit}");
    for wish in ["Wants=", "After="] {
        let mut wished = unit.lines().filter_map(|line| line.strip_prefix(wish)).flat_map(str::split_whitespace);
        assert!(wished.any(|other| other == "modprobe@vfio_pci.service"), "{wish}: {unit}");
    }
}

#[test]
fn wrong_usage_is_status_2() {
    let dir = tempfile::tempdir().unwrap();
    for words in
        [&["frobnicate"][..], &["run", "--no-such-flag"], &["crash"], &["run", "m.toml", "--kernel", "k"], &["vm"]]
    {
        assert_eq!(umbra(dir.path(), words).status.code(), Some(2), "{words:?}");
    }
    for (words, what) in [
        (&["run"][..], "give a machine file"),
        (
            &[
                "run", "--kernel", "k", "--nic", "3:0.0", "--nic", "4:0.0", "--nic", "5:0.0", "--image", "i",
                "--image", "j",
            ],
            "2 images",
        ),
        (&["image", "-o", "x"], "--pci ADDRESS"),
    ] {
        let message = error_of(2, dir.path(), words);
        assert!(message.contains(what), "{message}");
    }
    for interval in ["0", "-1", "nan", "inf", "soon"] {
        let output = umbra(dir.path(), &["status", "--watch", &format!("--interval={interval}")]);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(2) && stderr.contains("a number of seconds, from 0.01"), "{stderr}");
    }
}

#[test]
fn a_machine_file_s_mistake_is_named_with_its_line() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("m.toml");
    let path = file.to_str().unwrap();
    std::fs::write(&file, "[guest.web]\nkernel = \"k\"\n[[guest.web.net]]\ndriver = \"nic1\"\n").unwrap();
    let message = error_of(CONFIGURATION, dir.path(), &["run", path]);
    assert_eq!(message, format!("umbra: {path}:4: guest.web.net[0].driver: nothing defines [driver.nic1]"));
    let message = error_of(CONFIGURATION, dir.path(), &["run", "/no/such/machine.toml"]);
    assert_eq!(message, "umbra: read the machine file /no/such/machine.toml: No such file or directory (os error 2)");
    let message = error_of(CONFIGURATION, dir.path(), &["run", "--check", "/dev/zero"]);
    assert_eq!(message, "umbra: /dev/zero: is too long for a machine file, which has 1048576 bytes at most");
    std::fs::write(&file, " ".repeat((1 << 20) + 1)).unwrap();
    let message = error_of(CONFIGURATION, dir.path(), &["run", path]);
    assert!(message.contains("is too long for a machine file"), "{message}");
}

#[test]
fn check_prints_the_machine_with_its_defaults() {
    let dir = tempfile::tempdir().unwrap();
    let output = umbra(dir.path(), &["run", "--check", "--kernel", "/k", "--tap", "tap0"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success());
    assert!(text.contains("memory = \"512M\"") && text.contains("tap = \"tap0\""), "{text}");
}

#[test]
fn an_events_file_keeps_what_earlier_runs_have_told() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("events.jsonl");
    std::fs::write(&file, "{\"seq\":1}\n").unwrap();
    error(dir.path(), &["run", "--kernel", "/no/such/kernel", "--events", file.to_str().unwrap()]);
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "{\"seq\":1}\n");
}

#[test]
fn what_is_missing_is_said_before_anything_starts() {
    let dir = tempfile::tempdir().unwrap();
    let run = |words: &[&str]| error(dir.path(), &[&["run"], words].concat());
    if !Path::new("/dev/kvm").exists() {
        assert!(run(&["--kernel", "/no/such/kernel"]).contains("/dev/kvm is not there"));
        eprintln!("skipped the rest: no /dev/kvm");
        return;
    }
    let message = run(&["--kernel", "/no/such/kernel"]);
    assert_eq!(message, "umbra: guest: cannot read the kernel /no/such/kernel: No such file or directory (os error 2)");
    let message = run(&["--kernel", "/proc"]);
    assert!(message.contains("cannot read the kernel /proc: is a directory"), "{message}");
    let message = run(&["--kernel", "/proc/self/exe", "--disk", "/no/disk"]);
    assert!(message.contains("cannot open the disk /no/disk"), "{message}");
    let words = ["run", "--kernel", "/proc/self/exe", "--nic", "ffff:1f:1f.7", "--image", "/no/image"];
    let message = error_of(CONFIGURATION, dir.path(), &words);
    assert!(message.contains("nic0: there is no driver VM image /no/image; build it"), "{message}");
    let message = run(&["--kernel", "/proc/self/exe", "--passthrough", "ffff:1f:1f.7"]);
    assert!(message.contains("ffff:1f:1f.7"), "{message}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left behind");
}

#[test]
fn a_file_that_is_no_kernel_ends_the_run() {
    if !Path::new("/dev/kvm").exists() {
        eprintln!("skipped: no /dev/kvm");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let kernel = dir.path().join("kernel");
    std::fs::write(&kernel, "hello").unwrap();
    let output = umbra(dir.path(), &["run", "--quiet", "--kernel", kernel.to_str().unwrap()]);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(78), "another start would come to the same end: {stderr}");
    assert!(stderr.starts_with("umbra: guest: ") && stderr.contains(kernel.to_str().unwrap()), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    let output = umbra(dir.path(), &["run", "--kernel", kernel.to_str().unwrap()]);
    let told = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), told.as_str()), (Some(78), stderr.as_str()), "as an event and not once more");
    assert!(!dir.path().join("guest/control.sock").exists());
    let events = umbra(dir.path(), &["events"]);
    let events = String::from_utf8(events.stdout).unwrap();
    assert!(
        events.lines().any(|line| line.contains("\"event\":\"guest-ended\"")),
        "its past can still be read: {events}"
    );
}

#[test]
fn requests_without_a_machine_say_so() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().display();
    assert_eq!(error(dir.path(), &["events"]), format!("umbra: no machine is running or has run (nothing in {base})"));
    for words in [&["status"][..], &["status", "--watch"], &["stop"], &["crash", "nic0"]] {
        assert_eq!(error(dir.path(), words), format!("umbra: no machine is running (nothing in {base})"));
    }
    let message = error(dir.path(), &["status", "--name", "web"]);
    assert_eq!(message, "umbra: no machine named web is running");
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let dir = tempfile::tempdir().unwrap();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = Command::new(env!("CARGO_BIN_EXE_umbra"))
        .args(["run", "--check", "--kernel", "/k"])
        .env("UMBRA_RUN_DIR", dir.path())
        .env("UMBRA_STATE_DIR", dir.path().join("state"))
        .stdout(writer)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
        .wait_with_output()
        .unwrap();
    assert_eq!(String::from_utf8(output.stderr).unwrap(), "");
    assert!(output.status.success());
}

#[test]
fn doctor_says_what_is_missing_and_its_status_says_whether_anything_is() {
    let dir = tempfile::tempdir().unwrap();
    let output = umbra(dir.path(), &["doctor", "--json"]);
    let answer: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let host = answer["host"].as_array().unwrap();
    let missing: Vec<_> = host.iter().filter(|finding| finding["grade"] == "missing").collect();
    assert_eq!(answer["missing"], missing.len());
    assert_eq!(output.status.code(), Some(i32::from(!missing.is_empty())));
    assert!(missing.iter().all(|finding| finding["remedy"].is_string()), "{missing:#?}");
    let kvm = host.iter().find(|finding| finding["check"] == "KVM").unwrap();
    assert_eq!(kvm["grade"] == "missing", std::fs::File::options().read(true).write(true).open("/dev/kvm").is_err());
    assert!(answer["cards"].is_array());
    let text = umbra(dir.path(), &["doctor"]);
    let text = String::from_utf8(text.stdout).unwrap();
    assert!(
        text.starts_with("This host\n") && text.contains("\nNetwork cards, sound cards and storage controllers\n"),
        "{text}"
    );
    let file = dir.path().join("m.toml");
    let guest = "[guest.web]\nkernel = \"no-kernel\"\nnet = [{ driver = \"n\" }]\n";
    std::fs::write(&file, format!("{guest}[driver.n]\ndevice = \"ffff:1f:1f.7\"\nimage = \"i\"\n")).unwrap();
    let file = file.to_str().unwrap();
    for words in [&["doctor", file][..], &["run", "--check", "--host", file]] {
        let output = umbra(dir.path(), words);
        let text = String::from_utf8(output.stdout).unwrap();
        assert_eq!(output.status.code(), Some(1), "{text}");
        for words in [
            "This host\n",
            "\n[guest.web]\n",
            "no-kernel",
            "\n[driver.n]\n",
            "no PCI device ffff:1f:1f.7",
            "\nThe machine\n",
        ] {
            assert!(text.contains(words), "{words}: {text}");
        }
    }
    let message = error(dir.path(), &["doctor", "ffff:1f:1f.7"]);
    assert_eq!(message, "umbra: no PCI device ffff:1f:1f.7 in this host; `lspci -D` lists them");
    assert_eq!(umbra(dir.path(), &["doctor", "eth0"]).status.code(), Some(2));
}

#[test]
fn completions_and_man_pages_are_of_the_commands_that_there_are() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("out");
    let output = umbra(dir.path(), &["generate", folder.to_str().unwrap()]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for (file, words) in [
        ("completions/umbra.bash", "doctor"),
        ("completions/_umbra", "--watch"),
        ("completions/umbra.fish", "agent-hang"),
        ("man/umbra.1", "umbra\\-doctor"),
        ("man/umbra-run.1", "machine file"),
        ("man/umbra-status.1", "watch"),
    ] {
        let text = std::fs::read_to_string(folder.join(file)).unwrap();
        assert!(text.contains(words), "{file}: {text}");
    }
    assert!(!folder.join("man/umbra-vm.1").exists(), "hidden commands have no page");
    assert!(error(dir.path(), &["generate", "/proc/none"]).contains("make the folder /proc/none/completions"));
}
