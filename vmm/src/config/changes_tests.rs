//! What can be taken over, key by key.

use super::*;

const MACHINE: &str = r#"
[guest.web]
kernel = "k"
net = [{ driver = "nic0" }, { tap = "tap0" }]
[driver.nic0]
device = "0000:03:00.0"
image = "i"
"#;

fn parse(text: &str) -> Machine {
    Machine::parse(text, "m.toml".as_ref()).unwrap()
}

/// The changes from [`MACHINE`] to a text with `to` in the place of `from`.
fn changed(from: &str, to: &str) -> Plan {
    assert!(MACHINE.contains(from), "{from}");
    plan(&parse(MACHINE), &parse(&MACHINE.replace(from, to))).unwrap()
}

#[test]
fn every_key_has_its_effect_and_what_is_taken_is_in_the_machine() {
    use Effect::{Command, NextLife, NextProcess, NextRun, NextStart, Now};
    let guest = |key: &str| ("kernel = \"k\"", format!("kernel = \"k\"\n{key}"));
    let driver = |key: &str| ("image = \"i\"", format!("image = \"i\"\n{key}"));
    let cases = [
        (("\n[guest.web]", "metrics = \"127.0.0.1:9464\"\n[guest.web]".into()), "metrics", Now),
        (("\n[guest.web]", "confine = \"log\"\n[guest.web]".into()), "confine", NextProcess),
        (("\n[guest.web]", "cgroup = \"off\"\n[guest.web]".into()), "cgroup", NextRun),
        (("\n[guest.web]", "history = { runs = 1 }\n[guest.web]".into()), "history", NextRun),
        (("\"k\"", "\"other\"".into()), "guest.web.kernel", NextStart),
        (guest("initrd = [\"i\"]"), "guest.web.initrd", NextStart),
        (guest("cmdline = \"quiet\""), "guest.web.cmdline", NextStart),
        (guest("cpus = 2"), "guest.web.cpus", NextStart),
        (guest("cpu_max = \"50%\""), "guest.web.cpu_max", NextStart),
        (guest("memory = \"1G\""), "guest.web.memory", NextStart),
        (guest("on_reset = \"stop\""), "guest.web.on_reset", Now),
        (guest("on_crash = \"reboot\""), "guest.web.on_crash", Now),
        (guest("restart = { limit = 1 }"), "guest.web.restart.limit", Now),
        (guest("console = \"terminal\""), "guest.web.console", NextRun),
        (guest("passthrough = [\"0000:05:00.0\"]"), "guest.web.passthrough", NextRun),
        (guest("disk = [{ path = \"d\" }]"), "guest.web.disk", NextRun),
        (guest("port = [{ name = \"p\", socket = \"s\" }]"), "guest.web.port", NextRun),
        (("\"tap0\"", "\"tap1\"".into()), "guest.web.net", NextRun),
        (("03:00.0", "04:00.0".into()), "driver.nic0.device", NextRun),
        (driver("spare = \"0000:04:00.0\""), "driver.nic0.spare", NextRun),
        (("\"i\"", "\"j\"".into()), "driver.nic0.image", Command),
        (driver("spare_after_ms = 5"), "driver.nic0.spare_after_ms", Now),
        (driver("memory = \"256M\""), "driver.nic0.memory", NextRun),
        (driver("cpus = 2"), "driver.nic0.cpus", NextLife),
        (driver("cpu_max = \"50%\""), "driver.nic0.cpu_max", NextLife),
        (driver("cmdline = \"x\""), "driver.nic0.cmdline", NextLife),
        (driver("snapshots = false"), "driver.nic0.snapshots", NextLife),
        (driver("standby = \"cold\""), "driver.nic0.standby", Now),
        (driver("standbys = 2"), "driver.nic0.standbys", Now),
        (driver("restart.heartbeat_timeout_ms = 9000"), "driver.nic0.restart.heartbeat_timeout_ms", Now),
        (driver("restart.interrupts_per_s = 9"), "driver.nic0.restart.interrupts_per_s", NextLife),
    ];
    for ((from, to), key, effect) in cases {
        let Plan { machine, changes } = changed(from, &to);
        let [change] = &changes[..] else { panic!("{key}: {changes:?}") };
        assert_eq!((&*change.key, change.effect), (key, effect));
        let differs = change.before.is_some() && change.after.is_some() && change.before != change.after;
        assert!(differs, "{change:?}");
        assert_eq!(machine == parse(&MACHINE.replace(from, &to)), change.is_taken(), "{key}");
        assert_eq!(machine == parse(MACHINE), !change.is_taken(), "{key}");
    }
    let Plan { changes, .. } = plan(&parse(MACHINE), &parse(MACHINE)).unwrap();
    assert_eq!(changes, []);
}

#[test]
fn guests_and_driver_vms_are_added_that_have_to_do_with_each_other_alone() {
    let driver = "\n[driver.nic1]\ndevice = \"0000:04:00.0\"\nimage = \"i\"\n";
    let db = |driver: &str| format!("[guest.db]\nkernel = \"k\"\nnet = [{{ driver = \"{driver}\" }}]\n");
    let added = |more: &str| {
        let Plan { machine, changes } = plan(&parse(MACHINE), &parse(&format!("{MACHINE}{more}"))).unwrap();
        let taken: Vec<_> =
            changes.iter().filter(|change| change.is_taken()).map(|change| change.key.clone()).collect();
        let names = machine.guest.keys().map(|name| format!("guest.{name}"));
        let names: BTreeSet<_> = names.chain(machine.driver.keys().map(|name| format!("driver.{name}"))).collect();
        assert!(taken.iter().all(|key| names.contains(key)), "{names:?}");
        assert_eq!(names.len(), 2 + taken.len(), "{names:?}");
        taken
    };
    assert_eq!(added("[guest.db]\nkernel = \"k\"\nnet = [{ tap = \"tap1\" }]\n"), ["guest.db"]);
    assert_eq!(added(&format!("{driver}{}", db("nic1"))), ["guest.db", "driver.nic1"]);
    assert_eq!(added(&db("nic0")), [""; 0], "that of another guest");
    let both = MACHINE.replace("{ tap = \"tap0\" }", "{ driver = \"nic1\" }") + driver + &db("nic1");
    let Plan { machine, changes } = plan(&parse(MACHINE), &parse(&both)).unwrap();
    assert_eq!(machine, parse(MACHINE), "a guest that runs would have to change");
    assert_eq!(
        changes.iter().map(|change| &*change.key).collect::<Vec<_>>(),
        ["guest.db", "guest.web.net", "driver.nic1"]
    );
}

#[test]
fn what_was_removed_is_named_and_stays() {
    let two = format!("{MACHINE}[guest.db]\nkernel = \"k\"\n");
    let Plan { machine, changes } = plan(&parse(&two), &parse(MACHINE)).unwrap();
    assert_eq!(machine, parse(&two));
    let [Change { key, after: None, effect: Effect::NextRun, remedy, .. }] = &changes[..] else {
        panic!("{changes:?}")
    };
    assert_eq!((&**key, remedy.as_deref()), ("guest.db", Some("until then `umbra stop db` has it off")));
}

#[test]
fn what_contradicts_what_cannot_be_taken_over_is_refused() {
    // The new guest is to have what the old one would give up, which it keeps.
    let text = MACHINE.replace(", { tap = \"tap0\" }", "") + "[guest.db]\nkernel = \"k\"\nnet = [{ tap = \"tap0\" }]\n";
    let problem = plan(&parse(MACHINE), &parse(&text)).unwrap_err();
    assert!(problem.to_string().contains("the TAP interface tap0"), "{problem}");
}
