//! The whole service on regular files.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::sockopt::{ReceiveTimeout, SndBuf};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socketpair};
use nix::sys::time::{TimeVal, TimeValLike};
use tempfile::TempDir;
use umbra_driver_vm::block_protocol::{MAX_BATCH, MAX_HELLO, parse_hello};
use umbra_driver_vm::protocol::FromAgent;

use super::super::pool::Pool;
use super::super::port::Opener;
use super::super::resets::Resets;
use super::super::ring::Ring;
use super::super::service::{BlockService, MAX_ACTIONS};
use super::super::session::Sessions;
use super::*;
use crate::orders::Mailbox;

/// For anything that is to happen; a machine may be slow.
const PATIENCE: Duration = Duration::from_secs(120);
/// Time in which something that must not happen would.
const SILENCE: Duration = Duration::from_millis(300);
const SECTORS: u64 = 8192;
const WHOLE: Window = Window { start: 0, sectors: SECTORS };

/// A service with some ends, on one file.
struct Rig {
    dir: TempDir,
    /// Address of the pool, of a huge page for each end.
    pool: usize,
    /// The host's ends of the ports, each time that one is opened.
    ports: Vec<Receiver<OwnedFd>>,
    mailbox: Arc<Mailbox>,
    /// What the host is to know.
    reports: Receiver<FromAgent>,
    /// Number of the service's thread.
    thread: nix::unistd::Pid,
}

/// The host's end of a session.
struct Host {
    socket: File,
    attempt: u32,
}

fn port() -> (Opener, Receiver<OwnedFd>) {
    let (sender, host_ends) = channel();
    let opener = move || {
        let (service, host) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        fcntl(&service, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        // Room for some buffers alone, as in a queue: it is full when the host does not read.
        setsockopt(&service, SndBuf, &4096)?;
        sender.send(host).unwrap();
        Ok(File::from(service))
    };
    (Box::new(opener), host_ends)
}

/// Opens past the page cache, where the file system can do that.
fn open(path: &Path, write: bool) -> File {
    let open = |flags| OpenOptions::new().read(true).write(write).custom_flags(flags).open(path);
    open(libc::O_DIRECT).or_else(|_| open(0)).unwrap()
}

impl Rig {
    fn start(windows: &[Window]) -> Self {
        // Beside the program, on a disk: what is in memory alone knows no direct access.
        let dir = tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap();
        File::create(dir.path().join("disk")).unwrap().set_len(SECTORS * 512).unwrap();
        let file = open(&dir.path().join("disk"), true);
        Self::start_on(dir, file, windows)
    }

    fn start_on(dir: TempDir, file: File, windows: &[Window]) -> Self {
        Self::start_with(dir, file, windows, PATIENCE)
    }

    fn start_with(dir: TempDir, file: File, windows: &[Window], patience: Duration) -> Self {
        let log = dir.path().join("kmsg");
        File::create(&log).unwrap();
        let pool = Pool::ordinary(windows.len() * HUGE_PAGE);
        let address = pool.as_buffer().iov_base.addr();
        let mailbox = Arc::new(Mailbox::new().unwrap());
        let (openers, ports): (Vec<_>, _) = windows.iter().map(|_| port()).unzip();
        let offers: Vec<_> = (0..).zip(windows).map(|(end, window)| offer(end, disk(SECTORS, *window))).collect();
        let its_mailbox = Arc::clone(&mailbox);
        let (sender, thread) = channel();
        let (reporter, reports) = channel();
        std::thread::spawn(move || {
            let ring = Ring::new(pool, u32::try_from(offers.len()).unwrap() * MAX_ACTIONS).unwrap();
            let resets = Resets::of_test(File::open(log).unwrap());
            let mut service = BlockService::new(ring, resets, its_mailbox).unwrap();
            let file = Arc::new(file);
            for (opener, offer) in openers.into_iter().zip(offers) {
                service.add(opener, Sessions::new(offer, GENERATION), Arc::clone(&file), patience).unwrap();
            }
            sender.send(nix::unistd::gettid()).unwrap();
            panic!("{:#}", service.run(|message| reporter.send(message).unwrap()));
        });
        let thread = thread.recv_timeout(PATIENCE).unwrap();
        Self { dir, pool: address, ports, mailbox, thread, reports }
    }

    /// The next opening of the port of `end`.
    fn port(&self, end: usize) -> File {
        let port = self.ports[end].recv_timeout(PATIENCE).expect("the port is not opened");
        setsockopt(&port, ReceiveTimeout, &TimeVal::seconds(PATIENCE.as_secs().try_into().unwrap())).unwrap();
        File::from(port)
    }

    /// A session at the next opening of a port.
    fn begin(&self, end: usize, attempt: u32) -> Host {
        let mut host = Host { socket: self.port(end), attempt };
        host.begin(attempt);
        host
    }

    /// Writes to a place in the share of an end.
    fn fill(&self, end: usize, place: usize, bytes: &[u8]) {
        let to = std::ptr::with_exposed_provenance_mut::<u8>(self.pool + end * HUGE_PAGE + place);
        // SAFETY: the pool is mapped as long as the service's thread runs, and nothing of the ring is under way to this place.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
    }

    /// Reads from a place in the share of an end.
    fn look(&self, end: usize, place: usize, length: usize) -> Vec<u8> {
        let from = std::ptr::with_exposed_provenance::<u8>(self.pool + end * HUGE_PAGE + place);
        // SAFETY: as for `fill`.
        unsafe { std::slice::from_raw_parts(from, length) }.to_vec()
    }

    /// What the disk holds.
    fn sectors(&self, start: u64, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count * 512];
        File::open(self.dir.path().join("disk")).unwrap().read_exact_at(&mut bytes, start * 512).unwrap();
        bytes
    }

    fn log(&self, record: &str) {
        let mut log = OpenOptions::new().append(true).open(self.dir.path().join("kmsg")).unwrap();
        log.write_all(record.as_bytes()).unwrap();
    }

    /// Nanoseconds that the service's thread has run.
    fn run_ns(&self) -> u64 {
        let stat = std::fs::read_to_string(format!("/proc/self/task/{}/schedstat", self.thread)).unwrap();
        stat.split_whitespace().next().unwrap().parse().unwrap()
    }
}

