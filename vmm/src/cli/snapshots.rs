//! `umbra snapshots`: what driver VMs are restored from, and the removal of what nobody uses.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;

use super::image::size;
use crate::record::status_text::{Column, or_dash, table};
use crate::vm::snapshot::cache::{Cache, FOLDER, MAX_BYTES};
use crate::vm::snapshot::description::Description;
use crate::vm::snapshot::key::HostFacts;
use crate::vm::snapshot::list::{FileState, Listed};

/// Arguments of `umbra snapshots`.
#[derive(Debug, clap::Args)]
#[command(after_help = after_help())]
pub struct Args {
    /// Remove what this build of umbra does not use on this host, and what was left unfinished.
    #[arg(long)]
    prune: bool,
    /// With --prune: remove all. Whatever is missing is made again when it is needed.
    #[arg(long, requires = "prune")]
    all: bool,
    /// Print the list as JSON.
    #[arg(long)]
    json: bool,
}

fn after_help() -> String {
    format!(
        "The folder is ${FOLDER}, else /var/cache/umbra/snapshots for root, else $XDG_CACHE_HOME/umbra/snapshots.\n\
         It holds at most {}; those go first that were taken or restored longest ago.",
        size(MAX_BYTES)
    )
}

/// The whole answer, as `--json` has it.
#[derive(Debug, Serialize)]
pub struct Listing {
    /// The folder.
    pub folder: String,
    /// What its snapshots take on the disk, bytes.
    pub bytes: u64,
    /// What they may take at most, bytes.
    pub max_bytes: u64,
    /// Its files, those first that were used last.
    pub snapshots: Vec<Row>,
    /// What was removed just now.
    pub removed: Vec<Row>,
}

/// A file of the folder.
#[derive(Debug, Serialize)]
pub struct Row {
    /// Its name.
    pub file: String,
    /// `usable`, `unusable`, `being-written` or `leftover`.
    pub state: &'static str,
    /// Why it is unusable.
    pub reason: Option<String>,
    /// Folder of the driver VM image; what follows is `null` too where the file does not say it.
    pub image: Option<String>,
    /// Release of the image's kernel.
    pub kernel: Option<String>,
    /// Drivers of the device.
    pub drivers: Option<Vec<String>>,
    /// PCI address of the device that the driver VM knows already.
    pub device: Option<String>,
    /// vCPUs.
    pub cpus: Option<u8>,
    /// Memory of the driver VM, bytes.
    pub memory: Option<u64>,
    /// Version of umbra that has taken it.
    pub version: Option<String>,
    /// The host's kernel at that time.
    pub host_kernel: Option<String>,
    /// When it was taken, seconds since 1970 (UTC).
    pub taken: Option<u64>,
    /// When it was taken or restored last, in the same way.
    pub used: u64,
    /// What it takes on the disk, bytes.
    pub bytes: u64,
}

/// Lists the snapshots, or removes some.
///
/// # Errors
///
/// There is no folder, others may write to it, or a file cannot be removed.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let (cache, host) = (Cache::of_environment()?, HostFacts::now()?);
    let removed = if args.prune { cache.prune(&host, args.all)? } else { Vec::new() };
    let left = cache.list(&host)?;
    let listing = Listing {
        folder: cache.folder().display().to_string(),
        bytes: left.iter().map(|listed| listed.bytes).sum(),
        max_bytes: MAX_BYTES,
        snapshots: left.iter().map(Row::of).collect(),
        removed: removed.iter().map(Row::of).collect(),
    };
    if args.json {
        return super::print_json(&listing);
    }
    super::print(&if args.prune { listing.removal() } else { listing.text() })
}

impl Row {
    fn of(listed: &Listed) -> Self {
        let (state, reason) = match &listed.state {
            FileState::Usable => ("usable", None),
            FileState::Unusable(why) => ("unusable", Some(why.clone())),
            FileState::BeingWritten => ("being-written", None),
            FileState::Leftover => ("leftover", None),
        };
        let of = listed.description.as_ref();
        Self {
            file: listed.path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            state,
            reason,
            image: of.map(|of| of.image.clone()),
            kernel: of.map(|of| of.kernel.clone()),
            drivers: of.map(|of| of.drivers.clone()),
            device: of.and_then(|of| of.device.clone()),
            cpus: of.map(|of| of.cpus),
            memory: of.map(|of| of.memory),
            version: of.map(|of| of.by.program.0.clone()),
            host_kernel: of.map(|Description { by, .. }| by.kernel[0].clone()),
            taken: of.map(|of| of.taken),
            used: listed.used.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
            bytes: listed.bytes,
        }
    }

    fn device(&self) -> String {
        let drivers = self.drivers.as_ref().map(|drivers| drivers.join(" ")).filter(|drivers| !drivers.is_empty());
        match (&self.device, drivers) {
            (Some(device), Some(drivers)) => format!("{device} ({drivers})"),
            (device, drivers) => or_dash(device.clone().or(drivers)),
        }
    }

    fn age(&self) -> Option<String> {
        let taken = UNIX_EPOCH.checked_add(Duration::from_secs(self.taken?))?;
        Some(age(SystemTime::now().duration_since(taken).unwrap_or_default()))
    }

