//! The model test (T1): the shadow between a guest and a reference disk, in any order of requests, answers, deaths with loss of cache,
//! resets and errors. After each step the invariants of [`crate::block`] hold; in the end everything is answered, and every sector
//! is what it should be after one more loss.

mod end;
mod judge;

pub(super) use judge::Reached;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::broken::{Rule, is_broken};
use super::disk::{Deed, Disk, Value, at, fingerprint};
use super::history::{History, Id, Kind, value};
use super::plan::{Plan, SECTORS, START};
use super::random::Random;
use crate::block::range::{RangeSet, SectorRange};
use crate::block::{
    Access, Answer, BlockShadow, Done, Failure, GuestSpan, Identity, Mismatch, ModeName, NotTaken, Out, Status, Tag,
    Token,
};
use crate::{Generation, LinkId};

const MS: u64 = 1_000_000;

#[derive(Clone, Debug)]
enum Wish {
    Read { range: SectorRange, values: Vec<Option<Value>> },
    Change(Id),
    Flush,
}

#[derive(Clone, Debug)]
struct Request {
    wish: Wish,
    begin: u64,
    /// Places whose data were fetched.
    fetched: Vec<u64>,
}

/// Something that may be the reason of a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reason {
    Medium,
    Suspect(Generation),
    Death(Generation),
}

/// One case.
pub(super) struct Rig {
    random: Random,
    plan: Plan,
    shadow: BlockShadow<Arc<[Value]>>,
    disk: Disk,
    history: History,
    now: u64,
    link: Option<LinkId>,
    /// The newest of all.
    last: Option<LinkId>,
    next_token: u32,
    requests: BTreeMap<Token, Request>,
    /// What lost lives had answered too late.
    late: Vec<(LinkId, Tag, Answer)>,
    /// When what went wrong where; nowhere: with a flush.
    reasons: Vec<(u64, Option<SectorRange>, Reason)>,
    /// Only the last connection is lost: the driver VM lives on.
    lives_on: bool,
    /// What was ever lost.
    lost: RangeSet,
    /// What was lost at the end of the last step.
    lost_before: RangeSet,
    /// For each sector, the newest change that may have been lost with it.
    lost_until: Vec<Option<Id>>,
    /// For each sector, what the guest knows to be stable.
    stable: Vec<Id>,
    deaths_in_replay: u32,
    /// At the beginning of the step.
    mode: ModeName,
    reached: BTreeSet<Reached>,
    out: Out,
    trace: Option<Vec<String>>,
}

impl Rig {
    pub(super) fn new(seed: u64, is_traced: bool) -> Self {
        let mut random = Random::new(seed);
        let plan = Plan::any(&mut random);
        let mut shadow = BlockShadow::new(plan.identity(), plan.policy, plan.limits);
        shadow.set_guest_flushes(plan.guest_flushes);
        let disk = Disk::new(START + SECTORS + 3, plan.has_cache());
        Self {
            random,
            shadow,
            disk,
            history: History::new(SECTORS),
            now: 1_000 * MS,
            link: None,
            last: None,
            next_token: 0,
            requests: BTreeMap::new(),
            late: Vec::new(),
            reasons: Vec::new(),
            lives_on: false,
            lost: RangeSet::default(),
            lost_before: RangeSet::default(),
            lost_until: vec![None; at(SECTORS)],
            stable: vec![0; at(SECTORS)],
            deaths_in_replay: 0,
            mode: ModeName::Masking,
            reached: BTreeSet::new(),
            out: Out::default(),
            trace: is_traced.then(Vec::new),
            plan,
        }
    }

    pub(super) fn trace(&self) -> String {
        self.trace.iter().flatten().map(|line| format!("\n{line}")).collect()
    }

    fn note(&mut self, line: impl FnOnce() -> String) {
        if let Some(lines) = &mut self.trace {
            lines.push(line());
        }
    }

