//! The bench itself: devices where scripts expect them, status and output of scripts, files, captures.

use std::time::Duration;

use crate::common::{OrTell, STEP, assets, braked};
use umbra_tests::bench::{Bench, BenchError, BenchSpec, Storage};

#[test]
fn scripts_run_devices_are_where_they_should_be_and_a_nic_reaches_the_peer() {
    braked(crate::SPEED, scripts_run);
}

fn scripts_run() {
    let mut spec = BenchSpec::new("bench-itself").nics(&["e1000e", "rtl8139", "igb"]).sound(&["hda", "es1370"]);
    spec.storage = vec![Storage::empty("nvme", 64 << 20)];
    let mut bench = Bench::boot(spec, &assets()).or_tell();

    let output = bench.run("echo out; echo err >&2; exit 7").or_tell();
    assert_eq!((output.stdout.as_str(), output.stderr.as_str(), output.status), ("out\n", "err\n", 7));

    let ids = bench
        .expect("for d in $NIC0 $NIC1 $NIC2 $SND0 $SND1 $DISK0; do cat /sys/bus/pci/devices/$d/device; done", STEP);
    assert_eq!(
        ids.or_tell().split_whitespace().collect::<Vec<_>>(),
        ["0x10d3", "0x8139", "0x10c9", "0x2668", "0x5000", "0x0010"]
    );

    let groups = bench.expect(
        "for nic in $NIC0 $NIC1 $NIC2; do vfio $nic; readlink /sys/bus/pci/devices/$nic/iommu_group; done; ls /dev/kvm",
        STEP,
    );
    let groups = groups.or_tell();
    let mut distinct: Vec<_> = groups.lines().collect();
    distinct.sort_unstable();
    distinct.dedup();
    assert_eq!(distinct.len(), 4, "three groups and /dev/kvm: {groups}");

    std::fs::write(bench.share().join("in"), "from outside\n").unwrap();
    bench.expect("cp in out", STEP).or_tell();
    assert_eq!(std::fs::read_to_string(bench.share().join("out")).unwrap(), "from outside\n");

    let slow = bench.run_for("echo begun; sleep 100", Duration::from_secs(2)).unwrap_err();
    let BenchError::Script { source, .. } = &slow else { panic!("{slow}") };
    assert!(source.to_string().contains("begun"), "{source}");

    reach_the_peer(bench);
}

/// The first NIC is given back to its own driver and used by the test host itself.
fn reach_the_peer(mut bench: Bench) {
    let script = "unvfio $NIC0; has_net() { [ -n \"$(netof $NIC0)\" ]; }; await 10 has_net; nic=$(netof $NIC0)
        ip addr add 10.77.0.2/24 dev $nic; ip link set $nic up; umbra-probe first-answer 10.77.0.1 20";
    bench.expect(script, STEP).or_tell();
    bench.peer().offer(1 << 20, 100 << 20, u64::MAX).or_tell();
    let sum = bench.expect("wget -q -O - http://10.77.0.1:8000/x | sha256sum", STEP).or_tell();
    assert!(sum.starts_with(&umbra_tests::peer::Content { bytes: 1 << 20 }.sha256()), "{sum}");
    assert_eq!(bench.peer().progress().or_tell().complete, 1);
    // A port where nobody listens: the reset has to be in the capture.
    let _ = bench.run("wget -q -O - http://10.77.0.1:1/").or_tell();
    let dir = bench.shutdown().or_tell();
    assert_eq!(umbra_tests::bench::pcap::resets(&dir.join("nic0.pcap")).or_tell().len(), 1);
}
