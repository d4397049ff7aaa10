//! What can happen in a machine, as `umbra run` reports it and as histories read it back: the same type for both.
//!
//! `docs/events.md` describes the fields. An event that another version wrote and this one does not know is
//! [`Event::Unknown`], and so is a word in it that stands for one of a few.

use serde::{Deserialize, Serialize};
use umbra_shadow::DeviceId;
use umbra_shadow::block::Counts;

use crate::lifecycle::{NoticedBy, StandbyStage};
use crate::record::parts::{Ms, RecoveryParts};
use crate::record::timeline::LifeStage;
use crate::record::words;
use crate::wire::messages::{LinkEnd, MaskedCounts, PaceSteps, SoundCounts};

/// What happened.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// A guest's vCPUs run.
    GuestRunning {
        /// Name of the guest.
        guest: String,
    },
    /// A guest resets: it is started again.
    GuestRebooted {
        /// Name of the guest.
        guest: String,
    },
    /// A guest has ended.
    GuestEnded {
        /// Name of the guest.
        guest: String,
        /// How: `powered off`, `killed`, or what went wrong.
        how: String,
    },
    /// A guest's device is served that came later than its driver VM's life, or was connected with it again.
    EndLive {
        /// Name of the guest.
        guest: String,
        /// Its device.
        #[serde(with = "words::device")]
        device: DeviceId,
        /// Name of the driver VM.
        driver: String,
        /// Generation of the life.
        generation: u32,
        /// What became of its frames meanwhile, which are in no `driver-live`.
        #[serde(default)]
        frames: MaskedCounts,
    },
    /// A generation of a driver VM is started.
    DriverStarting {
        /// Name of the driver VM.
        driver: String,
        /// Generation of the life.
        generation: u32,
    },
    /// A standby boots.
    StandbyStarting {
        /// Name of the driver VM.
        driver: String,
        /// Generation that it will be.
        generation: u32,
    },
    /// A standby waits for its turn.
    StandbyReady {
        /// Name of the driver VM.
        driver: String,
        /// Generation that it will be.
        generation: u32,
        /// How long it took to boot, ms.
        boot_ms: f64,
        /// It was restored from a snapshot.
        #[serde(default)]
        restored: bool,
    },
    /// There is a snapshot, which the next life is restored from.
    SnapshotReady {
        /// Name of the driver VM.
        driver: String,
        /// How long it took to look for it, and to take it where there was none, ms.
        ms: f64,
        /// Bytes of its file, where it was taken now.
        bytes: Option<u64>,
    },
    /// A standby died while it waited; another one is started after a delay.
    StandbyFailed {
        /// Name of the driver VM.
        driver: String,
        /// Generation that it would have been.
        generation: u32,
        /// The reason, for people.
        reason: String,
    },
    /// A standby takes the device, or a spare takes over with its own.
    DriverAdopted {
        /// Name of the driver VM.
        driver: String,
        /// Generation that serves from now on.
        generation: u32,
        /// PCI address of the device that serves from now on.
        device: String,
        /// How far it was: ready or booting; a spare armed, without carrier or booting.
        standby: StandbyStage,
    },
    /// The carrier of a waiting spare's NIC changed: with a carrier it takes over at once, without one it does not.
    SpareCarrier {
        /// Name of the driver VM.
        driver: String,
        /// Generation that it will be.
        generation: u32,
        /// Link up.
        up: bool,
    },
    /// A requested restart did not come about; the image of before is in use.
    RestartFailed {
        /// Name of the driver VM.
        driver: String,
        /// The reason, for people.
        reason: String,
    },
    /// A generation got on.
    DriverStage {
        /// Name of the driver VM.
        driver: String,
        /// Generation of the life.
        generation: u32,
        /// The stage that it has reached.
        stage: LifeStage,
        /// Since the process was started, ms.
        ms: f64,
        /// What the agent said, as the driver's name.
        detail: String,
    },
    /// A guest's device lost its driver VM; the shadow answers.
    Masked {
        /// Name of the guest.
        guest: String,
        /// The device, as `net0` or `sound0`.
        #[serde(with = "words::device")]
        device: DeviceId,
        /// Name of the driver VM.
        driver: String,
        /// Generation of the life that was lost.
        generation: u32,
        /// Why the link was lost.
        #[serde(with = "words::cause")]
        cause: LinkEnd,
    },
    /// A driver VM has failed.
    DriverFailed {
        /// Name of the driver VM.
        driver: String,
        /// Generation of the life.
        generation: u32,
        /// How it was noticed.
        source: NoticedBy,
        /// What happened, for people.
        reason: String,
        /// From the first sign to the certainty, ms.
        detect_ms: f64,
    },
    /// The failed life is fenced and its evidence kept.
    DriverFenced {
        /// Name of the driver VM.
        driver: String,
        /// Generation of the life.
        generation: u32,
        /// From the certainty to the end of the process, ms.
        fence_ms: f64,
        /// The crash report, where it could be written.
        report: Option<String>,
    },
    /// The device was reset between two lives.
    DeviceReset {
        /// Name of the driver VM.
        driver: String,
        /// PCI address of the device.
        device: String,
        /// The method, or `none`.
        method: String,
        /// How long it took, ms.
        reset_ms: f64,
        /// What went wrong, if anything.
        error: Option<String>,
    },
    /// A driver VM serves.
    DriverLive {
        /// Name of the driver VM.
        driver: String,
        /// Generation of the life.
        generation: u32,
        /// From the mask to here, ms; none for the first life.
        outage_ms: Option<f64>,
        /// How long each part took, ms.
        #[serde(default)]
        parts: RecoveryParts,
        /// What became of the frames, summed over the guests.
        #[serde(default)]
        frames: MaskedCounts,
    },
    /// A guest's sound device plays again after an outage.
    SoundLive {
        /// Name of the guest.
        guest: String,
        /// The device, as `sound0`.
        #[serde(with = "words::device")]
        device: DeviceId,
        /// Name of the driver VM.
        driver: String,
        /// Generation of the life.
        generation: u32,
        /// What became of the samples.
        samples: SoundCounts,
    },
    /// A guest's disk is served again after an outage.
    BlockLive {
        /// Name of the guest.
        guest: String,
        /// The device, as `block0`.
        #[serde(with = "words::device")]
        device: DeviceId,
        /// Name of the driver VM.
        driver: String,
        /// Generation of the life.
        generation: u32,
        /// What was counted from the mask on. What is owed is written again after this.
        requests: Counts,
    },
    /// A guest's disk has come to rest before a deliberate reset, or has not.
    AtRest {
        /// Name of the guest.
        guest: String,
        /// The device, as `block0`.
        #[serde(with = "words::device")]
        device: DeviceId,
        /// Name of the driver VM.
        driver: String,
        /// Since it was asked to, ms.
        ms: f64,
        /// Everything that was acknowledged is stable.
        stable: bool,
    },
    /// How much a guest's device moved around an outage, two seconds after it.
    Pace {
        /// Name of the guest.
        guest: String,
        /// The device, as `net0` or `sound0`.
        #[serde(with = "words::device")]
        device: DeviceId,
        /// Name of the driver VM.
        driver: String,
        /// Generation of the life that serves now.
        generation: u32,
        /// Frames in each step of time.
        steps: PaceSteps,
    },
    /// The NIC's carrier changed.
    Carrier {
        /// Name of the driver VM.
        driver: String,
        /// Link up.
        up: bool,
    },
    /// The next generation gets nothing of what was recorded of a guest's device, and the guest learns of that loss.
    CleanStart {
        /// Name of the driver VM.
        driver: String,
        /// Name of the guest.
        guest: String,
        /// Its device: `net0`, `sound0`.
        #[serde(with = "words::device")]
        device: DeviceId,
    },
    /// There will be no further generation.
    Quarantined {
        /// Name of the driver VM.
        driver: String,
        /// The reason, for people.
        reason: String,
    },
    /// A guest sees a disk with another size, as was asked for.
    DiskResized {
        /// Name of the guest.
        guest: String,
        /// Which of its devices.
        device: DeviceId,
        /// Its size.
        bytes: u64,
    },
    /// The host is to sleep, and no process has a device of it any more.
    Asleep {
        /// How long it took, ms.
        ms: f64,
    },
    /// The host is awake: the driver VMs begin their next lives.
    Awake {
        /// How long they were without their devices, ms; time in which the host was suspended does not count.
        ms: f64,
    },
    /// Someone asked for the end of a quarantine.
    Resumed {
        /// Name of the driver VM.
        driver: String,
    },
    /// The machine file was read again.
    Reloaded {
        /// Places in it whose new values are taken over.
        taken: Vec<String>,
        /// Those that differ and are left until the machine is started again.
        left: Vec<String>,
    },
    /// The machine file could not be read again, or asks for what this host does not have: nothing was changed.
    ReloadFailed {
        /// Why not.
        reason: String,
    },
    /// The run before was killed; this one has cleaned up after it.
    CleanedUp {
        /// The number of the supervisor that was killed.
        pid: u32,
        /// What was done, in words.
        done: String,
    },
    /// Somebody asked for a crash.
    CrashRequested {
        /// Name of the driver VM.
        driver: String,
        /// Generation of the life.
        generation: u32,
        /// How: a kind of `umbra crash`.
        kind: String,
    },
    /// The machine is ending.
    Stopping {
        /// Who asked for it, and what they asked for.
        how: String,
    },
    /// Something is not as it should be, and the machine goes on.
    Warning {
        /// The warning, as a sentence.
        what: String,
    },
    /// An event of another version, read from its log. Never reported.
    #[serde(other)]
    Unknown,
}

