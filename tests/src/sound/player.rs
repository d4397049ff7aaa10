//! The player in the guest: started, watched and asked how it ended, through the guest's exec server.

use std::time::{Duration, Instant};

use crate::assets::PIECES_INSIDE;
use crate::bench::patience::{Stall, scaled, whole_factor};
use crate::demo::DemoError;
use crate::demo::place::Place;

/// Longest time for a single step on an emulated machine.
const STEP: Duration = Duration::from_secs(60);
/// Longest time in which the streams of a player that is waited for may stand still.
const STILL: Duration = Duration::from_secs(60);
/// The player of a sound server, whose stream goes on when the player hangs.
const SERVED: &str = "paplay";
/// Longest time that it may take in all, as may a player that is fed no more.
const LONGEST: Duration = Duration::from_secs(300);
/// How often a player is asked whether it has ended: each question costs the emulated machine time.
const PAUSE: Duration = Duration::from_millis(500);

/// What the guest's kernel tells of its playback stream.
const STATUS: &str = "/proc/asound/card0/pcm0p/sub0/status";
/// The same of its recording stream.
const STATUS_CAPTURE: &str = "/proc/asound/card0/pcm0c/sub0/status";
/// What its player has set.
const HW_PARAMS: &str = "/proc/asound/card0/pcm0p/sub0/hw_params";

/// Longest buffer that a player gets, s: what the guest's driver, and Umbra, take at most is 4 MiB.
const LONGEST_BUFFER_S: u32 = 8;

/// Seconds that a player's buffer lasts: one on the reference machine, more on slower ones, which stand still for longer.
fn buffer_s() -> u32 {
    whole_factor().clamp(1, LONGEST_BUFFER_S)
}

/// mpg123's option for an emulated machine: its buffer of 200 ms, the default, runs out where the machine stands still for
/// as long, as while two driver VMs boot at once or QEMU throws its translated code away; the guest's kernel then reports
/// `EIO`.
pub fn patient() -> String {
    format!("--devbuffer {}", buffer_s())
}

/// The same for speaker-test, which takes a third of a second by itself.
pub fn patient_tone() -> String {
    format!("--buffer {}", 1_000_000 * buffer_s())
}

/// The same for arecord.
pub fn patient_recorder() -> String {
    format!("--buffer-time={}", 1_000_000 * buffer_s())
}

/// What lets the guest's kernel have such a buffer: 480 ms of the largest samples are 1.04 s of a CD's.
pub fn patient_kernel() -> String {
    format!("virtio_snd.pcm_buffer_ms={}", 480 * buffer_s())
}

/// The pipe through which a song in pieces is fed.
const PIPE: &str = "/tmp/song.pipe";
/// Where the feeder notes how many pieces it has fed.
const FED: &str = "/tmp/song.fed";
/// The feeder ends with its piece when this is there.
const ENOUGH: &str = "/tmp/song.enough";

/// How a player ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// Its exit status.
    pub status: i32,
    /// Everything it said.
    pub said: String,
}

/// A program in a guest that plays or records.
#[derive(Clone, Debug)]
pub struct Player {
    guest: String,
    name: &'static str,
}

impl Player {
    /// Starts mpg123 with `options` on the song and waits until the card's position moves.
    ///
    /// # Errors
    /// It does not play.
    pub fn start(place: &mut Place, guest: &str, options: &str) -> Result<Self, DemoError> {
        Self::start_with(place, guest, &format!("mpg123 -q {options} /song.mp3"))
    }

    /// Starts mpg123 with `options` on a song in pieces, which goes on until [`Self::finish`], and waits until the card's position
    /// moves.
    ///
    /// # Errors
    /// It does not play.
    pub fn start_fed(place: &mut Place, guest: &str, options: &str) -> Result<Self, DemoError> {
        // The pipe is opened behind the other redirections: until the player reads, that waits.
        let feed = format!(
            "rm -f {FED} {ENOUGH} {PIPE}; mkfifo {PIPE}; (exec >{PIPE}; n=0; while :; do for piece in {PIECES_INSIDE}/*; do \
             cat $piece || exit; n=$((n+1)); echo $n >{FED}; [ ! -e {ENOUGH} ] || exit; done; done) </dev/null >/dev/null 2>&1 &"
        );
        place.in_guest(guest, &feed, STEP)?;
        Self::start_with(place, guest, &format!("mpg123 -q {options} - <{PIPE}"))
    }

    fn start_with(place: &mut Place, guest: &str, command: &str) -> Result<Self, DemoError> {
        let player = Self::run(place, guest, "mpg123", command)?;
        if let Err(error) = place.in_guest(guest, &format!("await 30 grep -q RUNNING {STATUS}"), STEP) {
            let said = place.in_guest(guest, "cat /tmp/mpg123.said /proc/asound/cards; dmesg | tail -n 5", STEP);
            return Err(DemoError::Umbra { what: format!("the player does not play: {error}"), said: said? });
        }
        Ok(player)
    }