    fn usable(&self) -> String {
        self.reason.as_ref().map_or_else(|| self.state.replace('-', " "), |why| format!("no: {why}"))
    }
}

/// The table that people see.
const COLUMNS: [Column<Row>; 8] = [
    ("IMAGE", |row| or_dash(row.image.as_ref().filter(|image| !image.is_empty()))),
    ("KERNEL", |row| or_dash(row.kernel.as_ref())),
    ("DEVICE", Row::device),
    ("VCPUS", |row| or_dash(row.cpus)),
    ("MEMORY", |row| or_dash(row.memory.map(size))),
    ("ON DISK", |row| size(row.bytes)),
    ("AGE", |row| or_dash(row.age())),
    ("USABLE", Row::usable),
];

impl Listing {
    fn text(&self) -> String {
        if self.snapshots.is_empty() {
            return format!("{}: no snapshots", self.folder);
        }
        format!(
            "{}\n{}: {} of at most {}",
            table(&COLUMNS, &self.snapshots),
            self.folder,
            size(self.bytes),
            size(self.max_bytes)
        )
    }

    fn removal(&self) -> String {
        let (freed, files) = (self.removed.iter().map(|row| row.bytes).sum(), self.removed.len());
        let many = if files == 1 { "1 file".into() } else { format!("{files} files") };
        let left = self.snapshots.len();
        format!("{}: removed {many} of {}, {left} left of {}", self.folder, size(freed), size(self.bytes))
    }
}

/// How long ago, in the largest unit of which there are two.
fn age(past: Duration) -> String {
    let seconds = past.as_secs();
    let units = [(86_400, "d"), (3600, "h"), (60, "min")];
    let unit = units.iter().find(|(length, _)| seconds >= 2 * length);
    unit.map_or_else(|| format!("{seconds} s"), |(length, name)| format!("{} {name}", seconds / length))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::vm::snapshot::key::Build;

    fn listing() -> Listing {
        let by = HostFacts { program: ("0.1.0".into(), Build::Checksum(7)), kernel: ["6.1".into(), "#1".into()] };
        let description = Description {
            image: "images/nic0".into(),
            kernel: "6.12".into(),
            drivers: vec!["e1000e".into()],
            device: Some("0000:03:00.0".into()),
            cpus: 1,
            memory: 128 << 20,
            taken: SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() - 3 * 3600,
            by,
        };
        let used = UNIX_EPOCH + Duration::from_secs(2000);
        let listed = |name: &str, description, state| {
            Row::of(&Listed { path: PathBuf::from("/cache").join(name), bytes: 3 << 20, used, description, state })
        };
        let snapshots = vec![
            listed("a.snapshot", Some(description), FileState::Usable),
            listed("b.snapshot", None, FileState::Unusable("its header is damaged\u{1b}[2J".into())),
            listed("c.1.unfinished", None, FileState::BeingWritten),
        ];
        Listing { folder: "/cache".into(), bytes: 9 << 20, max_bytes: 2 << 30, snapshots, removed: Vec::new() }
    }

    #[test]
    fn the_table_says_what_each_is_of_and_what_is_wrong_with_it() {
        let text = listing().text();
        let lines: Vec<_> = text.lines().collect();
        let [head, good, damaged, written, "", total] = &lines[..] else { panic!("{text}") };
        assert!(head.starts_with("IMAGE        KERNEL  DEVICE"), "{head}");
        let words: Vec<_> = good.split("  ").map(str::trim).filter(|word| !word.is_empty()).collect();
        let expected = ["images/nic0", "6.12", "0000:03:00.0 (e1000e)", "1", "128.0 MiB", "3.0 MiB", "3 h", "usable"];
        assert_eq!(words, expected);
        assert!(damaged.contains("no: its header is damaged") && !damaged.contains('\u{1b}'), "{damaged}");
        assert!(written.ends_with("being written"), "{written}");
        assert_eq!(*total, "/cache: 9.0 MiB of at most 2.0 GiB");
        let none = Listing { snapshots: Vec::new(), ..listing() };
        assert_eq!(none.text(), "/cache: no snapshots");
    }

    #[test]
    fn what_was_removed_is_counted() {
        let mut listing = listing();
        listing.removed = listing.snapshots.split_off(1);
        listing.bytes = 3 << 20;
        assert_eq!(listing.removal(), "/cache: removed 2 files of 6.0 MiB, 1 left of 3.0 MiB");
    }

    #[test]
    fn json_has_every_field_of_every_file() {
        let json = serde_json::to_value(listing()).unwrap();
        assert_eq!(json["snapshots"][0]["drivers"][0], "e1000e");
        assert_eq!((&json["snapshots"][0]["state"], &json["snapshots"][0]["used"]), (&"usable".into(), &2000.into()));
        assert!(json["snapshots"][1]["image"].is_null() && json["snapshots"][1]["reason"].is_string());
        assert_eq!(json["snapshots"][2]["state"], "being-written");
    }

    #[test]
    fn an_age_has_one_unit() {
        let ages = [0, 119, 120, 7199, 7200, 172_799, 172_800].map(|seconds| age(Duration::from_secs(seconds)));
        assert_eq!(ages, ["0 s", "119 s", "2 min", "119 min", "2 h", "47 h", "2 d"]);
    }
}
