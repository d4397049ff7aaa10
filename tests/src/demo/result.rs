//! What a demonstration found, as `result.json` and as the closing lines of the transcript.

use std::path::Path;
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;

use super::DemoError;
use super::crash::Kind;
use super::disk::DiskResult;
use super::events::Event;
use super::machine::NIC_DRIVER;
use super::outage::{Outage, median_and_max};
use super::sound::SoundResult;
use crate::bench::brake;

/// `result.json`.
#[derive(Clone, Debug, Serialize)]
pub struct DemoResult {
    /// The checksum holds, no connection was reset, the guest's log is clean, and all crashes took place.
    pub ok: bool,
    /// Which attempt this was: 1, unless an emulated test host had to be booted again.
    pub attempts: u32,
    /// The share of its full speed at which the emulator ran.
    pub speed: f64,
    /// How long it took, s.
    pub seconds: f64,
    /// Crashes of each driver VM that were to be survived.
    pub wanted: u32,
    /// The NIC's part.
    pub nic: NicResult,
    /// The sound card's part, where there is one.
    pub sound: Option<SoundResult>,
    /// The disk's part, where there is one.
    pub disk: Option<DiskResult>,
}

/// The NIC's part of the result.
#[derive(Clone, Debug, Serialize)]
pub struct NicResult {
    /// QEMU's model, or the PCI address of a real one.
    pub model: String,
    /// Crashes that were survived.
    pub crashes: u32,
    /// Size of the download.
    pub bytes: u64,
    /// What the guest got is what the peer sent.
    pub sha256_ok: bool,
    /// Resets seen by the peer's sockets or on the wire, whichever saw more.
    pub connection_resets: u32,
    /// TCP connections of the download: one.
    pub connections: u32,
    /// No new line in the guest's kernel log about virtio, links or errors, and no change of carrier.
    pub guest_log_clean: bool,
    /// All new lines.
    pub guest_log_new: Vec<String>,
    /// Carrier changes that the guest counted.
    pub carrier_changes: u64,
    /// Longest time without a newly acknowledged byte, as the peer's kernel counted.
    pub longest_tcp_stall_ms: u64,
    /// Gaps between ticks at the peer.
    pub outage_ms: Option<OutageFigures>,
    /// Each crash.
    pub per_crash: Vec<CrashResult>,
}

/// Figures over all outages, ms.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct OutageFigures {
    /// The middle one.
    pub p50: f64,
    /// The longest.
    pub max: f64,
}

/// One crash.
#[derive(Clone, Debug, Default, Serialize)]
pub struct CrashResult {
    /// `panic`, `kill`, `in-replay`.
    pub kind: Option<String>,
    /// What the peer saw; none for the second of a pair, whose outage is the first one's.
    pub outage: Option<Outage>,
    /// Longest time without a newly acknowledged byte around it, ms.
    pub tcp_stall_ms: u64,
    /// How Umbra noticed, in its words.
    pub reason: String,
    /// From mask to live, as Umbra counts, ms.
    pub umbra_outage_ms: Option<f64>,
    /// Its parts, ms.
    pub parts: Value,
    /// Frames logged, sent, dropped, of unknown fate.
    pub frames: Value,
}

impl CrashResult {
    pub(super) fn new(kind: Kind, outage: Option<Outage>, tcp_stall_ms: u64, events: &[Event]) -> Self {
        // The sound card's may have crashed at the same moment.
        let ours = |event: &&Event| event.text("driver") == NIC_DRIVER;
        let last = |name: &str| events.iter().filter(ours).rev().find(|event| event.event == name);
        let field = |event: Option<&Event>, name: &str| {
            event.and_then(|event| event.fields.get(name)).cloned().unwrap_or(Value::Null)
        };
        let live = last("driver-live");
        Self {
            kind: serde_json::to_value(kind).ok().and_then(|kind| kind.as_str().map(Into::into)),
            outage,
            tcp_stall_ms,
            reason: last("driver-failed").map(|event| event.text("reason").to_owned()).unwrap_or_default(),
            umbra_outage_ms: live.and_then(|event| event.number("outage_ms")),
            parts: field(live, "parts"),
            frames: field(live, "frames"),
        }
    }

    pub(super) fn second_of_pair() -> Self {
        Self { kind: Some("in-replay".into()), reason: "the second of the pair before".into(), ..Self::default() }
    }

    /// For the transcript.
    pub(super) fn lines(&self) -> Vec<String> {
        let ms = |name: &str| self.parts.get(name).and_then(Value::as_f64);
        let named = |name: &str, words: &str| ms(name).map(|ms| format!("{words} {}", span(ms)));
        let mut lines = Vec::new();
        let detect = ms("detect_ms").map(|ms| format!(" after {}", span(ms))).unwrap_or_default();
        lines.push(format!("  detected{detect}: {}; masked: the guest's device stays up", self.reason));
        let method = self.parts.get("reset_method").and_then(Value::as_str).unwrap_or("none");
        let parts: Vec<_> = [
            named("fence_ms", "fence"),
            named("reset_ms", &format!("device reset ({method})")),
            named("boot_ms", "boot"),
            named("plug_ms", "plug"),
            named("probe_ms", "driver's probe"),
            named("setup_ms", "set-up"),
            named("link_ms", "link"),
            named("replay_ms", "replay"),
        ]
        .into_iter()
        .flatten()
        .collect();
        let total = self.umbra_outage_ms.map(|ms| format!(" in {}", span(ms))).unwrap_or_default();
        lines.push(format!("  restored{total}: {}", parts.join(", ")));
        let count = |name: &str| self.frames.get(name).and_then(Value::as_u64).unwrap_or(0);
        lines.push(format!(
            "  frames: {} logged, {} sent, {} dropped, {} of unknown fate (never sent twice)",
            count("logged"),
            count("replayed"),
            count("dropped"),
            count("unknown")
        ));
        #[expect(clippy::cast_precision_loss, reason = "a figure for humans")]
        let stall = span(self.tcp_stall_ms as f64);
        let seen = self.outage.as_ref().map_or("too few ticks to tell".into(), |o| span(o.gap_ms));
        lines.push(format!("  the peer saw no tick for {seen}; the download stood still for {stall} and goes on"));
        lines
    }
}