    /// Starts any command, `name` for short.
    ///
    /// # Errors
    /// The guest does not answer.
    pub fn run(place: &mut Place, guest: &str, name: &'static str, command: &str) -> Result<Self, DemoError> {
        let script = format!(
            "rm -f /tmp/{name}.*; ({command} >/tmp/{name}.said 2>&1; echo $? >/tmp/{name}.status) </dev/null >/dev/null 2>&1 &"
        );
        place.in_guest(guest, &script, STEP)?;
        Ok(Self { guest: guest.into(), name })
    }

    /// Frames of a period, while it plays. Linux's virtio_snd hands over whole periods only (`virtsnd_pcm_msg_send`): what is
    /// behind the last one of a song never leaves the guest.
    ///
    /// # Errors
    /// The guest does not answer, or nothing plays.
    pub fn period(&self, place: &mut Place) -> Result<usize, DemoError> {
        let said = place.in_guest(&self.guest, &format!("sed -n 's/^period_size: //p' {HW_PARAMS}"), STEP)?;
        let none = |_| DemoError::Umbra { what: "the player has set no period".into(), said: said.clone() };
        said.trim().parse().map_err(none)
    }

    /// How it ended, if it has.
    ///
    /// # Errors
    /// The guest does not answer.
    pub fn ended(&self, place: &mut Place) -> Result<Option<Ended>, DemoError> {
        let script = format!("cat /tmp/{0}.status 2>/dev/null && cat /tmp/{0}.said || true", self.name);
        let text = place.in_guest(&self.guest, &script, STEP)?;
        let Some((status, said)) = text.split_once('\n') else { return Ok(None) };
        Ok(Some(Ended { status: status.trim().parse().unwrap_or(i32::MAX), said: said.to_owned() }))
    }

    /// It is under way, and its stream runs: asked for a moment, since a stream that was stopped is started again.
    ///
    /// # Errors
    /// It has ended, or its stream does not run; with all that the guest knows of it.
    pub fn plays(&self, place: &mut Place) -> Result<(), DemoError> {
        let script = format!(
            "plays() {{ [ -e /tmp/{0}.status ] || grep -q RUNNING {STATUS}; }}; \
             n=0; while ! plays; do n=$((n+1)); [ $n -lt $((20 * ${{UMBRA_PATIENCE:-1}})) ] || exit 1; usleep 100000; done; \
                 [ ! -e /tmp/{0}.status ]",
            self.name
        );
        let Err(error) = place.in_guest(&self.guest, &script, STEP) else { return Ok(()) };
        let about = format!("grep . /tmp/{0}.*; head -n 20 {STATUS}; ps; dmesg | tail -n 20", self.name);
        let said = place.in_guest(&self.guest, &about, STEP).unwrap_or_else(|e| format!("{error}\n{e}"));
        Err(DemoError::Player { name: self.name, said })
    }

    /// Ends a song in pieces with the piece that is being fed, and waits for the player's end: how it ended, and how many pieces it
    /// was fed.
    ///
    /// # Errors
    /// As [`Self::wait`].
    pub fn finish(&self, place: &mut Place) -> Result<(Ended, usize), DemoError> {
        place.in_guest(&self.guest, &format!(": >{ENOUGH}"), STEP)?;
        let ended = self.wait_for(place, Some(LONGEST))?;
        let said = place.in_guest(&self.guest, &format!("cat {FED}"), STEP)?;
        let none = |_| DemoError::Umbra { what: "the player was fed nothing".into(), said: said.clone() };
        Ok((ended, said.trim().parse().map_err(none)?))
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// It does not end: its stream moves no more, or has moved for too long.
    pub fn wait(&self, place: &mut Place) -> Result<Ended, DemoError> {
        self.wait_for(place, (self.name == SERVED).then_some(LONGEST))
    }

    fn wait_for(&self, place: &mut Place, longest: Option<Duration>) -> Result<Ended, DemoError> {
        let (mut stall, start) = (Stall::new(STILL), Instant::now());
        loop {
            if let Some(ended) = self.ended(place)? {
                return Ok(ended);
            }
            let state =
                place.in_guest(&self.guest, &format!("cat {STATUS} {STATUS_CAPTURE} 2>/dev/null || true"), STEP)?;
            let position = |line: &&str| line.starts_with("hw_ptr");
            let still = stall.is_over(state.lines().filter(position).map(str::to_owned).collect::<Vec<_>>());
            let too_long = longest.is_some_and(|longest| start.elapsed() > scaled(longest));
            if still || too_long {
                let said = place.in_guest(&self.guest, "dmesg | tail -n 5", STEP)?;
                let what = format!("{} in the guest does not end", self.name);
                return Err(DemoError::Still { what, limit: stall.limit(), said: state + &said });
            }
            std::thread::sleep(PAUSE);
        }
    }
}
