//! Rules for a machine that its types cannot say: names that something must define, things that may be used
//! once. Needs nothing but the machine itself; each [`Problem`] says where it is, so that a file's line can be found.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use umbra_driver_vm::protocol::{HEARTBEAT_MS, Mac};
use umbra_shadow::Class;

use crate::base::pci_address::Bdf;

use super::{Cgroup, Console, DEFAULT_SPARE_AFTER_MS, Driver, Guest, Machine, MemorySize, Net, Sound, Standby};

/// Most vCPUs of a VM: what the MADT and the local APIC ids (8 bits, 255 is broadcast) allow with room.
pub const MAX_CPUS: u8 = 64;

/// Longest name of a guest or driver: it becomes part of file names and thread names.
const MAX_NAME: usize = 32;

/// Longest interface name of Linux (`IFNAMSIZ` - 1).
const MAX_INTERFACE: usize = 15;

/// Smallest memory of a VM: no kernel that this VMM boots fits into less; catches a forgotten unit (`memory = 8192`).
const MIN_MEMORY: MemorySize = MemorySize(16 << 20);

/// Largest memory of a VM: the widest physical address of today's processors has 52 bits.
const MAX_MEMORY: MemorySize = MemorySize(1 << 46);

/// Smallest MTU of IPv4 (RFC 791).
const MIN_MTU: u16 = 68;

/// Prefix of the port names that are the project's own.
const RESERVED_PORT_PREFIX: &str = "org.umbra.";

/// One step on the way to a value: a table's key or an array's index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PathStep {
    /// A key of a table.
    Key(String),
    /// An index of an array.
    Index(usize),
}

/// What is wrong with a machine, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Where, from the machine's root.
    pub at: Vec<PathStep>,
    /// What, as a sentence for the user that does not repeat the place.
    pub what: String,
    /// The other place that it is about, from the machine's root; empty where there is none.
    pub other: Vec<PathStep>,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, step) in self.at.iter().enumerate() {
            match step {
                PathStep::Key(key) if n == 0 => f.write_str(key)?,
                PathStep::Key(key) => write!(f, ".{key}")?,
                PathStep::Index(index) => write!(f, "[{index}]")?,
            }
        }
        if !self.at.is_empty() {
            f.write_str(": ")?;
        }
        f.write_str(&self.what)
    }
}

impl std::error::Error for Problem {}

/// Where the checks are at the moment.
#[derive(Clone)]
pub(super) struct Place(Vec<PathStep>);

impl Place {
    pub(super) fn of(table: &str, name: &str) -> Self {
        Self(vec![PathStep::Key(table.into()), PathStep::Key(name.into())])
    }

    pub(super) fn key(&self, key: &str) -> Self {
        let mut place = self.clone();
        place.0.push(PathStep::Key(key.into()));
        place
    }

    pub(super) fn index(&self, key: &str, index: usize) -> Self {
        let mut place = self.key(key);
        place.0.push(PathStep::Index(index));
        place
    }

    pub(super) fn problem<T>(&self, what: impl Into<String>) -> Result<T, Problem> {
        Err(Problem { at: self.0.clone(), what: what.into(), other: Vec::new() })
    }

    /// A problem that is about the place `other` as well.
    pub(super) fn problem_with<T>(&self, other: &Self, what: impl Into<String>) -> Result<T, Problem> {
        Err(Problem { at: self.0.clone(), what: what.into(), other: other.0.clone() })
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let problem = Problem { at: self.0.clone(), what: String::new(), other: Vec::new() };
        f.write_str(problem.to_string().trim_end_matches(": "))
    }
}

/// Things that may be used once, with the place that uses each.
#[derive(Default)]
struct Uses(BTreeMap<String, Place>);

impl Uses {
    fn claim(&mut self, thing: String, place: &Place) -> Result<(), Problem> {
        if let Some(first) = self.0.get(&thing) {
            return place.problem_with(first, format!("{thing} is used by {first} already"));
        }
        self.0.insert(thing, place.clone());
        Ok(())
    }
}

