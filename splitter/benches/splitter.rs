//! Frames and bytes a second through the splitter on mock queues: both directions, small, full and segmented frames,
//! recording on against off. Off bypasses the shadow: no in-flight record is kept, nothing else differs. *Guarded* is a
//! NIC that guests share: with recording, and each source address is looked at; it is the guest's own. All are
//! measured in the same run, in turn, so that the ratio holds where the machine's speed does not.
//!
//! `cargo bench -p umbra-splitter` for criterion's figures; the table of ratios stands at the end and in
//! `target/bench/splitter.json`.

#![allow(clippy::unwrap_used)]

#[path = "../tests/common/mod.rs"]
mod common;

use std::hint::black_box;
use std::path::Path;
use std::time::{Duration, Instant};

use common::{Driver, PLAIN, RINGS_LEN, Rx, TX_SLOT, memory};
use criterion::{BenchmarkId, Criterion, Throughput};
use umbra_shadow::net::{Event, NetShadow};
use umbra_shadow::{Generation, LinkId};
use umbra_splitter::header::{HEADER_LEN, Offloads};
use umbra_splitter::net::in_flight::InFlight;
use umbra_splitter::net::source::{Inward, Outward, Sources};
use umbra_splitter::pump::{self, Counts, Flow, Off, Owner};
use umbra_splitter::queue::Virtqueue;
use vm_memory::{Bytes, GuestAddress};

/// As the devices have it.
const QUEUE: u16 = 256;

/// Receive buffers as Linux offers them with mergeable buffers.
const BUFFER: u32 = 1536;

/// Frames a pump call: what a busy guest queues between two kicks.
const BATCH: usize = 32;

/// A header of a TCP segment that the receiver is to cut: checksum at 34+16, segments of 1448.
const SEGMENTED: [u8; HEADER_LEN] = [1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0];

/// Two queues, driven as two kernels do, with the buffers always in the same places.
struct Bed {
    tx: Driver,
    rx: Rx,
    source: Virtqueue,
    target: Virtqueue,
    flow: Flow,
    counts: Counts,
    shadow: NetShadow,
    in_flight: InFlight,
    sources: Sources,
    len: usize,
}

impl Bed {
    fn new(source: Owner, len: usize) -> Self {
        let (a, b) = (memory(32 << 20), memory(32 << 20));
        let tx = Driver::new(&a, 0x1000, QUEUE, true);
        let mut rx = Rx::new(Driver::new(&b, 0x1000, QUEUE, true), 0x1000 + RINGS_LEN, BUFFER);
        rx.offer_all();
        let flow = Flow { source, negotiated: Offloads::all(), accepted: Offloads::all(), mergeable: true };
        let mut shadow = NetShadow::new([2; 6], 1500);
        shadow.apply(Event::GoLive(LinkId::first(Generation::FIRST)));
        shadow.apply(Event::Drained);
        let header = if len > 1514 { SEGMENTED } else { PLAIN };
        for head in 0..QUEUE {
            let at = 0x1000 + RINGS_LEN + u64::from(head) * TX_SLOT;
            a.write_slice(&header, GuestAddress(at)).unwrap();
            a.write_slice(&[2; 6], GuestAddress(at + HEADER_LEN as u64 + 6)).unwrap();
        }
        let (source, target) = (tx.device(), rx.driver.device());
        let (counts, in_flight) = (Counts::default(), InFlight::default());
        let mut sources = Sources::new([2; 6]);
        sources.share((0..8).map(|n| [2, 0, 0, 0, 0, n]).collect(), false);
        Self { tx, rx, source, target, flow, counts, shadow, in_flight, sources, len }
    }

    /// The kernels' part of one batch, not measured: completed frames and received ones away, new ones in.
    fn prepare(&mut self, frames: usize) {
        while self.tx.take_used().is_some() {}
        while self.rx.driver.take_used().is_some() {}
        self.rx.offer_all();
        for _ in 0..frames {
            let at = 0x1000 + RINGS_LEN + u64::from(self.tx.next_head()) * TX_SLOT;
            self.tx.offer(&[(at, u32::try_from(HEADER_LEN + self.len).unwrap(), 0)]);
        }
    }

    fn recorded(&mut self) {
        let Self { source, target, flow, in_flight, counts, shadow, .. } = self;
        let before = counts.frames;
        black_box(pump::pump(source, target, flow, in_flight, counts).unwrap());
        shadow.handed(counts.frames - before);
    }

    fn guarded(&mut self) {
        let Self { source, target, flow, in_flight, counts, shadow, sources, .. } = self;
        let before = counts.frames;
        black_box(pump::pump(source, target, flow, &mut Outward { sources, in_flight }, counts).unwrap());
        shadow.handed(counts.frames - before);
    }

    fn listening(&mut self) {
        let Self { source, target, flow, counts, sources, .. } = self;
        let mut tap = Inward { sources, heard: false };
        black_box(pump::pump(source, target, flow, &mut tap, counts).unwrap());
    }

    fn bypassed(&mut self) {
        let Self { source, target, flow, counts, .. } = self;
        black_box(pump::pump(source, target, flow, &mut Off, counts).unwrap());
    }