/// A length of time for people.
pub(super) fn span(ms: f64) -> String {
    if ms < 10.0 {
        format!("{ms:.1} ms")
    } else if ms < 1000.0 {
        format!("{ms:.0} ms")
    } else {
        format!("{:.2} s", ms / 1000.0)
    }
}

pub(super) fn outages(crashes: &[CrashResult]) -> Option<OutageFigures> {
    let gaps: Vec<_> = crashes.iter().filter_map(|crash| crash.outage.as_ref()).map(|outage| outage.gap_ms).collect();
    median_and_max(&gaps).map(|(p50, max)| OutageFigures { p50, max })
}

impl DemoResult {
    /// With the crashes that were `wanted`, and the number of the attempt.
    pub(super) fn new(
        nic: NicResult,
        (sound, disk): (Option<SoundResult>, Option<DiskResult>),
        (wanted, attempts): (u32, u32),
        took: Duration,
    ) -> Self {
        let ok = nic.sha256_ok
            && nic.connection_resets == 0
            && nic.connections == 1
            && nic.guest_log_clean
            && nic.crashes >= wanted
            && nic.outage_ms.is_some()
            && sound.as_ref().is_none_or(SoundResult::is_ok)
            && disk.as_ref().is_none_or(DiskResult::is_ok);
        let speed = brake::speed().unwrap_or(1.0);
        Self { ok, attempts, speed, seconds: took.as_secs_f64(), wanted, nic, sound, disk }
    }

    /// What is not as it should be, in the reader's words.
    pub fn failures(&self) -> Vec<String> {
        let nic = &self.nic;
        let mut all = Vec::new();
        let mut when = |failed: bool, what: String| all.extend(failed.then_some(what));
        when(!nic.sha256_ok, "the guest did not get the file that was sent".into());
        when(nic.connection_resets > 0, format!("{} connections were reset", nic.connection_resets));
        when(nic.connections != 1, format!("the download took {} connections", nic.connections));
        when(!nic.guest_log_clean, "the guest's kernel noticed something".into());
        when(nic.crashes < self.wanted, format!("{} of {} crashes took place", nic.crashes, self.wanted));
        when(nic.outage_ms.is_none(), "no outage was seen by the peer".into());
        all.extend(self.sound.as_ref().filter(|sound| !sound.is_ok()).map(SoundResult::failure));
        all.extend(self.disk.as_ref().filter(|disk| !disk.is_ok()).map(DiskResult::failure));
        all
    }

    pub(super) fn write(&self, path: &Path) -> Result<(), DemoError> {
        let text = serde_json::to_string_pretty(self).unwrap_or_default();
        std::fs::write(path, text + "\n").map_err(|e| DemoError::file("write", path, e))
    }

    /// The end of the transcript.
    pub(super) fn closing_lines(&self) -> Vec<String> {
        let nic = &self.nic;
        let good = |yes: bool| if yes { "yes" } else { "NO" };
        let mut lines = vec![String::new()];
        if !self.ok {
            lines.push(format!("The demo failed: {}.", self.failures().join("; ")));
        }
        lines.extend([
            format!("{}: {} crashes of the driver VM, {:.0} s in all", nic.model, nic.crashes, self.seconds),
            format!("  checksum of the {} MiB download holds    {}", nic.bytes >> 20, good(nic.sha256_ok)),
            format!("  connections reset                        {}", nic.connection_resets),
            format!("  guest's kernel log clean                 {}", good(nic.guest_log_clean)),
        ]);
        if !nic.guest_log_clean {
            lines.extend(nic.guest_log_new.iter().map(|line| format!("    {line}")));
            lines.push(format!("    carrier changes: {}", nic.carrier_changes));
        }
        if let Some(outage) = nic.outage_ms {
            lines.push(format!(
                "  outage seen by the peer                  {} (median), {} (longest)",
                span(outage.p50),
                span(outage.max)
            ));
        }
        if let Some(sound) = &self.sound {
            lines.extend(sound.closing_lines());
        }
        lines.extend(self.disk.iter().flat_map(DiskResult::closing_lines));
        lines.push("  all failures on a page                   report.html".into());
        if self.attempts > 1 {
            lines.push(format!("  attempts needed                          {}", self.attempts));
        }
        lines.push(if self.ok { "The guest noticed nothing but time.".into() } else { "NOT as it should be.".into() });
        lines
    }
}