impl Machine {
    /// Checks what the types cannot say.
    ///
    /// # Errors
    ///
    /// The first [`Problem`] found.
    pub fn check(&self) -> Result<(), Problem> {
        if self.guest.is_empty() {
            return Place(Vec::new()).problem("a machine needs a guest: a table [guest.NAME] with a `kernel`");
        }
        self.check_shares()?;
        let mut uses = Uses::default();
        for (name, guest) in &self.guest {
            let place = Place::of("guest", name);
            check_name(&place, name)?;
            self.check_guest(&place, name, guest, &mut uses)?;
        }
        for (name, driver) in &self.driver {
            let place = Place::of("driver", name);
            check_name(&place, name)?;
            self.check_driver(&place, name, driver, &mut uses)?;
        }
        Ok(())
    }

    /// Without control groups nobody keeps a VM to its share of the processors.
    fn check_shares(&self) -> Result<(), Problem> {
        let guests = self.guest.iter().filter(|(_, guest)| guest.cpu_max.is_some()).map(|(name, _)| ("guest", name));
        let drivers = self.driver.iter().filter(|(_, driver)| driver.cpu_max.is_some());
        match guests.chain(drivers.map(|(name, _)| ("driver", name))).next() {
            Some((table, name)) if self.cgroup == Cgroup::Off => {
                let what = "needs control groups: remove `cgroup = \"off\"`";
                Place::of(table, name).key("cpu_max").problem(what)
            }
            _ => Ok(()),
        }
    }

    fn check_guest(&self, place: &Place, name: &str, guest: &Guest, uses: &mut Uses) -> Result<(), Problem> {
        check_cpus(place, guest.cpus)?;
        check_memory(place, guest.memory)?;
        check_path(&place.key("kernel"), &guest.kernel)?;
        check_cmdline(place, &guest.cmdline)?;
        check_window(&place.key("restart"), guest.restart.interval_s)?;
        for (n, path) in guest.initrd.iter().enumerate() {
            check_path(&place.index("initrd", n), path)?;
        }
        match &guest.console {
            Console::Off => {}
            Console::Terminal => uses.claim("the terminal".into(), &place.key("console"))?,
            Console::File(path) => self.check_console_file(&place.key("console"), path, uses)?,
        }
        self.check_disks(place, guest)?;
        for (n, net) in guest.net.iter().enumerate() {
            let place = place.index("net", n);
            self.check_net(&place, net, uses)?;
            uses.claim(format!("the MAC address {}", net.mac_or_default(name, n)), &place.key("mac"))?;
        }
        for (n, sound) in guest.sound.iter().enumerate() {
            self.check_driver_name(&place.index("sound", n).key("driver"), &sound.driver)?;
        }
        check_ports(place, guest, uses)?;
        for (n, device) in guest.passthrough.iter().enumerate() {
            check_device(&place.index("passthrough", n), device, uses)?;
        }
        Ok(())
    }

    /// It is cut when it is full: nobody else writes there. A device or a FIFO of /dev is left as it is.
    fn check_console_file(&self, place: &Place, path: &Path, uses: &mut Uses) -> Result<(), Problem> {
        check_path(place, path)?;
        if self.guest.values().flat_map(|guest| &guest.disk).any(|disk| disk.path.as_deref() == Some(path)) {
            return place.problem(format!("{path:?} is a disk, which the console would be written over"));
        }
        if path.starts_with("/dev") { Ok(()) } else { uses.claim(format!("the file {path:?}"), place) }
    }

    fn check_net(&self, place: &Place, net: &Net, uses: &mut Uses) -> Result<(), Problem> {
        match (&net.tap, &net.driver) {
            (None, None) => return place.problem("needs `tap = \"...\"` (a host interface) or `driver = \"...\"`"),
            (Some(_), Some(_)) => return place.key("driver").problem("`tap` and `driver` exclude each other"),
            (Some(_), None) if net.allow_any_source => {
                return place.key("allow_any_source").problem("only a NIC that guests share looks at source addresses");
            }
            (Some(tap), None) => {
                let place = place.key("tap");
                if tap.is_empty() || tap.len() > MAX_INTERFACE || tap.contains(['/', ' ', '%', ':']) {
                    return place.problem(format!("{tap:?} is no interface name (1 to {MAX_INTERFACE} characters)"));
                }
                uses.claim(format!("the TAP interface {tap}"), &place)?;
            }
            (None, Some(driver)) => self.check_driver_name(&place.key("driver"), driver)?,
        }
        if net.mtu_or_default() < MIN_MTU {
            return place.key("mtu").problem(format!("an MTU is {MIN_MTU} to 65535 bytes"));
        }
        if let Some(mac) = net.mac
            && (mac.0[0] & 1 == 1 || mac.0 == [0; 6])
        {
            return place.key("mac").problem(format!("{mac} is no unicast address: a device cannot have it"));
        }
        Ok(())
    }

