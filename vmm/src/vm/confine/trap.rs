//! The end of a process for a system call that its thread may not make: it says which on stderr, and to the supervisor, and exits.
//!
//! All of it runs in the handler of `SIGSYS`: no allocation, no lock, and only calls that every table allows.

use std::io::{self, Cursor, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicI32, Ordering};

use crate::base::system_calls;
use crate::wire::spawn::CONFINED;

/// Number of the supervisor's channel, else -1.
static CHANNEL: AtomicI32 = AtomicI32::new(-1);

/// The supervisor at the other end of `channel` is told too. The channel stays open as long as the process is there.
pub fn tell(channel: &impl AsRawFd) {
    CHANNEL.store(channel.as_raw_fd(), Ordering::Relaxed);
}

/// Installs the handler.
pub(super) fn install() -> io::Result<()> {
    // SAFETY: a sigaction of zeros is one without flags and with an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_refused as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: the handler does only what is safe in one.
    let done = unsafe { libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut()) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The kernel's `siginfo_t` of a `SIGSYS` (sigaction(2)).
#[repr(C)]
struct Refused {
    signal: libc::c_int,
    error: libc::c_int,
    code: libc::c_int,
    address: *const libc::c_void,
    call: libc::c_int,
}

extern "C" fn on_refused(_: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel has filled the structure in for this signal.
    let call = unsafe { (*info.cast::<Refused>()).call };
    // SAFETY: the kernel hands the interrupted thread's registers over.
    let registers = unsafe { &(*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let [first, second, third] = [libc::REG_RDI, libc::REG_RSI, libc::REG_RDX].map(|n| registers[n as usize]);
    let mut name = [0_u8; 16];
    // SAFETY: the kernel writes 16 bytes at most, a zero among them.
    unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
    let length = name.iter().position(|byte| *byte == 0).unwrap_or(0);
    for byte in &mut name[..length] {
        if !byte.is_ascii_alphanumeric() && *byte != b'-' {
            *byte = b'?';
        }
    }
    let thread = std::str::from_utf8(&name[..length]).unwrap_or("?");
    let mut buffer = Cursor::new([0_u8; 256]);
    let what = system_calls::name(call.into()).unwrap_or("unknown");
    let _ = writeln!(
        buffer,
        "umbra: the thread {thread} made the system call {call} ({what}), which it may not make; \
         its first arguments: {first:#x}, {second:#x}, {third:#x}"
    );
    send(libc::STDERR_FILENO, &buffer);
    buffer.set_position(0);
    let _ = write!(buffer, r#"{{"type":"confined","thread":"{thread}","call":{call}}}"#);
    send(CHANNEL.load(Ordering::Relaxed), &buffer);
    // SAFETY: the process ends here, without anything of its own being run.
    unsafe { libc::_exit(CONFINED) };
}

/// Writes what is in `buffer`; a socket that is full, or no descriptor, takes none of it.
fn send(fd: RawFd, buffer: &Cursor<[u8; 256]>) {
    let length = usize::try_from(buffer.position()).unwrap_or_default();
    let (bytes, flags) = (buffer.get_ref().as_ptr().cast(), libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL);
    // SAFETY: the buffer lives through the calls, and is as long as said.
    unsafe {
        if libc::send(fd, bytes, length, flags) < 0 && fd == libc::STDERR_FILENO {
            libc::write(fd, bytes, length);
        }
    }
}
