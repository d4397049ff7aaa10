//! A register checker for a disk: it writes blocks of which each is unlike every other, past the kernel's cache, and knows of each block
//! what was acknowledged last. Any other content that is read is an acknowledged write that was lost, or an older one that came
//! back.
//!
//! Each worker has blocks of its own, which it alone reads and writes, so that at any time exactly one content is right. Workers side by
//! side keep several requests in flight; their requests are of 1 to [`MOST_BLOCKS`] blocks, and some are followed by a flush.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::random::Random;

/// Bytes of a block: the largest logical block of a disk.
const BLOCK: usize = 4096;
/// Most blocks of a request: 128 KiB.
const MOST_BLOCKS: usize = 32;
/// Workers: requests in flight.
const WORKERS: usize = 8;
/// Blocks of a worker; all of them together are 64 MiB, so that each is written several times in a minute.
const BLOCKS: usize = 2048;
/// Bytes that all workers write, from the beginning of the disk on.
pub const BYTES: u64 = (WORKERS * BLOCKS * BLOCK) as u64;
/// One request in so many is followed by a flush.
const FLUSHES: u64 = 16;
/// One request in so many is a read.
const READS: u64 = 3;
/// A file that ends a check when it is there.
pub const OVER: &str = "/tmp/disk-check-over";
/// Interval of progress on standard error.
const PROGRESS: Duration = Duration::from_secs(1);

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Found {
    /// Writes that were acknowledged.
    pub writes: u64,
    /// Reads that were compared.
    pub reads: u64,
    /// Flushes that were acknowledged.
    pub flushes: u64,
    /// Requests that failed.
    pub io_errors: u64,
    /// Blocks that held another content than the one acknowledged last.
    pub wrong: u64,
    /// The longest that a request took, ms.
    pub longest_ms: f64,
    /// The first few of what was wrong, in words.
    pub what: Vec<String>,
}

/// Most sentences in [`Found::what`].
const SENTENCES: usize = 8;

impl Found {
    /// Nothing failed, and nothing was lost.
    pub fn is_sound(&self) -> bool {
        self.io_errors == 0 && self.wrong == 0
    }

    fn add(&mut self, other: Self) {
        self.writes += other.writes;
        self.reads += other.reads;
        self.flushes += other.flushes;
        self.io_errors += other.io_errors;
        self.wrong += other.wrong;
        self.longest_ms = self.longest_ms.max(other.longest_ms);
        self.what.extend(other.what);
        self.what.truncate(SENTENCES);
    }

    fn say(&mut self, what: String) {
        if self.what.len() < SENTENCES {
            self.what.push(what);
        }
    }
}

/// Checks the disk or file `path` for `length`, or until there is a file [`OVER`], then reads everything that was written once more. What
/// is there is overwritten.
pub fn check(path: &Path, length: Duration, seed: u64) -> Found {
    let (done, over) = (AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let run = |n| {
            let (done, over) = (&done, &over);
            scope.spawn(move || {
                Worker::open(path, n, seed).map_or_else(|error| failed_to_open(&error), |worker| worker.run(over, done))
            })
        };
        let workers: Vec<_> = (0..WORKERS).map(run).collect();
        let begun = Instant::now();
        while workers.iter().any(|worker| !worker.is_finished()) {
            std::thread::sleep(PROGRESS.min(length));
            eprintln!("{} requests after {:.0} s", done.load(Ordering::Relaxed), begun.elapsed().as_secs_f64());
            over.fetch_or(begun.elapsed() >= length || Path::new(OVER).exists(), Ordering::Relaxed);
        }
        let mut found = Found::default();
        for worker in workers {
            found.add(worker.join().unwrap_or_else(|_| failed_to_open(&io::Error::other("a worker panicked"))));
        }
        found
    })
}

fn failed_to_open(error: &io::Error) -> Found {
    Found { io_errors: 1, what: vec![format!("open: {error}")], ..Found::default() }
}

/// A buffer that a disk transfers from and to directly.
#[repr(align(4096))]
#[derive(Clone)]
struct Aligned([u8; BLOCK]);

struct Worker {
    disk: File,
    n: usize,
    random: Random,
    /// Number of the write that each block holds; 0: none yet.
    last: Vec<u64>,
    writes: u64,
    found: Found,
}

impl Worker {
    fn open(path: &Path, n: usize, seed: u64) -> io::Result<Self> {
        let open = |flags| OpenOptions::new().read(true).write(true).custom_flags(flags).open(path);
        // A file system without direct access, as in the tests of this file.
        let disk = open(libc::O_DIRECT).or_else(|_| open(0))?;
        let random = Random::new(seed ^ (n as u64 + 1).rotate_left(32));
        Ok(Self { disk, n, random, last: vec![0; BLOCKS], writes: 0, found: Found::default() })
    }

    fn run(mut self, over: &AtomicBool, done: &AtomicU64) -> Found {
        while !over.load(Ordering::Relaxed) {
            let first = self.below(BLOCKS);
            let count = (1 + self.below(MOST_BLOCKS)).min(BLOCKS - first);
            if self.random.below(READS) == 0 {
                self.read(first, count);
            } else {
                self.write(first, count);
            }
            if self.random.below(FLUSHES) == 0 {
                self.flush();
            }
            done.fetch_add(1, Ordering::Relaxed);
        }
        self.flush();
        for first in (0..BLOCKS).step_by(MOST_BLOCKS) {
            self.read(first, MOST_BLOCKS.min(BLOCKS - first));
            done.fetch_add(1, Ordering::Relaxed);
        }
        self.found
    }