    pub(super) fn check_driver_name(&self, place: &Place, driver: &str) -> Result<(), Problem> {
        if self.driver.contains_key(driver) {
            return Ok(());
        }
        let hint = closest(driver, self.driver.keys()).map(|n| format!("; did you mean \"{n}\"?"));
        place.problem(format!("nothing defines [driver.{driver}]{}", hint.unwrap_or_default()))
    }

    fn check_driver(&self, place: &Place, name: &str, driver: &Driver, uses: &mut Uses) -> Result<(), Problem> {
        if self.guest.contains_key(name) {
            return place.problem(format!("a guest is named {name} too; `umbra status {name}` could mean either"));
        }
        check_device(&place.key("device"), &driver.device, uses)?;
        if let Some(spare) = &driver.spare {
            check_device(&place.key("spare"), spare, uses)?;
            if let Some(user) = self.users_of(name).find(|user| user.class != Class::Net) {
                let what = format!("{} has no spare: only a NIC can have one", user.device());
                return place.key("spare").problem(what);
            }
        }
        if let Some(user) = self.users_of(name).find(|user| user.class != Class::Net)
            && driver.spare_after_ms != DEFAULT_SPARE_AFTER_MS
        {
            let what = format!("{} has no spare, nor a carrier that it could lose", user.device());
            return place.key("spare_after_ms").problem(what);
        }
        check_path(&place.key("image"), &driver.image)?;
        check_cpus(place, driver.cpus)?;
        check_cmdline(place, &driver.cmdline)?;
        check_memory(place, driver.memory_or_default())?;
        self.check_ends(place, name)?;
        check_standby(place, driver)?;
        let restart = &driver.restart;
        let place = place.key("restart");
        check_window(&place, restart.interval_s)?;
        if restart.boot_timeout_s == 0 {
            return place.key("boot_timeout_s").problem("no driver VM boots in 0 seconds");
        }
        if u64::from(restart.heartbeat_timeout_ms) < 2 * HEARTBEAT_MS {
            let what = format!("heartbeats come every {HEARTBEAT_MS} ms; allow at least twice that");
            return place.key("heartbeat_timeout_ms").problem(what);
        }
        if restart.backoff_max_ms < restart.backoff_ms {
            return place.key("backoff_max_ms").problem("is less than `backoff_ms`");
        }
        Ok(())
    }

    /// Somebody uses the driver, all who do use devices of one class, and they agree on what they share.
    fn check_ends(&self, place: &Place, driver: &str) -> Result<(), Problem> {
        let mut mtu = None;
        for (name, n, net) in self.ends_of(driver) {
            if *mtu.get_or_insert(net.mtu_or_default()) != net.mtu_or_default() {
                return Place::of("guest", name).index("net", n).problem(format!(
                    "the guests that share [driver.{driver}] share its NIC's MTU: give them the same `mtu`"
                ));
            }
        }
        let Some(first) = self.users_of(driver).next() else {
            return place.problem(format!(
                "no guest uses it: give one a [[guest.NAME.net]], [[guest.NAME.disk]] or [[guest.NAME.sound]] with driver = \"{driver}\""
            ));
        };
        if let Some(other) = self.users_of(driver).find(|user| user.class != first.class) {
            let what = format!(
                "[driver.{driver}] serves {} already, and a driver VM holds one device: give {} a [driver.NAME] of its own",
                first.place(),
                other.device()
            );
            return other.place().problem_with(&first.place(), what);
        }
        self.check_parts(driver)
    }

    /// The guests' devices that `driver` serves, class by class.
    fn users_of<'a>(&'a self, driver: &'a str) -> impl Iterator<Item = User<'a>> {
        let user = |class| move |(guest, index)| User { guest, class, index };
        let nets = self.ends_of(driver).map(|(guest, n, _)| (guest, n)).map(user(Class::Net));
        let sounds = self.sounds_of(driver).map(|(guest, n, _)| (guest, n)).map(user(Class::Sound));
        let disks = self.disks_of(driver).map(|(guest, n, _)| (guest, n)).map(user(Class::Block));
        nets.chain(sounds).chain(disks)
    }