    /// Runs the case.
    pub(super) fn run(&mut self) -> Result<(), String> {
        let plan = format!("{:?}", self.plan.policy);
        self.note(|| plan);
        for step in 0..self.plan.steps {
            if step == self.plan.faults_from {
                self.disk.faults = self.plan.faults.clone();
            }
            self.mode = self.shadow.mode();
            self.step()?;
            self.check()?;
        }
        if self.random.percent(20) { self.end_of_guest() } else { self.finish() }
    }

    fn step(&mut self) -> Result<(), String> {
        self.now += self.random.below(20) * MS;
        if self.random.percent(self.plan.own_reset_percent) {
            self.lose_cache();
        }
        if self.comes_from_others() {
            self.flush_by_another();
        }
        if self.random.percent(self.plan.death_percent) {
            self.attach_or_die()?;
            self.drain()?;
        }
        match self.random.below(100) {
            0..24 => self.submit(),
            24..48 => {
                let most = 1 + self.random.below(4);
                self.pump(most)?;
            }
            48..54 if !self.disk.under_way.is_empty() => {
                let index = self.random.index(self.disk.under_way.len());
                self.disk.advance(index, &mut self.random);
            }
            54..74 => self.work()?,
            74..86 => self.deliver()?,
            86..88 => self.disk.write_back(&mut self.random),
            88 => self.reset_by_guest(),
            89..93 => self.attach()?,
            93 => self.quiesce()?,
            94 => self.quarantine_or_lie()?,
            95 => self.say_late_things()?,
            96 => self.disk.is_stuck |= !self.is_spared() && self.random.percent(10),
            97 if !self.is_spared() => self.wait()?,
            _ => self.attach()?,
        }
        self.drain()
    }

    fn wait(&mut self) -> Result<(), String> {
        self.now += if self.disk.is_stuck { 11_000 * MS } else { (1 + self.random.below(2_500)) * MS };
        let in_flight = self.shadow.in_flight();
        match self.shadow.tick(self.now, &mut self.out) {
            Err(Failure::Stalled { .. }) if in_flight > 0 => {
                self.reached.insert(Reached::Stall);
                self.died("stalled")
            }
            Err(Failure::NotQuiesced) => self.died("not at rest in time"),
            Err(failure) => Err(format!("without reason: {failure}")),
            Ok(()) => Ok(()),
        }
    }

    fn submit(&mut self) {
        if self.requests.len() >= self.plan.requests {
            return;
        }
        let token = Token(self.next_token);
        self.next_token += 1;
        let is_read = self.random.percent(self.plan.read_percent);
        let range = self.plan.any_range(is_read, &mut self.random);
        let begin = self.history.tick();
        let (access, wish) = match self.random.below(100) {
            _ if is_read => (Access::Read, Wish::Read { range, values: vec![None; at(range.count())] }),
            0..64 => (Access::Write, Wish::Change(self.history.begin(Kind::Write, range))),
            64..74 => {
                let unmap = self.random.percent(50);
                (Access::WriteZeroes { unmap }, Wish::Change(self.history.begin(Kind::Zeroes, range)))
            }
            74..80 => (Access::Discard, Wish::Change(self.history.begin(Kind::Discard, range))),
            _ => {
                self.note(|| format!("{token:?} flush"));
                self.requests.insert(token, Request { wish: Wish::Flush, begin, fetched: vec![] });
                return self.shadow.flush(token, &mut self.out);
            }
        };
        self.note(|| format!("{token:?} {access:?} {range} {wish:?}"));
        self.requests.insert(token, Request { wish, begin, fetched: vec![] });
        self.shadow.submit(token, access, range, &mut self.out);
    }

