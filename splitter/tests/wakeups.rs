//! No wake-up is lost: the guest, the driver VM and the splitter between them go to sleep as real ones do, whenever there is nothing to
//! do, and each frame arrives although nobody looks without being told.
#![allow(clippy::unwrap_used)]

mod common;

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::thread;

use common::{Driver, RINGS_LEN, Rx, Tx, frame, memory, number};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use umbra_splitter::header::Offloads;
use umbra_splitter::pump::{self, Counts, Flow, Off, Owner, Stop};
use vmm_sys_util::eventfd::EventFd;

/// Frames of a run: as many chances for a wake-up to fall between a look and a sleep.
const FRAMES: u32 = 10_000;

/// Waits for one of `events` and empties it. A minute without any is a lost wake-up, however busy the machine is.
fn sleep(who: &str, events: &[&EventFd]) {
    // SAFETY: the events own their descriptors and outlive the call.
    let fd = |event: &&EventFd| unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
    let mut fds: Vec<_> = events.iter().map(fd).map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
    let minute = PollTimeout::try_from(60_000).unwrap();
    assert!(poll(&mut fds, minute).unwrap() > 0, "nobody wakes the {who}");
    for event in events {
        let _ = event.read();
    }
}

/// Sleeps until the device has used something.
fn await_used(who: &str, driver: &Driver) {
    fence(Ordering::SeqCst);
    while !driver.has_used() {
        sleep(who, &[&driver.call]);
        fence(Ordering::SeqCst);
    }
}

fn send_all(mut tx: Tx) {
    for n in 0..FRAMES {
        while tx.driver.free() == 0 {
            await_used("sender", &tx.driver);
            tx.completed();
        }
        let old = tx.driver.avail_idx;
        tx.send(&frame(n, 60));
        if tx.driver.wants_kick(old) {
            tx.driver.kick.write(1).unwrap();
        }
    }
}

fn receive_all(mut rx: Rx) {
    let mut next = 0;
    while next < FRAMES {
        await_used("receiver", &rx.driver);
        for frame in rx.receive_all() {
            assert_eq!(number(&frame), next);
            next += 1;
        }
        let old = rx.driver.avail_idx;
        rx.offer_all();
        if rx.driver.wants_kick(old) {
            rx.driver.kick.write(1).unwrap();
        }
    }
}

#[test]
fn whoever_sleeps_is_woken_when_there_is_something_to_do() {
    // Queues of these lengths: either end is soon full or empty.
    for (event_idx, sizes) in [(true, (4, 4)), (true, (64, 4)), (true, (4, 64)), (false, (8, 8))] {
        let (a, b) = (memory(8 << 20), memory(8 << 20));
        let tx = Tx::new(Driver::new(&a, 0x1000, sizes.0, event_idx), 0x1000 + RINGS_LEN);
        let mut rx = Rx::new(Driver::new(&b, 0x2000, sizes.1, event_idx), 0x2000 + RINGS_LEN, 2048);
        rx.offer_all();
        let (mut source, mut target) = (tx.driver.device(), rx.driver.device());
        let kicks = [&tx.driver.kick, &rx.driver.kick].map(|kick| kick.try_clone().unwrap());
        let flow =
            Flow { source: Owner::Guest, negotiated: Offloads::all(), accepted: Offloads::all(), mergeable: true };
        let mut counts = Counts::default();
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| send_all(tx));
            let over = &over;
            let wake = kicks[0].try_clone().unwrap();
            scope.spawn(move || {
                receive_all(rx);
                over.store(true, Ordering::SeqCst);
                wake.write(1).unwrap();
            });
            while !over.load(Ordering::SeqCst) {
                while pump::pump(&mut source, &mut target, &flow, &mut Off, &mut counts).unwrap() == Stop::Budget {}
                sleep("splitter", &[&kicks[0], &kicks[1]]);
            }
        });
        assert_eq!(counts.frames, u64::from(FRAMES));
    }
}