    /// The guests' sound devices that `driver` serves, as [`Self::ends_of`].
    pub fn sounds_of<'a>(&'a self, driver: &'a str) -> impl Iterator<Item = (&'a str, usize, &'a Sound)> {
        self.guest.iter().flat_map(move |(name, guest)| {
            let sounds = guest.sound.iter().enumerate().filter(move |(_, sound)| sound.driver == driver);
            sounds.map(move |(n, sound)| (name.as_str(), n, sound))
        })
    }

    /// The guests' network devices that `driver` serves: guest, index of the device in that guest, the device.
    pub fn ends_of<'a>(&'a self, driver: &'a str) -> impl Iterator<Item = (&'a str, usize, &'a Net)> {
        self.guest.iter().flat_map(move |(name, guest)| {
            let nets = guest.net.iter().enumerate();
            nets.filter(move |(_, net)| net.driver.as_deref() == Some(driver))
                .map(move |(n, net)| (name.as_str(), n, net))
        })
    }

    /// The addresses of the devices that share the NIC of network device `net` of `guest`; none where it has none, or has it for itself.
    pub fn neighbours_of(&self, guest: &str, net: usize) -> Vec<Mac> {
        let device = self.guest.get(guest).and_then(|guest| guest.net.get(net));
        let Some(driver) = device.and_then(|device| device.driver.as_deref()) else { return Vec::new() };
        let others = self.ends_of(driver).filter(|(name, n, _)| (*name, *n) != (guest, net));
        others.map(|(name, n, net)| net.mac_or_default(name, n)).collect()
    }
}

/// A guest's device that a driver VM serves.
#[derive(Clone, Copy)]
struct User<'a> {
    guest: &'a str,
    class: Class,
    index: usize,
}

impl User<'_> {
    fn place(&self) -> Place {
        let key = match self.class {
            Class::Net => "net",
            Class::Sound => "sound",
            Class::Block => "disk",
        };
        Place::of("guest", self.guest).index(key, self.index)
    }

    /// What a driver VM holds for it.
    fn device(&self) -> &'static str {
        match self.class {
            Class::Net => "a NIC",
            Class::Sound => "a sound card",
            Class::Block => "a storage controller",
        }
    }
}

/// Most lives of a driver VM that wait: two failures in a row find one that is ready; a third within the second in which none is started
/// has worse reasons.
const MOST_STANDBYS: u8 = 2;

/// What is made ahead has to be allowed, and of use.
fn check_standby(place: &Place, driver: &Driver) -> Result<(), Problem> {
    let problem = |key, what: &str| {
        let (at, other) = (place.key("standby").0, place.key(key).0);
        Err(Problem { at, what: what.into(), other })
    };
    if !(1..=MOST_STANDBYS).contains(&driver.standbys) {
        let what = format!(
            "1 or {MOST_STANDBYS} lives wait, with `standby = \"warm\"`; to have none, choose another `standby`"
        );
        return place.key("standbys").problem(what);
    }
    if driver.standbys > 1 && (driver.standby != Standby::Warm || driver.spare.is_some()) {
        let what = "a second standby waits behind a first, which needs `standby = \"warm\"` and no `spare`";
        return place.key("standbys").problem(what);
    }
    match driver {
        Driver { standby: Standby::Snapshot, snapshots: false, .. } => problem(
            "snapshots",
            "\"snapshot\" needs snapshots: remove `snapshots = false`, or choose `standby = \"warm\"` or \"cold\"",
        ),
        Driver { standby: Standby::Snapshot, spare: Some(_), .. } => problem(
            "spare",
            "\"snapshot\" is for a driver VM without a spare, which stands ready already: remove `standby` or `spare`",
        ),
        _ => Ok(()),
    }
}