impl Host {
    fn begin(&mut self, attempt: u32) {
        self.attempt = attempt;
        self.send(&[ToService::Begin]);
        let hello = parse_hello(&self.receive(), link(attempt)).unwrap().expect("a hello of this session");
        assert_eq!((hello.depth, hello.disk.identity.sectors), (DEPTH, SECTORS));
    }

    fn send(&mut self, orders: &[ToService]) {
        assert!(self.socket.write(&encode(orders, self.attempt)).unwrap() > 0);
    }

    fn receive(&mut self) -> Vec<u8> {
        let mut buffer = vec![0; MAX_HELLO];
        let length = self.socket.read(&mut buffer).unwrap();
        assert_ne!(length, 0, "the service has closed the port");
        buffer.truncate(length);
        buffer
    }

    /// Waits for this number of answers.
    fn answers(&mut self, count: usize) -> Vec<FromService> {
        let mut answers = Vec::new();
        while answers.len() < count {
            answers.extend(decode(&self.receive(), self.attempt));
        }
        answers
    }

    fn order(&mut self, order: ToService) -> FromService {
        self.send(&[order]);
        self.answers(1)[0]
    }

    /// Waits until the service has closed the port.
    fn expect_end(mut self) {
        let patience = TimeVal::seconds(PATIENCE.as_secs().try_into().unwrap());
        setsockopt(&self.socket, ReceiveTimeout, &patience).unwrap();
        let mut buffer = vec![0; MAX_HELLO];
        while self.socket.read(&mut buffer).unwrap() != 0 {}
    }

    fn is_silent(&self) -> bool {
        setsockopt(&self.socket, ReceiveTimeout, &TimeVal::milliseconds(SILENCE.as_millis().try_into().unwrap()))
            .unwrap();
        (&self.socket).read(&mut [0; MAX_HELLO]).is_err()
    }
}

