//! The report in a real browser: it is laid out, nothing of a driver VM's words became markup, and it can be looked at.
//!
//! Needs Chromium (`make setup` installs it; `UMBRA_SKIP_BROWSER=1` leaves this out). `UMBRA_KEEP_REPORT=FOLDER` keeps
//! page and pictures.
#![allow(clippy::unwrap_used, missing_docs)]

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// How long a browser may take on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// Failures in the log, one of which gives the driver up.
const FAILURES: u32 = 24;

/// A log as a machine writes it, with a NIC that fails by panics and hangs and a sound card that is given up, and a
/// report with a console that would like to be a script.
fn write_past(folder: &Path) {
    let (mut log, mut seq, mut at) = (String::new(), 0, 5_000_000_000_u64);
    let mut line = |at: u64, rest: &str| {
        seq += 1;
        let (minute, second) = (at / 60_000_000_000 % 60, at / 1_000_000_000 % 60);
        writeln!(
            log,
            "{{\"seq\":{seq},\"at_ns\":{at},\"time\":\"2026-03-01T10:{minute:02}:{second:02}.000Z\",{rest}}}"
        )
        .unwrap();
    };
    for driver in ["nic0", "snd0"] {
        line(at, &format!("\"event\":\"driver-starting\",\"driver\":\"{driver}\",\"generation\":1"));
    }
    for n in 1..=FAILURES {
        at += 41_000_000_000 + u64::from(n * 7 % 11) * 3_000_000_000;
        let driver = if n % 5 == 0 { "snd0" } else { "nic0" };
        let (source, reason) = match n % 3 {
            0 => ("heartbeat", "no heartbeat for 3000 ms"),
            1 => ("panic", "kernel panic"),
            _ => ("link", "it broke a rule of its link: descriptor 7 points outside of its memory <b>"),
        };
        let detect = if source == "heartbeat" { 3000.0 } else { 0.4 };
        line(
            at,
            &format!(
                "\"event\":\"masked\",\"guest\":\"web\",\"device\":\"net0\",\"driver\":\"{driver}\",\"generation\":{n},\"cause\":\"closed\""
            ),
        );
        line(
            at,
            &format!(
                "\"event\":\"driver-failed\",\"driver\":\"{driver}\",\"generation\":{n},\
                 \"source\":\"{source}\",\"reason\":\"{reason}\",\"detect_ms\":{detect}"
            ),
        );
        if n == FAILURES {
            line(
                at,
                &format!(
                    "\"event\":\"quarantined\",\"driver\":\"{driver}\",\"reason\":\"5 restarts in 60 s\",\"text\":\"{driver}: quarantined\""
                ),
            );
            continue;
        }
        let boot = 700 + n * 37 % 240;
        let outage = detect + 12.0 + 104.0 + f64::from(boot) + 180.0 + 22.0 + 450.0 + 3.0 + 9.0;
        let next = n + 1;
        line(
            at + 1_500_000_000,
            &format!(
                "\"event\":\"driver-live\",\"driver\":\"{driver}\",\"generation\":{next},\
                 \"outage_ms\":{outage},\"parts\":{{\"detect_ms\":{detect},\
             \"fence_ms\":12.0,\"reset_ms\":104.0,\"reset_method\":\"flr\",\"back_off_ms\":0.1,\"boot_ms\":{boot},\"probe_ms\":180.0,\
             \"setup_ms\":22.0,\"link_ms\":450.0,\"replay_ms\":3.0}},\
             \"frames\":{{\"logged\":{n},\"replayed\":{n},\"dropped\":0,\"unknown\":1}}"
            ),
        );
    }
    let moved = |n: u64| if (80..130).contains(&n) { 0 } else { 40 + n * 7 % 23 };
    let steps = serde_json::json!({"step_ms": 25, "before_ms": 2000, "out": (0..210).map(moved).collect::<Vec<_>>(),
        "into": (0..210).map(|n| 2 * moved(n)).collect::<Vec<_>>()});
    line(
        at,
        &format!(
            "\"event\":\"pace\",\"guest\":\"web\",\"device\":\"net0\",\"driver\":\"nic0\",\"generation\":{},\"steps\":{steps}",
            FAILURES - 1
        ),
    );
    line(at, "\"event\":\"warning\",\"what\":\"x\",\"text\":\"warning: the disk is nearly full\"");
    fs::create_dir_all(folder).unwrap();
    fs::write(folder.join("events.jsonl"), log).unwrap();
    let console = "[   12.3] Kernel panic - not syncing\n</pre><script>document.title = 'owned'</script><img src=x onerror=alert(1)>";
    let report = serde_json::json!({"device": "0000:03:00.0", "kernel_driver": "e1000e", "kernel": "6.12.0",
        "kernel_says": "Kernel panic - not syncing: sysrq triggered crash", "console_tail": console,
        "timeline": [{"step": "mask", "ms": 0.0, "at_ns": 1, "time": "2026-03-01T10:00:46.000Z"}]});
    fs::write(folder.join(format!("nic0-gen{}.json", FAILURES - 2)), report.to_string()).unwrap();
}

