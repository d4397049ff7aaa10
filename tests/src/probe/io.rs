//! What a disk does at most: direct reads or writes of one size at random places, so many in flight, for some time.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use io_uring::types::Fd;
use io_uring::{IoUring, opcode, squeue};
use serde::{Deserialize, Serialize};

use crate::random::Random;

/// Where a direct transfer has to begin in memory: the largest logical block of a disk.
const ALIGNED: usize = 4096;

/// Requests of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Load {
    /// They write; otherwise they read.
    pub writes: bool,
    /// Bytes of each, a multiple of 4096.
    pub bytes: u32,
    /// How many are in flight at once.
    pub depth: u16,
}

/// What was done.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Speed {
    /// Requests that ended.
    pub requests: u64,
    /// Bytes of all of them.
    pub bytes: u64,
    /// For how long, s.
    pub seconds: f64,
    /// How long a request took: the median, us.
    pub p50_us: f64,
    /// The 99th percentile of that, us.
    pub p99_us: f64,
}

impl Speed {
    /// Requests a second.
    pub fn per_second(&self) -> f64 {
        self.requests as f64 / self.seconds
    }

    /// MiB a second.
    pub fn mib_s(&self) -> f64 {
        self.mib() / self.seconds
    }

    /// MiB in all.
    pub fn mib(&self) -> f64 {
        self.bytes as f64 / f64::from(1 << 20)
    }
}

/// Loads the disk or file `path` for `length`. What is there is overwritten, if `load` writes.
///
/// # Errors
/// What the disk says; one that is smaller than a request.
pub fn run(path: &Path, load: Load, length: Duration) -> io::Result<Speed> {
    let disk = OpenOptions::new().read(true).write(load.writes).custom_flags(libc::O_DIRECT).open(path)?;
    let places = io::Seek::seek(&mut &disk, io::SeekFrom::End(0))? / u64::from(load.bytes);
    if places == 0 {
        return Err(io::Error::other(format!("{} has less than {} bytes", path.display(), load.bytes)));
    }
    let mut ring = IoUring::new(u32::from(load.depth))?;
    let mut work = Work::new(&disk, load, places);
    let begun = Instant::now();
    for slot in 0..load.depth {
        work.submit(&mut ring, slot)?;
    }
    let mut took = Vec::new();
    let mut in_flight = load.depth;
    while in_flight > 0 {
        ring.submit_and_wait(1)?;
        let ended: Vec<_> = ring.completion().collect();
        for entry in ended {
            let slot = u16::try_from(entry.user_data()).map_err(io::Error::other)?;
            took.push(work.ended(slot, entry.result())?);
            if begun.elapsed() < length {
                work.submit(&mut ring, slot)?;
            } else {
                in_flight -= 1;
            }
        }
    }
    let seconds = begun.elapsed().as_secs_f64();
    took.sort_by(f64::total_cmp);
    let requests = took.len() as u64;
    let at = |percent: usize| took.get((took.len() * percent / 100).min(took.len().saturating_sub(1)));
    let (p50_us, p99_us) = (at(50).copied().unwrap_or_default(), at(99).copied().unwrap_or_default());
    Ok(Speed { requests, bytes: requests * u64::from(load.bytes), seconds, p50_us, p99_us })
}

/// The requests in flight, each with a slot of its own in memory.
struct Work<'a> {
    disk: &'a File,
    load: Load,
    places: u64,
    random: Random,
    memory: Vec<u8>,
    begun: Vec<Instant>,
}

impl<'a> Work<'a> {
    fn new(disk: &'a File, load: Load, places: u64) -> Self {
        let slots = usize::from(load.depth);
        // One page more: a slot begins at a multiple of one. Written, so that no read meets a page that is not there yet.
        let memory = vec![0xa5; slots * load.bytes as usize + ALIGNED];
        Self { disk, load, places, random: Random::new(1), memory, begun: vec![Instant::now(); slots] }
    }

    fn submit(&mut self, ring: &mut IoUring, slot: u16) -> io::Result<()> {
        let at = self.random.below(self.places) * u64::from(self.load.bytes);
        let begin = self.memory.as_ptr().align_offset(ALIGNED) + usize::from(slot) * self.load.bytes as usize;
        let memory = self.memory[begin..].as_mut_ptr();
        let (fd, bytes) = (Fd(self.disk.as_raw_fd()), self.load.bytes);
        let entry: squeue::Entry = if self.load.writes {
            opcode::Write::new(fd, memory, bytes).offset(at).build()
        } else {
            opcode::Read::new(fd, memory, bytes).offset(at).build()
        };
        self.begun[usize::from(slot)] = Instant::now();
        // SAFETY: the slot lies in `memory`, which is as large as all of them and outlives the ring's use: `run` waits for every
        // request; the slot's last one has ended.
        unsafe { ring.submission().push(&entry.user_data(u64::from(slot))) }.map_err(io::Error::other)
    }

    /// How long the request in this slot took, us.
    fn ended(&self, slot: u16, result: i32) -> io::Result<f64> {
        if result < 0 {
            return Err(io::Error::from_raw_os_error(-result));
        }
        if u32::try_from(result) != Ok(self.load.bytes) {
            return Err(io::Error::other(format!("{result} bytes of {}", self.load.bytes)));
        }
        Ok(self.begun[usize::from(slot)].elapsed().as_secs_f64() * 1e6)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_counted_and_timed() {
        // Not every file system has direct transfers.
        let file = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        for (writes, depth) in [(true, 4), (false, 1)] {
            let load = Load { writes, bytes: 65536, depth };
            let speed = run(file.path(), load, Duration::ZERO).unwrap();
            assert_eq!((speed.requests, speed.bytes), (u64::from(depth), u64::from(depth) * 65536));
            assert!(speed.p50_us > 0.0 && speed.p50_us <= speed.p99_us, "{speed:?}");
        }
        let content = std::fs::read(file.path()).unwrap();
        assert!(content.iter().filter(|byte| **byte == 0xa5).count() >= 65536);
        let load = Load { writes: false, bytes: 2 << 20, depth: 1 };
        assert!(run(file.path(), load, Duration::ZERO).unwrap_err().to_string().contains("less than"));
    }
}
