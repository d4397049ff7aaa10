//! Keeps the VFIO files of a driver VM's device over the deaths of its driver VMs: each life gets duplicates. So the device
//! is neither closed nor opened between two lives, which would cost a reset each, but fenced and reset once.
//!
//! Invariant: the files that a life gets are those of a device that was fenced and reset after the life before was gone.
//! All that may take its time (fence, reset, opening, closing) is done in threads, one after the other.

use std::io::{self, PipeReader};
use std::os::fd::AsFd;
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, poll};
use tracing::Span;

use crate::base::error::{chain, is_shortage};
use crate::base::lock::lock;
use crate::base::time::Time;
use crate::host;
use crate::host::Snapshot;
use crate::host::files::DeviceFiles;
use crate::host::reset::ResetDone;
use crate::host::sysfs::HostDevice;
use crate::supervisor::actions::RESET_AGAIN;

/// How a function's files are opened.
pub type Open = fn(&HostDevice) -> Result<DeviceFiles, host::Error>;

/// Time limit of a reset in its thread: longer than any run (one year), which is to say none. A reset that has not returned is not
/// over, whatever the life cycle makes of it, and no life gets the device.
const RESET_LIMIT: Duration = Duration::from_secs(365 * 24 * 3600);

/// The files of one device.
#[derive(Debug)]
pub(in crate::supervisor) struct HeldDevice {
    open: Open,
    files: Result<Arc<DeviceFiles>, String>,
    /// What the device shows, fresh from a reset, since it was opened.
    snapshot: Option<Snapshot>,
    /// The device is in an unknown state, or the host wants it back: the files are closed before the next reset.
    doubtful: bool,
    /// The thread that is still at work on the files.
    busy: Option<JoinHandle<()>>,
}

/// A reset under way in its own thread, because the kernel may take a minute over it.
#[derive(Debug)]
pub(in crate::supervisor) struct ResetJob {
    /// Ends when the reset has returned.
    pub(in crate::supervisor) done: PipeReader,
    result: Receiver<Outcome>,
    /// Why it waits: the host had no descriptor or memory for it a moment ago.
    lacks: Arc<Mutex<Option<String>>>,
}

/// What a reset left.
#[derive(Debug)]
struct Outcome {
    files: Result<Arc<DeviceFiles>, String>,
    snapshot: Option<Snapshot>,
    /// `None`: the device could not be opened, and was not touched.
    reset: Option<Result<ResetDone, String>>,
}

impl ResetJob {
    /// Whether it waits for what the host lacks, and why; asked once.
    pub(in crate::supervisor) fn take_lack(&self) -> Option<String> {
        lock(&self.lacks).take()
    }

    /// Waits until the reset has returned, or `until`. Whether it has.
    pub(in crate::supervisor) fn wait(&self, until: Time) -> bool {
        let left = u16::try_from(until.since(Time::now()).as_millis()).unwrap_or(u16::MAX);
        let mut fds = [PollFd::new(self.done.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, left).is_ok_and(|ready| ready > 0)
    }
}

impl HeldDevice {
    pub(in crate::supervisor) fn new(open: Open) -> Self {
        Self { open, files: Err("its device is not open".into()), snapshot: None, doubtful: false, busy: None }
    }

    /// The files, for a life; or why there are none.
    pub(in crate::supervisor) fn files(&self) -> Result<&DeviceFiles, String> {
        self.files.as_deref().map_err(Clone::clone)
    }

    /// What a standby learns of the device before it gets it; `None`: nothing is known.
    pub(in crate::supervisor) fn snapshot(&self) -> Option<&Snapshot> {
        self.snapshot.as_ref()
    }

    /// Takes the device from its life at once, whatever that does.
    pub(in crate::supervisor) fn fence(&mut self) {
        if let Ok(files) = &self.files {
            let files = Arc::clone(files);
            self.work("fence", move || {
                files.fence();
            });
        }
    }

    /// What the device does is not known: it is closed and opened again before its next life.
    pub(in crate::supervisor) fn doubt(&mut self) {
        self.doubtful = true;
    }

    /// Closes the files, if they are open.
    pub(in crate::supervisor) fn close(&mut self) {
        if let Ok(files) = std::mem::replace(&mut self.files, Err("its device is closed".into())) {
            self.work("close", move || drop(files));
        }
    }

