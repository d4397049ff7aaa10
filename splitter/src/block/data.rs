//! The data of the guest's requests: where they are, only the guest's device knows.

use std::sync::Arc;

use umbra_shadow::block::{GuestSpan, SECTOR_BYTES};
use vm_memory::VolatileSlice;

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

/// A private copy of what the guest writes.
pub(super) fn private_copy(data: &mut dyn GuestData, span: GuestSpan) -> Arc<[u8]> {
    let length = usize::try_from(span.sectors * SECTOR_BYTES).unwrap_or(usize::MAX);
    let mut copy: Arc<[u8]> = std::iter::repeat_n(0, length).collect();
    if let Some(bytes) = Arc::get_mut(&mut copy) {
        data.copy_from_guest(span, &VolatileSlice::from(bytes));
    }
    copy
}