    /// Frames that fit the receiver's queue at once.
    fn batch(&self) -> usize {
        let buffers = (self.len + HEADER_LEN).div_ceil(BUFFER as usize);
        BATCH.min(usize::from(QUEUE) / buffers)
    }

    fn time(&mut self, frames: u64, pump: fn(&mut Self)) -> Duration {
        let batch = self.batch();
        let mut left = usize::try_from(frames).unwrap();
        let mut spent = Duration::ZERO;
        while left > 0 {
            let now = left.min(batch);
            self.prepare(now);
            let start = Instant::now();
            pump(self);
            spent += start.elapsed();
            left -= now;
        }
        spent
    }
}

const SIZES: [(usize, &str); 3] = [(64, "64"), (1500, "1500"), (65_226, "64KiB-tso")];

fn criterion_figures(criterion: &mut Criterion) {
    for (len, name) in SIZES {
        let mut group = criterion.benchmark_group(format!("splitter/{name}"));
        group.throughput(Throughput::ElementsAndBytes { elements: 1, bytes: len as u64 });
        let mut bed = Bed::new(Owner::Guest, len);
        group.bench_function(BenchmarkId::new("guest-to-nic", "recording"), |b| {
            b.iter_custom(|frames| bed.time(frames, Bed::recorded));
        });
        let mut bed = Bed::new(Owner::Guest, len);
        group.bench_function(BenchmarkId::new("guest-to-nic", "off"), |b| {
            b.iter_custom(|frames| bed.time(frames, Bed::bypassed));
        });
        let mut bed = Bed::new(Owner::Guest, len);
        group.bench_function(BenchmarkId::new("guest-to-nic", "guarded"), |b| {
            b.iter_custom(|frames| bed.time(frames, Bed::guarded));
        });
        let mut bed = Bed::new(Owner::DriverVm, len);
        group.bench_function(BenchmarkId::new("nic-to-guest", "guarded"), |b| {
            b.iter_custom(|frames| bed.time(frames, Bed::listening));
        });
        // Towards the guest there is nothing to record: lost frames are the wire's business.
        let mut bed = Bed::new(Owner::DriverVm, len);
        group.bench_function("nic-to-guest", |b| b.iter_custom(|frames| bed.time(frames, Bed::bypassed)));
        group.finish();
    }
}

/// Slices a side: many and short (a millisecond or so), so that some are free of other processes' work.
const SLICES: usize = 1000;

/// Recording on against off in alternating slices; compared at the slices' lower quartile, which other processes on
/// the machine disturb least.
fn ratios() -> Vec<String> {
    let mut rows = Vec::new();
    println!(
        "\n{:<12} {:>14} {:>12} {:>14} {:>8} {:>12}",
        "frame", "frames/s on", "MB/s on", "frames/s off", "on/off", "guarded/off"
    );
    for (len, name) in SIZES {
        let frames = if len > 10_000 { 100u64 } else { 3_200 };
        // One bed for both: another would lie elsewhere in memory and caches.
        let mut bed = Bed::new(Owner::Guest, len);
        let (mut on_times, mut off_times, mut guarded_times) = (Vec::new(), Vec::new(), Vec::new());
        for slice in 0..SLICES {
            // The one that goes first alternates.
            if slice % 2 == 0 {
                on_times.push(bed.time(frames, Bed::recorded));
            }
            off_times.push(bed.time(frames, Bed::bypassed));
            guarded_times.push(bed.time(frames, Bed::guarded));
            if slice % 2 == 1 {
                on_times.push(bed.time(frames, Bed::recorded));
            }
        }
        let rate = |times: &mut Vec<Duration>| {
            times.sort_unstable();
            frames as f64 / times[SLICES / 4].as_secs_f64()
        };
        let (on, off) = (rate(&mut on_times), rate(&mut off_times));
        let (ratio, guarded) = (on / off, rate(&mut guarded_times) / off);
        println!("{name:<12} {on:>14.0} {:>12.0} {off:>14.0} {ratio:>8.3} {guarded:>12.3}", on * len as f64 / 1e6);
        rows.push(format!(
            "{{\"frame_bytes\":{len},\"recording_frames_s\":{on:.0},\"off_frames_s\":{off:.0},\"ratio\":{ratio:.4},\
             \"guarded_ratio\":{guarded:.4}}}"
        ));
    }
    rows
}

/// Writes the table as JSON beside the other measurements, `target/bench/splitter.json`.
fn write_json(rows: &[String]) -> std::io::Result<()> {
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/bench");
    std::fs::create_dir_all(&target)?;
    std::fs::write(target.join("splitter.json"), format!("[{}]\n", rows.join(",\n ")))
}

fn main() {
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .configure_from_args();
    criterion_figures(&mut criterion);
    criterion.final_summary();
    // `cargo test` runs benchmarks too, with this flag and without optimisation.
    if !std::env::args().any(|arg| arg == "--test") {
        let rows = ratios();
        if let Err(error) = write_json(&rows) {
            eprintln!("cannot write target/bench/splitter.json: {error}");
        }
    }
}
