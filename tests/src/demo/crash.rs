//! The crashes of a demonstration: which kind comes when, and what is seen of each.
//!
//! With 20 or more, one hits the replay of the crash before it, and two are `kill -9`; from 40 on, failures of all kinds
//! take turns, on the sound card too. A crash is issued when the
//! download is half way through its share of the file, which waits at the share's end until the guest is served again.
//! Before the next one the download trickles on until a standby is ready, as it mostly is when a driver crashes; or for a time that was
//! asked for, whatever is ready then.

use std::time::{Duration, Instant};

use super::error::During;
use super::machine::{DISK_DRIVER, NIC_DRIVER, SOUND_DRIVER};
use super::result::{CrashResult, span};
use super::sound::SoundCrash;
use super::{Demo, DemoError, GUEST, RECOVERY_LIMIT, STEP, outage};
use crate::bench::patience::Stall;
use crate::peer::{Content, Tick, now_us};
use crate::probe::client::Run;

/// How a driver VM is made to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// `umbra crash`: a real panic.
    Panic,
    /// `kill -9` of its process.
    Kill,
    /// A panic, and `kill -9` of the next life while it gets the logged frames.
    InReplay,
    /// `SIGSTOP` of its process.
    Stop,
    /// The agent hangs.
    AgentHang,
    /// Real-time tasks take every CPU.
    Spin,
    /// Every vCPU spins with interrupts off.
    LockUp,
    /// All memory is taken.
    OutOfMemory,
    /// Frames or samples are taken no more.
    Stall,
    /// A reboot without a panic.
    Reboot,
    /// The driver lets go of its device.
    Unbind,
    /// A planned restart, which is no failure.
    Restart,
}

impl Kind {
    /// For the transcript.
    pub fn describe(self) -> &'static str {
        match self {
            Self::Panic => "kernel panic in the driver VM",
            Self::Kill => "kill -9 of the driver VM's process",
            Self::InReplay => "kill -9 while the log is being replayed",
            Self::Stop => "SIGSTOP of the driver VM's process",
            Self::AgentHang => "the driver VM's agent hangs",
            Self::Spin => "real-time tasks take every CPU of the driver VM",
            Self::LockUp => "every vCPU of the driver VM spins with interrupts off",
            Self::OutOfMemory => "all memory of the driver VM is taken",
            Self::Stall => "the driver VM lives and takes nothing more",
            Self::Reboot => "the driver VM reboots by itself",
            Self::Unbind => "the driver lets go of its device",
            Self::Restart => "a planned restart",
        }
    }

    /// Makes `driver`, whose process is `pid`, fail.
    pub fn command(self, driver: &str, pid: u64) -> String {
        match self {
            Self::Panic | Self::InReplay => format!("umbra crash {driver}"),
            Self::Kill => format!("kill -9 {pid}"),
            Self::Stop => format!("kill -STOP {pid}"),
            Self::AgentHang => format!("umbra crash {driver} --kind agent-hang"),
            Self::Spin => format!("umbra crash {driver} --kind spin"),
            Self::LockUp => format!("umbra crash {driver} --kind lock-up"),
            Self::OutOfMemory => format!("umbra crash {driver} --kind out-of-memory"),
            Self::Stall => format!("umbra crash {driver} --kind stall"),
            Self::Reboot => format!("umbra crash {driver} --kind reboot"),
            Self::Unbind => format!("umbra crash {driver} --kind unbind"),
            // It returns when the next life serves.
            Self::Restart => format!("umbra restart {driver} </dev/null >/dev/null 2>&1 & echo"),
        }
    }
}

/// What the download gets every 20 ms while a standby boots, bytes.
const TRICKLE: u64 = 2 << 10;

/// Shares are whole blocks: the server hands out multiples of 8 bytes but for the file's end.
const BLOCK: u64 = 4096;