    /// Hands up to `most` orders to the disk.
    fn pump(&mut self, most: u64) -> Result<(), String> {
        for _ in 0..most {
            let Self { shadow, requests, out, .. } = self;
            let mut fetch = |span: GuestSpan| -> Arc<[Value]> {
                let Some(Request { wish: Wish::Change(id), fetched, .. }) = requests.get_mut(&span.token) else {
                    return vec![Value::MAX - 1; at(span.sectors)].into();
                };
                // The guest may change its memory as soon as it was read.
                let is_first = !fetched.contains(&span.skip);
                fetched.push(span.skip);
                let values = span.skip..span.skip + span.sectors;
                values.map(|n| if is_first { value(*id, n) } else { Value::MAX - 2 }).collect()
            };
            let Some(order) = shadow.next_order(self.now, &mut fetch, out) else { break };
            let requests = &self.requests;
            let from_guest = |span: GuestSpan| match requests.get(&span.token) {
                Some(Request { wish: Wish::Change(id), .. }) => {
                    (span.skip..span.skip + span.sectors).map(|n| value(*id, n)).collect()
                }
                _ => vec![Value::MAX - 1; at(span.sectors)],
            };
            self.disk.take(order, from_guest);
            self.check_order()?;
            let order = self.disk.under_way.last().cloned();
            self.note(|| format!("handed {order:?}"));
        }
        Ok(())
    }

    /// The disk works on an order.
    fn work(&mut self) -> Result<(), String> {
        if self.disk.under_way.is_empty() || self.disk.is_stuck {
            return Ok(());
        }
        let index = self.random.index(self.disk.under_way.len());
        if self.disk.is_deadly(index) {
            return self.die("poison");
        }
        self.disk.finish(index, &mut self.random);
        Ok(())
    }

    /// The host reads an answer.
    fn deliver(&mut self) -> Result<(), String> {
        let Some(link) = self.link.filter(|_| !self.disk.posted.is_empty()) else { return Ok(()) };
        let index = self.random.index(self.disk.posted.len());
        let posted = self.disk.posted.swap_remove(index);
        self.note(|| format!("answered {posted:?}"));
        let time = self.history.tick();
        if let Answer::Failed(class) = posted.answer {
            self.note_error(time, &posted.deed, class);
        }
        let result = match (&posted.deed, posted.answer) {
            (Deed::Sample(_), Answer::Done { .. }) => {
                self.reached.insert(Reached::Recognised);
                self.shadow.sampled(link, posted.tag, fingerprint(&posted.values), self.now, &mut self.out)
            }
            (Deed::Read(_), Answer::Done { .. }) => {
                if let Some(span) = self.shadow.read_into(link, posted.tag) {
                    self.copy_in(span, &posted.values)?;
                }
                self.shadow.answered(link, posted.tag, posted.answer, self.now, &mut self.out)
            }
            _ => self.shadow.answered(link, posted.tag, posted.answer, self.now, &mut self.out),
        };
        let is_error = matches!(posted.answer, Answer::Failed(_));
        match result {
            Ok(()) => Ok(()),
            Err(failure @ (Failure::Suspect | Failure::FlushFailed)) if is_error => self.died(&failure.to_string()),
            Err(failure) => Err(format!("an honest disk is accused: {failure}")),
        }
    }

    fn copy_in(&mut self, span: GuestSpan, values: &[Value]) -> Result<(), String> {
        match self.requests.get_mut(&span.token) {
            Some(Request { wish: Wish::Read { values: room, .. }, .. }) => {
                let room = &mut room[at(span.skip)..at(span.skip + span.sectors)];
                room.iter_mut().zip(values).for_each(|(place, value)| *place = Some(*value));
                Ok(())
            }
            _ => Err(format!("{:?} is no read of the guest", span.token)),
        }
    }

    fn attach_or_die(&mut self) -> Result<(), String> {
        if self.link.is_none() {
            self.attach()
        } else if self.is_spared() {
            Ok(())
        } else {
            self.die("killed")
        }
    }

    /// In a calm case the driver VM does not die in replay twice in a row.
    fn is_spared(&self) -> bool {
        self.plan.is_calm && self.deaths_in_replay > 0 && self.mode != ModeName::Passive
    }

