//! A guest with its disk, which knows what it has written.

use std::collections::{BTreeSet, HashMap};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::mpsc::{Receiver, channel};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use umbra_shadow::block::{Access, CachePolicy, GuestSpan, Limits, SECTOR_BYTES, SectorRange, Status, Token};
use umbra_shadow::{Generation, LinkId};
use umbra_splitter::block::{BlockSplitter, GuestData, Notice};
use vm_memory::VolatileSlice;

use crate::medium::{Medium, disk};
use crate::vm::{MEMORY, QUEUE, Vm};

/// What a sector holds: the number of the write, over and over; 0 at first.
type Value = u32;

fn content(value: Value, sectors: u64) -> Vec<u8> {
    value.to_le_bytes().repeat(usize::try_from(sectors * SECTOR_BYTES / 4).unwrap())
}

/// The value of a sector, which has to be whole.
pub fn value_of(sector: &[u8]) -> Value {
    let value = Value::from_le_bytes(*sector.first_chunk().unwrap());
    assert!(sector == content(value, 1), "a sector of several values");
    value
}

#[derive(Debug)]
struct Request {
    /// None for a flush.
    access: Option<(Access, SectorRange)>,
    /// What it writes; 0 for zeroes.
    value: Value,
    bytes: Vec<u8>,
    /// Of a read: what each of its sectors may hold.
    allowed: Vec<BTreeSet<Value>>,
}

/// The guest's memory: the buffers of requests that are not answered. To touch any other fails.
#[derive(Default)]
struct Buffers(HashMap<u32, Request>);

fn place(span: GuestSpan) -> std::ops::Range<usize> {
    let byte = |sectors: u64| usize::try_from(sectors * SECTOR_BYTES).unwrap();
    byte(span.skip)..byte(span.skip + span.sectors)
}

impl GuestData for Buffers {
    fn copy_from_guest(&mut self, span: GuestSpan, to: &VolatileSlice<'_>) {
        let bytes = &self.0[&span.token.0].bytes[place(span)];
        assert_eq!(bytes.len(), to.len());
        to.copy_from(bytes);
    }

    fn copy_to_guest(&mut self, span: GuestSpan, from: &VolatileSlice<'_>) {
        let request = self.0.get_mut(&span.token.0).unwrap();
        assert!(matches!(request.access, Some((Access::Read, _))), "data for {request:?}");
        let bytes = &mut request.bytes[place(span)];
        assert_eq!(bytes.len(), from.len());
        from.copy_to(bytes);
    }
}

pub struct Guest {
    pub splitter: BlockSplitter,
    buffers: Buffers,
    pub notices: Receiver<Notice>,
    pub now: u64,
    next: u32,
    /// Of the acknowledged changes of each sector the one that was asked for last: its token, and the value.
    acknowledged: HashMap<u64, (u32, Value)>,
    /// Whether it looks at what it reads.
    believes: bool,
    /// Requests that are finished, and how, since [`Self::finished`].
    done: Vec<(u32, Status)>,
}

impl Guest {
    pub fn new() -> Self {
        Self::with(CachePolicy::Auto, Limits::default())
    }

    pub fn with(policy: CachePolicy, limits: Limits) -> Self {
        let (sender, notices) = channel();
        let listener = Box::new(move |notice| sender.send(notice).unwrap_or(()));
        let splitter = BlockSplitter::new(&disk(), policy, limits, MEMORY, listener).unwrap();
        let buffers = Buffers::default();
        let (acknowledged, done) = (HashMap::new(), Vec::new());
        Self { splitter, buffers, notices, now: 1, next: 0, acknowledged, believes: true, done }
    }

    /// One turn of the event loop.
    pub fn turn(&mut self) {
        self.now += 1_000_000;
        self.splitter.service(self.now, &mut self.buffers);
        drop(self.splitter.take_retired());
        self.take_done();
    }