    /// Does `work` on the files after what is still being done on them.
    fn work(&mut self, what: &str, work: impl FnOnce() + Send + 'static) {
        let before = self.busy.take();
        let then = move || {
            wait(before);
            work();
        };
        // Without a thread the files are closed here.
        self.busy = thread::Builder::new().name(what.into()).spawn(then).ok();
    }

    /// Begins to reset `device`, which no life has any more: fenced first, and opened if it is not. Where `patient`, that waits until the
    /// host has what it takes.
    pub(in crate::supervisor) fn begin_reset(
        &mut self,
        device: HostDevice,
        patient: bool,
        about: Span,
    ) -> io::Result<ResetJob> {
        let (done, writer) = io::pipe()?;
        let (sender, result) = mpsc::channel();
        let (hand_over, take) = mpsc::channel();
        let (open, doubtful) = (self.open, self.doubtful);
        let lacks = Arc::default();
        let patience = patient.then(|| Arc::clone(&lacks));
        // It gets what it works with when it is there: without it nothing is lost.
        thread::Builder::new().name(format!("reset {}", device.bdf())).spawn(move || {
            let _about = about.entered();
            let Ok((before, files, snapshot)) = take.recv() else { return };
            wait(before);
            let files = Result::ok(files).filter(|_| !doubtful);
            // Nobody waits any more when the machine has been stopped.
            let _ = sender.send(reset(&device, files.zip(Some(snapshot)), open, patience.as_deref()));
            drop(writer);
        })?;
        let files = std::mem::replace(&mut self.files, Err("its device is being reset".into()));
        self.doubtful = false;
        // It waits for this.
        let _ = hand_over.send((self.busy.take(), files, self.snapshot.take()));
        Ok(ResetJob { done, result, lacks })
    }