    fn attach(&mut self) -> Result<(), String> {
        if self.link.is_some() {
            return Ok(());
        }
        let is_next_connection = self.lives_on;
        let link = match self.last.filter(|_| is_next_connection) {
            Some(last) => last.next(),
            None => LinkId::first(self.last.map_or(Generation::FIRST, |last| last.generation.next())),
        };
        (self.last, self.lives_on) = (Some(link), false);
        self.plan.change(&mut self.random);
        self.disk.use_cache(self.plan.has_cache(), &mut self.random);
        let depth = self.plan.depth;
        self.note(|| format!("life {link}"));
        let is_another = !is_next_connection && self.comes_from_others();
        let serial = if is_another { "another" } else { "model" };
        let disk = Identity { serial: serial.into(), ..self.plan.identity() };
        let taken = self.shadow.attach(link, &disk, self.plan.cache, depth, self.now, &mut self.out);
        if is_another {
            self.reached.insert(Reached::AnotherDisk);
            return match taken {
                Err(NotTaken::OtherDisk(Mismatch::Serial)) => self.drain(),
                other => Err(format!("another disk: {other:?}")),
            };
        }
        taken.map_err(|refusal| format!("its own disk: {refusal}"))?;
        self.link = Some(link);
        Ok(())
    }

    /// The driver VM dies, and the shadow hears of it, or of the next one only.
    fn die(&mut self, why: &str) -> Result<(), String> {
        let Some(link) = self.link else { return Ok(()) };
        self.note_deaths();
        let is_heard = self.random.percent(80);
        if is_heard {
            self.shadow.lost(link, &mut self.out);
        }
        self.reset_disk(why);
        if is_heard { Ok(()) } else { self.attach() }
    }

    /// The shadow has given the driver VM up.
    fn died(&mut self, why: &str) -> Result<(), String> {
        self.note_deaths();
        self.reset_disk(why);
        Ok(())
    }

    fn note_deaths(&mut self) {
        let Some(life) = self.link.or(self.last).map(|link| link.generation) else { return };
        let time = self.history.tick();
        let under_way = self.disk.under_way.iter().map(|order| &order.deed);
        for deed in under_way.chain(self.disk.posted.iter().map(|posted| &posted.deed)) {
            self.reasons.push((time, deed.range().map(in_guest), Reason::Death(life)));
        }
        let in_replay = !matches!(self.mode, ModeName::Passive | ModeName::Quiescing);
        self.deaths_in_replay = if in_replay { self.deaths_in_replay + 1 } else { 0 };
        self.reached.extend(in_replay.then_some(Reached::DeathInReplay));
        self.review_orphans();
    }

    fn reset_disk(&mut self, why: &str) {
        self.note(|| format!("death: {why}"));
        if let Some(link) = self.link.take() {
            self.late.extend(self.disk.posted.iter().map(|posted| (link, posted.tag, posted.answer)));
            self.late.extend(self.disk.under_way.iter().map(|order| (link, order.tag, Answer::Done { bytes: 0 })));
        }
        self.lives_on = self.plan.connections_end && self.random.percent(60);
        if self.lives_on {
            self.note(|| "the driver VM lives on".into());
            self.disk.end_session(&mut self.random);
        } else {
            self.disk.reset(self.plan.loss_percent, &mut self.random);
        }
    }

    fn reset_by_guest(&mut self) {
        self.note(|| "reset by the guest".into());
        self.shadow.reset_by_guest();
        if self.random.percent(20) {
            self.plan.guest_flushes = self.random.percent(80);
            self.shadow.set_guest_flushes(self.plan.guest_flushes);
        }
        for request in std::mem::take(&mut self.requests).into_values() {
            if let Wish::Change(id) = request.wish {
                self.history.orphaned(id);
            }
        }
        self.review_orphans();
    }