    /// Where block `block` of this worker is on the disk, bytes.
    fn place(&self, block: usize) -> u64 {
        ((self.n * BLOCKS + block) * BLOCK) as u64
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.random.below(bound as u64)).unwrap_or(0)
    }

    fn write(&mut self, first: usize, count: usize) {
        self.writes += 1;
        let blocks: Vec<_> = (first..first + count).map(|block| self.content(block, self.writes)).collect();
        let at = self.place(first);
        let wrote = self.timed(|disk| disk.write_all_at(bytes(&blocks), at));
        match wrote {
            Ok(()) => {
                self.found.writes += 1;
                self.last[first..first + count].fill(self.writes);
            }
            Err(error) => self.failed(&format!("write of {count} blocks at {at}"), &error),
        }
    }

    fn read(&mut self, first: usize, count: usize) {
        let mut blocks = vec![Aligned([0; BLOCK]); count];
        let at = self.place(first);
        match self.timed(|disk| disk.read_exact_at(bytes_mut(&mut blocks), at)) {
            Ok(()) => {
                self.found.reads += 1;
                (first..).zip(&blocks).for_each(|(block, is)| self.compare(block, is));
            }
            Err(error) => self.failed(&format!("read of {count} blocks at {at}"), &error),
        }
    }

    fn flush(&mut self) {
        match self.timed(File::sync_data) {
            Ok(()) => self.found.flushes += 1,
            Err(error) => self.failed("flush", &error),
        }
    }

    fn timed<T>(&mut self, act: impl FnOnce(&File) -> io::Result<T>) -> io::Result<T> {
        let begun = Instant::now();
        let result = act(&self.disk);
        self.found.longest_ms = self.found.longest_ms.max(begun.elapsed().as_secs_f64() * 1000.0);
        result
    }

    fn failed(&mut self, what: &str, error: &io::Error) {
        self.found.io_errors += 1;
        self.found.say(format!("{what}: {error}"));
    }

    fn compare(&mut self, block: usize, is: &Aligned) {
        let last = self.last[block];
        // What was there before the first write is nobody's business.
        if last == 0 || is.0 == self.content(block, last).0 {
            return;
        }
        self.found.wrong += 1;
        let (n, there) = (self.n, number(&is.0[16..24]));
        self.found.say(format!("block {block} of worker {n}: write {last} was acknowledged last, {there} is there"));
    }

    /// Block and write by number, and random bytes that follow from them: a torn block is neither.
    fn content(&self, block: usize, write: u64) -> Aligned {
        let mut content = Aligned([0; BLOCK]);
        let mut random = Random::new((self.n as u64) << 48 ^ (block as u64) << 32 ^ write);
        for (at, word) in content.0.chunks_exact_mut(8).enumerate() {
            let value = match at {
                0 => self.n as u64,
                1 => block as u64,
                2 => write,
                _ => random.next(),
            };
            word.copy_from_slice(&value.to_le_bytes());
        }
        content
    }
}

fn number(bytes: &[u8]) -> u64 {
    bytes.try_into().map_or(0, u64::from_le_bytes)
}

fn bytes(blocks: &[Aligned]) -> &[u8] {
    // SAFETY: `Aligned` is an array of bytes as large as its alignment, without padding.
    unsafe { std::slice::from_raw_parts(blocks.as_ptr().cast(), blocks.len() * BLOCK) }
}

fn bytes_mut(blocks: &mut [Aligned]) -> &mut [u8] {
    // SAFETY: as in `bytes`; any bytes are an `Aligned`.
    unsafe { std::slice::from_raw_parts_mut(blocks.as_mut_ptr().cast(), blocks.len() * BLOCK) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk() -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(BYTES).unwrap();
        file
    }

    #[test]
    fn a_disk_that_keeps_what_it_is_given_is_sound() {
        let found = check(disk().path(), Duration::from_millis(200), 1);
        assert!(found.is_sound() && found.writes > 0 && found.reads > 0 && found.flushes > 0, "{found:?}");
    }

    #[test]
    fn a_write_that_is_lost_or_torn_is_found() {
        let file = disk();
        for torn in [0, 512] {
            let mut worker = Worker::open(file.path(), 2, 1).unwrap();
            worker.write(5, 1);
            let older = worker.content(5, 1);
            worker.write(5, 1);
            worker.read(5, 1);
            assert_eq!(worker.found.wrong, 0);
            worker.disk.write_all_at(&bytes(&[older])[torn..], worker.place(5) + torn as u64).unwrap();
            worker.read(5, 1);
            assert_eq!(worker.found.wrong, 1, "{:?}", worker.found);
        }
    }

    #[test]
    fn a_disk_that_is_too_small_fails() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(!check(Path::new("/dev/full"), Duration::from_millis(50), 1).is_sound());
        let mut worker = Worker::open(file.path(), 0, 1).unwrap();
        worker.read(0, 1);
        assert_eq!(worker.found.io_errors, 1);
    }
}