    fn take_done(&mut self) {
        for done in self.splitter.take_done() {
            let request = self.buffers.0.remove(&done.token.0).expect("a request that was answered twice");
            self.done.push((done.token.0, done.status));
            if done.status == Status::Ok && self.believes {
                self.check(done.token.0, &request);
            }
        }
    }

    fn check(&mut self, token: u32, request: &Request) {
        let Some((access, range)) = request.access else { return };
        if access == Access::Read {
            for (sector, allowed) in request.bytes.chunks(512).zip(&request.allowed) {
                assert!(allowed.contains(&value_of(sector)), "{} of {allowed:?}", value_of(sector));
            }
            return;
        }
        for sector in range.start()..range.end() {
            // One that was asked for before and is acknowledged after, because of its other parts, was done before.
            let last = self.acknowledged.entry(sector).or_default();
            *last = (*last).max((token, request.value));
        }
    }

    fn submit(&mut self, access: Access, start: u64, count: u64) -> u32 {
        let range = SectorRange::new(start, count).unwrap();
        self.next += 1;
        let (token, value) = (self.next, if access == Access::Write { self.next } else { 0 });
        let bytes = if access == Access::Write { content(value, count) } else { content(u32::MAX, count) };
        let mut allowed = Vec::new();
        if access == Access::Read {
            allowed = (range.start()..range.end()).map(|sector| self.may_hold(sector)).collect();
        } else {
            self.add_writer(range, value);
        }
        self.buffers.0.insert(token, Request { access: Some((access, range)), value, bytes, allowed });
        self.splitter.submit(Token(token), access, range);
        token
    }

    /// What a sector may hold now.
    fn may_hold(&self, sector: u64) -> BTreeSet<Value> {
        let (_, last) = self.acknowledged.get(&sector).copied().unwrap_or_default();
        let writes = self.buffers.0.values().filter(|request| {
            request
                .access
                .is_some_and(|(access, range)| access.changes() && (range.start()..range.end()).contains(&sector))
        });
        writes.map(|request| request.value).chain([last]).collect()
    }

    fn add_writer(&mut self, range: SectorRange, value: Value) {
        for request in self.buffers.0.values_mut() {
            if let Some((Access::Read, read)) = request.access {
                let sectors = (read.start()..read.end()).zip(&mut request.allowed);
                sectors.filter(|(sector, _)| (range.start()..range.end()).contains(sector)).for_each(|(_, allowed)| {
                    allowed.insert(value);
                });
            }
        }
    }

    pub fn write(&mut self, start: u64, count: u64) -> u32 {
        self.submit(Access::Write, start, count)
    }

    pub fn read(&mut self, start: u64, count: u64) -> u32 {
        self.submit(Access::Read, start, count)
    }

    pub fn zero(&mut self, start: u64, count: u64) -> u32 {
        self.submit(Access::WriteZeroes { unmap: true }, start, count)
    }

    pub fn flush(&mut self) -> u32 {
        self.next += 1;
        let request = Request { access: None, value: 0, bytes: Vec::new(), allowed: Vec::new() };
        self.buffers.0.insert(self.next, request);
        self.splitter.flush(Token(self.next));
        self.next
    }

    /// The guest's driver resets its device.
    pub fn reset(&mut self) {
        self.splitter.reset();
        self.buffers.0.clear();
        self.take_done();
    }

    /// Does not look at what it reads from now on: its driver VM has lied.
    pub fn forget(&mut self) {
        self.believes = false;
    }

    /// What has been finished since the last call.
    pub fn finished(&mut self) -> Vec<(u32, Status)> {
        std::mem::take(&mut self.done)
    }

    /// Requests that are not answered.
    pub fn waiting(&self) -> usize {
        self.buffers.0.len()
    }

    /// All that was acknowledged is on the medium.
    pub fn assert_stable(&self, medium: &Medium) {
        for (sector, (_, value)) in &self.acknowledged {
            assert_eq!(value_of(medium.stable(*sector)), *value, "sector {sector}");
        }
    }