impl Event {
    /// The sentence for people; `None` for what only measures.
    pub(crate) fn sentence(&self) -> Option<String> {
        Some(match self {
            Self::StandbyStarting { .. } | Self::StandbyReady { .. } | Self::DriverStage { .. } => return None,
            Self::Pace { .. } | Self::SnapshotReady { .. } | Self::Unknown => return None,
            Self::DriverFenced { report: None, .. } => return None,
            Self::DeviceReset { error: None, .. } => return None,
            Self::GuestRunning { guest } => format!("{guest}: running"),
            Self::GuestRebooted { guest } => format!("{guest}: reboots"),
            Self::EndLive { guest, device, driver, generation, .. } => {
                format!("{guest}.{device} is served by {driver}, generation {generation}")
            }
            Self::GuestEnded { guest, how } => format!("{guest}: {how}"),
            Self::DriverStarting { driver, generation } => format!("{driver}: generation {generation} starts"),
            Self::StandbyFailed { driver, generation, reason } => {
                format!("{driver}: the standby (generation {generation}) failed: {reason}; another one follows")
            }
            Self::DriverAdopted {
                driver,
                generation,
                device,
                standby: standby @ (StandbyStage::Armed | StandbyStage::NoCarrier),
            } => format!("{driver}: the spare {device} takes over as generation {generation} (it was {standby})"),
            Self::SpareCarrier { driver, up: true, .. } => format!("{driver}: the spare has a carrier"),
            Self::SpareCarrier { driver, up: false, .. } => format!("{driver}: the spare has no carrier"),
            Self::DriverAdopted { driver, generation, standby, .. } => {
                format!("{driver}: the standby takes over as generation {generation} (it was {standby})")
            }
            Self::Masked { guest, device, driver, cause, .. } => match cause {
                LinkEnd::Closed => format!("{guest}.{device}: {driver} is gone; masked"),
                LinkEnd::Stalled(what) => format!("{guest}.{device}: {driver} stands still ({what}); masked"),
                LinkEnd::Broken(rule) => format!("{guest}.{device}: {driver} broke a rule ({rule}); masked"),
                LinkEnd::Suspect(what) => format!("{guest}.{device}: {driver} is suspected ({what}); masked"),
                LinkEnd::OtherDisk(what) => format!("{guest}.{device}: {driver} brought {what}; masked"),
            },
            Self::RestartFailed { driver, reason } => {
                format!("{driver}: not restarted: {reason}")
            }
            Self::DriverFailed {
                driver, generation, source: NoticedBy::Planned | NoticedBy::Carrier, reason, ..
            } => {
                format!("{driver}: generation {generation} is replaced: {reason}")
            }
            Self::DriverFailed { driver, generation, reason, detect_ms, .. } => {
                format!("{driver}: generation {generation} failed: {reason} (detected in {})", Ms(*detect_ms))
            }
            Self::DriverFenced { driver, report: Some(report), .. } => format!("{driver}: report in {report}"),
            Self::DeviceReset { driver, method, error: Some(error), .. } => {
                format!("{driver}: the device's reset ({method}) failed: {error}; going on without")
            }
            Self::DriverLive { driver, generation, outage_ms: None, parts, .. } => {
                format!("{driver}: generation {generation} live ({parts})")
            }
            Self::DriverLive { driver, generation, outage_ms: Some(outage), parts, frames } => {
                let MaskedCounts { logged, replayed, dropped, unknown } = frames;
                format!(
                    "{driver}: generation {generation} live after {} ({parts}; frames: {logged} logged, {replayed} \
                     sent, {dropped} dropped, {unknown} of unknown fate)",
                    Ms(*outage)
                )
            }
            Self::SoundLive { guest, device, samples, .. } => {
                let SoundCounts { frames_skipped, frames_silent, xruns, .. } = samples;
                format!(
                    "{guest}.{device}: plays again (samples: {frames_skipped} skipped, {frames_silent} silent; {xruns} xruns)"
                )
            }
            Self::BlockLive { guest, device, requests, .. } => {
                let Counts { kept_in_flight, failed_requests, .. } = requests;
                format!(
                    "{guest}.{device}: served again ({kept_in_flight} requests were under way and are done again, {failed_requests} have \
                     failed)"
                )
            }
            Self::AtRest { guest, device, ms, stable: true, .. } => {
                format!("{guest}.{device}: at rest in {}: everything acknowledged is stable", Ms(*ms))
            }
            Self::AtRest { guest, device, ms, stable: false, .. } => {
                format!(
                    "{guest}.{device}: not at rest after {}; what is owed is written again by the next life",
                    Ms(*ms)
                )
            }
            Self::Carrier { driver, up: true } => format!("{driver}: carrier"),
            Self::Carrier { driver, up: false } => format!("{driver}: no carrier"),
            Self::CleanStart { driver, guest, device } => {
                format!(
                    "{driver}: lives in a row died while {guest}'s {device} was set up or replayed; {device} starts over (until then \
                     a NIC's link is down, a sound card is dead)"
                )
            }
            Self::Quarantined { driver, reason } => {
                format!(
                    "{driver}: quarantined: {reason}; its guests have no service (a NIC shows no link, a sound card is dead, a disk's \
                     requests fail). \
                     `umbra resume {driver}` tries again"
                )
            }
            Self::DiskResized { guest, device, bytes } => {
                format!("{guest}.{device}: has {bytes} bytes now, as was asked for")
            }
            Self::Asleep { ms } => format!("asleep: no device of the host is in use, after {ms:.0} ms"),
            Self::Awake { ms } => {
                format!("awake after {ms:.0} ms (and the sleep): the driver VMs begin their next lives")
            }
            Self::Resumed { driver } => format!("{driver}: is tried again, as was asked for"),
            Self::Reloaded { taken, left } => reloaded(taken, left),
            Self::ReloadFailed { reason } => {
                format!("the machine file was not taken over, nothing is changed: {reason}")
            }
            Self::CleanedUp { pid, done } => format!(
                "the run before (process {pid}) was killed: {done}; its reports are kept (`umbra report --previous`)"
            ),
            Self::CrashRequested { driver, generation, kind } => {
                format!("{driver}: generation {generation} is told to crash ({kind})")
            }
            Self::Stopping { how } => format!("stopping: {how}"),
            Self::Warning { what } => format!("warning: {what}"),
        })
    }
}