fn check_ports(place: &Place, guest: &Guest, uses: &mut Uses) -> Result<(), Problem> {
    for (n, port) in guest.port.iter().enumerate() {
        let place = place.index("port", n);
        if port.name.is_empty() || port.name.len() > MAX_NAME || port.name.contains(['/', '\0']) {
            return place.key("name").problem(format!("a port's name has 1 to {MAX_NAME} characters and no slash"));
        }
        if port.name.starts_with(RESERVED_PORT_PREFIX) {
            return place.key("name").problem(format!("names that start with {RESERVED_PORT_PREFIX} are taken"));
        }
        if guest.port.iter().take(n).any(|other| other.name == port.name) {
            return place.key("name").problem(format!("the guest has a port {:?} already", port.name));
        }
        check_path(&place.key("socket"), &port.socket)?;
        uses.claim(format!("the socket {:?}", port.socket), &place.key("socket"))?;
    }
    Ok(())
}

fn check_name(place: &Place, name: &str) -> Result<(), Problem> {
    let valid = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if name.is_empty() || name.len() > MAX_NAME || !name.chars().all(valid) {
        return place.problem(format!("a name has 1 to {MAX_NAME} letters, digits, `-` or `_`"));
    }
    Ok(())
}

fn check_cpus(place: &Place, cpus: u8) -> Result<(), Problem> {
    if cpus == 0 || cpus > MAX_CPUS {
        return place.key("cpus").problem(format!("a VM has 1 to {MAX_CPUS} vCPUs"));
    }
    Ok(())
}

/// A kernel's command line ends at the first zero byte.
fn check_cmdline(place: &Place, cmdline: &str) -> Result<(), Problem> {
    if cmdline.contains('\0') {
        return place.key("cmdline").problem("holds a zero byte, behind which the kernel would read nothing");
    }
    Ok(())
}

fn check_window(place: &Place, interval_s: u32) -> Result<(), Problem> {
    if interval_s == 0 { place.key("interval_s").problem("the window is at least 1 second") } else { Ok(()) }
}

fn check_memory(place: &Place, memory: MemorySize) -> Result<(), Problem> {
    if memory < MIN_MEMORY || memory > MAX_MEMORY {
        let what = format!("{memory} is not between {MIN_MEMORY} and {MAX_MEMORY} (write a unit, as \"512M\")");
        return place.key("memory").problem(what);
    }
    Ok(())
}

pub(super) fn check_path(place: &Place, path: &Path) -> Result<(), Problem> {
    if path.as_os_str().is_empty() {
        return place.problem("the path is empty");
    }
    Ok(())
}

fn check_device(place: &Place, device: &str, uses: &mut Uses) -> Result<(), Problem> {
    match device.parse::<Bdf>() {
        Ok(device) => uses.claim(format!("the PCI function {device}"), place),
        Err(error) => place.problem(error.to_string()),
    }
}

/// The candidate that `word` is most likely a misspelling of, if any.
pub(super) fn closest<'a, S: AsRef<str> + ?Sized + 'a>(
    word: &str,
    candidates: impl IntoIterator<Item = &'a S>,
) -> Option<&'a str> {
    let most = 1 + word.chars().count() / 4;
    let scored = candidates.into_iter().map(|c| (distance(word, c.as_ref()), c.as_ref()));
    scored.filter(|(d, _)| *d <= most).min().map(|(_, c)| c)
}

/// Edit distance (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = i;
        let mut left = i + 1;
        for (cell, cb) in row.iter_mut().skip(1).zip(&b) {
            let replaced = diagonal + usize::from(ca != *cb);
            diagonal = *cell;
            left = replaced.min(diagonal + 1).min(left + 1);
            *cell = left;
        }
        if let Some(first) = row.first_mut() {
            *first = i + 1;
        }
    }
    row.last().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slips_of_the_pen_find_their_word() {
        assert_eq!(closest("kernal", ["kernel", "cmdline"]), Some("kernel"));
        assert_eq!(closest("nic1", ["nic0", "sound"]), Some("nic0"));
        assert_eq!(closest("xyz", ["kernel", "cmdline"]), None);
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!(distance("", "abc"), 3);
        assert_eq!(distance("abc", ""), 3);
    }

    #[test]
    fn made_addresses_differ_and_are_local_unicast() {
        let net = Net::default();
        let a = net.mac_or_default("web", 0);
        assert_eq!(a, net.mac_or_default("web", 0));
        assert_ne!(a, net.mac_or_default("web", 1));
        assert_ne!(a, net.mac_or_default("db", 0));
        assert_eq!(a.0[0] & 3, 2);
    }
}
