//! How often a function interrupts, as the host's kernel counts it. A device that does nothing but interrupt (an interrupt
//! storm) leaves no time to the driver VM's CPU, nor to the host's, which handles each one first.
//!
//! The count needs no word of the driver VM. It is the kernel's own, for each interrupt of the host
//! (`/sys/kernel/irq/N/per_cpu_count`, `Documentation/ABI/testing/sysfs-kernel-irq`). Interrupts that the IOMMU posts to the
//! vCPU directly cost the host nothing and are not in it; a driver VM that they starve misses its heartbeats.

use std::collections::BTreeMap;
use std::fs;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::Instant;

use crate::base::pci_address::Bdf;

/// Folder with the kernel's counters of each interrupt.
const COUNTERS: &str = "/sys/kernel/irq";

/// Watches the interrupts of one function.
#[derive(Debug)]
pub(super) struct StormWatch {
    /// `/sys/bus/pci/devices/BDF`.
    device: PathBuf,
    /// How the kernel's VFIO names the function as the user of an interrupt: `vfio-msix[0](0000:03:00.0)`.
    user: String,
    counters: PathBuf,
    /// Most times that one interrupt may come per second.
    limit: NonZeroU32,
    last: Option<(Instant, BTreeMap<u32, u32>)>,
    /// The last look found too many.
    over: bool,
}

impl StormWatch {
    /// For the function `bdf`, which is in `device`; `limit` is per second.
    pub(super) fn new(bdf: Bdf, device: PathBuf, limit: NonZeroU32) -> Self {
        Self { device, user: format!("({bdf})"), counters: COUNTERS.into(), limit, last: None, over: false }
    }

    /// To be called about every second. Returns how often an interrupt came per second, if that was too often at two looks in a
    /// row.
    pub(super) fn look(&mut self, now: Instant) -> Option<u32> {
        let counts = self.counts();
        let before = self.last.replace((now, counts));
        let ((then, before), (_, counts)) = (before?, self.last.as_ref()?);
        let rate = per_second(grown(&before, counts), (now - then).as_secs_f64());
        let before = std::mem::replace(&mut self.over, rate > self.limit.get());
        (before && self.over).then_some(rate)
    }

    /// The counter of each interrupt that is the function's own.
    fn counts(&self) -> BTreeMap<u32, u32> {
        let vectors = fs::read_dir(self.device.join("msi_irqs")).into_iter().flatten().flatten();
        let vectors = vectors.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let line = fs::read_to_string(self.device.join("irq")).ok().and_then(|text| text.trim().parse().ok());
        vectors.chain(line).filter_map(|irq: u32| Some((irq, self.count(irq)?))).collect()
    }

    fn count(&self, irq: u32) -> Option<u32> {
        let directory = self.counters.join(irq.to_string());
        // A line shared with others says nothing about this function, and one that only another function uses is not its own.
        let users = fs::read_to_string(directory.join("actions")).ok()?;
        if !users.contains(&self.user) || users.contains(',') {
            return None;
        }
        sum(&fs::read_to_string(directory.join("per_cpu_count")).ok()?)
    }
}