/// What became of the machine file.
fn reloaded(taken: &[String], left: &[String]) -> String {
    let list = |what: &str, keys: &[String]| match keys {
        [] => String::new(),
        keys => format!("; {what} {}", keys.join(", ")),
    };
    match (taken, left) {
        ([], []) => "the machine file was read again: nothing in it differs".into(),
        _ => format!("the machine file was read again{}{}", list("taken over:", taken), list("left as it runs:", left)),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn masked(cause: LinkEnd) -> Event {
        let (guest, device, driver) = ("web".into(), DeviceId::net(0), "nic0".into());
        Event::Masked { guest, device, driver, generation: 1, cause }
    }

    fn read(text: &str) -> Event {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn events_are_written_with_the_words_of_the_documents_and_read_back() {
        let masked = [LinkEnd::Closed, LinkEnd::Broken("a descriptor twice".into())].map(masked);
        let json = masked.each_ref().map(|event| serde_json::to_value(event).unwrap());
        assert_eq!(
            (&json[0]["event"], &json[0]["device"], &json[0]["cause"]),
            (&"masked".into(), &"net0".into(), &"closed".into())
        );
        assert_eq!(json[1]["cause"], "a descriptor twice");
        for (event, json) in masked.iter().zip(&json) {
            assert_eq!(read(&json.to_string()).sentence(), event.sentence());
        }
        let failed = r#"{"event":"driver-failed","driver":"nic0","generation":1,"source":"vm-end","reason":"r","detect_ms":0.5}"#;
        let Event::DriverFailed { source: NoticedBy::VmEnd, .. } = read(failed) else { panic!("{failed}") };
        assert_eq!(serde_json::to_string(&read(failed)).unwrap(), failed);
    }

    #[test]
    fn words_of_another_version_are_read_as_unknown() {
        assert!(matches!(read(r#"{"event":"from-the-future","driver":"nic0"}"#), Event::Unknown));
        let failed =
            r#"{"event":"driver-failed","driver":"nic0","generation":1,"source":"WORD","reason":"r","detect_ms":0.5}"#;
        for (word, wanted) in [("telepathy", NoticedBy::Unknown), ("replaced", NoticedBy::Planned)] {
            let Event::DriverFailed { source, .. } = read(&failed.replace("WORD", word)) else { panic!("{word}") };
            assert_eq!(source, wanted);
        }
        let adopted =
            r#"{"event":"driver-adopted","driver":"nic0","generation":2,"device":"0000:01:00.0","standby":"asleep"}"#;
        assert!(matches!(read(adopted), Event::DriverAdopted { standby: StandbyStage::Unknown, .. }));
    }

    #[test]
    fn a_link_is_said_to_be_gone_to_stand_still_or_to_break_a_rule() {
        let said = |cause| masked(cause).sentence().unwrap();
        assert_eq!(said(LinkEnd::Closed), "web.net0: nic0 is gone; masked");
        assert_eq!(said(LinkEnd::Stalled("4 s".into())), "web.net0: nic0 stands still (4 s); masked");
        assert_eq!(said(LinkEnd::Broken("r".into())), "web.net0: nic0 broke a rule (r); masked");
        assert_eq!(said(LinkEnd::Suspect("EIO".into())), "web.net0: nic0 is suspected (EIO); masked");
        assert_eq!(said(LinkEnd::OtherDisk("another disk".into())), "web.net0: nic0 brought another disk; masked");
    }

    #[test]
    fn a_disk_s_events_read_as_sentences_and_are_read_back() {
        let at = || ("db".into(), DeviceId::block(1), "disk0".into());
        let (guest, device, driver) = at();
        let requests = Counts { kept_in_flight: 3, ..Counts::default() };
        let live = Event::BlockLive { guest, device, driver, generation: 2, requests };
        let sentence = "db.block1: served again (3 requests were under way and are done again, 0 have failed)";
        assert_eq!(live.sentence().unwrap(), sentence);
        let rest = |stable| {
            let (guest, device, driver) = at();
            Event::AtRest { guest, device, driver, ms: 12.0, stable }
        };
        assert_eq!(rest(true).sentence().unwrap(), "db.block1: at rest in 12 ms: everything acknowledged is stable");
        assert!(rest(false).sentence().unwrap().starts_with("db.block1: not at rest after 12 ms"));
        for event in [live, rest(true)] {
            let json = serde_json::to_string(&event).unwrap();
            assert!(json.contains("\"device\":\"block1\""), "{json}");
            assert_eq!(read(&json).sentence(), event.sentence());
        }
    }

    #[test]
    fn a_recovery_reads_as_a_sentence() {
        let parts = RecoveryParts {
            detect_ms: Some(0.4),
            reset_ms: Some(104.0),
            reset_method: "flr".into(),
            back_off_ms: Some(0.01),
            boot_ms: Some(5123.0),
            ..RecoveryParts::default()
        };
        let frames = MaskedCounts { logged: 14, replayed: 12, dropped: 0, unknown: 2 };
        let live = Event::DriverLive { driver: "nic0".into(), generation: 2, outage_ms: Some(6214.0), parts, frames };
        assert_eq!(
            live.sentence().unwrap(),
            "nic0: generation 2 live after 6.21 s (detect 0.4 ms, reset flr 104 ms, boot 5.12 s; frames: 14 logged, \
             12 sent, 0 dropped, 2 of unknown fate)"
        );
    }
}
