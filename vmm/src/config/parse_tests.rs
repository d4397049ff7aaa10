//! Every mistake that a machine file can have, and the line that the error names.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use proptest::prelude::*;

use umbra_driver_vm::protocol::Mac;
use umbra_shadow::sound::Policy;

use super::*;
use crate::config::{Confine, Driver, Guest, GuestDisk, MemorySize, Net, Port, Restart, Standby};

const GOOD: &str = r#"# a guest with its network behind a driver VM
[guest.web]
kernel = "vmlinuz"
initrd = ["initrd.img"]
cpus = 2
memory = "1G"
console = "terminal"

[[guest.web.disk]]
path = "/var/lib/debian.raw"

[[guest.web.net]]
driver = "nic0"
mac = "52:54:00:00:00:01"

[[guest.web.net]]
tap = "tap0"

[driver.nic0]
device = "0000:03:00.0"
image = "images/e1000e"
restart = { limit = 20 }
"#;

fn parse(text: &str) -> Result<Machine, String> {
    Machine::parse(text, Path::new("dir/m.toml")).map_err(|error| error.to_string())
}

/// The error of [`GOOD`] with `old` replaced by `new`.
fn mistake(old: &str, new: &str) -> String {
    assert!(GOOD.contains(old), "{old:?} is not in the good file");
    parse(&GOOD.replacen(old, new, 1)).expect_err(new)
}

#[test]
fn a_value_of_the_wrong_kind_is_told_with_what_to_write() {
    for (wrong, hint) in [
        ("initrd = \"i\"", "write a list, as [\"one\", \"two\"]"),
        ("cpus = \"2\"", "a whole number from 0 to 255, without quotes"),
        ("cpus = 1000", "a whole number from 0 to 255, without quotes"),
        ("net = [{ tap = \"t\", mtu = 70000 }]", "a whole number from 0 to 65535, without quotes"),
        ("restart = { limit = -1 }", "a whole number from 0 to 4294967295, without quotes"),
        ("restart = 5", "write a table, as { limit = 5, interval_s = 60 }"),
        ("disk = [\"d\"]", "write a table, as { path = \"debian.raw\" }"),
        ("net = [\"nic0\"]", "write a table, as { driver = \"nic0\" }"),
        ("sound = [\"snd0\"]", "write a table, as { driver = \"snd0\" }"),
        ("port = [\"agent\"]", "write a table, as { name = \"agent\", socket = \"agent.sock\" }"),
        ("[guest]\ndb = \"k\"", "name each guest in a table of its own, as [guest.web]"),
        ("console = \"file\"", "for a file write console = { file = \"web.log\" }"),
        ("console = { file = \"web.log\", x = 1 }", "for a file write console = { file = \"web.log\" }"),
        ("on_reset = true", "write one of its words, in quotes"),
        ("[driver]\nnic0 = \"0000:03:00.0\"", "name each driver VM in a table of its own, as [driver.nic0]"),
        ("[driver.nic0]\nrestart = 5", "write a table, as { limit = 5, interval_s = 60 }"),
        ("cpu_max = \"1.5\"", "write percent of one, from \"5%\" to \"12800%\", as \"150%\""),
        ("memory = 512", "with a unit it is text, as \"512M\""),
        ("console = \"web.log\"", "for a file write console = { file = \"web.log\" }"),
        ("disk = [{ path = \"d\", read_only = \"yes\" }]", "true or false, without quotes"),
        ("[guest.web.net]\ntap = \"t\"", "with two brackets, as [[guest.web.net]]"),
    ] {
        let told = parse(&format!("[guest.web]\nkernel = \"k\"\n{wrong}\n")).expect_err(wrong);
        assert!(
            told.contains(":3: ") && told.ends_with(hint)
                || told.contains(":4: ") && told.ends_with(hint)
                || told.contains(&format!("{hint}, once")),
            "{wrong}: {told}"
        );
    }
}

#[test]
fn the_last_console_of_the_command_line_is_the_guest_s() {
    let is_hvc = |cmdline: &str| Guest { cmdline: cmdline.into(), ..Guest::new("k".into()) }.has_hvc_console();
    assert!(
        ["console=hvc0", "quiet console=ttyS0,115200 console=hvc0", "console=hvc root=/dev/vda1"]
            .iter()
            .all(|c| is_hvc(c))
    );
    assert!(
        !["", "console=ttyS0", "console=hvc0 console=ttyS0", "console=hvc1", "xconsole=hvc0"].iter().any(|c| is_hvc(c))
    );
}

