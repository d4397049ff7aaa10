//! fio in a guest: passes over a part of its disk with requests of all sizes, each with a checksum and a header of its own, which are read
//! again and compared at the end of each pass.

use std::time::Duration;

use serde::Deserialize;

use super::{STEP, requests};
use crate::bench::patience::Stall;
use crate::demo::DemoError;
use crate::demo::place::Place;
use crate::probe::disk::Found;

/// The file in the guest that ends it.
const OVER: &str = "/tmp/fio-over";
/// Files of the guest: the passes' results, what fio said, its status when it has ended.
const PRINTED: &str = "/tmp/fio-printed";
const SAID: &str = "/tmp/fio-said";
const STATUS: &str = "/tmp/fio-status";
/// Interval of looks at them.
const LOOK: Duration = Duration::from_millis(500);
/// Longest time without a request to the disk, as on the reference machine.
const SILENCE: Duration = Duration::from_secs(120);
/// How a line begins with which fio says that something is not what it wrote.
const WRONG: &str = "verify: ";
/// The same, of a block whose header is right.
const WRONG_CONTENT: &str = ": verify failed at ";

/// Passes until there is a file `$OVER`. What a pass writes is laid out anew, as its number has it; no block is written twice in a pass, so
/// that the order of requests in flight does not matter.
const PASSES: &str = r#"
pass=0
while [ ! -e $OVER ]; do
  pass=$((pass + 1))
  fio --name=pass --filename=$DISK --thread --ioengine=libaio --direct=1 --iodepth=8 --rw=randrw --rwmixread=30 --bsrange=512-1M \
    --size=48M --fsync=32 --verify=crc32c --randseed=$pass --output-format=json || exit 1
done
"#;

/// fio at work.
pub struct Fio {
    guest: String,
}

impl Fio {
    /// Starts it on `disk` of the guest.
    ///
    /// # Errors
    /// The guest does not answer.
    pub fn start(place: &mut Place, guest: &str, disk: &str) -> Result<Self, DemoError> {
        let script = format!(
            "rm -f {OVER} {STATUS}; ( ( OVER={OVER}; DISK={disk}; {PASSES} ) </dev/null >{PRINTED} 2>{SAID}; echo $? >{STATUS} ) \
             </dev/null >/dev/null 2>&1 & echo"
        );
        place.in_guest(guest, &script, STEP)?;
        Ok(Self { guest: guest.into() })
    }

    /// Waits until the disk has served so many requests more; whether it still runs.
    ///
    /// # Errors
    /// The disk gets no requests, or the guest does not answer.
    pub fn await_more(&self, place: &mut Place, more: u64) -> Result<bool, DemoError> {
        let mut now = requests(place, &self.guest)?;
        let wanted = now + more;
        let mut stall = Stall::new(SILENCE);
        while now < wanted {
            if self.status(place)?.is_some() {
                return Ok(false);
            }
            if stall.is_over(now) {
                return Err(DemoError::Umbra { what: "fio gets nowhere".into(), said: place.tail() });
            }
            std::thread::sleep(LOOK);
            now = requests(place, &self.guest)?;
        }
        Ok(true)
    }

    fn status(&self, place: &mut Place) -> Result<Option<i32>, DemoError> {
        let said = place.in_guest(&self.guest, &format!("[ -e {STATUS} ] && cat {STATUS} || echo"), STEP)?;
        Ok(said.trim().parse().ok())
    }

    /// Ends it after the pass that is under way; what it found.
    ///
    /// # Errors
    /// It does not end.
    pub fn finish(self, place: &mut Place) -> Result<Found, DemoError> {
        place.in_guest(&self.guest, &format!("touch {OVER}"), STEP)?;
        let mut stall = Stall::new(SILENCE);
        while !stall.is_over(requests(place, &self.guest)?) {
            if let Some(status) = self.status(place)? {
                let mut read = |file| place.in_guest(&self.guest, &format!("cat {file}"), STEP);
                return Ok(judge(&read(PRINTED)?, &read(SAID)?, status));
            }
            std::thread::sleep(LOOK);
        }
        Err(DemoError::Umbra { what: "fio does not end".into(), said: place.tail() })
    }
}

/// A pass's result, as far as it is of interest.
#[derive(Deserialize)]
struct Pass {
    jobs: Vec<Job>,
}

#[derive(Deserialize)]
struct Job {
    error: i32,
    read: Side,
    write: Side,
    sync: Side,
}

#[derive(Deserialize)]
struct Side {
    total_ios: u64,
    /// None for flushes, which have no time of their own here.
    #[serde(default)]
    clat_ns: Option<Latency>,
}

#[derive(Deserialize)]
struct Latency {
    max: f64,
}

/// What a finished run left: the results of its passes, what it said, its status.
fn judge(printed: &str, said: &str, status: i32) -> Found {
    let mut found = Found::default();
    // Notes of its own stand between the results.
    let results: Vec<&str> = printed.lines().filter(|line| !line.starts_with("fio: ")).collect();
    for pass in serde_json::Deserializer::from_str(&results.join("\n")).into_iter::<Pass>() {
        let Ok(pass) = pass else {
            found.io_errors += 1;
            found.what.push("a result cannot be read".into());
            break;
        };
        for job in &pass.jobs {
            found.writes += job.write.total_ios;
            found.reads += job.read.total_ios;
            found.flushes += job.sync.total_ios;
            found.io_errors += u64::from(job.error != 0);
            let longest = [&job.read, &job.write].into_iter().filter_map(|side| side.clat_ns.as_ref());
            found.longest_ms = longest.map(|latency| latency.max / 1e6).fold(found.longest_ms, f64::max);
        }
    }
    let wrong: Vec<&str> =
        said.lines().filter(|line| line.starts_with(WRONG) || line.contains(WRONG_CONTENT)).collect();
    found.wrong = wrong.len() as u64;
    if status != 0 {
        found.io_errors = found.io_errors.max(1);
        let last = said.lines().last().unwrap_or("it said nothing");
        found.what.push(format!("status {status}: {}", wrong.first().unwrap_or(&last)));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASS: &str = r#"{
      "fio version": "fio-3.33",
      "jobs": [{
        "jobname": "pass", "error": 0,
        "read": {"total_ios": 30, "clat_ns": {"min": 1, "max": 4000000}},
        "write": {"total_ios": 12, "clat_ns": {"min": 1, "max": 900000000}},
        "sync": {"total_ios": 1}
      }]
    }"#;

    #[test]
    fn passes_add_up() {
        let found = judge(&format!("{PASS}\nfio: a note\n{PASS}\n"), "", 0);
        let wanted = Found { writes: 24, reads: 60, flushes: 2, longest_ms: 900.0, ..Found::default() };
        assert!(found == wanted && found.is_sound(), "{found:?}");
    }

    #[test]
    fn what_is_not_what_was_written_is_wrong() {
        let failed = PASS.replace("\"error\": 0", "\"error\": 84");
        let said = "crc32c: verify failed at file /dev/vda offset 512, length 1024 (requested block: offset=0, length=8, flags=88)\n\
                    verify: bad magic header 0, wanted acca at file /dev/vda offset 4096, length 512\nfio: pid=0, err=84\n";
        let found = judge(&failed, said, 1);
        assert!(found.wrong == 2 && found.io_errors == 1 && !found.is_sound(), "{found:?}");
        assert!(found.what[0].contains("verify failed"), "{found:?}");
        assert!(!judge("", "fio: engine libaio not loadable\n", 1).is_sound());
        assert!(!judge("{", "", 0).is_sound());
    }
}
