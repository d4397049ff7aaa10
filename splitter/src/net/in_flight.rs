//! Which frames a driver VM has been handed and has not taken. It has taken a frame when it offers the frame's first
//! buffer again.
//!
//! The record is the splitter's own: the heads of the last buffers handed over, as many as the queue is long. On the
//! data path it costs one store a buffer; what is in flight is worked out when a link ends. A driver VM that lies in
//! its ring changes what is counted about itself, within the size of its queue, and nothing else.

use crate::pump::HandoverLog;
use crate::queue::{MAX_SIZE, Virtqueue};

const SIZE: usize = MAX_SIZE as usize;

/// Marks the first buffer of a frame; heads are below [`MAX_SIZE`].
const FIRST: u16 = 1 << 15;

/// No buffer yet.
const NONE: u16 = u16::MAX;

/// The buffers handed over last, by used index.
#[derive(Debug)]
pub struct InFlight {
    heads: Box<[u16; SIZE]>,
}

impl Default for InFlight {
    fn default() -> Self {
        Self { heads: Box::new([NONE; SIZE]) }
    }
}

impl InFlight {
    /// Frames in `queue` that its owner has not taken.
    pub fn count(&self, queue: &mut Virtqueue) -> u64 {
        // What is offered again is not in flight, nor is an earlier life of a buffer that was used again later.
        let mut past = [false; SIZE];
        if let Ok(ring) = queue.open() {
            let waiting = ring.available().unwrap_or(0);
            for head in (0..waiting).map_while(|ahead| ring.head(ahead).ok()) {
                past[usize::from(head) % SIZE] = true;
            }
        }
        let (_, end) = queue.position();
        let back = (1..=queue.size()).map(|back| self.heads[usize::from(end.wrapping_sub(back)) % SIZE]);
        let mut count = 0;
        for entry in back.take_while(|entry| *entry != NONE) {
            let head = usize::from(entry & !FIRST) % SIZE;
            count += u64::from(!past[head] && entry & FIRST != 0);
            past[head] = true;
        }
        count
    }

    /// Records frames that are the splitter's own: their buffers are known, but they do not count.
    pub fn uncounted(&mut self) -> Uncounted<'_> {
        Uncounted(self)
    }

    /// Records a frame's buffers, the first with `mark`.
    #[inline]
    fn record(&mut self, used: u16, heads: impl Iterator<Item = u16>, mut mark: u16) {
        let mut at = used;
        for head in heads {
            self.heads[usize::from(at) % SIZE] = head | mark;
            (at, mark) = (at.wrapping_add(1), 0);
        }
    }
}

impl HandoverLog for InFlight {
    #[inline]
    fn handed(&mut self, used: u16, heads: impl Iterator<Item = u16>) {
        self.record(used, heads, FIRST);
    }
}

/// See [`InFlight::uncounted`].
pub struct Uncounted<'a>(&'a mut InFlight);

impl HandoverLog for Uncounted<'_> {
    fn handed(&mut self, used: u16, heads: impl Iterator<Item = u16>) {
        self.0.record(used, heads, 0);
    }
}