    /// Turns until `is_there` says so. A cap on the turns, not on the time: a turn without news waits for some.
    pub fn until<T>(&mut self, mut is_there: impl FnMut(&mut Self) -> Option<T>) -> T {
        for _ in 0..1000 {
            self.turn();
            if let Some(found) = is_there(self) {
                return found;
            }
            let wake = self.splitter.wake().as_raw_fd();
            // SAFETY: the splitter owns the descriptor and outlives the borrow.
            let wake = unsafe { BorrowedFd::borrow_raw(wake) };
            poll(&mut [PollFd::new(wake, PollFlags::POLLIN)], PollTimeout::from(100u16)).unwrap();
        }
        panic!("it never came");
    }

    pub fn notice(&mut self) -> Notice {
        self.until(|guest| guest.notices.try_recv().ok())
    }
}

pub fn link(n: u32) -> LinkId {
    LinkId::first(Generation::new(n).unwrap())
}

/// A driver VM of this generation that has heard of its session and not greeted yet.
pub fn attached(guest: &mut Guest, n: u32) -> Vm {
    let (mut vm, socket) = Vm::new(link(n));
    meet(guest, &mut vm, socket);
    vm
}

/// The same driver VM by its next connection.
pub fn attached_again(guest: &mut Guest, vm: &mut Vm) {
    let socket = vm.hang_up();
    meet(guest, vm, socket);
}

fn meet(guest: &mut Guest, vm: &mut Vm, socket: std::os::unix::net::UnixStream) {
    guest.splitter.attach(vm.link, socket);
    vm.connect();
    guest.until(|_| {
        vm.receive();
        vm.begun.contains(&vm.link).then_some(())
    });
    vm.begun.clear();
}

/// One that has greeted.
pub fn greeted(guest: &mut Guest, n: u32) -> Vm {
    let mut vm = attached(guest, n);
    vm.greet();
    guest.turn();
    vm
}

/// One that serves.
pub fn live(guest: &mut Guest, n: u32, medium: &mut Medium) -> Vm {
    let mut vm = greeted(guest, n);
    serve_until_live(guest, &mut vm, medium);
    vm
}

pub fn serve_until_live(guest: &mut Guest, vm: &mut Vm, medium: &mut Medium) {
    loop {
        while let Ok(notice) = guest.notices.try_recv() {
            match notice {
                Notice::Live(generation, _) => return assert_eq!(generation, vm.link.generation),
                // Of a life before.
                Notice::Lost(lost, error) => assert!(lost < vm.link, "lost: {error:?}"),
                other => panic!("{other:?}"),
            }
        }
        serve_once(guest, vm, medium);
    }
}

/// The service does what it was asked; the guest hears of it.
pub fn serve_once(guest: &mut Guest, vm: &mut Vm, medium: &mut Medium) {
    vm.receive();
    while vm.tx.free() > 1 && vm.work(medium) {}
    guest.turn();
}

/// Serves until the guest has nothing to wait for.
pub fn serve(guest: &mut Guest, vm: &mut Vm, medium: &mut Medium) {
    for _ in 0..1000 {
        if guest.waiting() == 0 {
            return;
        }
        serve_once(guest, vm, medium);
    }
    panic!("{} requests wait for ever", guest.waiting());
}

/// The same, and makes it stable: a flush covers what was acknowledged before it.
pub fn serve_and_flush(guest: &mut Guest, vm: &mut Vm, medium: &mut Medium) {
    serve(guest, vm, medium);
    guest.flush();
    serve(guest, vm, medium);
}

/// Leaves the driver VM without a receive buffer.
pub fn use_up_buffers(guest: &mut Guest, vm: &mut Vm, medium: &mut Medium) {
    vm.offers = false;
    while vm.rx.free() < usize::from(QUEUE) {
        guest.write(900, 1);
        for _ in 0..2 {
            serve_once(guest, vm, medium);
        }
    }
}
