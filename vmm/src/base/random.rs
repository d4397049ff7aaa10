//! Random bytes of the host's kernel.

use std::io;

/// `N` random bytes. Waits until the kernel's generator is seeded, which it is soon after the host's own boot.
///
/// # Errors
/// The kernel has no getrandom(2).
pub fn random<const N: usize>() -> io::Result<[u8; N]> {
    // Up to 256 bytes come at once and whole (getrandom(2)).
    const { assert!(N <= 256) };
    let mut bytes = [0; N];
    // SAFETY: the buffer is writable and as long as said.
    let length = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    if usize::try_from(length) == Ok(N) { Ok(bytes) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn no_two_calls_return_the_same_bytes() {
        let (first, second) = (random::<64>().unwrap(), random::<64>().unwrap());
        assert!(first != second && first != [0; 64]);
    }
}
