//! Wrong input, in a test host: one message that says what to do, a status other than 0, nothing left behind.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{OrTell, STEP, assets, scenario};
use umbra_tests::bench::{Bench, BenchSpec};

/// What is wrong, the script that tries it, and words that the message has to have.
const CASES: &[(&str, &str, &[&str])] = &[
    ("the NIC is not bound", "machine $NIC0 $IMAGE; unvfio $NIC0; umbra run m.toml", &["vfio-pci"]),
    ("an unknown PCI address", "machine 0000:42:00.0 $IMAGE; umbra run m.toml", &["0000:42:00.0"]),
    ("no PCI address at all", "machine nonsense $IMAGE; umbra run m.toml", &["nonsense"]),
    ("no such image", "machine $NIC0 /nowhere; umbra run m.toml", &["/nowhere", "umbra image"]),
    (
        "a broken image",
        "cp -r $IMAGE /tmp/broken; : > /tmp/broken/vmlinux; machine $NIC0 /tmp/broken; umbra run m.toml",
        &["/tmp/broken"],
    ),
    ("a kernel that is none", "echo no kernel > /tmp/k; umbra run --kernel /tmp/k", &["/tmp/k", "kernel"]),
    ("no such kernel", "umbra run --kernel /nowhere/k", &["/nowhere/k"]),
    ("no such disk", "umbra run --kernel vmlinux --disk /nowhere/d", &["/nowhere/d"]),
    ("no such file", "umbra run nowhere.toml", &["nowhere.toml"]),
    (
        "a mistake in the file",
        "printf '[guest.web]\\nkernl = \"x\"\\n' > m.toml; umbra run m.toml",
        &["m.toml", "2", "kernl"],
    ),
    (
        "a name that nothing defines",
        "printf '[guest.web]\\nkernel = \"x\"\\n[[guest.web.net]]\\ndriver = \"nic7\"\\n' > m.toml; umbra run m.toml",
        &["nic7"],
    ),
    ("nothing runs", "umbra status", &["no machine"]),
    ("no such driver", "umbra crash nic0", &["no machine"]),
    ("a kernel without the driver", "umbra image --driver nosuchdriver --kernel-dir / -o /tmp/i", &[]),
    (
        "no KVM",
        "mv /dev/kvm /dev/kvm.away; umbra run --kernel vmlinux; s=$?; mv /dev/kvm.away /dev/kvm; exit $s",
        &["/dev/kvm"],
    ),
];

/// The status of what another start would not change (docs/programs.md).
const EX_CONFIG: i32 = 78;

/// `machine BDF IMAGE` writes a machine file.
const PRELUDE: &str = r#"
IMAGE=/share/e1000e
machine() { printf '[guest.web]\nkernel = "/share/vmlinux"\n[[guest.web.net]]\ndriver = "nic0"\n' > m.toml
  printf '[driver.nic0]\ndevice = "%s"\nimage = "%s"\n' "$1" "$2" >> m.toml; }
mkdir -p /tmp/w; cd /tmp/w; cp -n /share/vmlinux .
vfio $NIC0
"#;

#[test]
fn wrong_input_gets_one_message_and_leaves_nothing() {
    scenario(wrong_input);
}

fn wrong_input() {
    let assets = assets();
    let mut spec = BenchSpec::new("bad-input");
    spec.files = vec![assets.driver_image(&"e1000e".into()).or_tell()];
    let mut bench = Bench::boot(spec, &assets).or_tell();
    let mut wrong = Vec::new();
    for (what, script, words) in CASES {
        let output = bench.run_for(&format!("{PRELUDE}\n{script}"), STEP).or_tell();
        let said: Vec<_> = output.stderr.lines().filter(|line| line.starts_with("umbra")).collect();
        let mut complain = |why: String| wrong.push(format!("{what}: {why}\n    {}{}", output.stderr, output.stdout));
        if ![1, 2, EX_CONFIG].contains(&output.status) {
            complain(format!("ended with status {}", output.status));
        }
        if said.len() != 1 && output.status != 2 {
            complain(format!("{} messages", said.len()));
        }
        if let Some(word) = words.iter().find(|word| !output.stderr.contains(**word)) {
            complain(format!("does not say {word}"));
        }
        let left = bench.run("pidof umbra; ls /run/umbra/*/control.sock 2>/dev/null").or_tell();
        if !left.stdout.is_empty() {
            complain(format!("left behind: {}", left.stdout));
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}
