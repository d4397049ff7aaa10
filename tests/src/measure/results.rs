//! The figures, as JSON and as a table.

use serde::Serialize;
use serde_json::Value;

use super::compare::{median, ratio};
use super::slice::{Kind, Slice};
use crate::bench::Model;
use crate::demo::outage::median_and_max;
use crate::probe::reinit::Reinit;

/// One way from guest to peer.
#[derive(Clone, Debug, Serialize)]
pub struct PathFigures {
    /// Which.
    pub name: String,
    /// Its measurements, in the order of the rounds: TCP from guest to peer, measured at the peer; from peer to guest, measured in
    /// the guest; UDP round trips.
    pub slices: Vec<Slice>,
}

impl PathFigures {
    fn figures(&self, kind: Kind) -> Vec<f64> {
        self.slices.iter().filter(|slice| slice.kind == kind).map(|slice| slice.figure).collect()
    }

    /// The median of the 99th percentiles, us.
    fn p99(&self) -> f64 {
        let trips = self.slices.iter().filter_map(|slice| slice.round_trips);
        median(&trips.map(|trips| f64::from(u32::try_from(trips.p99_us).unwrap_or(u32::MAX))).collect::<Vec<_>>())
    }
}

/// One crash.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct OutageFigures {
    /// The gap between ticks at the peer, ms.
    pub peer_ms: Option<f64>,
    /// From mask to live, as Umbra counts, ms.
    pub umbra_ms: Option<f64>,
    /// Its parts, ms.
    pub parts: Value,
}

/// The memory of one process, KiB.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// Which.
    pub process: String,
    /// The memory of its VM that is there.
    pub vm_kib: u64,
    /// What is pinned, for DMA.
    pub pinned_kib: u64,
    /// Page tables of the process.
    pub page_tables_kib: u64,
    /// All else: code, heap, stacks. What several processes share counts for each by its part.
    pub rest_kib: u64,
}

impl Memory {
    /// For people.
    pub fn line(&self) -> String {
        let [vm, pinned, tables, rest] = [self.vm_kib, self.pinned_kib, self.page_tables_kib, self.rest_kib].map(mib);
        let all = mib(self.vm_kib + self.page_tables_kib + self.rest_kib);
        let process = &self.process;
        format!(
            "{process:<30}{all:>9.1} MiB: its VM's {vm:.1} ({pinned:.1} pinned), page tables {tables:.1}, the rest {rest:.1}\n"
        )
    }
}

/// All figures of one NIC.
#[derive(Clone, Debug, Serialize)]
pub struct Results {
    /// QEMU's model.
    pub nic: String,
    /// Throughput and round trips; the driver VM's first.
    pub paths: Vec<PathFigures>,
    /// Crashes.
    pub outage: Vec<OutageFigures>,
    /// Bare re-initialisations.
    pub reinit: Vec<Reinit>,
    /// Processes of `umbra run`.
    pub memory: Vec<Memory>,
    /// Smallest memory that the driver VM boots in, where it was looked for.
    pub smallest_mib: Option<u32>,
}

/// Names of an outage's parts in `umbra`'s events, in order.
const PARTS: [&str; 9] =
    ["detect_ms", "fence_ms", "reset_ms", "boot_ms", "plug_ms", "probe_ms", "setup_ms", "link_ms", "replay_ms"];

impl Results {
    pub(super) fn new(nic: &Model) -> Self {
        Self {
            nic: nic.to_string(),
            paths: Vec::new(),
            outage: Vec::new(),
            reinit: Vec::new(),
            memory: Vec::new(),
            smallest_mib: None,
        }
    }

    /// For people.
    pub fn table(&self) -> String {
        let mut text = format!("\n{:<30}{:>12}{:>12}{:>12}{:>12}\n", self.nic, "send", "receive", "rtt p50", "rtt p99");
        for path in &self.paths {
            let [send, receive, p50] = Kind::ALL.map(|kind| median(&path.figures(kind)));
            let p99 = path.p99();
            let name = &path.name;
            text.push_str(&format!("{name:<30}{send:>7.0} Mb/s{receive:>7.0} Mb/s{p50:>9.0} us{p99:>9.0} us\n"));
        }
        if let Some((first, others)) = self.paths.split_first() {
            for other in others {
                for kind in Kind::ALL {
                    let ratio = ratio(&other.figures(kind), &first.figures(kind));
                    let what = format!("{} : {}", first.name, other.name);
                    text.push_str(&format!("  {what:<40}{:<20}{ratio}\n", kind.title()));
                }
            }
        }
        self.outages(&mut text);
        text.extend(self.memory.iter().map(Memory::line));
        if let Some(smallest) = self.smallest_mib {
            text.push_str(&format!("{:<30}{smallest:>9} MiB\n", "driver VM boots in"));
        }
        text
    }

    fn outages(&self, text: &mut String) {
        let mut line = |name: &str, figures: Vec<f64>| {
            if let Some((p50, max)) = median_and_max(&figures) {
                text.push_str(&format!("{name:<30}{p50:>9.0} ms median{max:>9.0} ms longest of {}\n", figures.len()));
            }
        };
        line("outage seen by the peer", self.outage.iter().filter_map(|o| o.peer_ms).collect());
        line("outage as Umbra counts it", self.outage.iter().filter_map(|o| o.umbra_ms).collect());
        for part in PARTS {
            let figures = self.outage.iter().filter_map(|o| o.parts.get(part).and_then(Value::as_f64)).collect();
            line(&format!("  {}", part.trim_end_matches("_ms")), figures);
        }
        line("bare re-initialisation", self.reinit.iter().map(|r| r.total_ms).collect());
    }
}

pub(super) fn mib(kib: u64) -> f64 {
    f64::from(u32::try_from(kib).unwrap_or(u32::MAX)) / 1024.0
}
