//! The data of the guest's requests: where they are, only the guest's device knows.

use std::sync::Arc;

use umbra_shadow::block::{Fingerprint, GuestSpan, Payload, SECTOR_BYTES};
use vm_memory::VolatileSlice;

use crate::spares::Spares;

/// Access to the data of the guest's requests that are not answered yet. The device has seen to it, when a request was submitted, that
/// its buffers hold as much as its range; they belong to the guest, whose driver may change them at any time.
///
/// Byte 0 of a span is `span.skip` sectors into the request's data; the other side of the copy is as long as the span.
pub trait GuestData {
    /// Copies what the guest writes: the bytes of `span` into `to`.
    fn copy_from_guest(&mut self, span: GuestSpan, to: &VolatileSlice<'_>);

    /// Copies what the guest reads: `from` into the bytes of `span`.
    fn copy_to_guest(&mut self, span: GuestSpan, from: &VolatileSlice<'_>);
}

/// Most bytes of copies that are kept to be used again: what one flush lets go of, at half of the log's bound.
const MAX_SPARE: usize = 32 << 20;

/// A private copy of what the guest writes. Cloning shares it.
#[derive(Clone, Debug)]
pub struct PrivateCopy(Arc<Owned>);

#[derive(Debug)]
struct Owned {
    bytes: Vec<u8>,
    spares: Spares,
}

impl Drop for Owned {
    fn drop(&mut self) {
        self.spares.keep(std::mem::take(&mut self.bytes));
    }
}

impl AsRef<[u8]> for PrivateCopy {
    fn as_ref(&self) -> &[u8] {
        &self.0.bytes
    }
}

impl Payload for PrivateCopy {
    fn fingerprint(&self, skip: u64, sectors: u64) -> Fingerprint {
        Fingerprint::of_sectors(self.as_ref(), skip, sectors)
    }
}

/// Makes private copies.
#[derive(Debug)]
pub(super) struct Copies(Spares);

impl Default for Copies {
    fn default() -> Self {
        Self(Spares::new(MAX_SPARE))
    }
}

impl Copies {
    /// A private copy of `span`.
    pub(super) fn copy(&self, data: &mut dyn GuestData, span: GuestSpan) -> PrivateCopy {
        let length = usize::try_from(span.sectors * SECTOR_BYTES).unwrap_or(usize::MAX);
        let mut bytes = self.0.take(length);
        data.copy_from_guest(span, &VolatileSlice::from(&mut bytes[..]));
        PrivateCopy(Arc::new(Owned { bytes, spares: self.0.clone() }))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use umbra_shadow::block::Token;

    use super::*;

    /// A guest whose every byte is its number.
    struct Filled(u8);

    impl GuestData for Filled {
        fn copy_from_guest(&mut self, _: GuestSpan, to: &VolatileSlice<'_>) {
            to.copy_from(&vec![self.0; to.len()]);
        }

        fn copy_to_guest(&mut self, _: GuestSpan, _: &VolatileSlice<'_>) {}
    }

    fn copy(copies: &Copies, filled: u8, sectors: u64) -> PrivateCopy {
        copies.copy(&mut Filled(filled), GuestSpan { token: Token(0), skip: 0, sectors })
    }

    #[test]
    fn memory_is_used_again_by_the_next_copy_of_its_size_and_no_earlier() {
        let copies = Copies::default();
        let first = copy(&copies, 1, 8);
        let (at, shared) = (first.as_ref().as_ptr(), first.clone());
        drop(first);
        assert_ne!(copy(&copies, 2, 8).as_ref().as_ptr(), at, "it has a user");
        assert_eq!(shared.as_ref(), [1; 4096]);
        drop(shared);
        let again = [copy(&copies, 3, 8), copy(&copies, 4, 9)];
        assert!(again.iter().any(|copy| copy.as_ref().as_ptr() == at));
        assert_eq!((again[0].as_ref(), again[1].as_ref()), (&[3; 4096][..], &[4; 4608][..]));
    }
}
