//! How often a function interrupts, as the host's kernel counts it. A device that does nothing but interrupt (an interrupt
//! storm) leaves no time to the driver VM's CPU, nor to the host's, which handles each one first.
//!
//! The count needs no word of the driver VM. It is the kernel's own, for each interrupt of the host (`/proc/interrupts`), and one open
//! file has it for functions that come later too. Interrupts that the IOMMU posts to the vCPU directly cost the host nothing and are
//! not in it; a driver VM that they starve misses its heartbeats.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::num::NonZeroU32;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Instant;

use crate::base::pci_address::Bdf;

/// The kernel's counters.
pub const COUNTERS: &str = "/proc/interrupts";

/// Most that is read of them, in bytes: the lines of thousands of interrupts on hundreds of processors.
const MOST: usize = 32 << 20;

/// Watches the interrupts of one function.
#[derive(Debug)]
pub(super) struct StormWatch {
    /// How the kernel's VFIO names the function as the user of an interrupt: `vfio-msix[0](0000:03:00.0)`.
    user: String,
    counters: Arc<File>,
    /// Most times that one interrupt may come per second.
    limit: NonZeroU32,
    last: Option<(Instant, BTreeMap<u32, u32>)>,
    /// The last look found too many.
    over: bool,
}

impl StormWatch {
    /// For the function `bdf`; `limit` is per second, `counters` is [`COUNTERS`].
    pub(super) fn new(bdf: Bdf, counters: Arc<File>, limit: NonZeroU32) -> Self {
        Self { user: format!("({bdf})"), counters, limit, last: None, over: false }
    }

    /// To be called about every second. Returns how often an interrupt came per second, if that was too often at two looks in a
    /// row.
    pub(super) fn look(&mut self, now: Instant) -> Option<u32> {
        let counts = counts(&read(&self.counters).ok()?, &self.user);
        let before = self.last.replace((now, counts));
        let ((then, before), (_, counts)) = (before?, self.last.as_ref()?);
        let rate = per_second(grown(&before, counts), (now - then).as_secs_f64());
        let before = std::mem::replace(&mut self.over, rate > self.limit.get());
        (before && self.over).then_some(rate)
    }
}

/// The whole file, from its beginning.
fn read(file: &File) -> io::Result<String> {
    let (mut bytes, mut length) = (vec![0; 16 << 10], 0);
    loop {
        match file.read_at(&mut bytes[length..], length as u64)? {
            0 => break,
            more => length += more,
        }
        if length == bytes.len() && length < MOST {
            bytes.resize(length * 2, 0);
        }
    }
    Ok(String::from_utf8_lossy(&bytes[..length]).into_owned())
}

/// The counter of each interrupt that only `user` has. A line shared with others says nothing about this function.
///
/// ```text
///            CPU0       CPU1
///  30:          0        117  IR-PCI-MSIX-0000:03:00.0    0-edge      vfio-msix[0](0000:03:00.0)
/// ```
fn counts(text: &str, user: &str) -> BTreeMap<u32, u32> {
    let mut lines = text.lines();
    let processors = lines.next().unwrap_or_default().split_whitespace().count();
    let of_user = lines.filter(|line| line.ends_with(user) && !line.contains(','));
    let count = |line: &str| {
        let (irq, rest) = line.split_once(':')?;
        Some((irq.trim().parse().ok()?, sum(rest.split_whitespace().take(processors))?))
    };
    of_user.filter_map(count).collect()
}

/// The sum of numbers; each wraps at 32 bits, and so may the sum.
fn sum<'a>(mut numbers: impl Iterator<Item = &'a str>) -> Option<u32> {
    numbers.try_fold(0u32, |sum, number| Some(sum.wrapping_add(number.parse().ok()?)))
}

/// Growth of the fastest counter. A counter that is new, or smaller than before because its number was given to another interrupt,
/// starts from here.
fn grown(before: &BTreeMap<u32, u32>, now: &BTreeMap<u32, u32>) -> u32 {
    now.iter().filter_map(|(irq, count)| count.checked_sub(*before.get(irq)?)).max().unwrap_or(0)
}

