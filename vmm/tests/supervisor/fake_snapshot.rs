//! The snapshots' part of the fake driver VMs. What goes wrong is in the kernel command lines, as in [`super::fake_vm`].

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use umbra_driver_vm::protocol::{FromAgent, MemoryRange};
use umbra_vmm::base::time::Time;
use umbra_vmm::vm::snapshot::key::OfVm;
use umbra_vmm::wire::channel::{Channel, Incoming};
use umbra_vmm::wire::messages::{FromVm, SnapshotNews, ToVm, VcpuCounts, VmSpec};

/// The begin of a life with a snapshot, which is restored from the fourth life on, or from the second. Whether it is restored.
pub fn snapshot(spec: &VmSpec, channel: &Channel, say: &dyn Fn(FromAgent)) -> bool {
    let tell = |news| channel.send(&FromVm::Snapshot { news }, &[]).unwrap();
    let restored = spec.cmdline.contains("restored ");
    // As much as a process has between its start and the word that it is restored.
    thread::sleep(Duration::from_millis(50));
    match spec.name.as_str() {
        "nic0.1" => tell(SnapshotNews::Missing),
        "nic0.2" if !restored => tell(SnapshotNews::Missing),
        "nic0.3" if !restored => tell(SnapshotNews::Refused("its memory is damaged".into())),
        _ => {
            tell(SnapshotNews::Restored);
            return true;
        }
    }
    if restored {
        // One that nothing is made ahead for.
        return false;
    }
    say(FromAgent::Ready { loaded: false, unused: Vec::new() });
    let unused = vec![MemoryRange { start: 32 << 20, length: 4 << 20 }];
    say(FromAgent::Ready { loaded: true, unused: unused.clone() });
    if spec.name == "nic0.2" && spec.cmdline.contains("slow-to-be-saved ") {
        return false;
    }
    expect_to_be_saved(channel, &unused);
    println!("[    1.0] {} is saved", spec.name);
    tell(if spec.name == "nic0.2" { SnapshotNews::Taken(1 << 20) } else { SnapshotNews::NotTaken("no room".into()) });
    false
}

/// Whatever else came before this would be in the snapshot.
fn expect_to_be_saved(channel: &Channel, unused: &[MemoryRange]) {
    let first = channel.receive::<ToVm>().unwrap();
    assert!(matches!(&first, Incoming::Message(ToVm::Snapshot { unused: told }, _) if *told == unused), "{first:?}");
}

/// Where the snapshot of the VM is that would be restored in this one's place: a file beside the images, whose name is made of all that
/// the real key is made of, but for the host.
fn snapshot_file(spec: &VmSpec) -> PathBuf {
    let mut hasher = DefaultHasher::new();
    serde_json::to_string(&OfVm::new(spec).unwrap()).unwrap().hash(&mut hasher);
    spec.kernel.parent().unwrap().with_file_name(format!("{:016x}.snapshot", hasher.finish()))
}

/// The begin of a life whose snapshot is kept in a file.
pub fn kept_snapshot(spec: &VmSpec, channel: &Channel, say: &dyn Fn(FromAgent)) -> bool {
    let tell = |news| channel.send(&FromVm::Snapshot { news }, &[]).unwrap();
    let generation = spec.name.rsplit('.').next().unwrap();
    let told = |what: &str| spec.cmdline.contains(&format!("{what}={generation} "));
    if told("slow-to-look") {
        thread::sleep(Duration::from_secs(100));
    }
    thread::sleep(Duration::from_millis(50));
    let file = snapshot_file(spec);
    match (file.exists(), spec.only_saves) {
        (true, true) => {
            tell(SnapshotNews::There);
            std::process::exit(0);
        }
        (true, false) => {
            tell(SnapshotNews::Restored);
            return true;
        }
        (false, _) => tell(SnapshotNews::Missing),
    }
    // For a test that has to know that this was said.
    std::fs::write(file.with_file_name(format!("{}.boots", spec.name)), "").unwrap();
    if told("dies-of-saving") {
        std::process::exit(9);
    }
    say(FromAgent::Ready { loaded: false, unused: Vec::new() });
    if told("slow-to-be-saved") {
        return false;
    }
    while told("slow-to-load") && !file.with_file_name("may-load").exists() {
        thread::sleep(Duration::from_millis(10));
    }
    if told("saved-slowly") {
        // From now on it would answer if it were asked how its vCPUs are.
        channel.send(&FromVm::Vcpus(VcpuCounts::default()), &[]).unwrap();
    }
    say(FromAgent::Ready { loaded: true, unused: Vec::new() });
    expect_to_be_saved(channel, &[]);
    if told("saved-slowly") {
        std::fs::write(file.with_file_name("is-being-saved"), "").unwrap();
        while !file.with_file_name("is-saved").exists() {
            thread::sleep(Duration::from_millis(10));
        }
        if !matches!(channel.try_receive::<ToVm>().unwrap(), Incoming::Empty) {
            tell(SnapshotNews::NotTaken("something more urgent came".into()));
            return false;
        }
    }
    if told("fails-when-saved") {
        channel.send(&FromVm::Panicked { at: Time::now().0 }, &[]).unwrap();
        let next = channel.receive::<ToVm>().unwrap();
        assert!(matches!(next, Incoming::Message(ToVm::Release, _)), "{next:?}");
        tell(SnapshotNews::NotTaken("something more urgent came".into()));
        // Whatever it is told because of this comes before the word that it has no device.
        thread::sleep(Duration::from_millis(200));
        if matches!(channel.try_receive::<ToVm>(), Ok(Incoming::Message(ToVm::Plug { .. }, _))) {
            std::fs::write(file.with_file_name("has-device"), "").unwrap();
        }
        channel.send(&FromVm::Released { at: Time::now().0 }, &[]).unwrap();
        return false;
    }
    if spec.cmdline.contains("full-disk ") {
        tell(SnapshotNews::NotTaken("write the snapshot: No space left on device".into()));
        return false;
    }
    // One that is lost is there, and is removed before anybody looks for it.
    if !told("lost") {
        std::fs::write(&file, &spec.name).unwrap();
    }
    tell(SnapshotNews::Taken(1 << 20));
    false
}
