//! A guest, and lives of its driver VM that come, wait, are armed, lose their connections and fail in any order, as a supervisor would
//! have it. Whatever has happened, the next life serves the guest, and each of its frames has gone out once, in order.
#![allow(clippy::unwrap_used)]

mod common;

use std::os::unix::net::UnixStream;
use std::time::Duration;

use common::vm::{DriverVm, Guest, attached, attached_again, generation};
use common::{frame, number};
use proptest::prelude::*;
use umbra_shadow::LinkId;
use umbra_splitter::link::LinkQueue;
use umbra_splitter::net::{Kicker, Log, Notice};
use vhost::vhost_user::Frontend;

#[derive(Clone, Copy, Debug)]
enum Step {
    /// The guest sends a frame.
    Send,
    /// A frame comes in through the life of this rank.
    Bring(usize),
    /// The kernel of the life of this rank takes what it was handed, and offers all its buffers.
    Take(usize),
    /// A life begins to wait, if none does.
    Wait,
    Arm(bool),
    GoLive,
    Carrier(bool),
    /// The connection of the present life is lost, and the guest sees it.
    Lost,
    /// It is made again before the guest has seen its end.
    Unseen,
    /// The present life fails.
    Fail,
    /// The life that waits dies.
    Die,
    /// 100 ms pass.
    Pass,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => Just(Step::Send),
        2 => (0..2usize).prop_map(Step::Bring),
        3 => (0..2usize).prop_map(Step::Take),
        3 => Just(Step::Wait),
        3 => any::<bool>().prop_map(Step::Arm),
        4 => Just(Step::GoLive),
        2 => any::<bool>().prop_map(Step::Carrier),
        2 => Just(Step::Lost),
        2 => Just(Step::Unseen),
        2 => Just(Step::Fail),
        1 => Just(Step::Die),
        2 => Just(Step::Pass),
    ]
}

fn is_announcement(frame: &[u8]) -> bool {
    frame[12..14] == [0x80, 0x35]
}

struct Life {
    link: LinkId,
    vm: DriverVm,
}

struct World {
    guest: Guest,
    /// The present life, then the one that waits.
    lives: Vec<Life>,
    armed: bool,
    newest: u32,
    sent: Vec<u32>,
    taken: Vec<u32>,
}

impl World {
    fn new() -> Self {
        let mut new = Self {
            guest: Guest::new(),
            lives: Vec::new(),
            armed: false,
            newest: 0,
            sent: Vec::new(),
            taken: Vec::new(),
        };
        new.begin();
        new
    }

    /// Another life begins, with few buffers at first.
    fn begin(&mut self) {
        self.newest += 1;
        let mut vm = attached(&mut self.guest, self.newest);
        vm.rx.offer(3);
        self.lives.push(Life { link: LinkId::first(generation(self.newest)), vm });
    }

    /// The kernel of the life of this rank takes what it was handed.
    fn take(&mut self, rank: usize) {
        if let Some(life) = self.lives.get_mut(rank) {
            let frames = life.vm.rx.receive_all();
            self.taken.extend(frames.iter().filter(|frame| !is_announcement(frame)).map(|frame| number(frame)));
            life.vm.rx.offer_all();
            self.guest.splitter.kicked(Kicker::Link(LinkQueue::Rx));
        }
    }

    /// The present life is over: the one that waits takes its place, or another one begins.
    fn over(&mut self) {
        let mut before = self.lives.remove(0);
        self.guest.splitter.mask(before.link.generation);
        let frames = before.vm.rx.receive_all();
        self.taken.extend(frames.iter().filter(|frame| !is_announcement(frame)).map(|frame| number(frame)));
        self.armed = false;
        if self.lives.is_empty() {
            self.begin();
        }
    }

    fn heard_of(&mut self, wanted: impl Fn(&Notice) -> bool) {
        while !wanted(&self.guest.notice()) {}
    }

    fn lose(&mut self) {
        let serves = self.guest.splitter.serving().is_some();
        let (id, socket) = (self.lives[0].link, self.lives[0].vm.hang_up());
        self.heard_of(|notice| matches!(notice, Notice::LinkLost(lost, _) if *lost == id));
        if serves && self.armed {
            // The guest has gone over by itself, and the supervisor follows.
            return self.over();
        }
        drop(socket);
        let Life { link, vm } = &mut self.lives[0];
        *link = link.next();
        attached_again(&mut self.guest, vm, *link);
    }

    fn again(&mut self) {
        let Life { link, vm } = &mut self.lives[0];
        *link = link.next();
        let id = *link;
        let (ours, theirs) = UnixStream::pair().unwrap();
        let _unseen = std::mem::replace(&mut vm.frontend, Frontend::from_stream(ours, 2));
        self.guest.splitter.attach(id, theirs);
        vm.connect();
        self.heard_of(|notice| matches!(notice, Notice::LinkUp(up) if *up == id));
    }

    fn go(&mut self, step: Step) {
        self.guest.tx.completed();
        match step {
            Step::Send if self.guest.tx.driver.free() > 0 => {
                let n = u32::try_from(self.sent.len()).unwrap();
                self.guest.tx.send(&frame(n, 100));
                self.sent.push(n);
            }
            Step::Bring(rank) => {
                if let Some(life) = self.lives.get_mut(rank) {
                    life.vm.tx.completed();
                    if life.vm.tx.driver.free() > 0 {
                        life.vm.tx.send(&frame(7, 100));
                    }
                }
            }
            Step::Take(rank) => self.take(rank),
            Step::Wait if self.lives.len() == 1 => self.begin(),
            Step::Arm(armed) if self.lives.len() == 2 => {
                self.armed = armed;
                self.guest.splitter.arm(self.lives[1].link.generation, armed);
            }
            Step::GoLive => self.guest.splitter.go_live(self.lives[0].link.generation, Log::Replay),
            Step::Carrier(up) => self.guest.splitter.carrier(self.lives[0].link.generation, up),
            Step::Lost => self.lose(),
            Step::Unseen => self.again(),
            Step::Fail => self.over(),
            Step::Die if self.lives.len() == 2 => {
                let id = self.lives.remove(1).link;
                self.armed = false;
                self.heard_of(|notice| matches!(notice, Notice::LinkLost(lost, _) if *lost == id));
            }
            Step::Pass => self.pass(Duration::from_millis(100)),
            Step::Send | Step::Wait | Step::Arm(_) | Step::Die => {}
        }
        self.guest.turn();
        self.guest.rx.receive_all();
        self.guest.rx.offer_all();
    }

    fn pass(&mut self, time: Duration) {
        self.guest.pass(time);
        self.guest.splitter.go_on_replaying();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn the_next_life_serves_whatever_has_happened(steps in prop::collection::vec(step(), 0..40)) {
        let mut world = World::new();
        for step in steps {
            world.go(step);
        }
        world.over();
        let (present, n) = (world.lives[0].link.generation, u32::try_from(world.sent.len()).unwrap());
        world.guest.splitter.go_live(present, Log::Replay);
        world.guest.splitter.carrier(present, true);
        world.pass(Duration::from_secs(3));
        for _ in 0..4 {
            world.take(0);
            world.guest.turn();
        }
        prop_assert_eq!(world.guest.splitter.serving(), Some(present));
        world.go(Step::Send);
        world.take(0);
        prop_assert_eq!(world.taken, (0..=n).collect::<Vec<_>>());
        world.lives[0].vm.tx.send(&frame(9, 100));
        world.guest.turn();
        prop_assert_eq!(world.guest.rx.receive_all(), [frame(9, 100)]);
    }
}
