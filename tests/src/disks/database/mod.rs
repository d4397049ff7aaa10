//! A database in a guest: it commits rows until it is told to end, and notes the number of each row when it is committed.

use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use super::{STEP, requests};
use crate::assets::{AssetError, Assets, Say};
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
/// Longest time without a request to the disk, as on the reference machine.
const SILENCE: Duration = Duration::from_secs(120);
/// A bound for numbers of rows that none reaches.
const ALL_ROWS: u64 = i32::MAX as u64;

/// What each database's functions are called by: `make` a database in the working directory, `commit` until there is a file `$OVER`,
/// `look` at what is there, which prints the check and how many rows up to `$ROWS` there are. Long rows, so that few of them wait in the
/// pipe when the time is over.
const MOUNT: &str = "modprobe crc32c_generic; mkdir -p /mnt; attach() { mount -t ext4 $DISK /mnt && cd /mnt; }";
/// Commits, then reads everything from the disk again.
const COMMIT: &str =
    "/sbin/mke2fs -q -t ext4 $DISK && attach && make && commit && cd / && umount /mnt && attach && look";

/// Looks at what is there after an end that nobody had prepared, and at the file system itself; leaves it unmounted.
const LOOK_AGAIN: &str = "attach && look && cd / && umount /mnt && e2fsck -f -n $DISK >&2";

/// What commits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Database {
    /// SQLite with a write-ahead log, which is flushed at each commit.
    Wal,
    /// SQLite with a rollback journal, which is deleted at each commit.
    Delete,
    /// PostgreSQL.
    Postgresql,
}

impl Database {
    /// The archive for the guest.
    ///
    /// # Errors
    /// It could not be made.
    pub fn archive(self, assets: &Assets, say: Say<'_>) -> Result<PathBuf, AssetError> {
        match self {
            Self::Wal | Self::Delete => assets.database(),
            Self::Postgresql => assets.postgresql(say),
        }
    }

    /// Its functions for a shell.
    fn functions(self) -> String {
        match self {
            Self::Wal => format!("JOURNAL=wal\n{}", include_str!("sqlite.sh")),
            Self::Delete => format!("JOURNAL=delete\n{}", include_str!("sqlite.sh")),
            Self::Postgresql => include_str!("postgresql.sh").into(),
        }
    }

    /// A script that does `what` with it on `disk`, rows up to `rows`.
    fn script(self, disk: &str, rows: u64, what: &str) -> String {
        format!("DISK={disk}; OVER={OVER}; LAST={LAST}; ROWS={rows}; {MOUNT}\n{}\n{what}", self.functions())
    }
}
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
    /// Makes a file system on `disk` of the guest, and commits to `database` there.
    ///
    /// # Errors
    /// The guest does not answer.
    pub fn start(place: &mut Place, guest: &str, disk: &str, database: Database) -> Result<Self, DemoError> {
        let commit = database.script(disk, ALL_ROWS, COMMIT);
        let script = format!(
            "rm -f {OVER} {STATUS}; echo 0 >{LAST}; ( ( {commit} ) </dev/null >{PRINTED} 2>{SAID}; echo $? >{STATUS} ) \
             </dev/null >/dev/null 2>&1 & echo"
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
        while !stall.is_over(requests(place, &self.guest)?) {
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
        while !stall.is_over(requests(place, &self.guest)?) {
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

/// Looks at `database` on `disk` of the guest, of which rows up to `last` were committed before a power cut or the guest's end.
///
/// # Errors
/// It cannot be read.
pub fn look(place: &mut Place, guest: &str, disk: &str, database: Database, last: u64) -> Result<Committed, DemoError> {
    let said = place.in_guest(guest, &database.script(disk, last, LOOK_AGAIN), SILENCE)?;
    Ok(judge(&last.to_string(), &said, "", 0))
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
