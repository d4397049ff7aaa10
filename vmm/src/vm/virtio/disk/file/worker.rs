//! The threads of a disk, which wait for the host's file system in place of the event loop: one for reads and writes (and
//! what changes sectors without data), which it carries out in their order, and one for flushes, so that neither waits for the other.
//!
//! Invariants: a job has its own buffer, so that no thread touches a VM's memory, however late the file system answers. After
//! [`Worker::forget`] nothing of the earlier jobs is reported any more, and at most one of each thread is still under way; a write
//! among them ends before any later write begins. A flush begins after the jobs that were done when it was handed over; flushes
//! that wait together are one, and share its outcome (the kernel reports an error of write-back once). The error of one that is
//! forgotten is the next one's. The thread of the flushes also looks whether somebody has made the file or block device larger.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use umbra_splitter::threads::{self, Purpose};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::base::lock::lock;
use crate::config::OnFull;

/// Longest wait at the end for jobs under way: longer than a disk that works takes for one. A thread that a frozen file system
/// holds is left to the kernel.
const PATIENCE: Duration = Duration::from_secs(2);

/// Interval at which a write that finds no room is tried again.
const LOOK_FOR_ROOM: Duration = Duration::from_secs(1);

/// Interval at which the thread of the flushes looks whether what is behind the disk has grown.
const LOOK_FOR_GROWTH: Duration = Duration::from_secs(1);

/// What is behind a disk. Its calls may block without end.
pub(super) trait Backing: Send + Sync {
    /// Fills `into` from byte `position` on.
    fn read(&self, position: u64, into: &mut [u8]) -> io::Result<()>;
    /// Writes `bytes` from byte `position` on.
    fn write(&self, position: u64, bytes: &[u8]) -> io::Result<()>;
    /// Lets go of what is in `length` bytes from byte `position` on, if that can be done; their content is arbitrary afterwards.
    fn discard(&self, position: u64, length: u64) -> io::Result<()>;
    /// Fills `length` bytes from byte `position` on with zeroes; with `unmap` without keeping room for them where that can be done.
    fn zeroes(&self, position: u64, length: u64, unmap: bool) -> io::Result<()>;
    /// Makes durable what was written.
    fn flush(&self) -> io::Result<()>;
    /// Makes it so large, or measures it; its size in bytes, which is not less than before. The error is for people.
    fn resize(&self, bytes: Option<u64>) -> Result<u64, String>;
    /// Its size in bytes, if that is larger than [`Backing::resize`] has found it to be so far.
    fn grown(&self) -> Option<u64>;
}

/// What the host does to a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum News {
    /// The end of a [`Work::Resize`].
    Resized(Result<u64, String>),
    /// Somebody has made larger what is behind the disk, and has come to an end with that. Told at each look until a [`Work::Resize`].
    Grown,
    /// There is no room for a write, which waits.
    Full,
    /// It has been written.
    HasRoom,
}

/// Names a job, once in the life of a worker.
pub(super) type Tag = u64;

/// What a job does; positions in bytes.
#[derive(Debug)]
pub(super) enum Work {
    Read {
        position: u64,
        length: usize,
    },
    Write {
        position: u64,
        bytes: Vec<u8>,
    },
    Discard {
        position: u64,
        length: u64,
    },
    Zeroes {
        position: u64,
        length: u64,
        unmap: bool,
    },
    Flush,
    /// Reported as news, also after [`Worker::forget`].
    Resize(Option<u64>),
}

/// A job that is done.
#[derive(Debug)]
pub(super) struct Done {
    pub tag: Tag,
    /// The bytes that were read.
    pub result: io::Result<Vec<u8>>,
}

/// A thread's kind of jobs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lane {
    Transfers,
    Flushes,
}

/// The threads.
pub(super) struct Worker {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    backing: Arc<dyn Backing>,
    on_full: OnFull,
    state: Mutex<State>,
    /// There is a transfer, a flush, or an end.
    wake: [Condvar; 2],
    /// A thread has ended.
    ended: Condvar,
    /// Signalled when a job is done.
    done: EventFd,
}

/// Looks whether what is behind a disk has grown.
struct GrowthWatch {
    /// When the next look is due.
    due: Instant,
    /// What the last one found.
    found: Option<u64>,
}