/// The sum of numbers like `17,0,4`; each wraps at 32 bits, and so may the sum.
fn sum(text: &str) -> Option<u32> {
    text.trim().split(',').try_fold(0u32, |sum, number| Some(sum.wrapping_add(number.parse().ok()?)))
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
    struct Host(tempfile::TempDir);

    impl Host {
        fn new() -> Self {
            let this = Self(tempfile::tempdir().unwrap());
            fs::create_dir_all(this.0.path().join("device/msi_irqs")).unwrap();
            fs::write(this.0.path().join("device/irq"), "11\n").unwrap();
            for irq in [30, 31] {
                fs::write(this.0.path().join(format!("device/msi_irqs/{irq}")), "msix\n").unwrap();
                this.count(irq, "vfio-msix[0](0000:03:00.0)", "0,0");
            }
            this.count(11, "", "7,7");
            this
        }

        fn count(&self, irq: u32, actions: &str, counts: &str) {
            let directory = self.0.path().join("irq").join(irq.to_string());
            fs::create_dir_all(&directory).unwrap();
            fs::write(directory.join("actions"), format!("{actions}\n")).unwrap();
            fs::write(directory.join("per_cpu_count"), format!("{counts}\n")).unwrap();
        }

        fn watch(&self, limit: u32) -> StormWatch {
            let limit = NonZeroU32::new(limit).unwrap();
            let mut watch = StormWatch::new(BDF.parse().unwrap(), self.0.path().join("device"), limit);
            watch.counters = self.0.path().join("irq");
            watch
        }
    }

    const SECOND: Duration = Duration::from_secs(1);
    const BDF: &str = "0000:03:00.0";

    #[test]
    fn too_many_twice_in_a_row_are_a_storm() {
        let (host, start) = (Host::new(), Instant::now());
        let mut watch = host.watch(1000);
        assert_eq!(watch.look(start), None);
        host.count(30, "vfio-msix[0](0000:03:00.0)", "900,200");
        assert_eq!(watch.look(start + SECOND), None, "a burst");
        host.count(31, "vfio-msix[1](0000:03:00.0)", "4000,0");
        assert_eq!(watch.look(start + 3 * SECOND), Some(2000));
        assert_eq!(watch.look(start + 4 * SECOND), None, "over");
    }

    #[test]
    fn bursts_with_a_rest_between_are_none() {
        let (host, start) = (Host::new(), Instant::now());
        let mut watch = host.watch(1000);
        for second in 0..10u32 {
            // As many again every other second.
            host.count(30, "vfio-msix[0](0000:03:00.0)", &format!("{},0", second / 2 * 5000));
            assert_eq!(watch.look(start + second * SECOND), None);
        }
    }

    #[test]
    fn a_line_that_is_shared_or_off_does_not_count() {
        let (host, start) = (Host::new(), Instant::now());
        let mut watch = host.watch(10);
        for (second, users) in
            [(0, "vfio-intx(0000:03:00.0),ahci"), (1, "vfio-intx(0000:03:00.0),ahci"), (2, ""), (3, "")]
        {
            host.count(11, users, &format!("{},0", second * 1000));
            assert_eq!(watch.look(start + second * SECOND), None);
        }
        for second in 4..7 {
            host.count(11, "vfio-intx(0000:03:00.0)", &format!("{},0", second * 1000));
            assert_eq!(watch.look(start + second * SECOND), (second == 6).then_some(1000));
        }
    }

    #[test]
    fn a_line_whose_only_user_is_another_driver_does_not_count() {
        let (host, start) = (Host::new(), Instant::now());
        let mut watch = host.watch(10);
        for (second, users) in (0..).zip(["ahci", "ahci", "vfio-intx(0000:03:00.1)", "vfio-intx(0000:03:00.1)"]) {
            host.count(11, users, &format!("{},0", second * 1000));
            assert_eq!(watch.look(start + second * SECOND), None, "{users}");
        }
    }

    #[test]
    fn counters_that_begin_anew_or_wrap_are_no_storm() {
        let before = BTreeMap::from([(30, 5_000_000), (31, 7)]);
        assert_eq!(grown(&before, &BTreeMap::from([(30, 12), (31, 9), (32, 4_000_000_000)])), 2);
        assert_eq!(sum("4294967295,3\n"), Some(2));
        assert_eq!(sum("nonsense"), None);
    }

    #[test]
    fn a_device_that_is_gone_does_not_count() {
        let mut watch = StormWatch::new(BDF.parse().unwrap(), "/no/such/device".into(), NonZeroU32::MIN);
        let start = Instant::now();
        assert_eq!((0..3).find_map(|second| watch.look(start + second * SECOND)), None);
    }
}
