//! One short measurement of a path, with what it took: counters of `umbra status --json` before and after.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;

use super::{answer_of, disk};
use crate::demo::DemoError;
use crate::demo::machine::Machine;
use crate::demo::place::Place;
use crate::peer::peer_address;
use crate::probe::io::{Load, Speed};
use crate::probe::net::{Bulk, RoundTrips};

/// Round trips of a slice.
const ROUND_TRIPS: u32 = 300;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// TCP from the guest to the peer, Mbit/s.
    Send,
    /// TCP from the peer to the guest, Mbit/s.
    Receive,
    /// UDP round trips, one after the other: median, us.
    RoundTrip,
    /// Requests to the guest's first disk, a second.
    Disk(Load),
}

impl Kind {
    /// All of a NIC, in the order in which they are measured.
    pub const ALL: [Self; 3] = [Self::Send, Self::Receive, Self::RoundTrip];

    /// All of a disk.
    pub const OF_DISK: [Self; disk::JOBS.len()] = {
        let (mut all, mut n) = ([Self::RoundTrip; disk::JOBS.len()], 0);
        while n < all.len() {
            all[n] = Self::Disk(disk::JOBS[n].1);
            n += 1;
        }
        all
    };

    /// For people.
    pub fn title(self) -> &'static str {
        match self {
            Self::Send => "send, Mb/s",
            Self::Receive => "receive, Mb/s",
            Self::RoundTrip => "round trip p50, us",
            Self::Disk(load) => disk::JOBS.iter().find(|(_, job)| *job == load).map_or("requests", |(name, _)| *name),
        }
    }

    /// What its counters are for each of.
    pub fn unit(self) -> &'static str {
        match self {
            Self::Send | Self::Receive => "MiB",
            Self::RoundTrip => "round trip",
            Self::Disk(_) => "request",
        }
    }
}

/// One measurement.
#[derive(Clone, Debug, Serialize)]
pub struct Slice {
    /// What.
    pub kind: Kind,
    /// How much.
    pub figure: f64,
    /// MiB moved, or round trips or requests made.
    pub amount: f64,
    /// The round trips, where these were made.
    pub round_trips: Option<RoundTrips>,
    /// By how much counters went up meanwhile, for each [`Kind::unit`]; of a path of Umbra's.
    pub each: BTreeMap<String, f64>,
}

impl Slice {
    /// Measures `kind` in guest `guest`; of the network between it, which is on that of NIC `nic`, and the peer. With the counters of its
    /// machine, where Umbra runs it.
    ///
    /// # Errors
    /// The guest does not do it.
    pub fn take(
        (mut machine, place): (Option<&mut Machine>, &mut Place),
        (guest, nic): (&str, usize),
        kind: Kind,
        seconds: u32,
    ) -> Result<Self, DemoError> {
        let (peer, limit) = (peer_address(nic), Duration::from_secs(u64::from(seconds) + 60));
        let mut look = |place: &mut Place| match &mut machine {
            Some(machine) => machine.status(place).map(|status| counters(&status)),
            None => Ok(BTreeMap::new()),
        };
        let before = look(place)?;
        let mut round_trips = None;
        let (figure, amount) = match kind {
            Kind::Send | Kind::Receive => {
                let verb = if kind == Kind::Send { "send" } else { "receive" };
                let bulk: Bulk = answer_of(place, guest, &format!("umbra-probe {verb} {peer} {seconds}"), limit)?;
                (bulk.mbit_s(), float(bulk.bytes) / f64::from(1 << 20))
            }
            Kind::RoundTrip => {
                let script = format!("umbra-probe ping {peer} {ROUND_TRIPS}");
                let trips: RoundTrips = answer_of(place, guest, &script, limit)?;
                round_trips = Some(trips);
                (float(trips.p50_us), f64::from(trips.sent - trips.lost))
            }
            Kind::Disk(Load { writes, bytes, depth }) => {
                let access = if writes { "write" } else { "read" };
                let script = format!("umbra-probe io /dev/vda {access} {bytes} {depth} {seconds}");
                let speed: Speed = answer_of(place, guest, &script, limit)?;
                (speed.per_second(), float(speed.requests))
            }
        };
        let after = look(place)?;
        let each = |(name, after): (String, u64)| {
            let before = before.get(&name).copied().unwrap_or(0);
            (name, float(after.saturating_sub(before)) / amount.max(1e-9))
        };
        Ok(Self { kind, figure, amount, round_trips, each: after.into_iter().map(each).collect() })
    }
}

#[expect(clippy::cast_precision_loss, reason = "a figure for humans")]
fn float(count: u64) -> f64 {
    count as f64
}

/// The counters in a status, of the first guest and its first NIC: `guest.exits`, `guest.loop.sleeps`, `driver.vcpu0.cpu_ns`,
/// `out.kicks`, ...
fn counters(status: &Value) -> BTreeMap<String, u64> {
    let mut all = BTreeMap::new();
    let mut add = |prefix: &str, fields: &Value| {
        let fields = fields.as_object().into_iter().flatten();
        all.extend(fields.filter_map(|(name, value)| Some((format!("{prefix}.{name}"), value.as_u64()?))));
    };
    for (prefix, list) in [("guest", "guests"), ("driver", "drivers")] {
        let usage = &status[list][0]["usage"];
        add(prefix, &usage["vcpus"]);
        for thread in usage["threads"].as_array().into_iter().flatten() {
            add(&format!("{prefix}.{}", thread["role"].as_str().unwrap_or_default()), thread);
        }
    }
    let net = &status["guests"][0]["nets"][0];
    add("out", &net["work"]["out"]);
    add("into", &net["work"]["into"]);
    add("net", net);
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_of_a_status_have_names() {
        let status = serde_json::json!({
            "guests": [{"usage": {"vcpus": {"exits": 3}, "threads": [{"role": "loop", "sleeps": 5}]},
                "nets": [{"frames_out": 9, "mode": "passive", "work": {"out": {"kicks": 7}, "into": {"kicks": 8}}}]}],
            "drivers": [{"usage": {"vcpus": null, "threads": [{"role": "vcpu0", "cpu_ns": 6}]}}],
        });
        let found = counters(&status);
        let expected = [
            ("driver.vcpu0.cpu_ns", 6),
            ("guest.exits", 3),
            ("guest.loop.sleeps", 5),
            ("into.kicks", 8),
            ("net.frames_out", 9),
            ("out.kicks", 7),
        ];
        assert_eq!(found, expected.map(|(name, count)| (name.to_owned(), count)).into_iter().collect());
    }
}
