//! Which buffers of the driver VM's receive queue hold a frame that it has not taken yet: one bit a descriptor. It
//! has taken a frame when it offers the frame's first buffer again. The record is the splitter's own; a driver VM
//! that lies in its ring changes what is counted about itself, within the size of its queue, and nothing else.

use crate::pump::Tap;
use crate::queue::{MAX_SIZE, Virtqueue};

/// Buffers that hold frames, and what changed since last asked.
#[derive(Debug, Default)]
pub struct InFlight {
    bits: [u64; MAX_SIZE as usize / 64],
    handed: u32,
    taken: u32,
}

impl InFlight {
    /// Frames handed over and frames taken since the last call.
    pub fn changes(&mut self) -> (u32, u32) {
        (std::mem::take(&mut self.handed), std::mem::take(&mut self.taken))
    }

    /// At the end of a link: finds the buffers that were offered again but not looked at yet.
    pub fn settle(&mut self, queue: &mut Virtqueue) {
        let Ok(ring) = queue.open() else { return };
        let waiting = ring.available().unwrap_or(0);
        (0..waiting).map_while(|ahead| ring.head(ahead).ok()).for_each(|head| self.offered(head));
    }

    #[inline]
    fn place(&mut self, head: u16) -> Option<(&mut u64, u64)> {
        self.bits.get_mut(usize::from(head) / 64).map(|word| (word, 1 << (head % 64)))
    }
}

impl Tap for InFlight {
    #[inline]
    fn handed(&mut self, head: u16) {
        if let Some((word, bit)) = self.place(head) {
            *word |= bit;
            self.handed += 1;
        }
    }

    #[inline]
    fn offered(&mut self, head: u16) {
        if let Some((word, bit)) = self.place(head) {
            let held = *word & bit != 0;
            *word &= !bit;
            self.taken += u32::from(held);
        }
    }
}