#[test]
fn a_good_file_is_read_with_its_defaults_and_paths() {
    let machine = parse(GOOD).unwrap();
    let web = &machine.guest["web"];
    assert_eq!(web.kernel, PathBuf::from("dir/vmlinuz"));
    assert_eq!(web.disk[0].path.as_deref(), Some(Path::new("/var/lib/debian.raw")));
    assert_eq!(web.memory, MemorySize(1 << 30));
    assert_eq!(web.cmdline, "console=ttyS0");
    let nic0 = &machine.driver["nic0"];
    assert_eq!(nic0.image, PathBuf::from("dir/images/e1000e"));
    assert_eq!(nic0.memory, Some(MemorySize(128 << 20)));
    assert_eq!(nic0.restart, Restart { limit: 20, ..Restart::default() });
    assert_eq!(machine.ends_of("nic0").map(|(g, n, _)| (g, n)).collect::<Vec<_>>(), [("web", 0)]);
}

#[test]
fn a_console_can_be_a_file() {
    let machine = parse(&GOOD.replace("\"terminal\"", "{ file = \"web.log\" }")).unwrap();
    assert_eq!(machine.guest["web"].console, Console::File("dir/web.log".into()));
}

#[test]
fn unknown_keys_are_named_with_their_line_and_a_guess() {
    let error = mistake("cpus = 2", "cpu = 2");
    assert!(error.starts_with("dir/m.toml:5: unknown field `cpu`"), "{error}");
    assert!(error.ends_with("did you mean `cpus`?"), "{error}");
    let error = mistake("limit = 20", "limits = 20");
    assert!(error.starts_with("dir/m.toml:22: ") && error.ends_with("did you mean `limit`?"), "{error}");
    let error = mistake("[driver.nic0]", "[drivers.nic0]");
    assert!(error.starts_with("dir/m.toml:19: ") && error.contains("did you mean `driver`?"), "{error}");
}

#[test]
fn syntax_and_types_are_named_with_their_line() {
    for (old, new, line) in [
        ("cpus = 2", "cpus = ", 5),
        ("cpus = 2", "cpus = \"two\"", 5),
        ("cpus = 2", "cpus = 300", 5),
        ("cpus = 2", "cpus = -1", 5),
        ("memory = \"1G\"", "memory = \"1GB\"", 6),
        ("memory = \"1G\"", "memory = -4096", 6),
        ("memory = \"1G\"", "memory = 1073741825", 6),
        ("memory = \"1G\"", "memory = 1.5", 6),
        ("console = \"terminal\"", "console = \"tty\"", 7),
        ("52:54:00:00:00:01", "52:54:00:00:00", 14),
        ("[[guest.web.net]]\ntap", "[guest.web.net]\ntap", 16),
        ("limit = 20", "limit = -1", 22),
    ] {
        let error = mistake(old, new);
        // A table's header opens one line before its keys in some messages.
        let named = [line, line - 1].map(|line| format!("dir/m.toml:{line}: "));
        assert!(named.iter().any(|named| error.starts_with(named)), "{new}: {error}");
    }
}

#[test]
fn what_is_there_twice_is_named() {
    let web = "[guest.web]\nkernel = \"k\"\n";
    for (twice, line, name) in [(web, 3, "web"), ("kernel = \"l\"\n", 3, "kernel"), ("cpus = 1\ncpus = 2\n", 4, "cpus")]
    {
        let error = parse(&format!("{web}{twice}")).unwrap_err();
        assert!(error.starts_with(&format!("dir/m.toml:{line}: `{name}` is there already")), "{error}");
    }
}

#[test]
fn a_missing_kernel_names_the_guest_s_table() {
    let error = mistake("kernel = \"vmlinuz\"\n", "");
    assert!(error.starts_with("dir/m.toml:2: missing field `kernel`"), "{error}");
}

