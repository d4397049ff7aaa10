//! Starting the threads of a VM's process. Each says what it is for, so that the process can take rights from it before it does
//! anything else: see [`at_start`]. Other programs set nothing, and their threads start as usual.

use std::cell::Cell;
use std::io;
use std::sync::OnceLock;
use std::thread::{Builder, JoinHandle};

/// What a thread is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Purpose {
    /// Runs a vCPU and what it does to devices.
    Vcpu,
    /// Reads and writes a disk's file.
    Disk,
    /// Speaks with a driver VM's process about a link.
    Link,
    /// Writes a log or console, sends messages, watches eventfds.
    Helper,
    /// Does one thing for who started it, and ends: it may do what that thread may.
    Brief,
}

/// What a thread may do when it starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inherits {
    /// What any program of the user may.
    Everything,
    /// What the thread that started it may, from which rights were taken.
    Confinement,
}

/// What a thread is to do first.
pub type AtStart = fn(Purpose, Inherits);

static AT_START: OnceLock<AtStart> = OnceLock::new();

thread_local! {
    static CONFINED: Cell<bool> = const { Cell::new(false) };
}

/// From now on, each thread that [`spawn`] starts does `act` first. Only the first call has an effect.
pub fn at_start(act: AtStart) {
    AT_START.get_or_init(|| act);
}

/// Rights were taken from this thread: those that it starts inherit that.
pub fn mark_confined() {
    CONFINED.set(true);
}

/// Starts the thread `name`.
///
/// # Errors
/// The kernel gives no further thread, or no memory for one.
pub fn spawn<T: Send + 'static>(
    purpose: Purpose,
    name: impl Into<String>,
    body: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    let inherits = if CONFINED.get() { Inherits::Confinement } else { Inherits::Everything };
    Builder::new().name(name.into()).spawn(move || {
        CONFINED.set(inherits == Inherits::Confinement);
        if let Some(act) = AT_START.get() {
            act(purpose, inherits);
        }
        body()
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    static SEEN: Mutex<Vec<(Option<String>, Purpose, Inherits)>> = Mutex::new(Vec::new());

    #[test]
    fn each_thread_does_first_what_all_are_to_do_and_knows_what_it_inherits() {
        at_start(|purpose, inherits| {
            let name = std::thread::current().name().map(ToOwned::to_owned);
            SEEN.lock().unwrap().push((name, purpose, inherits));
        });
        let outer = spawn(Purpose::Vcpu, "outer-7391", || {
            mark_confined();
            let inner = spawn(Purpose::Brief, "inner-7391", || {
                spawn(Purpose::Brief, "innermost-7391", || 7).unwrap().join().unwrap()
            });
            inner.unwrap().join().unwrap()
        });
        assert_eq!(outer.unwrap().join().unwrap(), 7);
        let seen = SEEN.lock().unwrap();
        let of = |wanted: &str| seen.iter().find(|(name, ..)| name.as_deref() == Some(wanted)).unwrap();
        assert_eq!(of("outer-7391").1, Purpose::Vcpu);
        assert_eq!(of("outer-7391").2, Inherits::Everything);
        for name in ["inner-7391", "innermost-7391"] {
            assert_eq!((of(name).1, of(name).2), (Purpose::Brief, Inherits::Confinement), "{name}");
        }
    }
}
