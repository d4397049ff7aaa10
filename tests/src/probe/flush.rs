//! A program that calls `fsync` in a loop, as databases do: small writes to a disk, each made durable before the next.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// Bytes of a write: a page, the least that the kernel writes back.
const BLOCK: usize = 4096;
/// Writes go round in so many blocks.
const BLOCKS: u64 = 256;

/// How long the writes took to be durable.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Flushes {
    /// Writes made durable.
    pub count: u64,
    /// Best, ms.
    pub min_ms: f64,
    /// Worst, ms.
    pub max_ms: f64,
}

/// Writes to the disk or file `path` and makes each write durable, for `length`. What is there is overwritten.
///
/// # Errors
/// What the disk says.
pub fn flush(path: &Path, length: Duration) -> io::Result<Flushes> {
    let disk = OpenOptions::new().write(true).open(path)?;
    let mut flushes = Flushes { count: 0, min_ms: f64::MAX, max_ms: 0.0 };
    let start = Instant::now();
    while start.elapsed() < length || flushes.count == 0 {
        let begun = Instant::now();
        // The low byte: another content each time.
        let content = [flushes.count.to_le_bytes()[0]; BLOCK];
        disk.write_all_at(&content, flushes.count % BLOCKS * BLOCK as u64)?;
        disk.sync_all()?;
        let took = begun.elapsed().as_secs_f64() * 1000.0;
        flushes.count += 1;
        flushes.min_ms = flushes.min_ms.min(took);
        flushes.max_ms = flushes.max_ms.max(took);
    }
    Ok(flushes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_writes_at_least_once() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let flushes = flush(file.path(), Duration::ZERO).unwrap();
        assert_eq!((flushes.count, file.as_file().metadata().unwrap().len()), (1, BLOCK as u64));
        assert!(flushes.min_ms <= flushes.max_ms);
    }
}