/// Runs the browser on `page` with `words`.
fn browser(dir: &Path, words: &[&str], page: &Path) -> Output {
    let profile = dir.join("profile");
    let mut chromium = Command::new("chromium");
    chromium.args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]);
    chromium.args(["--disable-component-update", "--no-first-run", "--disable-dev-shm-usage", "--hide-scrollbars"]);
    chromium.arg(format!("--user-data-dir={}", profile.display())).args(words);
    chromium.arg(format!("file://{}", page.display())).current_dir(dir).env("HOME", dir);
    // To files: a pipe that nobody empties would stop it.
    let (out, err) = (dir.join("stdout"), dir.join("stderr"));
    chromium.stdin(Stdio::null()).stdout(fs::File::create(&out).unwrap()).stderr(fs::File::create(&err).unwrap());
    let mut child =
        chromium.spawn().expect("no Chromium: `make setup` installs it, UMBRA_SKIP_BROWSER=1 leaves this out");
    let until = Instant::now() + PATIENCE;
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > until {
            child.kill().unwrap();
            panic!("the browser did not end: {}", fs::read_to_string(&err).unwrap());
        }
        thread::sleep(Duration::from_millis(50));
    };
    Output { status, stdout: fs::read(out).unwrap(), stderr: fs::read(err).unwrap() }
}

/// Where page and pictures go.
fn place() -> (Option<tempfile::TempDir>, PathBuf) {
    if let Some(folder) = std::env::var_os("UMBRA_KEEP_REPORT") {
        fs::create_dir_all(&folder).unwrap();
        return (None, fs::canonicalize(folder).unwrap());
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_owned();
    (Some(dir), path)
}

#[test]
fn the_report_is_laid_out_by_a_browser_and_runs_nothing() {
    if std::env::var_os("UMBRA_SKIP_BROWSER").is_some() {
        eprintln!("skipped: UMBRA_SKIP_BROWSER is set");
        return;
    }
    let (_dir, dir) = place();
    let (folder, page) = (dir.join("web/reports"), dir.join("report.html"));
    write_past(&folder);
    let output =
        Command::new(env!("CARGO_BIN_EXE_umbra")).arg("report").arg(&folder).arg("-o").arg(&page).output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.contains(&format!("{FAILURES} failures of web")), "{said}{}", String::from_utf8_lossy(&output.stderr));

    let output = browser(&dir, &["--dump-dom"], &page);
    let dom = String::from_utf8(output.stdout).unwrap();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && dom.contains("</html>"), "{dom}\n{errors}");
    assert!(dom.contains("<title>web: failures and recoveries</title>"), "a script changed the title: {dom}");
    assert_eq!(dom.matches("id=\"failure-").count(), FAILURES as usize);
    assert_eq!(dom.matches("<svg").count(), FAILURES as usize + 3, "a time line each, two charts, and one pace");
    assert!(!dom.contains("<script") && !dom.contains("<img"), "a console became markup: {dom}");
    assert!(!errors.contains("CONSOLE"), "the browser complains: {errors}");

    for (picture, scheme) in [("light.png", "1"), ("dark.png", "0")] {
        let shot = format!("--screenshot={}", dir.join(picture).display());
        let scheme = format!("--blink-settings=preferredColorScheme={scheme}");
        browser(&dir, &[&shot, &scheme, "--window-size=1180,2400"], &page);
        let png = fs::read(dir.join(picture)).unwrap();
        assert!(png.starts_with(b"\x89PNG"), "{picture}");
        // An empty page of this size is below 20 kB.
        assert!(png.len() > 60_000, "{picture} has {} bytes: is anything on it?", png.len());
    }
}