    /// The reset has returned: what it did; `None` if the device could not be opened, which its next life will say.
    pub(in crate::supervisor) fn end_reset(&mut self, job: &ResetJob) -> Option<Result<ResetDone, String>> {
        let ended = || String::from("the thread that did it ended");
        let lost = |_| Outcome { files: Err(ended()), snapshot: None, reset: Some(Err(ended())) };
        let Outcome { files, snapshot, reset } = job.result.try_recv().unwrap_or_else(lost);
        (self.files, self.snapshot) = (files, snapshot);
        reset
    }
}

fn wait(thread: Option<JoinHandle<()>>) {
    // One that has panicked has said so.
    let _ = thread.map(JoinHandle::join);
}

/// Fences and resets `device`; opens it where it is not open, or cannot be fenced in any other way than by closing it.
fn reset(
    device: &HostDevice,
    held: Option<(Arc<DeviceFiles>, Option<Snapshot>)>,
    open: Open,
    patience: Option<&Mutex<Option<String>>>,
) -> Outcome {
    let (files, known) = match held {
        Some((files, known)) if files.fence() => (Ok(files), known),
        held => {
            drop(held);
            (until_possible(patience, || open(device)).map(Arc::new), None)
        }
    };
    let perform = |files: &Arc<DeviceFiles>| until_possible(patience, || device.perform_reset(files, RESET_LIMIT));
    let reset = files.as_ref().ok().map(perform);
    // Once: it takes as many reads as there are registers.
    let snapshot = known.or_else(|| take_snapshot(files.as_deref().ok()?));
    Outcome { files, snapshot, reset }
}

/// Does `work`, again and again as long as the host has no descriptor or memory for it: a device that was not reset would be given to its
/// next life. Says why in `patience`; without it, it is done once.
fn until_possible<T>(
    patience: Option<&Mutex<Option<String>>>,
    work: impl Fn() -> Result<T, host::Error>,
) -> Result<T, String> {
    loop {
        match (work(), patience) {
            (Err(error), Some(lacks)) if is_shortage(&error) => {
                *lock(lacks) = Some(chain(&error));
                thread::sleep(RESET_AGAIN);
            }
            (done, _) => return done.map_err(|error| chain(&error)),
        }
    }
}

/// Without one a standby sees nothing of the device until it has it.
fn take_snapshot(files: &DeviceFiles) -> Option<Snapshot> {
    Snapshot::take(files).inspect_err(|error| tracing::debug!("{error}")).ok().flatten()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs::{self, File};
    use std::io::Read;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::host::sysfs::tests::FakeBus;

    static OPENED: AtomicUsize = AtomicUsize::new(0);

    /// Files that know no request of VFIO, so that no fence is certain.
    fn open(device: &HostDevice) -> Result<DeviceFiles, host::Error> {
        if !device.is_bound_to_vfio() {
            return Err(host::Error::NoDriver { bdf: device.bdf() });
        }
        OPENED.fetch_add(1, Ordering::Relaxed);
        let null = || File::open("/dev/null").unwrap().into();
        Ok(DeviceFiles::received(device.bdf(), vec![null(), null(), null()]).unwrap())
    }

    fn device(bus: &FakeBus, bdf: &str, driver: Option<&str>) -> HostDevice {
        let device = bus.add(bdf, Some(1), driver);
        fs::write(device.directory().join("config"), [0; 256]).unwrap();
        fs::write(device.directory().join("reset_method"), "flr\n").unwrap();
        fs::write(device.directory().join("reset"), "").unwrap();
        device
    }

    fn reset(held: &mut HeldDevice, device: &HostDevice) -> Option<Result<ResetDone, String>> {
        let mut job = held.begin_reset(device.clone(), true, Span::none()).unwrap();
        assert!(held.files().is_err(), "nobody gets them meanwhile");
        job.done.read_to_end(&mut Vec::new()).unwrap();
        held.end_reset(&job)
    }

    #[test]
    fn files_are_opened_before_the_reset_and_again_where_a_fence_is_not_certain() {
        let bus = FakeBus::new();
        let nic = device(&bus, "0000:01:00.0", Some("vfio-pci"));
        let mut held = HeldDevice::new(open);
        assert!(held.files().is_err());
        assert!(reset(&mut held, &nic).unwrap().is_ok());
        assert_eq!(held.files().unwrap().bdf(), nic.bdf());
        held.fence();
        assert!(reset(&mut held, &nic).unwrap().is_ok());
        assert_eq!(OPENED.load(Ordering::Relaxed), 2);
        held.close();
        assert_eq!(held.files().unwrap_err(), "its device is closed");
    }

    static REFUSED: AtomicUsize = AtomicUsize::new(0);

    fn open_later(device: &HostDevice) -> Result<DeviceFiles, host::Error> {
        if REFUSED.fetch_add(1, Ordering::Relaxed) < 2 {
            let source = io::Error::from_raw_os_error(libc::EMFILE);
            return Err(host::Error::Sysfs { operation: "open", path: device.directory(), source });
        }
        let null = || File::open("/dev/null").unwrap().into();
        Ok(DeviceFiles::received(device.bdf(), vec![null(), null(), null()]).unwrap())
    }

    #[test]
    fn a_device_that_cannot_be_opened_for_want_of_descriptors_is_opened_later() {
        let bus = FakeBus::new();
        let nic = device(&bus, "0000:01:00.0", Some("vfio-pci"));
        let mut held = HeldDevice::new(open_later);
        let mut job = held.begin_reset(nic.clone(), true, Span::none()).unwrap();
        job.done.read_to_end(&mut Vec::new()).unwrap();
        assert!(job.take_lack().unwrap().contains("Too many open files"));
        assert!(job.take_lack().is_none(), "said once");
        assert!(held.end_reset(&job).unwrap().is_ok());
        assert_eq!((held.files().unwrap().bdf(), REFUSED.load(Ordering::Relaxed)), (nic.bdf(), 3));
        REFUSED.store(0, Ordering::Relaxed);
        let mut held = HeldDevice::new(open_later);
        let mut job = held.begin_reset(nic, false, Span::none()).unwrap();
        job.done.read_to_end(&mut Vec::new()).unwrap();
        assert!(held.end_reset(&job).is_none(), "before anybody is served it is not waited for");
    }

    #[test]
    fn a_device_that_cannot_be_opened_is_not_reset_and_says_why() {
        let bus = FakeBus::new();
        let nic = device(&bus, "0000:01:00.0", None);
        let mut held = HeldDevice::new(open);
        assert!(reset(&mut held, &nic).is_none());
        assert!(held.files().unwrap_err().contains("0000:01:00.0 is bound to no driver"));
        assert_eq!(fs::read_to_string(nic.directory().join("reset")).unwrap(), "");
    }
}