#[test]
fn two_drivers_of_one_device_are_refused_with_both_lines() {
    let text = "[guest.web]\nkernel = \"k\"\nnet = [{ driver = \"a\" }, { driver = \"b\" }]\n\
                [driver.a]\ndevice = \"0000:03:00.0\"\nimage = \"i\"\n[driver.b]\nimage = \"i\"\ndevice = \"03:00.0\"\n";
    let error = parse(text).unwrap_err();
    let said =
        "dir/m.toml:9: driver.b.device: the PCI function 0000:03:00.0 is used by driver.a.device already (line 5)";
    assert_eq!(error, said);
}

#[test]
fn snapshots_that_are_made_ahead_have_to_be_allowed_and_of_use() {
    let with = |more: &str| GOOD.replacen("[driver.nic0]", &format!("[driver.nic0]\n{more}"), 1);
    for snapshots in ["", "snapshots = true\n"] {
        let machine = parse(&with(&format!("standby = \"snapshot\"\n{snapshots}"))).unwrap();
        assert_eq!(machine.driver["nic0"].standby, Standby::Snapshot);
    }
    let error = parse(&with("snapshots = false\nstandby = \"snapshot\"")).unwrap_err();
    let expected = "dir/m.toml:21: driver.nic0.standby: \"snapshot\" needs snapshots: remove `snapshots = false`, or choose \
                    `standby = \"warm\"` or \"cold\" (line 20)";
    assert_eq!(error, expected);
    let error = parse(&with("standby = \"snapshot\"\nspare = \"0000:04:00.0\"")).unwrap_err();
    let expected = "dir/m.toml:20: driver.nic0.standby: \"snapshot\" is for a driver VM without a spare, which stands ready already: \
                    remove `standby` or `spare` (line 21)";
    assert_eq!(error, expected);
    assert!(parse(&with("snapshots = false\nstandby = \"cold\"")).is_ok());
}

#[test]
fn a_second_standby_needs_a_first_that_waits() {
    let with = |more: &str| GOOD.replacen("[driver.nic0]", &format!("[driver.nic0]\n{more}"), 1);
    assert_eq!(parse(GOOD).unwrap().driver["nic0"].standbys, 1);
    for (more, standbys) in [("standbys = 2", 2), ("standbys = 1\nstandby = \"cold\"", 1)] {
        assert_eq!(parse(&with(more)).unwrap().driver["nic0"].standbys, standbys);
    }
    for number in [0, 3] {
        let error = parse(&with(&format!("standbys = {number}"))).unwrap_err();
        let expected = "dir/m.toml:20: driver.nic0.standbys: 1 or 2 lives wait, with `standby = \"warm\"`; to have none, choose \
                        another `standby`";
        assert_eq!(error, expected);
    }
    for other in ["standby = \"cold\"", "standby = \"snapshot\"", "spare = \"0000:04:00.0\""] {
        let error = parse(&with(&format!("standbys = 2\n{other}"))).unwrap_err();
        let expected = "dir/m.toml:20: driver.nic0.standbys: a second standby waits behind a first, which needs \
                        `standby = \"warm\"` and no `spare`";
        assert_eq!(error, expected);
    }
}

#[test]
fn a_spare_is_a_second_nic_of_nobody_else() {
    let text = |ends: &str, spare: &str| {
        format!(
            "[guest.web]\nkernel = \"k\"\n{ends}\n[driver.a]\ndevice = \"0000:03:00.0\"\nimage = \"i\"\nspare = \"{spare}\"\n"
        )
    };
    let net = "net = [{ driver = \"a\" }]";
    let machine = parse(&text(net, "04:00.0")).unwrap();
    assert_eq!(machine.driver["a"].spare.as_deref(), Some("04:00.0"));
    let said =
        "dir/m.toml:7: driver.a.spare: the PCI function 0000:03:00.0 is used by driver.a.device already (line 5)";
    assert_eq!(parse(&text(net, "0000:03:00.0")).unwrap_err(), said);
    let two = "net = [{ driver = \"a\" }, { driver = \"b\" }]";
    let other = "[driver.b]\ndevice = \"0000:04:00.0\"\nimage = \"i\"\n";
    let error = parse(&(text(two, "0000:04:00.0") + other)).unwrap_err();
    assert!(error.contains("driver.b.device: the PCI function 0000:04:00.0 is used by driver.a.spare"), "{error}");
    let error = parse(&text("sound = [{ driver = \"a\" }]", "0000:04:00.0")).unwrap_err();
    assert!(error.starts_with("dir/m.toml:7: driver.a.spare: a sound card has no spare"), "{error}");
}

