//! SQLite in a guest: it commits rows until it is told to end, and prints the number of each row that was committed.

use std::time::Duration;

use super::STEP;
use crate::demo::DemoError;
use crate::demo::place::Place;
use crate::probe::client::Run;

/// The file in the guest that ends it.
const OVER: &str = "/tmp/database-over";
/// Longest time without a row, as on the reference machine.
const SILENCE: Duration = Duration::from_secs(120);

/// Commits until `$OVER` is there, then reads everything from the disk again: the check, and how many rows there are. Long rows, so that
/// few of them wait in the pipe when the time is over.
const COMMIT: &str = r#"
modprobe crc32c_generic; /sbin/mke2fs -q -t ext4 $DISK && mkdir -p /mnt && mount -t ext4 $DISK /mnt && cd /mnt || exit 1
sqlite3 db "pragma journal_mode=$JOURNAL; create table t(id integer primary key, content text);" >&2 || exit 1
row=$(head -c 400 /dev/zero | tr '\0' x); id=0
while [ ! -e $OVER ]; do id=$((id + 1)); echo "insert into t values($id, '$row'); select $id;"; done |
  (echo 'pragma synchronous=full;'; cat) | sqlite3 -batch -bail db || exit 1
cd / && umount /mnt && mount -t ext4 $DISK /mnt && cd /mnt || exit 1
sqlite3 db "pragma integrity_check; select count(*) from t;"
"#;

/// What there is after a power cut: the check, and how many rows up to `$LAST`.
const LOOK: &str = r#"
modprobe crc32c_generic; mkdir -p /mnt && mount -t ext4 $DISK /mnt && cd /mnt || exit 1
sqlite3 db "pragma integrity_check; select count(*) from t where id <= $LAST;"
"#;

/// A database at work.
pub struct Commits(Run);

/// How it ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Committed {
    /// Rows that were committed.
    pub commits: u64,
    /// Of these, rows that are not there.
    pub lost: u64,
    /// `ok`, or what `pragma integrity_check` found, or what the database or the shell said when they failed.
    pub check: String,
}

impl Committed {
    /// Everything that was committed is there.
    pub fn is_sound(&self) -> bool {
        self.check == "ok" && self.lost == 0 && self.commits > 0
    }
}

impl Commits {
    /// Makes a file system on `disk` of the guest, and commits with this journal: `wal`, `delete`.
    ///
    /// # Errors
    /// The place is gone.
    pub fn start(place: &mut Place, guest: &str, disk: &str, journal: &str) -> Result<Self, DemoError> {
        let script = format!("JOURNAL={journal}; DISK={disk}; OVER={OVER}; rm -f $OVER; {COMMIT}");
        place.start_in_guest(guest, &script).map(Self)
    }

    /// Rows committed by now.
    ///
    /// # Errors
    /// It has ended, with what it said; or the place is gone.
    pub fn so_far(&mut self) -> Result<u64, DemoError> {
        if self.0.poll(Duration::from_millis(1)).map_err(DemoError::Exec)? {
            let output = self.0.output();
            let said = format!("{}\n{}", output.stdout.lines().last().unwrap_or_default(), output.stderr);
            return Err(DemoError::Umbra { what: "the database has ended".into(), said });
        }
        // Whole lines alone: the last may still come.
        let text = &self.0.output().stdout;
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        Ok(whole.lines().last().and_then(|line| line.parse().ok()).unwrap_or(0))
    }

    /// Waits until there are more rows than `before`.
    ///
    /// # Errors
    /// It has ended, or commits nothing more.
    pub fn await_more(&mut self, place: &mut Place, before: u64) -> Result<u64, DemoError> {
        let mut stall = crate::bench::patience::Stall::new(SILENCE);
        while !stall.is_over(()) {
            let now = self.so_far()?;
            if now > before {
                return Ok(now);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Err(DemoError::Umbra { what: "the database commits nothing more".into(), said: place.tail() })
    }

    /// Ends it; what is there.
    ///
    /// # Errors
    /// It does not end.
    pub fn finish(mut self, place: &mut Place, guest: &str) -> Result<Committed, DemoError> {
        place.in_guest(guest, &format!("touch {OVER}"), STEP)?;
        place.await_end(&mut self.0, SILENCE, |_| Ok(()))?;
        let output = self.0.output();
        Ok(judge(&output.stdout, &output.stderr, output.status))
    }
}

/// What a finished run printed: the rows' numbers, then the check, then how many there are.
fn judge(stdout: &str, stderr: &str, status: i32) -> Committed {
    let mut lines: Vec<&str> = stdout.lines().collect();
    let rows = lines.pop().and_then(|line| line.parse::<u64>().ok());
    let check = lines.pop().unwrap_or_default();
    let in_order = (1u64..).zip(&lines).all(|(id, line)| line.parse() == Ok(id));
    let commits = lines.len() as u64;
    match rows {
        Some(rows) if status == 0 && in_order => {
            Committed { commits, lost: commits.saturating_sub(rows), check: check.into() }
        }
        _ => Committed { commits, lost: 0, check: format!("status {status}: {stderr}") },
    }
}

/// Looks at a database on `disk` of the guest of which rows up to `last` were committed before a power cut.
///
/// # Errors
/// It cannot be read.
pub fn look(place: &mut Place, guest: &str, disk: &str, last: u64) -> Result<Committed, DemoError> {
    let said = place.in_guest(guest, &format!("DISK={disk}; LAST={last}; {LOOK}"), SILENCE)?;
    let mut lines = said.lines();
    let (check, rows) = (lines.next().unwrap_or_default(), lines.next().and_then(|line| line.parse::<u64>().ok()));
    Ok(Committed { commits: last, lost: last.saturating_sub(rows.unwrap_or(0)), check: check.into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_that_is_not_there_is_lost_and_a_failure_is_no_check() {
        assert!(judge("1\n2\n3\nok\n3\n", "", 0).is_sound());
        assert_eq!(judge("1\n2\n3\nok\n2\n", "", 0), Committed { commits: 3, lost: 1, check: "ok".into() });
        assert!(!judge("1\n2\nrow 1 missing from index\n2\n", "", 0).is_sound());
        let failed = judge("1\n2\n3\n", "Error: disk I/O error", 1);
        assert!(!failed.is_sound() && failed.check.contains("disk I/O error"), "{failed:?}");
        assert!(!judge("ok\n0\n", "", 0).is_sound(), "nothing was committed");
        assert!(!judge("", "", 0).is_sound());
    }
}
