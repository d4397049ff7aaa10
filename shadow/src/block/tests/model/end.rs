//! How a case ends: all goes well from some moment on.

use super::{MS, Reached, Request, Rig, Wish};
use crate::block::range::SectorRange;
use crate::block::tests::disk::Faults;
use crate::block::tests::plan::SECTORS;
use crate::block::{Access, ModeName, Token};

impl Rig {
    /// All goes well from now on: everything is answered, flushed, and there after one more loss.
    pub(super) fn finish(&mut self) -> Result<(), String> {
        self.note(|| "to the end".into());
        self.disk.faults = Faults::default();
        self.plan.is_calm = false;
        self.shadow.go_on();
        self.settle()?;
        self.read_all()?;
        if self.plan.guest_flushes {
            // The first may fail for what was lost.
            self.flush_all()?;
            self.flush_all()?;
            self.check_stable(u64::MAX)?;
            if self.shadow.logged_extents() > 0 || self.shadow.kept_bytes() > 0 {
                return Err("the log is not empty after a flush".into());
            }
        }
        self.plan.loss_percent = 100;
        self.die("the last loss")?;
        self.settle()?;
        self.read_all()
    }

    /// The guest ends, and nothing is asked of anybody any more: what it was told is done becomes stable all the same, whatever goes wrong
    /// meanwhile.
    pub(super) fn end_of_guest(&mut self) -> Result<(), String> {
        self.note(|| "the guest ends".into());
        self.reset_by_guest();
        self.shadow.finish();
        self.reached.extend((self.shadow.logged_extents() > 0).then_some(Reached::EndOfGuest));
        for turn in 0..20_000 {
            if self.shadow.logged_extents() == 0 {
                return self.check_stable(u64::MAX);
            }
            if turn == 300 {
                self.disk.faults = Faults::default();
                self.plan.death_percent = 0;
            }
            self.mode = self.shadow.mode();
            self.now += MS;
            if self.random.percent(self.plan.death_percent) && self.link.is_some() && !self.is_spared() {
                self.die("killed")?;
            }
            self.attach()?;
            self.disk.is_stuck = false;
            self.pump(1)?;
            self.work()?;
            self.deliver()?;
            self.drain()?;
            self.check()?;
        }
        Err(format!("{} extents are kept at the guest's end", self.shadow.logged_extents()))
    }

    /// Until everything is answered.
    pub(super) fn settle(&mut self) -> Result<(), String> {
        for _ in 0..20_000 {
            self.attach()?;
            self.disk.is_stuck = false;
            self.now += MS;
            self.pump(u64::MAX)?;
            self.work()?;
            self.deliver()?;
            self.drain()?;
            if self.requests.is_empty() && self.shadow.mode() == ModeName::Passive && self.shadow.in_flight() == 0 {
                return self.check();
            }
        }
        Err(format!("stuck: {:?}, mode {:?}", self.requests, self.shadow.mode()))
    }

    pub(super) fn flush_all(&mut self) -> Result<(), String> {
        let token = Token(self.next_token);
        self.next_token += 1;
        let begin = self.history.tick();
        self.requests.insert(token, Request { wish: Wish::Flush, begin, fetched: vec![] });
        self.shadow.flush(token, &mut self.out);
        self.settle()
    }

    pub(super) fn read_all(&mut self) -> Result<(), String> {
        for sector in (0..SECTORS).step_by(8) {
            let range = SectorRange::new(sector, 8).unwrap();
            let token = Token(self.next_token);
            self.next_token += 1;
            let wish = Wish::Read { range, values: vec![None; 8] };
            let begin = self.history.tick();
            self.requests.insert(token, Request { wish, begin, fetched: vec![] });
            self.shadow.submit(token, Access::Read, range, &mut self.out);
            self.settle()?;
        }
        Ok(())
    }
}