#[test]
fn what_is_written_is_on_the_disk_and_is_read_back() {
    let rig = Rig::start(&[WHOLE]);
    let mut host = rig.begin(0, 1);
    let data: Vec<u8> = (0..1 << 20).map(|n: u32| n.to_le_bytes()[1] ^ 0x5a).collect();
    rig.fill(0, 0, &data);
    assert_eq!(host.order(access(255, Operation::Write { place: 0 }, range(64, 2048))), done(255, 1 << 20));
    assert_eq!(host.order(flush(0)), done(0, 0));
    assert_eq!(rig.sectors(64, 2048), data);
    assert_eq!(host.order(access(7, Operation::Read { place: 1 << 20 }, range(65, 1))), done(7, 512));
    assert_eq!(rig.look(0, 1 << 20, 512), data[512..1024]);
    for (tag, operation) in [
        (1, Operation::WriteZeroes { unmap: false }),
        (2, Operation::WriteZeroes { unmap: true }),
        (3, Operation::Discard),
    ] {
        let start = 64 + u64::from(tag) * 16;
        assert_eq!(host.order(access(tag, operation, range(start, 16))), done(tag, 0));
        assert_eq!(rig.sectors(start, 16), [0; 16 * 512], "{operation:?}");
    }
    assert_eq!(rig.sectors(64 + 4 * 16, 16), data[4 * 16 * 512..][..16 * 512], "what lies behind");
}

#[test]
fn a_disk_whose_driver_has_gone_has_no_error_of_its_own() {
    // Reads only: a write fails with an error of its own.
    let dir = tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap();
    let path = dir.path().join("disk");
    File::create(&path).unwrap().set_len(SECTORS * 512).unwrap();
    let rig = Rig::start_on(dir, open(&path, false), &[WHOLE]);
    let mut host = rig.begin(0, 1);
    let write = access(1, Operation::Write { place: 0 }, range(0, 8));
    assert_eq!(host.order(write), failed(1, libc::EBADF));
    assert_eq!(host.order(access(2, Operation::Discard, range(0, 8))), failed(2, libc::EBADF));
    File::options().write(true).open(&path).unwrap().set_len(0).unwrap();
    assert_eq!(host.order(write), failed(1, libc::ENODEV));
}

/// A disk of which nothing can be flushed: neither are reads and writes possible on a file that is only named, and its size is known.
fn named_only(windows: &[Window]) -> Rig {
    let dir = tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap();
    let path = dir.path().join("disk");
    File::create(&path).unwrap().set_len(SECTORS * 512).unwrap();
    let file = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(&path).unwrap();
    Rig::start_on(dir, file, windows)
}

#[test]
fn a_flush_that_failed_proves_nothing_to_the_others_on_its_disk() {
    let parts = [Window { start: 0, sectors: 4096 }, Window { start: 4096, sectors: 4096 }];
    let rig = named_only(&parts);
    let (mut first, mut second) = (rig.begin(0, 1), rig.begin(1, 1));
    first.send(&[flush(0)]);
    assert_eq!(second.answers(1), [FromService::CacheLost], "it may have dropped what the second has written");
    // And so may that after the end of a session.
    drop(first);
    assert_eq!(second.answers(1), [FromService::CacheLost]);
}

#[test]
fn disks_come_to_rest_when_nothing_is_ordered_any_more() {
    let rig = Rig::start(&[WHOLE, WHOLE]);
    let mut host = rig.begin(0, 1);
    host.send(&[access(1, Operation::Write { place: 0 }, range(0, 8))]);
    rig.mailbox.order(|orders| orders.rest = true);
    assert_eq!(rig.reports.recv_timeout(PATIENCE), Ok(FromAgent::AtRest { stable: true }));
}

