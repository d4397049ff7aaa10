//! Metrics out of events and status.

use umbra_shadow::DeviceId;
use umbra_shadow::block::Counts;

use super::*;
use crate::lifecycle::NoticedBy;
use crate::wire::messages::{MaskedCounts, NetWork, PathWork, SoundCounts};

fn failed(source: NoticedBy) -> Event {
    Event::DriverFailed { driver: "nic0".into(), generation: 1, source, reason: "x".into(), detect_ms: 0.1 }
}

#[test]
fn events_are_counted() {
    let metrics = Metrics::new("m");
    metrics.observe(&failed(NoticedBy::Panic));
    metrics.observe(&failed(NoticedBy::Panic));
    metrics.observe(&failed(NoticedBy::Planned));
    let parts = RecoveryParts { boot_ms: Some(500.0), ..RecoveryParts::default() };
    let frames = MaskedCounts { logged: 5, replayed: 4, dropped: 0, unknown: 1 };
    metrics.observe(&Event::DriverLive { driver: "nic0".into(), generation: 3, outage_ms: Some(700.0), parts, frames });
    metrics.observe(&Event::EndLive {
        guest: "web".into(),
        device: DeviceId::net(0),
        driver: "nic0".into(),
        generation: 3,
        frames,
    });
    let samples = SoundCounts { frames_skipped: 480, ..SoundCounts::default() };
    let live = Event::SoundLive {
        guest: "web".into(),
        device: DeviceId::sound(0),
        driver: "snd0".into(),
        generation: 2,
        samples,
    };
    metrics.observe(&live);
    let text = metrics.text();
    for line in [
        "umbra_machine_info{machine=\"m\",version=\"0.1.0\"} 1",
        "umbra_driver_failures_total{driver=\"nic0\",source=\"panic\"} 2",
        "umbra_driver_outage_seconds_bucket{le=\"0.5\",driver=\"nic0\"} 0",
        "umbra_driver_outage_seconds_bucket{le=\"1.0\",driver=\"nic0\"} 1",
        "umbra_driver_recovery_seconds_total{driver=\"nic0\",part=\"boot\"} 0.5",
        "umbra_driver_frames_total{driver=\"nic0\",fate=\"unknown\"} 2",
        "umbra_driver_samples_total{driver=\"snd0\",fate=\"skipped\"} 480",
    ] {
        assert!(text.lines().any(|have| have == line), "{line}:\n{text}");
    }
    assert!(!text.contains("replaced"), "a guest's reboot is no failure");
    assert!(text.ends_with("# EOF\n"));
}

#[test]
fn the_present_state_is_shown_with_the_memory_of_each_process() {
    let metrics = Metrics::new("m");
    let status = r#"{"name":"web","pid":PID,"guests":[{"name":"web","state":"running","reason":null,"pid":PID,"uptime_s":2.5,"nets":[
        {"index":0,"mac":"02:00:00:00:00:01","tap":null,"driver":"nic0","mode":"passive","frames_out":9,"frames_in":8,"foreign_source":3,
        "logged_now":0,"masked":{"logged":0,"replayed":0,"dropped":0,"unknown":0},"work":WORK}],
        "disks":[{"index":1,"driver":"disk0","serial":"S",
        "bytes":512,"volatile_cache":true,"cache":"auto","mode":"replaying","kept_bytes":8192,"owed_bytes":4096,"pending":2,"sums":SUMS}]}],
        "drivers":[{"name":"nic0","device":"","driver":null,"kernel":null,"generation":1,"state":"live","pid":null,"carrier":true,
        "reset_method":"flr","reset_meaning":"","failures":0,"reason":null,"last_outage_ms":null,"report":null,"available_memory":42,
        "standby":{"state":"armed","device":"0000:04:00.0","network":"same","generation":2,"pid":null,"age_s":7.5},
        "usage":{"vcpus":{"exits":7}}}]}"#;
    let sums = Counts { kept_in_flight: 3, rewritten_sectors: 8, failed_requests: 1, ..Counts::default() };
    let sums = serde_json::to_string(&sums).unwrap();
    let into = PathWork { suppressed: 6, ..PathWork::default() };
    let work = serde_json::to_string(&NetWork { into, ..NetWork::default() }).unwrap();
    let status = status.replace("PID", &std::process::id().to_string()).replace("SUMS", &sums).replace("WORK", &work);
    metrics.show(serde_json::from_str(&status).unwrap());
    let text = metrics.text();
    for line in [
        "umbra_driver_state{driver=\"nic0\",state=\"live\"} 1",
        "umbra_driver_generation{driver=\"nic0\"} 1",
        "umbra_driver_carrier{driver=\"nic0\"} 1",
        "umbra_driver_available_memory_bytes{driver=\"nic0\"} 42",
        "umbra_guest_uptime_seconds{guest=\"web\"} 2.5",
        "umbra_guest_disk_owed_bytes{guest=\"web\",device=\"block1\"} 4096",
        "umbra_guest_disk_requests_total{guest=\"web\",device=\"block1\",fate=\"kept\"} 3",
        "umbra_guest_disk_requests_total{guest=\"web\",device=\"block1\",fate=\"failed\"} 1",
        "umbra_vcpu_events_total{kind=\"driver\",name=\"nic0\",counter=\"exits\"} 7",
        "umbra_guest_net_events_total{guest=\"web\",device=\"net0\",direction=\"into\",counter=\"suppressed\"} 6",
        "umbra_guest_disk_bytes_total{guest=\"web\",device=\"block1\",fate=\"rewritten\"} 4096",
        "umbra_guest_disk_bytes_total{guest=\"web\",device=\"block1\",fate=\"lost\"} 0",
        "umbra_guest_disk_kept_bytes{guest=\"web\",device=\"block1\"} 8192",
        "umbra_driver_standby_state{driver=\"nic0\",kind=\"spare\",state=\"armed\"} 1",
        "umbra_driver_standby_age_seconds{driver=\"nic0\",kind=\"spare\"} 7.5",
        "umbra_guest_foreign_source_frames_total{guest=\"web\",device=\"net0\"} 3",
    ] {
        assert!(text.lines().any(|have| have == line), "{line}:\n{text}");
    }
    let resident = text
        .lines()
        .find(|line| line.starts_with("umbra_process_resident_memory_bytes{kind=\"guest\",name=\"web\"}"))
        .unwrap();
    let mut names: Vec<_> =
        text.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.rsplit_once(' ')).collect();
    names.sort_unstable();
    assert!(names.windows(2).all(|pair| pair[0].0 != pair[1].0), "a name twice: {text}");
    assert!(resident.rsplit(' ').next().unwrap().parse::<u64>().unwrap() > 100_000, "{resident}");
}
