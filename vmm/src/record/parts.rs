//! The parts of a recovery, as events, reports and sentences have them.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The parts of a recovery, or of a first start, in ms.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RecoveryParts {
    /// From the first sign of the failure to certainty.
    pub detect_ms: Option<f64>,
    /// From certainty until the device was given up, or the process ended.
    pub fence_ms: Option<f64>,
    /// The device's reset.
    pub reset_ms: Option<f64>,
    /// Method of the reset; `none` where only bus mastering was cleared.
    pub reset_method: String,
    /// The restart policy's delay.
    pub back_off_ms: Option<f64>,
    /// Start of the process to the agent's hello; nothing for a standby that was ready.
    pub boot_ms: Option<f64>,
    /// The device put into a standby, after its hello.
    pub plug_ms: Option<f64>,
    /// Hello, or the device's arrival in a standby, to the driver bound.
    pub probe_ms: Option<f64>,
    /// From the driver bound to forwarding.
    pub setup_ms: Option<f64>,
    /// Forwarding to carrier, or to the end of the patience for it.
    pub link_ms: Option<f64>,
    /// From `GoLive` until all guests are live.
    pub replay_ms: Option<f64>,
}

impl RecoveryParts {
    /// The parts' names and times, in the order of their happening.
    pub fn named(&self) -> [(&'static str, Option<f64>); 10] {
        [
            ("detect", self.detect_ms),
            ("fence", self.fence_ms),
            ("reset", self.reset_ms),
            ("back-off", self.back_off_ms),
            ("boot", self.boot_ms),
            ("plug", self.plug_ms),
            ("probe", self.probe_ms),
            ("set-up", self.setup_ms),
            ("link", self.link_ms),
            ("replay", self.replay_ms),
        ]
    }
}

impl fmt::Display for RecoveryParts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = self.named().into_iter().filter(|(name, ms)| *name != "back-off" || ms.is_some_and(|ms| ms >= 1.0));
        let parts = parts.filter_map(|(name, ms)| match name {
            "reset" => Some(format!("reset {} {}", self.reset_method, Ms(ms?))),
            _ => Some(format!("{name} {}", Ms(ms?))),
        });
        f.write_str(&parts.collect::<Vec<_>>().join(", "))
    }
}

/// Milliseconds, with as many digits as are of use.
pub(super) struct Ms(pub(super) f64);

impl fmt::Display for Ms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            ms if ms < 10.0 => write!(f, "{ms:.1} ms"),
            ms if ms < 1000.0 => write!(f, "{ms:.0} ms"),
            ms => write!(f, "{:.2} s", ms / 1000.0),
        }
    }
}