#[test]
fn processes_are_confined_unless_the_machine_says_otherwise() {
    let parse = |line: &str| Machine::parse(&format!("{line}\n[guest.web]\nkernel = \"k\"\n"), "m.toml".as_ref());
    let confine = |line| parse(line).unwrap().confine;
    assert_eq!((confine(""), confine("confine = \"on\"")), (Confine::On, Confine::On));
    assert_eq!((confine("confine = \"log\""), confine("confine = \"off\"")), (Confine::Log, Confine::Off));
    assert_eq!(
        Machine::parse(&parse("confine = \"off\"").unwrap().to_string(), "m.toml".as_ref()).unwrap().confine,
        Confine::Off
    );
    let error = parse("confine = \"maybe\"").unwrap_err().to_string();
    assert!(error.starts_with("m.toml:1: ") && error.contains("maybe"), "{error}");
}

#[test]
fn a_share_of_the_processors_needs_control_groups() {
    let text = |cgroup: &str| format!("cgroup = \"{cgroup}\"\n[guest.web]\nkernel = \"/k\"\ncpu_max = \"50%\"\n");
    let machine = parse(&text("/umbra")).unwrap();
    assert_eq!(machine.guest["web"].cpu_max.map(|share| share.percent()), Some(50));
    assert_eq!(parse(&machine.to_string()).unwrap(), machine);
    assert!(parse(&text("off")).unwrap_err().contains(":4: guest.web.cpu_max: needs control groups"));
    assert!(parse(&text("umbra")).unwrap_err().contains(":1: \"umbra\" is no control group: write \"auto\""));
}

#[test]
fn metrics_are_served_on_this_host_alone() {
    let text = |place: &str| format!("metrics = \"{place}\"\n[guest.web]\nkernel = \"k\"\n");
    let machine = parse(&text("./m.sock")).unwrap();
    assert_eq!(machine.metrics.unwrap().to_string(), "dir/./m.sock", "relative to the file's folder");
    let error = parse(&text("0.0.0.0:9464")).unwrap_err();
    assert!(error.starts_with("dir/m.toml:1: ") && error.contains("is not a loopback address"), "{error}");
    assert!(parse(&text("9464")).unwrap_err().contains("neither the path of a socket"));
}

#[test]
fn a_sound_device_names_its_driver_and_policy() {
    let text = "[guest.web]\nkernel = \"k\"\n[[guest.web.sound]]\ndriver = \"snd0\"\npolicy = \"hold\"\n\
                [driver.snd0]\ndevice = \"0000:00:1f.3\"\nimage = \"i\"\n";
    let machine = parse(text).unwrap();
    assert_eq!(
        machine.sounds_of("snd0").map(|(g, n, s)| (g, n, s.policy)).collect::<Vec<_>>(),
        [("web", 0, Policy::Hold)]
    );
    let machine = parse(&text.replace("policy = \"hold\"\n", "")).unwrap();
    assert_eq!(machine.guest["web"].sound[0].policy, Policy::Skip);
    let error = parse(&text.replace("hold", "pause")).unwrap_err();
    assert!(error.starts_with("dir/m.toml:5: ") && error.contains("`skip`"), "{error}");
}