/// From this many crashes on there are other kinds than panics.
const MIXED_FROM: u32 = 20;
/// From this many on, these take turns.
const ALL_FROM: u32 = 40;
const ALL: [Kind; 9] = [
    Kind::Panic,
    Kind::Kill,
    Kind::Stop,
    Kind::Stall,
    Kind::Spin,
    Kind::LockUp,
    Kind::Reboot,
    Kind::OutOfMemory,
    Kind::AgentHang,
];

/// The kinds in order.
#[derive(Clone, Debug)]
pub(super) struct Crashes(Vec<Kind>);

impl Crashes {
    /// `count` crashes; one [`Kind::InReplay`] counts as two.
    pub(super) fn plan(count: u32) -> Self {
        let mut kinds = vec![Kind::Panic; count as usize];
        if count >= ALL_FROM {
            kinds = ALL.into_iter().cycle().take(count as usize).collect();
        }
        if count >= MIXED_FROM {
            kinds.pop();
            kinds[4] = Kind::Kill;
            kinds[9] = Kind::InReplay;
            kinds[14] = Kind::Kill;
        }
        Self(kinds)
    }

    /// How the sound card's driver VM fails before crash `index`: out of step with the NIC's.
    fn of_sound(&self, index: usize) -> Kind {
        if self.0.len() + 1 >= ALL_FROM as usize { ALL[(index + 3) % ALL.len()] } else { Kind::Panic }
    }

    /// From which crash of the NIC on one of the sound card alone goes before it: with the one together, `count` in all.
    fn quiet_until(&self, count: u32) -> usize {
        (self.0.len() + 1).saturating_sub(count as usize)
    }

    /// The last crash of the NIC is one of the sound card's as well, where there is one.
    fn is_together(&self, index: usize, sound: bool) -> bool {
        sound && index + 1 == self.0.len() && self.0[index] != Kind::InReplay
    }

    /// How the NIC's driver VM fails in crash `index`.
    fn kind(&self, index: usize, sound: bool) -> Kind {
        if self.is_together(index, sound) { Kind::Panic } else { self.0[index] }
    }

    /// So many halves of a crash's share of the file, bytes.
    fn share(&self, halves: u64, bytes: u64) -> u64 {
        // In 128 bits: the product does not fit otherwise.
        let all = 2 * (self.0.len() as u128 + 1);
        let share = u64::try_from(u128::from(bytes) * u128::from(halves) / all).unwrap_or(bytes);
        share / BLOCK * BLOCK
    }

    /// How far the download may go before crash `index` is survived.
    pub(super) fn allowance(&self, index: usize, bytes: u64) -> u64 {
        self.share(2 * (index as u64 + 1), bytes)
    }

    /// How far it has to be before crash `index`.
    fn threshold(&self, index: usize, bytes: u64) -> u64 {
        self.share(2 * index as u64 + 1, bytes)
    }
}

/// Issues all crashes and watches the recoveries.
pub(super) fn run(
    demo: &mut Demo<'_>,
    plan: &Crashes,
    content: Content,
    get: &mut Run,
) -> Result<Vec<CrashResult>, DemoError> {
    let mut ticks = Vec::new();
    let mut results = Vec::new();
    for index in 0..plan.0.len() {
        let number = results.len() + 1;
        let (kind, total) = (plan.kind(index, demo.sound.is_some()), demo.spec.crashes);
        let pace = ready(demo, plan, index, &mut ticks, (content, &mut *get));
        pace.during(|| format!("before crash {number} of {total}"))?;
        demo.tell(&format!("crash {number} of {total}: {}", kind.describe()));
        let crash = one(demo, plan, index, &mut ticks, (content, &mut *get));
        results.extend(crash.during(|| format!("at crash {number} of {total} ({})", kind.describe()))?);
    }
    Ok(results)
}

