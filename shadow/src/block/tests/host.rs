//! A host for one shadow, whose disk does nothing by itself: each test says what is answered.

use std::sync::Arc;

use super::disk::{Value, at};
use crate::block::range::SectorRange;
use crate::block::{
    Access, Answer, BlockShadow, CachePolicy, Command, Data, ErrorClass, Failure, Identity, Limits, Order, Out, Status,
    Tag, Token, Window, WriteCache,
};
use crate::{Generation, LinkId};

/// Where the guest's disk begins on the driver VM's.
pub(super) const START: u64 = 1000;
/// Sectors of the guest's disk.
pub(super) const SIZE: u64 = 1 << 20;

pub(super) fn identity() -> Identity {
    let window = Window { start: START, sectors: SIZE };
    Identity { serial: "s".into(), sectors: 1 << 24, logical_block: 512, read_only: false, window }
}

pub(super) fn range(start: u64, count: u64) -> SectorRange {
    SectorRange::new(start, count).unwrap()
}

pub(super) fn link(life: u32) -> LinkId {
    LinkId::first(Generation::new(life).unwrap())
}

pub(super) struct Host {
    pub(super) shadow: BlockShadow<Arc<[Value]>>,
    pub(super) now: u64,
    pub(super) life: u32,
    attempt: u32,
    next_token: u32,
    pub(super) orders: Vec<Order<Arc<[Value]>>>,
    out: Out,
}

impl Host {
    pub(super) fn new(policy: CachePolicy, limits: Limits) -> Self {
        let shadow = BlockShadow::new(identity(), policy, limits);
        Self { shadow, now: 1_000_000_000, life: 0, attempt: 1, next_token: 0, orders: Vec::new(), out: Out::default() }
    }

    /// With a life that has a volatile cache, and bounds as users have them.
    pub(super) fn alive() -> Self {
        let mut host = Self::new(CachePolicy::Auto, Limits::default());
        host.live();
        host
    }

    /// The next life.
    pub(super) fn live(&mut self) {
        self.live_with(WriteCache::Volatile, 32);
    }

    pub(super) fn live_with(&mut self, cache: WriteCache, depth: u16) {
        self.life += 1;
        self.attempt = 1;
        self.attach(cache, depth);
    }

    /// The next connection with the same life, which is lost by now.
    pub(super) fn connect_again(&mut self) {
        self.attempt += 1;
        self.attach(WriteCache::Volatile, 32);
    }

    pub(super) fn link(&self) -> LinkId {
        LinkId { attempt: self.attempt, ..link(self.life) }
    }

    fn attach(&mut self, cache: WriteCache, depth: u16) {
        let link = self.link();
        self.shadow.attach(link, &identity(), cache, depth, self.now, &mut self.out).unwrap();
    }

    pub(super) fn die(&mut self) {
        self.orders.clear();
        let link = self.link();
        self.shadow.lost(link, &mut self.out);
    }

    pub(super) fn ask(&mut self, access: Access, start: u64, count: u64) -> Token {
        let token = self.token();
        self.shadow.submit(token, access, range(start, count), &mut self.out);
        token
    }

    fn token(&mut self) -> Token {
        self.next_token += 1;
        Token(self.next_token)
    }

    pub(super) fn write(&mut self, start: u64, count: u64) -> Token {
        self.ask(Access::Write, start, count)
    }

    pub(super) fn read(&mut self, start: u64, count: u64) -> Token {
        self.ask(Access::Read, start, count)
    }

    pub(super) fn flush(&mut self) -> Token {
        let token = self.token();
        self.shadow.flush(token, &mut self.out);
        token
    }

    /// Takes what there is to hand over, and says what that is: the kind, the first of the guest's sectors, and how many.
    pub(super) fn handed(&mut self) -> Vec<String> {
        let mut new = Vec::new();
        let copy = |span: crate::block::GuestSpan| vec![span.token.0; at(span.sectors)].into();
        while let Some(order) = self.shadow.next_order(self.now, copy, &mut self.out) {
            new.push(name(&order.command));
            self.orders.push(order);
        }
        new
    }

    /// The order of this name that was handed over first.
    fn take(&mut self, what: &str) -> Order<Arc<[Value]>> {
        let index = self.orders.iter().position(|order| name(&order.command) == what);
        self.orders.remove(index.unwrap_or_else(|| panic!("no {what} in flight")))
    }