#[test]
fn many_orders_in_many_buffers_are_all_answered_in_few() {
    let rig = Rig::start(&[WHOLE]);
    let mut host = rig.begin(0, 1);
    for round in 0..20 {
        let orders: Vec<_> = (0..DEPTH)
            .map(|tag| {
                let at = range(u64::from(tag) * 8, 8);
                let place = u64::from(tag) * 4096;
                rig.fill(0, usize::from(tag) * 4096, &[round ^ tag.to_le_bytes()[0]; 4096]);
                access(tag, Operation::Write { place }, at)
            })
            .collect();
        for orders in orders.chunks(MAX_BATCH) {
            host.send(orders);
        }
        let mut answers = host.answers(orders.len());
        answers.sort_by_key(|answer| if let FromService::Done { tag, .. } = answer { tag.0 } else { u16::MAX });
        assert_eq!(answers, (0..DEPTH).map(|tag| done(tag, 4096)).collect::<Vec<_>>());
    }
    for tag in 0..DEPTH {
        assert_eq!(rig.sectors(u64::from(tag) * 8, 8), [19 ^ tag.to_le_bytes()[0]; 4096]);
    }
}

#[test]
fn a_host_that_breaks_the_protocol_loses_its_session_and_no_other_does() {
    let parts = [Window { start: 0, sectors: 4096 }, Window { start: 4096, sectors: 4096 }];
    let rig = Rig::start(&parts);
    let (mut first, mut second) = (rig.begin(0, 1), rig.begin(1, 1));
    rig.fill(0, 0, &[1; 512]);
    rig.fill(1, 0, &[2; 512]);
    assert_eq!(second.order(access(0, Operation::Write { place: 0 }, range(4096, 1))), done(0, 512));
    first.send(&[access(0, Operation::Write { place: 0 }, range(4096, 1))]);
    first.expect_end();
    assert_eq!(second.order(access(0, Operation::Read { place: 4096 }, range(4096, 1))), done(0, 512));
    assert_eq!(rig.look(1, 4096, 512), [2; 512], "one guest's order reached the other's part");
    let mut first = rig.begin(0, 2);
    assert_eq!(first.order(access(0, Operation::Write { place: 0 }, range(4095, 1))), done(0, 512));
    assert_eq!(rig.sectors(4095, 2), [[1; 512], [2; 512]].concat());
}

#[test]
fn sessions_follow_each_other_at_one_port() {
    let rig = Rig::start(&[WHOLE]);
    let mut host = rig.begin(0, 1);
    let orders: Vec<_> =
        (0..64).map(|tag| access(tag, Operation::Write { place: 0 }, range(u64::from(tag), 1))).collect();
    host.send(&orders);
    host.attempt = 2;
    host.send(&[ToService::Begin]);
    // Answers of the first session may have been written before the second began, none after the hello.
    let hello = loop {
        if let Some(hello) = parse_hello(&host.receive(), link(2)).unwrap() {
            break hello;
        }
    };
    assert!(hello.is_sane());
    assert_eq!(host.order(flush(63)), done(63, 0));
}

#[test]
fn errors_are_answered_by_their_number() {
    let dir = tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap();
    let path = dir.path().join("disk");
    // Half as long as the disk says.
    File::create(&path).unwrap().set_len(SECTORS * 256).unwrap();
    let rig = Rig::start_on(dir, open(&path, false), &[WHOLE]);
    let mut host = rig.begin(0, 1);
    let read = |at| access(1, Operation::Read { place: 0 }, at);
    assert_eq!(host.order(read(range(0, 8))), done(1, 4096));
    assert_eq!(host.order(read(range(SECTORS / 2 - 4, 8))), failed(1, libc::EIO), "there is no rest");
}

#[test]
fn a_reset_by_the_driver_is_reported_before_the_answers_that_follow() {
    let rig = Rig::start(&[WHOLE, WHOLE]);
    let (mut first, mut second) = (rig.begin(0, 1), rig.begin(1, 1));
    assert_eq!(first.order(flush(1)), done(1, 0));
    rig.log("6,900,77,-;nvme nvme0: 1/0/0 default/read/poll queues\n");
    first.send(&[flush(2)]);
    assert_eq!(first.answers(2), [FromService::CacheLost, done(2, 0)]);
    // The other end may have heard of it without an order.
    second.send(&[flush(3)]);
    assert_eq!(second.answers(2), [FromService::CacheLost, done(3, 0)]);
    assert_eq!(first.order(flush(4)), done(4, 0));
}

