//! What is to come in a demonstration and how long it is likely to take: as long as the last time, which is kept in the cache, else
//! as long as on the reference machine times this one's slowness.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::DemoSpec;
use crate::assets::cache_dir;
use crate::bench::{brake, patience};

/// The file in the cache.
const FILE: &str = "timings.json";

/// A part of a demonstration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// Images, the song, the test host.
    Host,
    /// The machine's cold start.
    Start,
    /// The crashes.
    Crashes,
    /// Everything behind the last crash.
    End,
}

impl Part {
    const ALL: [Self; 4] = [Self::Host, Self::Start, Self::Crashes, Self::End];

    fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Start => "start",
            Self::Crashes => "crash",
            Self::End => "end",
        }
    }

    /// On the reference machine, s; of crashes for each.
    fn reference_s(self) -> f64 {
        match self {
            Self::Host => 15.0,
            Self::Start => 25.0,
            Self::Crashes => 30.0,
            Self::End => 20.0,
        }
    }
}

/// How long the parts took when they were last there, s, by what was shown and how fast.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
struct Timings(BTreeMap<String, BTreeMap<String, f64>>);

/// See the module.
#[derive(Debug)]
pub(super) struct Forecast {
    file: PathBuf,
    key: String,
    crashes: u32,
    known: Timings,
    since: Instant,
}

impl Forecast {
    pub(super) fn of(spec: &DemoSpec) -> Self {
        Self::from_file(spec, &cache_dir().join(FILE))
    }

    fn from_file(spec: &DemoSpec, file: &Path) -> Self {
        let text = std::fs::read_to_string(file).unwrap_or_default();
        let known = serde_json::from_str(&text).unwrap_or_default();
        let nic = spec.hardware.as_ref().map_or_else(|| spec.nic.to_string(), |wire| wire.pci.clone());
        let sound = spec.sound.as_ref().map_or_else(|| "none".into(), ToString::to_string);
        let disk = spec.disk.as_ref().map(|disk| format!(" {disk}")).unwrap_or_default();
        let key = format!("demo {nic} {sound}{disk} at {}", brake::speed().unwrap_or(1.0));
        Self { file: file.into(), key, crashes: spec.crashes, known, since: Instant::now() }
    }

    /// How long a part took last time, or is likely to take.
    fn of_part(&self, part: Part) -> (Duration, bool) {
        let times = if part == Part::Crashes { self.crashes } else { 1 };
        let known = self.known.0.get(&self.key).and_then(|parts| parts.get(part.name())).copied();
        // Whatever the file says, it is a time.
        let known = known.filter(|s| s.is_finite() && (0.0..1e6).contains(s));
        let seconds = known.unwrap_or_else(|| part.reference_s() * patience::factor());
        (Duration::from_secs_f64(seconds * f64::from(times)), known.is_some())
    }

    /// For the transcript's start.
    pub(super) fn lines(&self, devices: &str) -> Vec<String> {
        let parts = Part::ALL.map(|part| (part, self.of_part(part)));
        let all: Duration = parts.iter().map(|(_, (length, _))| *length).sum();
        let known = parts.iter().all(|(_, (_, known))| *known);
        let how = if known { "as long as last time" } else { "a guess for a first time" };
        let crashes = match self.crashes {
            1 => "one crash of each driver".to_owned(),
            crashes => format!("{crashes} crashes of each driver"),
        };
        let mut lines = vec![format!("to come, about {} ({how}):", minutes(all))];
        lines.extend(parts.iter().map(|(part, (length, _))| {
            let what = match part {
                Part::Host => format!("images, and a test host with {devices}"),
                Part::Start => "the guest and its driver VMs start".into(),
                Part::Crashes => format!("download and song through {crashes}"),
                Part::End => "the download's rest, the report, the judgement".into(),
            };
            format!("  {what:<52} {}", minutes(*length))
        }));
        lines
    }

    /// A part has come to its end; the next one begins.
    pub(super) fn done(&mut self, part: Part) {
        let times = if part == Part::Crashes { self.crashes.max(1) } else { 1 };
        let seconds = self.since.elapsed().as_secs_f64() / f64::from(times);
        self.since = Instant::now();
        self.known.0.entry(self.key.clone()).or_default().insert(part.name().into(), (seconds * 10.0).round() / 10.0);
    }

    /// Keeps the times for the next demonstration. That it cannot is no reason to fail.
    pub(super) fn keep(&self) {
        if let Ok(text) = serde_json::to_string_pretty(&self.known) {
            let _ = std::fs::write(&self.file, text + "\n");
        }
    }
}

fn minutes(length: Duration) -> String {
    let seconds = length.as_secs_f64();
    if seconds < 100.0 { format!("{seconds:.0} s") } else { format!("{:.1} min", seconds / 60.0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(crashes: u32) -> DemoSpec {
        DemoSpec { nic: "igb".into(), crashes, pause: None, bytes: 1, sound: None, disk: None, hardware: None }
    }

    #[test]
    fn the_second_time_is_as_long_as_the_first() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("timings.json");
        let mut first = Forecast::from_file(&spec(2), &file);
        let lines = first.lines("igb");
        assert!(lines[0].contains("a guess") && lines.len() == 5, "{lines:?}");
        for part in Part::ALL {
            first.since = Instant::now().checked_sub(Duration::from_secs(20)).unwrap();
            first.done(part);
        }
        first.keep();
        let lines = Forecast::from_file(&spec(6), &file).lines("igb");
        assert_eq!(lines[0], "to come, about 2.0 min (as long as last time):");
        assert!(lines[3].contains("6 crashes") && lines[3].ends_with("60 s"), "{lines:?}");
        std::fs::write(&file, "{\"demo igb none at 1\": {\"host\": -3, \"start\": 1e99}}").unwrap();
        assert!(Forecast::from_file(&spec(1), &file).lines("igb")[0].contains("a guess"));
    }
}
