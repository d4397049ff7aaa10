//! The private copies of what the guest writes, counted by their users. A copy of which a single sector is left in the log still
//! takes its whole length of memory: what is bounded is the sum of whole copies.

/// Names a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BufferId(usize);

#[derive(Clone, Debug)]
struct Buffer<P> {
    payload: P,
    sectors: u64,
    users: u32,
}

/// The copies. Invariant: `sectors` is the sum over those with a user; those without are gone.
#[derive(Clone, Debug)]
pub(super) struct Buffers<P> {
    slots: Vec<Option<Buffer<P>>>,
    free: Vec<usize>,
    sectors: u64,
}

impl<P> Default for Buffers<P> {
    fn default() -> Self {
        Self { slots: Vec::new(), free: Vec::new(), sectors: 0 }
    }
}

impl<P> Buffers<P> {
    /// Takes a copy of `sectors` sectors, with one user.
    pub(super) fn insert(&mut self, payload: P, sectors: u64) -> BufferId {
        self.sectors += sectors;
        let buffer = Some(Buffer { payload, sectors, users: 1 });
        let Some(slot) = self.free.pop() else {
            self.slots.push(buffer);
            return BufferId(self.slots.len() - 1);
        };
        self.slots[slot] = buffer;
        BufferId(slot)
    }

    /// One user more.
    pub(super) fn share(&mut self, id: BufferId) {
        if let Some(buffer) = &mut self.slots[id.0] {
            buffer.users += 1;
        }
    }

    /// One user less; the last one drops the copy.
    pub(super) fn release(&mut self, id: BufferId) {
        let slot = &mut self.slots[id.0];
        let Some(buffer) = slot else { return };
        buffer.users -= 1;
        if buffer.users == 0 {
            self.sectors -= buffer.sectors;
            *slot = None;
            self.free.push(id.0);
        }
    }

    /// The copy.
    pub(super) fn get(&self, id: BufferId) -> Option<&P> {
        self.slots[id.0].as_ref().map(|buffer| &buffer.payload)
    }

    /// Sectors of the whole copy.
    pub(super) fn sectors_of(&self, id: BufferId) -> u64 {
        self.slots[id.0].as_ref().map_or(0, |buffer| buffer.sectors)
    }

    /// Sectors of all copies.
    pub(super) fn sectors(&self) -> u64 {
        self.sectors
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_counts_whole_until_its_last_user_is_gone() {
        let mut buffers = Buffers::default();
        let long = buffers.insert('a', 2048);
        let short = buffers.insert('b', 1);
        buffers.share(long);
        buffers.release(long);
        assert_eq!((buffers.sectors(), buffers.get(long)), (2049, Some(&'a')));
        buffers.release(long);
        assert_eq!((buffers.sectors(), buffers.get(long), buffers.get(short)), (1, None, Some(&'b')));
        let again = buffers.insert('c', 8);
        assert_eq!((again, buffers.sectors()), (long, 9), "its place is used again");
    }
}