#[test]
fn what_the_types_cannot_say_is_checked_with_its_line() {
    for (old, new, line, what) in [
        ("driver = \"nic0\"", "driver = \"nic1\"", 13, "nothing defines [driver.nic1]; did you mean \"nic0\"?"),
        ("tap = \"tap0\"", "mtu = 1500", 16, "needs `tap"),
        ("tap = \"tap0\"", "tap = \"tap0\"\ndriver = \"nic0\"", 18, "exclude each other"),
        ("tap = \"tap0\"", "tap = \"a-name-that-is-too-long\"", 17, "no interface name"),
        ("tap = \"tap0\"", "tap = \"t\"\nmac = \"52:54:00:00:00:01\"", 18, "used by guest.web.net[0].mac already"),
        ("tap = \"tap0\"", "tap = \"t\"\nmac = \"01:00:5e:00:00:01\"", 18, "no unicast address"),
        ("tap = \"tap0\"", "tap = \"t\"\nmtu = 67", 18, "68 to 65535"),
        ("tap = \"tap0\"", "tap = \"t\"\nallow_any_source = true", 18, "only a NIC that guests share"),
        ("tap = \"tap0\"", "driver = \"nic0\"\nmtu = 9000", 16, "share its NIC's MTU"),
        ("cpus = 2", "cpus = 0", 5, "1 to 64 vCPUs"),
        ("cpus = 2", "cpus = 65", 5, "1 to 64 vCPUs"),
        ("memory = \"1G\"", "memory = 8192", 6, "not between 16M and"),
        ("kernel = \"vmlinuz\"", "kernel = \"\"", 3, "the path is empty"),
        ("0000:03:00.0", "0000:03:20.0", 20, "no PCI address"),
        ("cpus = 2", "passthrough = [\"03:00.0\"]", 20, "used by guest.web.passthrough[0] already"),
        ("cpus = 2", "passthrough = [\"0000:04:00.0\",\n\"0000:04:00.0\"]", 6, "used by guest.web.passthrough[0]"),
        ("[driver.nic0]", "[driver.web]", 13, "nothing defines [driver.nic0]"),
        ("limit = 20", "interval_s = 0", 22, "at least 1 second"),
        ("cpus = 2", "restart = { interval_s = 0 }", 5, "at least 1 second"),
        ("cpus = 2", "cmdline = \"quiet\\u0000 root=/dev/vda1\"", 5, "holds a zero byte"),
        ("[driver.nic0]", "[driver.nic0]\ncmdline = \"\\u0000\"", 20, "holds a zero byte"),
        ("limit = 20", "boot_timeout_s = 0", 22, "no driver VM boots"),
        ("limit = 20", "heartbeat_timeout_ms = 300", 22, "allow at least twice"),
        ("limit = 20", "backoff_max_ms = 1", 22, "less than `backoff_ms`"),
        ("[driver.nic0]", "[guest.\"a b\"]\nkernel = \"k\"\n[driver.nic0]", 19, "letters, digits"),
        (
            "[driver.nic0]",
            "[guest.b]\nkernel = \"k\"\nconsole = \"terminal\"\n[driver.nic0]",
            7,
            "the terminal is used",
        ),
        (
            "console = \"terminal\"",
            "console = { file = \"c\" }\n[guest.a]\nkernel = \"k\"\nconsole = { file = \"c\" }\n[guest.b]\nkernel = \"k\"",
            7,
            "the file \"c\" is used by guest.a.console already (line 10)",
        ),
        (
            "console = \"terminal\"",
            "console = { file = \"/var/lib/debian.raw\" }",
            7,
            "\"/var/lib/debian.raw\" is a disk",
        ),
        (
            "[driver.nic0]",
            "[guest.b]\nkernel = \"k\"\ndisk = [{ path = \"/var/lib/debian.raw\" }]\n[driver.nic0]",
            21,
            "shared",
        ),
        (
            "[driver.nic0]",
            "[[guest.web.port]]\nname = \"a\"\nsocket = \"s\"\n[[guest.web.port]]\nname = \"a\"\nsocket = \"t\"\n[driver.nic0]",
            23,
            "already",
        ),
        ("[driver.nic0]", "[[guest.web.sound]]\ndriver = \"snd0\"\n[driver.nic0]", 20, "nothing defines [driver.snd0]"),
        ("[driver.nic0]", "[[guest.web.sound]]\ndriver = \"nic0\"\n[driver.nic0]", 19, "a driver VM holds one device"),
        ("[driver.nic0]", "[[guest.web.port]]\nname = \"org.umbra.x\"\nsocket = \"s\"\n[driver.nic0]", 20, "taken"),
    ] {
        let error = mistake(old, new);
        let right = error.contains(what) && error.starts_with(&format!("dir/m.toml:{line}: "));
        assert!(right, "{new:?} should say {what:?} in line {line}: {error}");
    }
}

#[test]
fn a_driver_that_nobody_uses_and_one_named_as_a_guest_are_mistakes() {
    let lone = format!("{GOOD}[driver.lone]\ndevice = \"0000:05:00.0\"\nimage = \"i\"\n");
    let error = parse(&lone).unwrap_err();
    assert!(error.contains(":23: driver.lone: no guest uses it"), "{error}");
    let twin = GOOD.replace("nic0", "web");
    let error = parse(&twin).unwrap_err();
    assert!(error.contains(":19: driver.web: a guest is named web too"), "{error}");
}