#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a float becomes the nearest number there is"
)]
fn per_second(count: u32, seconds: f64) -> u32 {
    (f64::from(count) / seconds.max(f64::EPSILON)) as u32
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// A function with the line 11 and the vectors 30 and 31.
    struct Host {
        file: tempfile::NamedTempFile,
        lines: BTreeMap<u32, (String, [u32; 2])>,
    }

    impl Host {
        fn new() -> Self {
            let mut this = Self { file: tempfile::NamedTempFile::new().unwrap(), lines: BTreeMap::new() };
            for (irq, user) in [(30, "vfio-msix[0](0000:03:00.0)"), (31, "vfio-msix[1](0000:03:00.0)"), (11, "")] {
                this.count(irq, user, [0, 7]);
            }
            this
        }

        /// As the kernel prints it (`show_interrupts`, kernel/irq/proc.c).
        fn count(&mut self, irq: u32, user: &str, counts: [u32; 2]) {
            self.lines.insert(irq, (user.into(), counts));
            let mut text = format!("{:>16}{:>11}\n", "CPU0", "CPU1");
            for (irq, (user, [first, second])) in &self.lines {
                let chip = "IR-PCI-MSIX-0000:03:00.0    0-edge     ";
                text += &format!("{irq:>4}: {first:>10} {second:>10}  {chip} {user}\n");
            }
            text += " NMI:          0          0   Non-maskable interrupts\n ERR:          0\n";
            std::fs::write(self.file.path(), text).unwrap();
        }

        fn watch(&self, limit: u32) -> StormWatch {
            let file = Arc::new(File::open(self.file.path()).unwrap());
            StormWatch::new(BDF.parse().unwrap(), file, NonZeroU32::new(limit).unwrap())
        }
    }

    const SECOND: Duration = Duration::from_secs(1);
    const BDF: &str = "0000:03:00.0";

    #[test]
    fn too_many_twice_in_a_row_are_a_storm() {
        let (mut host, start) = (Host::new(), Instant::now());
        let mut watch = host.watch(1000);
        assert_eq!(watch.look(start), None);
        host.count(30, "vfio-msix[0](0000:03:00.0)", [900, 207]);
        assert_eq!(watch.look(start + SECOND), None, "a burst");
        host.count(31, "vfio-msix[1](0000:03:00.0)", [4000, 7]);
        assert_eq!(watch.look(start + 3 * SECOND), Some(2000));
        assert_eq!(watch.look(start + 4 * SECOND), None, "over");
    }

    #[test]
    fn bursts_with_a_rest_between_are_none() {
        let (mut host, start) = (Host::new(), Instant::now());
        let mut watch = host.watch(1000);
        for second in 0..10u32 {
            // As many again every other second.
            host.count(30, "vfio-msix[0](0000:03:00.0)", [second / 2 * 5000, 0]);
            assert_eq!(watch.look(start + second * SECOND), None);
        }
    }

    #[test]
    fn a_line_that_is_shared_or_off_does_not_count() {
        let (mut host, start) = (Host::new(), Instant::now());
        let mut watch = host.watch(10);
        for (second, users) in
            [(0, "vfio-intx(0000:03:00.0), ahci"), (1, "vfio-intx(0000:03:00.0), ahci"), (2, ""), (3, "")]
        {
            host.count(11, users, [second * 1000, 0]);
            assert_eq!(watch.look(start + second * SECOND), None);
        }
        for second in 4..7 {
            host.count(11, "vfio-intx(0000:03:00.0)", [second * 1000, 0]);
            assert_eq!(watch.look(start + second * SECOND), (second == 6).then_some(1000));
        }
    }

    #[test]
    fn a_line_whose_only_user_is_another_driver_does_not_count() {
        let (mut host, start) = (Host::new(), Instant::now());
        let mut watch = host.watch(10);
        for (second, users) in (0..).zip(["ahci", "ahci", "vfio-intx(0000:03:00.1)", "vfio-intx(0000:03:00.1)"]) {
            host.count(11, users, [second * 1000, 0]);
            assert_eq!(watch.look(start + second * SECOND), None, "{users}");
        }
    }

    #[test]
    fn counters_that_begin_anew_or_wrap_are_no_storm() {
        let before = BTreeMap::from([(30, 5_000_000), (31, 7)]);
        assert_eq!(grown(&before, &BTreeMap::from([(30, 12), (31, 9), (32, 4_000_000_000)])), 2);
        assert_eq!(sum("4294967295 3".split(' ')), Some(2));
        assert_eq!(sum("nonsense".split(' ')), None);
    }

    #[test]
    fn the_host_s_own_counters_can_be_read_again_and_again() {
        let file = File::open(COUNTERS).unwrap();
        for _ in 0..2 {
            let text = read(&file).unwrap();
            assert!(text.trim_start().starts_with("CPU0"), "{text}");
            let last = text.lines().nth(1).unwrap();
            assert!(text.lines().count() > 3 && last.contains(':'), "{text}");
        }
    }
}
