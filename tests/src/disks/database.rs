//! SQLite in a guest: it commits rows until it is told to end, and notes the number of each row when it is committed.

use std::time::Duration;

use super::STEP;
use crate::bench::patience::Stall;
use crate::demo::DemoError;
use crate::demo::place::Place;

/// The file in the guest that ends it.
const OVER: &str = "/tmp/database-over";
/// Files of the guest: the number of the last row, what it printed, what it said, its status when it has ended.
const LAST: &str = "/tmp/database-last";
const PRINTED: &str = "/tmp/database-printed";
const SAID: &str = "/tmp/database-said";
const STATUS: &str = "/tmp/database-status";
/// Interval of looks at them.
const LOOK: Duration = Duration::from_millis(200);
/// Longest time without a row, as on the reference machine.
const SILENCE: Duration = Duration::from_secs(120);

/// Commits until `$OVER` is there, then reads everything from the disk again: the check, and how many rows there are. Long rows, so that
/// few of them wait in the pipe when the time is over. What SQLite prints stays in its buffer; a file of one row does not.
const COMMIT: &str = r#"
modprobe crc32c_generic; /sbin/mke2fs -q -t ext4 $DISK && mkdir -p /mnt && mount -t ext4 $DISK /mnt && cd /mnt || exit 1
sqlite3 db "pragma journal_mode=$JOURNAL; create table t(id integer primary key, content text);" >&2 || exit 1
row=$(head -c 400 /dev/zero | tr '\0' x); id=0
while [ ! -e $OVER ]; do id=$((id + 1)); printf '%s\n' "insert into t values($id, '$row');" ".once $LAST" "select $id;"; done |
  (echo 'pragma synchronous=full;'; cat) | sqlite3 -batch -bail db || exit 1
cd / && umount /mnt && mount -t ext4 $DISK /mnt && cd /mnt || exit 1
sqlite3 db "pragma integrity_check; select count(*) from t;"
"#;

/// What there is after a power cut: the check, and how many rows up to `$ROWS`.
const AFTER: &str = r#"
modprobe crc32c_generic; mkdir -p /mnt && mount -t ext4 $DISK /mnt && cd /mnt || exit 1
sqlite3 db "pragma integrity_check; select count(*) from t where id <= $ROWS;"
"#;

/// A database at work, beside whatever else runs in its guest.
pub struct Commits {
    guest: String,
}

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
    /// The guest does not answer.
    pub fn start(place: &mut Place, guest: &str, disk: &str, journal: &str) -> Result<Self, DemoError> {
        let begin =
            format!("JOURNAL={journal}; DISK={disk}; OVER={OVER}; LAST={LAST}; rm -f {OVER} {STATUS}; echo 0 >{LAST}");
        let script = format!(
            "{begin}; ( ( {COMMIT} ) </dev/null >{PRINTED} 2>{SAID}; echo $? >{STATUS} ) </dev/null >/dev/null 2>&1 & echo"
        );
        place.in_guest(guest, &script, STEP)?;
        Ok(Self { guest: guest.into() })
    }

    /// Rows committed by now.
    ///
    /// # Errors
    /// It has ended, with what it said; or the guest does not answer.
    pub fn so_far(&self, place: &mut Place) -> Result<u64, DemoError> {
        // It is empty for a moment at each row.
        let look = format!("n=$(cat {LAST}); [ -n \"$n\" ] || {{ sleep 0.3; n=$(cat {LAST}); }}; echo ${{n:-0}}");
        let script = format!("[ -e {STATUS} ] && tail -n 3 {SAID} {STATUS} || {{ {look}; }}");
        let said = place.in_guest(&self.guest, &script, STEP)?;
        said.trim().parse().map_err(|_| DemoError::Umbra { what: "the database has ended".into(), said })
    }

    /// Waits until there are more rows than `before`.
    ///
    /// # Errors
    /// It has ended, or commits nothing more.
    pub fn await_more(&self, place: &mut Place, before: u64) -> Result<u64, DemoError> {
        let mut stall = Stall::new(SILENCE);
        while !stall.is_over(()) {
            let now = self.so_far(place)?;
            if now > before {
                return Ok(now);
            }
            std::thread::sleep(LOOK);
        }
        Err(DemoError::Umbra { what: "the database commits nothing more".into(), said: place.tail() })
    }

    /// Ends it; what is there.
    ///
    /// # Errors
    /// It does not end.
    pub fn finish(self, place: &mut Place) -> Result<Committed, DemoError> {
        let script = format!("touch {OVER}; [ -e {STATUS} ] && cat {STATUS} || echo");
        let mut stall = Stall::new(SILENCE);
        while !stall.is_over(()) {
            let status = place.in_guest(&self.guest, &script, STEP)?;
            if let Ok(status) = status.trim().parse() {
                let mut read = |file| place.in_guest(&self.guest, &format!("cat {file}"), STEP);
                return Ok(judge(&read(LAST)?, &read(PRINTED)?, &read(SAID)?, status));
            }
            std::thread::sleep(LOOK);
        }
        Err(DemoError::Umbra { what: "the database does not end".into(), said: place.tail() })
    }
}

/// What a finished run left: the number of its last row; the check and how many rows there are; what was said.
fn judge(last: &str, printed: &str, said: &str, status: i32) -> Committed {
    let commits = last.trim().parse().unwrap_or(0);
    let mut lines = printed.lines().rev();
    let rows = lines.next().and_then(|line| line.parse::<u64>().ok());
    let check: Vec<&str> = lines.rev().collect();
    match rows {
        Some(rows) if status == 0 => Committed { commits, lost: commits.saturating_sub(rows), check: check.join("; ") },
        _ => Committed { commits, lost: 0, check: format!("status {status}: {said}") },
    }
}

/// Looks at a database on `disk` of the guest of which rows up to `last` were committed before a power cut.
///
/// # Errors
/// It cannot be read.
pub fn look(place: &mut Place, guest: &str, disk: &str, last: u64) -> Result<Committed, DemoError> {
    let said = place.in_guest(guest, &format!("DISK={disk}; ROWS={last}; {AFTER}"), SILENCE)?;
    let mut lines = said.lines();
    let (check, rows) = (lines.next().unwrap_or_default(), lines.next().and_then(|line| line.parse::<u64>().ok()));
    Ok(Committed { commits: last, lost: last.saturating_sub(rows.unwrap_or(0)), check: check.into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_that_is_not_there_is_lost_and_a_failure_is_no_check() {
        assert!(judge("3\n", "ok\n3\n", "", 0).is_sound());
        assert_eq!(judge("3\n", "ok\n2\n", "", 0), Committed { commits: 3, lost: 1, check: "ok".into() });
        assert!(!judge("2", "row 1 missing from index\nrow 2 missing from index\n2\n", "", 0).is_sound());
        let failed = judge("3", "", "Error: disk I/O error", 1);
        assert!(!failed.is_sound() && failed.check.contains("disk I/O error"), "{failed:?}");
        assert!(!judge("0", "ok\n0\n", "", 0).is_sound(), "nothing was committed");
        assert!(!judge("", "", "", 0).is_sound());
    }
}