#[derive(Default)]
struct State {
    transfers: VecDeque<(Tag, Work)>,
    flushes: VecDeque<(Tag, Work)>,
    done: VecDeque<(Lane, Done)>,
    /// Of a flush that was forgotten.
    unheard: Option<io::Error>,
    news: VecDeque<News>,
    /// Number of calls of [`Worker::forget`]; a job that began before the last of them reports nothing.
    life: u64,
    stopping: bool,
    /// Threads that have ended.
    ended: usize,
}

impl Worker {
    /// Starts the threads of the disk `name`.
    pub fn start(name: &str, backing: Arc<dyn Backing>, on_full: OnFull) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            backing,
            on_full,
            state: Mutex::default(),
            wake: Default::default(),
            ended: Condvar::new(),
            done: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        });
        let mut worker = Self { shared, threads: Vec::new() };
        for (lane, name) in [(Lane::Transfers, name.to_owned()), (Lane::Flushes, format!("{name}-flush"))] {
            let shared = Arc::clone(&worker.shared);
            worker.threads.push(threads::spawn(Purpose::Disk, name, move || shared.work(lane))?);
        }
        Ok(worker)
    }

    /// Hands a job over. Whoever does so bounds their number and size.
    pub fn submit(&self, tag: Tag, work: Work) {
        let mut state = self.shared.lock();
        let lane = if matches!(work, Work::Flush) { Lane::Flushes } else { Lane::Transfers };
        state.queue(lane).push_back((tag, work));
        self.shared.wake[lane as usize].notify_one();
    }

    /// A job that is done, if there is one.
    pub fn take_done(&self) -> Option<Done> {
        self.shared.lock().done.pop_front().map(|(_, done)| done)
    }

    /// Something new, if there is.
    pub fn take_news(&self) -> Option<News> {
        self.shared.lock().news.pop_front()
    }

    /// Readable when a job is done, or there is news.
    pub fn done_event(&self) -> &EventFd {
        &self.shared.done
    }

    /// Drops all jobs: those that have not begun are not carried out; the outcome of the others is not reported.
    pub fn forget(&self) {
        let mut state = self.shared.lock();
        state.transfers.retain(|(_, work)| matches!(work, Work::Resize(_)));
        state.flushes.clear();
        let flushes = std::mem::take(&mut state.done).into_iter().filter(|(lane, _)| *lane == Lane::Flushes);
        let unheard = flushes.filter_map(|(_, done)| done.result.err()).next();
        state.unheard = unheard.or(state.unheard.take());
        state.life += 1;
        // Of a transfer that waits for room: nobody wants it any more.
        self.shared.wake[Lane::Transfers as usize].notify_one();
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.forget();
        let mut state = self.shared.lock();
        state.stopping = true;
        self.shared.wake.iter().for_each(Condvar::notify_one);
        let count = self.threads.len();
        let waited = self.shared.ended.wait_timeout_while(state, PATIENCE, |state| state.ended < count);
        let (state, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        drop(state);
        if timeout.timed_out() {
            tracing::warn!("a disk's file does not answer; what it does to a request under way is not waited for");
            return;
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl State {
    fn queue(&mut self, lane: Lane) -> &mut VecDeque<(Tag, Work)> {
        match lane {
            Lane::Transfers => &mut self.transfers,
            Lane::Flushes => &mut self.flushes,
        }
    }

    /// The next job, or all flushes that wait.
    fn take(&mut self, lane: Lane) -> Option<(Vec<Tag>, Work)> {
        let (tag, work) = self.queue(lane).pop_front()?;
        let more = match lane {
            Lane::Transfers => VecDeque::new(),
            Lane::Flushes => std::mem::take(&mut self.flushes),
        };
        Some(([tag].into_iter().chain(more.into_iter().map(|(tag, _)| tag)).collect(), work))
    }
}

impl GrowthWatch {
    fn new() -> Self {
        Self { due: Instant::now() + LOOK_FOR_GROWTH, found: None }
    }

    /// Looks; whether it has grown since it was measured, and not any more since the last look: a file that is being copied into grows
    /// at each.
    fn look(&mut self, backing: &dyn Backing) -> bool {
        let before = std::mem::replace(&mut self.found, backing.grown());
        self.due = Instant::now() + LOOK_FOR_GROWTH;
        self.found.is_some() && self.found == before
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// A thread's life.
    fn work(&self, lane: Lane) {
        let mut growth = (lane == Lane::Flushes).then(GrowthWatch::new);
        while let Some((life, tags, work)) = self.next(lane, growth.as_mut()) {
            let mut result = self.when_there_is_room(life, &work);
            let mut state = self.lock();
            if lane == Lane::Flushes {
                result = state.unheard.take().map_or(result, Err);
            }
            if state.life == life {
                state.done.extend(each(tags, result).map(|done| (lane, done)));
                drop(state);
                // Fails only when 2^64 - 2 signals wait: then one waits anyway.
                let _ = self.done.write(1);
            } else if lane == Lane::Flushes {
                state.unheard = result.err();
            }
        }
        self.lock().ended += 1;
        self.ended.notify_all();
    }

    /// Waits for a job, and looks for growth meanwhile; `None` at the end.
    fn next(&self, lane: Lane, mut growth: Option<&mut GrowthWatch>) -> Option<(u64, Vec<Tag>, Work)> {
        let wake = &self.wake[lane as usize];
        let mut state = self.lock();
        while !state.stopping {
            let until_look = growth.as_ref().map(|growth| growth.due.saturating_duration_since(Instant::now()));
            if let Some(growth) = growth.as_mut().filter(|_| until_look == Some(Duration::ZERO)) {
                drop(state);
                if growth.look(&*self.backing) {
                    self.tell(News::Grown);
                }
                state = self.lock();
            } else if let Some((tags, work)) = state.take(lane) {
                return Some((state.life, tags, work));
            } else if let Some(time) = until_look {
                (state, _) = wake.wait_timeout(state, time).unwrap_or_else(PoisonError::into_inner);
            } else {
                state = wake.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }
        None
    }

    /// Carries a job out; what finds no room waits for it, where that is wanted, until the job is forgotten.
    fn when_there_is_room(&self, life: u64, work: &Work) -> io::Result<Vec<u8>> {
        let mut waited = false;
        loop {
            let result = self.carry_out(work);
            let is_full = result.as_ref().is_err_and(is_full) && self.on_full == OnFull::Pause;
            // Of a flush that failed nothing is known: it cannot be done again.
            if !is_full || matches!(work, Work::Flush) {
                if waited {
                    self.tell(News::HasRoom);
                }
                return result;
            }
            if !std::mem::replace(&mut waited, true) {
                self.tell(News::Full);
            }
            let state = self.lock();
            let is_wanted = |state: &mut State| state.life == life && !state.stopping;
            let wake = &self.wake[Lane::Transfers as usize];
            let (mut state, _) =
                wake.wait_timeout_while(state, LOOK_FOR_ROOM, is_wanted).unwrap_or_else(PoisonError::into_inner);
            if !is_wanted(&mut state) {
                return result;
            }
        }
    }

    fn tell(&self, news: News) {
        self.lock().news.push_back(news);
        // As in `work`.
        let _ = self.done.write(1);
    }

    fn carry_out(&self, work: &Work) -> io::Result<Vec<u8>> {
        match *work {
            Work::Resize(bytes) => {
                self.tell(News::Resized(self.backing.resize(bytes)));
                Ok(Vec::new())
            }
            Work::Read { position, length } => {
                let mut bytes = vec![0; length];
                self.backing.read(position, &mut bytes).map(|()| bytes)
            }
            Work::Write { position, ref bytes } => self.backing.write(position, bytes).map(|()| Vec::new()),
            Work::Discard { position, length } => self.backing.discard(position, length).map(|()| Vec::new()),
            Work::Zeroes { position, length, unmap } => {
                self.backing.zeroes(position, length, unmap).map(|()| Vec::new())
            }
            Work::Flush => self.backing.flush().map(|()| Vec::new()),
        }
    }
}

/// There is no room for it: in the file system, or in what its user may have of it.
fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// The outcome of one job for each of its tags.
fn each(tags: Vec<Tag>, result: io::Result<Vec<u8>>) -> impl Iterator<Item = Done> {
    let error = result.as_ref().err().map(|error| (error.kind(), error.to_string()));
    let mut first = Some(result);
    tags.into_iter().map(move |tag| {
        let again =
            || error.as_ref().map_or_else(|| Ok(Vec::new()), |(kind, what)| Err(io::Error::new(*kind, what.clone())));
        Done { tag, result: first.take().unwrap_or_else(again) }
    })
}
