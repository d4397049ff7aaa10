//! Wrong input, in a test host: one message that says what to do, a status that says whether another try is in vain, nothing left behind.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{OrTell, STEP, assets, scenario};
use umbra_tests::bench::{Bench, BenchSpec};

/// What another start would not change (docs/programs.md).
const EX_CONFIG: i32 = 78;

/// What is wrong, the script that tries it, the status that it ends with, and words that the message has to have.
const CASES: &[(&str, &str, i32, &[&str])] = &[
    ("the NIC is the host's", "machine $NIC0 $IMAGE; unvfio $NIC0; umbra run m.toml", 1, &["vfio-pci", "`umbra bind"]),
    ("an unknown PCI address", "machine 0000:42:00.0 $IMAGE; umbra run m.toml", 1, &["0000:42:00.0", "lspci"]),
    ("no PCI address at all", "machine nonsense $IMAGE; umbra run m.toml", EX_CONFIG, &["nonsense", "0000:03:00.0"]),
    ("no such image", "machine $NIC0 /nowhere; umbra run m.toml", EX_CONFIG, &["/nowhere", "umbra image"]),
    (
        "a broken image",
        "cp -r $IMAGE /tmp/broken; : > /tmp/broken/vmlinux; machine $NIC0 /tmp/broken; umbra run m.toml",
        EX_CONFIG,
        &["/tmp/broken", "umbra image"],
    ),
    (
        "a driver VM with too little memory for its kernel",
        "machine $NIC0 $IMAGE; echo 'memory = \"16M\"' >> m.toml; umbra run -q m.toml",
        EX_CONFIG,
        &["nic0", "raise `memory`"],
    ),
    (
        "a kernel that is none",
        "echo no kernel > /tmp/k; umbra run -q --kernel /tmp/k",
        EX_CONFIG,
        &["/tmp/k", "no Linux kernel"],
    ),
    ("no such kernel", "umbra run --kernel /nowhere/k", 1, &["/nowhere/k"]),
    ("too little memory", "umbra run -q --kernel vmlinux --memory 16M", EX_CONFIG, &["raise `memory`"]),
    ("no such disk", "umbra run --kernel vmlinux --disk /nowhere/d", 1, &["/nowhere/d"]),
    (
        "a disk of another format",
        "printf 'QFI\\373\\0\\0\\0\\3' > /tmp/d; truncate -s 1M /tmp/d; umbra run -q --kernel vmlinux --disk /tmp/d",
        EX_CONFIG,
        &["/tmp/d", "qcow2", "qemu-img convert"],
    ),
    ("an interface that is no TAP", "umbra run -q --kernel vmlinux --tap lo", EX_CONFIG, &["lo", "another name"]),
    (
        "another user's TAP",
        "tunctl -u root -t tap0 >/dev/null; chmod 666 /dev/kvm
su -s /bin/sh -c 'XDG_RUNTIME_DIR=/tmp/ann exec umbra run -q --kernel vmlinux --tap tap0' -- ann",
        1,
        &["tap0", "as root: `ip tuntap add tap0 mode tap user"],
    ),
    (
        "a TAP that another machine has",
        "tunctl -t tap1 >/dev/null; umbra run -q --name first --kernel vmlinux --tap tap1 2>/dev/null & first=$!
await 20 umbra wait running guest --name first
umbra run -q --name second --kernel vmlinux --tap tap1; status=$?
umbra stop --force --name first >/dev/null; wait $first; exit $status",
        1,
        &["tap1", "in use by another process"],
    ),
    (
        "no folder for a port's socket",
        "machine $NIC0 $IMAGE; printf '[[guest.web.port]]\\nname = \"p\"\\nsocket = \"/nowhere/p.sock\"\\n' >> m.toml; umbra run m.toml",
        1,
        &["/nowhere/p.sock", "make it"],
    ),
    ("no such file", "umbra run nowhere.toml", EX_CONFIG, &["nowhere.toml"]),
    (
        "a mistake in the file",
        "printf '[guest.web]\\nkernl = \"x\"\\n' > m.toml; umbra run m.toml",
        EX_CONFIG,
        &["m.toml:2", "did you mean `kernel`?"],
    ),
    (
        "a value of the wrong type",
        "machine $NIC0 $IMAGE; sed -i '1 a cpus = \"2\"' m.toml; umbra run m.toml",
        EX_CONFIG,
        &["m.toml:2", "without quotes"],
    ),
    (
        "two guests of one name",
        "machine $NIC0 $IMAGE; printf '[guest.web]\\nkernel = \"x\"\\n' >> m.toml; umbra run m.toml",
        EX_CONFIG,
        &["m.toml:8", "`web` is there already"],
    ),
    (
        "a name that nothing defines",
        "printf '[guest.web]\\nkernel = \"x\"\\n[[guest.web.net]]\\ndriver = \"nic7\"\\n' > m.toml; umbra run m.toml",
        EX_CONFIG,
        &["m.toml:4", "nic7"],
    ),
    ("nothing runs", "umbra status", 1, &["no machine"]),
    ("no such driver", "umbra crash nic0", 1, &["no machine"]),
    ("a kernel without the driver", "umbra image --driver nosuchdriver --kernel-dir / -o /tmp/i", 1, &[]),
    (
        "no KVM",
        "mv /dev/kvm /dev/kvm.away; umbra run --kernel vmlinux; s=$?; mv /dev/kvm.away /dev/kvm; exit $s",
        1,
        &["/dev/kvm", "`kvm_amd`"],
    ),
    (
        "no permission for KVM",
        "chmod 600 /dev/kvm; su -s /bin/sh -c 'XDG_RUNTIME_DIR=/tmp/ann exec umbra run --kernel vmlinux' -- ann",
        1,
        &["/dev/kvm", "join the group"],
    ),
];

/// `machine BDF IMAGE` writes a machine file; there is a user `ann`.
const PRELUDE: &str = r#"
IMAGE=/share/e1000e
machine() { printf '[guest.web]\nkernel = "/share/vmlinux"\n[[guest.web.net]]\ndriver = "nic0"\n' > m.toml
  printf '[driver.nic0]\ndevice = "%s"\nimage = "%s"\n' "$1" "$2" >> m.toml; }
mkdir -p /tmp/w; cd /tmp/w; [ -e vmlinux ] || fetch /share/vmlinux vmlinux
grep -q ^ann: /etc/passwd || { echo 'ann:x:1000:1000::/tmp/ann:/bin/sh' >>/etc/passwd; echo 'ann:x:1000:' >>/etc/group
  mkdir -p /tmp/ann; chown 1000:1000 /tmp/ann; }
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
    for (what, script, status, words) in CASES {
        let output = bench.run_for(&format!("{PRELUDE}\n{script}"), STEP).or_tell();
        let said: Vec<_> = output.stderr.lines().filter(|line| line.starts_with("umbra")).collect();
        let mut complain = |why: String| wrong.push(format!("{what}: {why}\n    {}{}", output.stderr, output.stdout));
        if output.status != *status {
            complain(format!("ended with status {} in place of {status}", output.status));
        }
        if said.len() != 1 {
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