/// Waits for the standbys, crashes the sound card alone where the plan says so, and waits until the download is where it is to be
/// hit.
fn ready(
    demo: &mut Demo<'_>,
    plan: &Crashes,
    index: usize,
    ticks: &mut Vec<Tick>,
    (content, get): (Content, &mut Run),
) -> Result<(), DemoError> {
    let before = index.checked_sub(1).map_or(0, |before| plan.allowance(before, content.bytes));
    let mut pace = Pace { at: before, most: plan.threshold(index, content.bytes) };
    await_next(demo, &mut pace, get)?;
    if demo.sound.is_some() && index >= plan.quiet_until(demo.spec.crashes) {
        sound_alone(demo, plan.of_sound(index)).during(|| "in a crash of the sound card alone".into())?;
        check_player(demo, ticks)?;
        await_next(demo, &mut pace, get)?;
        check_player(demo, ticks)?;
    }
    demo.place.peer().allow(plan.allowance(index, content.bytes))?;
    reach(demo, plan.threshold(index, content.bytes), get, ticks)
}

/// Crash number `index` of the NIC's driver VM and what was seen of it; two results where it was two crashes.
fn one(
    demo: &mut Demo<'_>,
    plan: &Crashes,
    index: usize,
    ticks: &mut Vec<Tick>,
    (content, get): (Content, &mut Run),
) -> Result<Vec<CrashResult>, DemoError> {
    let kind = plan.kind(index, demo.sound.is_some());
    let begin_us = now_us();
    let seen = demo.machine.seen.len();
    demo.place.peer().mark_stall()?;
    let together = plan.is_together(index, demo.sound.is_some());
    let lives = if together { both(demo)? } else { issue(demo, kind)? };
    reach(demo, plan.allowance(index, content.bytes), get, ticks)?;
    await_tick(demo, ticks)?;
    let stall = demo.place.peer().progress()?.longest_stall_ms;
    let gap = outage::longest(ticks, demo.guest, begin_us.saturating_sub(500_000), now_us());
    demo.machine.drain();
    let result = CrashResult::new(kind, gap, stall, &demo.machine.seen[seen..]);
    for line in result.lines() {
        demo.tell(&line);
    }
    check_player(demo, ticks)?;
    if !together && index < demo.spec.crashes as usize {
        demo.disk_alone().during(|| "in a crash of the disk's controller alone".into())?;
    }
    let second = (lives > 1).then(CrashResult::second_of_pair);
    Ok(std::iter::once(result).chain(second).collect())
}