#[test]
fn a_disk_that_answers_nothing_is_given_up_and_one_that_was_idle_is_not() {
    let dir = tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap();
    let path = dir.path().join("disk");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    // It answers a read when something is written to it.
    let pipe = File::options().read(true).write(true).open(&path).unwrap();
    let patience = Duration::from_millis(1500);
    let rig = Rig::start_with(dir, pipe.try_clone().unwrap(), &[WHOLE], patience);
    let mut host = rig.begin(0, 1);
    std::thread::sleep(patience * 2);
    let read = access(1, Operation::Read { place: 0 }, range(0, 1));
    host.send(&[read]);
    assert!(host.is_silent(), "it is given up for the time before");
    setsockopt(&host.socket, ReceiveTimeout, &TimeVal::seconds(PATIENCE.as_secs().try_into().unwrap())).unwrap();
    (&pipe).write_all(&[7; 512]).unwrap();
    assert_eq!(host.answers(1), [done(1, 512)]);
    host.send(&[read]);
    host.expect_end();
}

#[test]
fn an_error_that_may_be_the_driver_s_is_reported_once_of_each_session() {
    let dir = tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap();
    let path = dir.path().join("disk");
    File::create(&path).unwrap().set_len(SECTORS * 512).unwrap();
    let rig = Rig::start_on(dir, open(&path, false), &[WHOLE, WHOLE]);
    let mut host = rig.begin(1, 1);
    for _ in 0..2 {
        assert_eq!(host.order(access(2, Operation::Discard, range(0, 8))), failed(2, libc::EBADF));
    }
    assert_eq!(rig.reports.recv_timeout(PATIENCE), Ok(FromAgent::DiskError { end: 1, attempt: 1, errno: libc::EBADF }));
    host.begin(2);
    assert_eq!(host.order(access(2, Operation::Discard, range(0, 8))), failed(2, libc::EBADF));
    assert_eq!(rig.reports.recv_timeout(PATIENCE), Ok(FromAgent::DiskError { end: 1, attempt: 2, errno: libc::EBADF }));
    assert!(rig.reports.try_recv().is_err());
}

#[test]
fn a_stalled_service_takes_no_more_orders() {
    let rig = Rig::start(&[WHOLE]);
    let mut host = rig.begin(0, 1);
    assert_eq!(host.order(flush(1)), done(1, 0));
    rig.mailbox.order(|orders| orders.stall = true);
    host.send(&[flush(2)]);
    assert!(host.is_silent());
}

#[test]
fn a_service_with_nothing_to_do_does_nothing() {
    let rig = Rig::start(&[WHOLE, WHOLE, WHOLE]);
    let mut host = rig.begin(0, 1);
    // No session has been here, and no host is: the port ends whenever it is read.
    drop(rig.port(1));
    let mut full = rig.begin(2, 1);
    // A host that reads nothing.
    (0..64).for_each(|tag| full.send(&[flush(tag)]));
    assert_eq!(host.order(flush(1)), done(1, 0));
    let before = rig.run_ns();
    std::thread::sleep(SILENCE);
    let ran = rig.run_ns() - before;
    assert!(ran < 100_000_000, "{ran} ns in {SILENCE:?}");
    assert_eq!(host.order(flush(1)), done(1, 0));
}

#[test]
fn a_host_that_does_not_read_is_answered_in_full_when_it_does() {
    let rig = Rig::start(&[WHOLE]);
    let mut host = rig.begin(0, 1);
    for tag in 0..DEPTH {
        host.send(&[access(tag, Operation::Read { place: 0 }, range(0, 1))]);
    }
    let mut tags: Vec<_> = host.answers(usize::from(DEPTH));
    tags.sort_by_key(|answer| if let FromService::Done { tag, .. } = answer { tag.0 } else { u16::MAX });
    assert_eq!(tags, (0..DEPTH).map(|tag| done(tag, 512)).collect::<Vec<_>>());
}