#[test]
fn an_empty_file_asks_for_a_guest() {
    assert!(parse("").unwrap_err().contains("m.toml:1: a machine needs a guest"));
}

#[test]
fn files_that_are_no_machine_files_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.toml");
    assert!(matches!(Machine::read(&path), Err(SpecError::Read { .. })));
    std::fs::write(&path, b"\xff\xfe").unwrap();
    assert!(matches!(Machine::read(&path), Err(SpecError::NotText { .. })));
    std::fs::write(&path, vec![b'#'; 2 << 20]).unwrap();
    assert!(matches!(Machine::read(&path), Err(SpecError::NotText { .. })));
}

prop_compose! {
    fn any_guest()(
        cpus in 1..=crate::config::MAX_CPUS,
        pages in (16 << 8)..(1_u64 << 20),
        cmdline in "\\PC*",
        kernel in "/[a-z\"\\\\ ]{1,20}",
        read_only: bool,
        taps in prop::collection::btree_set("[a-z]{1,15}", 0..4),
        mtu in prop::option::of(68_u16..),
        port in "[a-z.]{1,10}",
    ) -> Guest {
        Guest {
            cpus,
            memory: MemorySize(pages * 4096),
            cmdline,
            disk: vec![GuestDisk::on_file("/disk".into(), read_only)],
            net: taps.into_iter().map(|tap| Net { tap: Some(tap), mtu, ..Net::default() }).collect(),
            port: vec![Port { name: port, socket: "/socket".into() }],
            console: Console::File("/log".into()),
            ..Guest::new(kernel.into())
        }
    }
}

proptest! {
    #[test]
    fn parse_never_panics(text in ".*") {
        let _ = parse(&text);
    }

    #[test]
    fn parse_never_panics_on_damaged_files(at in 0..GOOD.len(), length in 0_usize..20, with in ".{0,5}") {
        let end = (at + length).min(GOOD.len());
        let _ = parse(&format!("{}{with}{}", &GOOD[..at], &GOOD[end..]));
    }

    #[test]
    fn what_is_written_is_read_back(guest in any_guest(), mut driven in any_guest(), restart: (u16, u16)) {
        driven.net = vec![Net { driver: Some("nic0".into()), ..Net::default() }];
        driven.port.clear();
        driven.console = Console::File("/b.log".into());
        driven.disk.clear();
        let mut machine = Machine::default();
        machine.guest.insert("a".into(), guest);
        machine.guest.insert("b".into(), driven);
        machine.guest.values_mut().for_each(|g| g.disk.iter_mut().for_each(|d| d.read_only = true));
        let mut driver = Driver::new("0000:03:00.0".into(), "/image".into());
        driver.restart.limit = restart.0.into();
        driver.restart.interval_s = u32::from(restart.1) + 1;
        machine.driver.insert("nic0".into(), driver);
        let text = machine.to_string();
        prop_assert_eq!(parse(&text).map_err(|e| TestCaseError::fail(format!("{e}\n{text}")))?, machine);
    }
}

#[test]
fn the_devices_that_share_a_nic_know_each_others_addresses() {
    let net = |driver: &str, mac| Net { driver: Some(driver.into()), mac, ..Net::default() };
    let guest = |net| Guest { net, ..Guest::new("vmlinuz".into()) };
    let set = Mac([2, 0, 0, 0, 0, 9]);
    let mut machine = Machine::default();
    machine.guest.insert("a".into(), guest(vec![net("nic0", None), net("nic1", None), net("nic0", Some(set))]));
    machine.guest.insert("b".into(), guest(vec![net("nic0", None), Net { tap: Some("t".into()), ..Net::default() }]));
    let made = |name: &str, n: usize| Net::default().mac_or_default(name, n);
    assert_eq!(machine.neighbours_of("a", 0), [set, made("b", 0)]);
    assert_eq!(machine.neighbours_of("b", 0), [made("a", 0), set]);
    for (name, n) in [("a", 1), ("b", 1), ("b", 7), ("c", 0)] {
        assert_eq!(machine.neighbours_of(name, n), [], "{name} {n}");
    }
}