/// Waits for the guest's next tick, so that the gap behind the last one is over: a download that was ahead is no sign of that.
fn await_tick(demo: &mut Demo<'_>, ticks: &mut Vec<Tick>) -> Result<(), DemoError> {
    let (mut stall, since) = (Stall::new(RECOVERY_LIMIT), now_us());
    while !stall.is_over(demo.machine.seen.len()) {
        demo.machine.drain();
        ticks.extend(demo.place.peer().take_ticks()?);
        if ticks.last().is_some_and(|tick| tick.arrived_us > since) {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Err(DemoError::Umbra { what: "the guest's ticks arrive no more".into(), said: demo.machine.said() })
}

/// The player, if there is one, plays on; where it does not, says what Umbra told and for how long the guest itself stood still
/// at most.
fn check_player(demo: &mut Demo<'_>, ticks: &mut Vec<Tick>) -> Result<(), DemoError> {
    let Some(player) = &demo.player else { return Ok(()) };
    let Err(error) = player.plays(&mut demo.place) else { return Ok(()) };
    ticks.extend(demo.place.peer().take_ticks()?);
    if let Some(still) = outage::longest_standstill(ticks, demo.guest) {
        let ago = now_us().saturating_sub(still.arrived_us) / 1000;
        demo.tell(&format!("the guest itself stood still for {} at most, {ago} ms ago", span(still.ms)));
    }
    Err(error.with(&demo.machine.said()))
}

/// How far the download may trickle on, bytes.
struct Pace {
    at: u64,
    most: u64,
}

/// Waits until the next failure may come: until standbys are ready, or for the time that was asked for.
fn await_next(demo: &mut Demo<'_>, pace: &mut Pace, get: &mut Run) -> Result<(), DemoError> {
    let Some(pause) = demo.spec.pause else { return await_standbys(demo, pace, get) };
    let start = Instant::now();
    while start.elapsed() < pause {
        if get.poll(Duration::from_millis(20)).map_err(DemoError::Exec)? {
            return Err(demo.download_failed("the download ended before the next failure", get));
        }
        demo.machine.drain();
        pace.at = (pace.at + TRICKLE).min(pace.most);
        demo.place.peer().allow(pace.at)?;
    }
    Ok(())
}

/// Waits until each driver VM has a standby again; says how long they booted.
fn await_standbys(demo: &mut Demo<'_>, pace: &mut Pace, get: &mut Run) -> Result<(), DemoError> {
    let mut stall = Stall::new(RECOVERY_LIMIT);
    let others = [demo.sound.as_ref().map(|_| SOUND_DRIVER), demo.disk.as_ref().map(|_| DISK_DRIVER)];
    let drivers: Vec<_> = std::iter::once(NIC_DRIVER).chain(others.into_iter().flatten()).collect();
    loop {
        let ready: Option<Vec<f64>> = drivers.iter().map(|driver| demo.machine.standby_ready(driver)).collect();
        if let Some(boots) = ready {
            let boots: Vec<_> = boots.into_iter().map(span).collect();
            demo.tell(&format!("the next driver VM stands by, booted in {}", boots.join(" and ")));
            return Ok(());
        }
        if get.poll(Duration::from_millis(20)).map_err(DemoError::Exec)? {
            return Err(demo.download_failed("the download ended before the next driver VM stood by", get));
        }
        // The boot of a standby tells nothing but its end: its limit is a whole one, not that of a single event.
        if stall.is_over(demo.machine.seen.len()) {
            let what = "the next driver VM does not come up".to_owned();
            return Err(DemoError::Still { what, limit: stall.limit(), said: demo.machine.said() });
        }
        pace.at = (pace.at + TRICKLE).min(pace.most);
        demo.place.peer().allow(pace.at)?;
    }
}

/// Waits until the guest has acknowledged `bytes` of the download, collecting ticks.
fn reach(demo: &mut Demo<'_>, bytes: u64, get: &mut Run, ticks: &mut Vec<Tick>) -> Result<(), DemoError> {
    let mut stall = Stall::new(RECOVERY_LIMIT);
    loop {
        ticks.extend(demo.place.peer().take_ticks()?);
        let reached = demo.place.peer().progress()?.acknowledged;
        if reached >= bytes {
            return Ok(());
        }
        if get.poll(Duration::from_millis(20)).map_err(DemoError::Exec)? {
            return Err(demo.download_failed("the download ended early", get));
        }
        demo.machine.drain();
        if stall.is_over((reached, demo.machine.seen.len())) {
            return Err(demo.download_failed("the download does not go on", get));
        }
    }
}

fn fail(demo: &mut Demo<'_>, driver: &str, kind: Kind) -> Result<(), DemoError> {
    let pid = demo.machine.driver_pid(&mut demo.place, driver)?;
    demo.place.expect(&kind.command(driver, pid), STEP).map(drop)
}

/// Crashes the driver VM and waits until the next life is live; how many lives it cost.
fn issue(demo: &mut Demo<'_>, kind: Kind) -> Result<u32, DemoError> {
    if kind == Kind::InReplay {
        return in_replay(demo);
    }
    fail(demo, NIC_DRIVER, kind)?;
    demo.machine.await_live(NIC_DRIVER, RECOVERY_LIMIT)?;
    Ok(1)
}

/// Panics both driver VMs at once.
fn both(demo: &mut Demo<'_>) -> Result<u32, DemoError> {
    let mut drivers = vec![NIC_DRIVER, SOUND_DRIVER];
    let (words, disk) = match &demo.disk {
        Some(_) => ("  and of the sound card's and the disk controller's driver VMs, at the same moment", DISK_DRIVER),
        None => ("  and of the sound card's driver VM, at the same moment", ""),
    };
    demo.tell(words);
    drivers.extend(demo.disk.is_some().then_some(disk));
    let crashes: String = drivers.iter().map(|driver| format!("umbra crash {driver} & ")).collect();
    demo.place.expect(&format!("{crashes} wait"), STEP)?;
    demo.lose_with_others()?;
    for event in demo.machine.await_lives(&drivers, RECOVERY_LIMIT)? {
        demo.note_disk(&event, true);
        if event.text("driver") == SOUND_DRIVER {
            demo.sound_crashes.push(SoundCrash::new(&event, true));
        }
    }
    Ok(1)
}

/// Crashes the sound card's driver VM, while the download is not disturbed.
fn sound_alone(demo: &mut Demo<'_>, kind: Kind) -> Result<(), DemoError> {
    demo.tell(&format!("the sound card, in mid-song: {}", kind.describe()));
    fail(demo, SOUND_DRIVER, kind)?;
    let event = demo.machine.await_live(SOUND_DRIVER, RECOVERY_LIMIT)?;
    let crash = SoundCrash::new(&event, false);
    demo.tell(&crash.line());
    demo.sound_crashes.push(crash);
    Ok(())
}

/// A panic, then `kill -9` of the next life as soon as its link is up: the supervisor then has the log replayed. A watcher
/// in the place does it, which is quicker than this process could be.
fn in_replay(demo: &mut Demo<'_>) -> Result<u32, DemoError> {
    let events = format!("{}/events.jsonl", demo.place.share_inside());
    let mut watcher = demo.place.start(&format!("umbra-probe kill-at carrier {events}"))?;
    demo.place.expect("umbra crash nic0", STEP)?;
    let live = |demo: &mut Demo<'_>| demo.machine.await_live(NIC_DRIVER, RECOVERY_LIMIT);
    let first = live(demo)?;
    demo.place.await_end(&mut watcher, STEP, |_| Ok(()))?;
    let killed: u32 = watcher.output().stdout.trim().parse().unwrap_or(0);
    if killed == 0 {
        let said = format!("{}{}", watcher.output().stdout, watcher.output().stderr);
        return Err(DemoError::Umbra { what: "the watcher of the replay killed nothing".into(), said });
    }
    if first.generation == killed {
        demo.tell(&format!(
            "{GUEST} was served again before the blow fell; it counts as a kill -9 right after the replay"
        ));
        live(demo)?;
    }
    Ok(2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn twenty_crashes_have_one_in_replay_and_two_kills() {
        let plan = Crashes::plan(20);
        let count = |kind| plan.0.iter().filter(|&&k| k == kind).count();
        assert_eq!((count(Kind::Kill), count(Kind::InReplay)), (2, 1));
        // The one in replay is two crashes.
        assert_eq!(plan.0.len() + 1, 20);
        assert_eq!(Crashes::plan(3).0, [Kind::Panic; 3]);
    }

    #[test]
    fn the_card_fails_as_often_as_the_nic() {
        for count in [1, 3, 19, 20, 50] {
            let plan = Crashes::plan(count);
            let alone = plan.0.len() - plan.quiet_until(count);
            assert_eq!(alone + 1, count as usize, "one is together with the NIC's last");
        }
    }

    #[test]
    fn a_crash_comes_before_its_share_is_used_up() {
        let plan = Crashes::plan(3);
        let bytes = 64 << 20;
        for index in 0..3 {
            assert!(plan.threshold(index, bytes) < plan.allowance(index, bytes));
            assert!(plan.allowance(index, bytes) <= plan.threshold(index + 1, bytes));
        }
        assert!(plan.allowance(2, bytes) < bytes);
    }
}