    pub(super) fn answer(&mut self, tag: Tag, answer: Answer) -> Result<(), Failure> {
        let link = self.link();
        self.shadow.answered(link, tag, answer, self.now, &mut self.out)
    }

    /// The disk has done an order.
    pub(super) fn ok(&mut self, what: &str) {
        let order = self.take(what);
        let bytes = order.command.bytes();
        self.answer(order.tag, Answer::Done { bytes }).unwrap();
    }

    /// The driver VM says that an order is under way.
    pub(super) fn at_work(&mut self, what: &str) -> Result<(), Failure> {
        let tag = self.orders.iter().find(|order| name(&order.command) == what).unwrap().tag;
        let link = self.link();
        self.shadow.at_work(link, tag, self.now, &mut self.out)
    }

    /// An order failed, and the life is not to blame.
    pub(super) fn fails(&mut self, what: &str, class: ErrorClass) {
        let order = self.take(what);
        self.answer(order.tag, Answer::Failed(class)).unwrap();
    }

    /// An order failed, and with it the life.
    pub(super) fn kills(&mut self, what: &str, class: ErrorClass) -> Failure {
        let order = self.take(what);
        let failure = self.answer(order.tag, Answer::Failed(class)).unwrap_err();
        self.orders.clear();
        failure
    }

    /// Hands over and answers until nothing is left to do; returns what was handed over.
    pub(super) fn run(&mut self) -> Vec<String> {
        let mut all = self.handed();
        while let Some(order) = self.orders.first() {
            let what = name(&order.command);
            self.ok(&what);
            all.extend(self.handed());
        }
        all
    }

    /// Whose data the write of this name carries.
    pub(super) fn writers(&self, what: &str) -> Vec<Value> {
        let order = self.orders.iter().find(|order| name(&order.command) == what).unwrap();
        let Command::Write { data: Data::Private(slices), .. } = &order.command else { panic!("{order:?}") };
        slices.iter().flat_map(|s| s.payload[at(s.skip)..at(s.skip + s.sectors)].to_vec()).collect()
    }

    /// What went back to the guest since the last call.
    pub(super) fn done(&mut self) -> Vec<(Token, Status)> {
        std::mem::take(&mut self.out.done).into_iter().map(|done| (done.token, done.status)).collect()
    }

    pub(super) fn tick(&mut self) -> Result<(), Failure> {
        let result = self.shadow.tick(self.now, &mut self.out);
        if result.is_err() {
            self.orders.clear();
        }
        result
    }

    pub(super) fn quarantine(&mut self) {
        self.orders.clear();
        self.shadow.quarantine(&mut self.out);
    }

    /// The disk reads a block to be recognised by.
    pub(super) fn sampled(&mut self, what: &str, values: &[Value]) -> Result<(), Failure> {
        let tag = self.take(what).tag;
        let found = super::disk::fingerprint(values);
        let link = self.link();
        self.shadow.sampled(link, tag, found, self.now, &mut self.out)
    }

    /// Hands over and answers until an order of this name is in flight.
    pub(super) fn run_to(&mut self, what: &str) {
        self.handed();
        while !self.orders.iter().any(|order| name(&order.command) == what) {
            let first = name(&self.orders[0].command);
            self.ok(&first);
            self.handed();
        }
    }

    /// Takes the present disk for the one that it was, whatever it holds: reading its samples fails.
    pub(super) fn run_samples(&mut self) {
        for _ in 0..2 {
            for what in self.handed() {
                self.fails(&what, ErrorClass::Medium);
            }
        }
    }

    /// Recognises the disk by blocks that token `writer` filled.
    pub(super) fn recognise(&mut self, writer: Token) {
        for what in self.handed() {
            self.sampled(&what, &[writer.0; 8]).unwrap();
        }
    }
}

fn name(command: &Command<Arc<[Value]>>) -> String {
    let place = |at: &SectorRange| format!("{} {}", at.start() - START, at.count());
    match command {
        Command::Read { at, .. } => format!("read {}", place(at)),
        Command::Write { at, .. } => format!("write {}", place(at)),
        Command::WriteZeroes { at, unmap } => format!("zero {}{}", place(at), if *unmap { " unmap" } else { "" }),
        Command::Discard { at } => format!("discard {}", place(at)),
        Command::Flush => "flush".into(),
        Command::Sample { at } => format!("sample {}", place(at)),
    }
}