    fn lose_cache(&mut self) {
        let Some(link) = self.link else { return };
        self.note(|| "the driver resets its controller".into());
        self.disk.lose_cache(self.plan.loss_percent, &mut self.random);
        self.reached.extend((self.shadow.in_flight() > 0).then_some(Reached::VoidAnswer));
        self.shadow.cache_lost(link);
    }

    /// Whether it is the turn of what others do.
    fn comes_from_others(&mut self) -> bool {
        self.plan.others_percent > 0 && self.random.percent(self.plan.others_percent)
    }

    fn flush_by_another(&mut self) {
        let Some(link) = self.link.filter(|_| self.disk.flush_by_another(&mut self.random)) else { return };
        self.note(|| "the flush of another guest fails".into());
        if !is_broken(Rule::OthersFailInSilence) {
            self.reached.insert(Reached::OtherGuest);
            self.shadow.cache_lost(link);
        }
    }

    fn quiesce(&mut self) -> Result<(), String> {
        if self.shadow.is_at_rest() && self.link.is_some() {
            self.note(|| "at rest".into());
            self.reached.insert(Reached::Rest);
            self.check_stable(u64::MAX)?;
            return self.die("planned");
        }
        if self.random.percent(70) {
            self.shadow.quiesce(self.now);
        } else {
            self.shadow.go_on();
        }
        Ok(())
    }

    fn quarantine_or_lie(&mut self) -> Result<(), String> {
        if self.random.percent(30) && !self.plan.is_calm {
            self.note(|| "quarantine".into());
            self.reached.insert(Reached::Quarantine);
            self.note_deaths();
            self.shadow.quarantine(&mut self.out);
            self.reset_disk("quarantine");
            for done in std::mem::take(&mut self.out.done) {
                self.fail_for(&done)?;
            }
            self.history.orphans().into_iter().for_each(|id| self.history.orphan_failed(id));
        } else if let Some(link) = self.link.filter(|_| !self.plan.is_calm) {
            let (tag, answer) = (Tag(self.plan.depth + 1), Answer::Done { bytes: 0 });
            return match self.shadow.answered(link, tag, answer, self.now, &mut self.out) {
                Err(Failure::Violation(_)) => self.died("a lie"),
                other => Err(format!("a lie is believed: {other:?}")),
            };
        }
        Ok(())
    }

    /// A request that a quarantine ended.
    fn fail_for(&mut self, done: &Done) -> Result<(), String> {
        let request = self.requests.remove(&done.token).ok_or_else(|| format!("{done:?} was not asked for"))?;
        match (request.wish, done.status) {
            (Wish::Change(id), Status::Ok) => self.history.acknowledged(id),
            (Wish::Change(id), _) => {
                self.history.failed(id);
                self.undo_where_logged(id);
            }
            _ => {}
        }
        Ok(())
    }

    fn say_late_things(&mut self) -> Result<(), String> {
        if self.late.is_empty() {
            return Ok(());
        }
        let index = self.random.index(self.late.len());
        let (link, tag, answer) = self.late.swap_remove(index);
        self.shadow.lost(link, &mut self.out);
        self.shadow.cache_lost(link);
        let result = self.shadow.answered(link, tag, answer, self.now, &mut self.out);
        result.map_err(|failure| format!("a life that is over is heard: {failure}"))
    }

    /// Takes what was answered to the guest.
    fn drain(&mut self) -> Result<(), String> {
        self.check_lost()?;
        for done in std::mem::take(&mut self.out.done) {
            self.history.tick();
            self.note(|| format!("to the guest: {done:?}"));
            let request = self.requests.remove(&done.token).ok_or_else(|| format!("{done:?} was not asked for"))?;
            match done.status {
                Status::Ok => self.succeeded(request)?,
                _ => self.failed(&request)?,
            }
        }
        Ok(())
    }
}

/// In the guest's sectors.
fn in_guest(range: SectorRange) -> SectorRange {
    SectorRange::between(range.start() - START, range.end() - START).unwrap()
}
