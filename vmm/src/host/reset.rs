//! Resetting a PCI function between two lives of its driver, through sysfs (`reset_method`, `reset`), or with its slot
//! ([`super::hot_reset`]).
//!
//! The invariant: bus mastering is cleared first, so that a device without any reset at least stops its DMA
//! until the next driver switches it on. `vfio-pci` resets by the same methods itself when its device
//! file is opened and after it is closed for good.
//! The kernel prefers `pm` to `bus`; here `bus` comes first. Many devices keep their rings through D3hot, and such a device writes
//! into its next driver VM at addresses of its last life. The kernel does `bus` only where nothing else is on that bus; where other
//! functions are and all are in hand, the whole slot is reset (`hot`). The kernel's own order is put back afterwards, so that
//! `vfio-pci`'s resets at open and close stay quick.
//!
//! A user that may not write to sysfs has VFIO do both, and the kernel's order as it stands: `umbra bind --for` leaves a good one.

use std::fmt;
use std::fs::{self, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use super::error::Error;
use super::files::DeviceFiles;
use super::hot_reset::Siblings;
use super::sysfs::HostDevice;

/// PCI command register (PCI 3.0, section 6.2.2).
const COMMAND: u64 = 4;
/// Its bus master bit.
const COMMAND_MASTER: u16 = 1 << 2;

/// A way to reset a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResetMethod {
    /// A routine in the kernel for this very device.
    DeviceSpecific,
    /// The firmware's `_RST`.
    Acpi,
    /// Function-level reset (PCI Express).
    Flr,
    /// Function-level reset (conventional PCI, Advanced Features).
    AfFlr,
    /// Power management: D3hot and back.
    Pm,
    /// Secondary bus reset of the bridge or slot above.
    Bus,
    /// Secondary bus reset of a CXL port.
    CxlBus,
    /// The whole slot, with functions beside this one that are all in hand, by `vfio-pci`.
    Hot,
    /// A method that the kernel does not name (older than 5.15) or this program does not know.
    Other,
}

impl ResetMethod {
    /// Of the word that [`Self::word`] gives; [`Self::Other`] of one that is not known.
    pub(crate) fn from_word(word: &str) -> Self {
        match word {
            "device_specific" => Self::DeviceSpecific,
            "acpi" => Self::Acpi,
            "flr" => Self::Flr,
            "af_flr" => Self::AfFlr,
            "pm" => Self::Pm,
            "bus" => Self::Bus,
            "cxl_bus" => Self::CxlBus,
            "hot" => Self::Hot,
            _ => Self::Other,
        }
    }

    /// The kernel's word for it; `hot` is VFIO's.
    pub fn word(self) -> &'static str {
        match self {
            Self::DeviceSpecific => "device_specific",
            Self::Acpi => "acpi",
            Self::Flr => "flr",
            Self::AfFlr => "af_flr",
            Self::Pm => "pm",
            Self::Bus => "bus",
            Self::CxlBus => "cxl_bus",
            Self::Hot => "hot",
            Self::Other => "other",
        }
    }
}

impl fmt::Display for ResetMethod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// The word for a method that may not be there.
pub fn word(method: Option<ResetMethod>) -> &'static str {
    method.map_or("none", ResetMethod::word)
}

/// The methods for one function, best first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reset {
    methods: Vec<ResetMethod>,
    /// Nothing else is behind the same bridge.
    alone: bool,
    /// Why the whole slot cannot be reset, if it has other functions.
    in_the_way: Option<String>,
}

impl Reset {
    /// From the content of `reset_method`, whether there is a file `reset` (older kernels have that alone), and what else
    /// is in the slot.
    pub(crate) fn new(methods: Option<&str>, has_reset: bool, siblings: Siblings) -> Self {
        let mut methods: Vec<_> = match methods {
            Some(words) => words.split_whitespace().map(ResetMethod::from_word).collect(),
            None if has_reset => vec![ResetMethod::Other],
            None => Vec::new(),
        };
        // The kernel lists it for the first function of a card, because it looks before the others have come, and then
        // refuses it.
        let alone = siblings == Siblings::Nobody;
        methods.retain(|method| *method != ResetMethod::Bus || alone);
        // A method without a name here cannot be put in order.
        let has_better = methods.iter().any(|method| matches!(method, ResetMethod::Bus | ResetMethod::Other));
        let in_the_way = match siblings {
            Siblings::InHand if !has_better => {
                methods.push(ResetMethod::Hot);
                None
            }
            Siblings::InTheWay(why) if !has_better => Some(why),
            Siblings::Nobody | Siblings::InHand | Siblings::InTheWay(_) => None,
        };
        methods.sort_by_key(|method| match method {
            ResetMethod::Pm => 2,
            ResetMethod::Hot => 1,
            _ => 0,
        });
        Self { methods, alone, in_the_way }
    }

    /// The method that is tried first.
    pub fn best(&self) -> Option<ResetMethod> {
        self.methods.first().copied()
    }

    /// All methods, best first.
    pub fn methods(&self) -> &[ResetMethod] {
        &self.methods
    }

    /// The words of `order`, which once stood in `reset_method`, that the kernel takes again: not the bus reset that it had
    /// listed before the others behind the bridge came.
    pub fn acceptable_order(&self, order: &str) -> String {
        let accepts = |word: &&str| self.alone || ResetMethod::from_word(word) != ResetMethod::Bus;
        order.split_whitespace().filter(accepts).collect::<Vec<_>>().join(" ")
    }

    /// A sentence on the best method, for people.
    pub fn describe(&self) -> String {
        self.describe_use(self.best())
    }

    /// As [`Self::describe`], where `method` is the one that was used.
    pub fn describe_use(&self, method: Option<ResetMethod>) -> String {
        let mut sentence = String::from(meaning(method));
        if let (None | Some(ResetMethod::Pm), Some(why)) = (method, &self.in_the_way) {
            sentence.push_str(&format!("; its slot cannot be reset as a whole: {why}"));
        }
        sentence
    }
}

fn meaning(method: Option<ResetMethod>) -> &'static str {
    match method {
        Some(ResetMethod::Flr | ResetMethod::AfFlr) => "function-level reset: the device starts each life clean",
        Some(ResetMethod::Bus | ResetMethod::CxlBus) => {
            "bus reset: the device starts each life clean, together with everything behind the same bridge"
        }
        Some(ResetMethod::Hot) => {
            "reset of the whole slot: the device starts each life clean, together with the other functions of its slot, \
             which nobody else can have"
        }
        Some(ResetMethod::Pm) => {
            "power-management reset (D3hot and back): most devices lose their registers; one that keeps them may write to \
             the memory of its own new driver VM at addresses of the last life; no other memory is in its reach"
        }
        Some(ResetMethod::DeviceSpecific) => "the kernel has a reset routine for this very device",
        Some(ResetMethod::Acpi) => "the firmware resets the device (ACPI _RST)",
        Some(ResetMethod::Other) => "the kernel can reset the device, by a method it does not name",
        None => {
            "no reset method: bus mastering is cleared between two lives, but the device keeps its registers, and from \
             the moment the next driver enables bus mastering until it has set the device up, the device may write to \
             the memory of its own new driver VM at addresses of the last life; no other memory is in its reach"
        }
    }
}

/// What a reset did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResetDone {
    /// The method that succeeded; `None`: it has none, only bus mastering was cleared.
    pub method: Option<ResetMethod>,
    /// How long it took.
    pub took: Duration,
}

impl HostDevice {
    /// Stops the function's DMA, then resets it by the best method there is. It is open as `files`, and no VM may have it.
    ///
    /// The kernel waits up to a minute for a device that does not come back; after `limit` this gives up and
    /// leaves a thread behind that waits on.
    pub fn perform_reset(&self, files: &Arc<DeviceFiles>, limit: Duration) -> Result<ResetDone, Error> {
        let start = Instant::now();
        self.clear_bus_master(files)?;
        let method = self.reset_in_order(files, start + limit)?;
        Ok(ResetDone { method, took: start.elapsed() })
    }

    /// Clears the bus master bit in the configuration space.
    fn clear_bus_master(&self, files: &DeviceFiles) -> Result<(), Error> {
        let path = self.directory().join("config");
        let failed = |operation, source| Error::Sysfs { operation, path: path.clone(), source };
        let config = match OpenOptions::new().read(true).write(true).open(&path) {
            Err(error) if error.kind() == ErrorKind::PermissionDenied => {
                let failed = |source| Error::Vfio { operation: "clear bus mastering", bdf: self.bdf(), source };
                return files.stop_dma().map_err(failed);
            }
            opened => opened.map_err(|e| failed("open", e))?,
        };
        let mut command = [0; 2];
        config.read_exact_at(&mut command, COMMAND).map_err(|e| failed("read the command register in", e))?;
        let value = u16::from_le_bytes(command);
        // All ones: the device is gone or off the bus, there is nothing to switch off.
        if value & COMMAND_MASTER == 0 || value == u16::MAX {
            return Ok(());
        }
        let cleared = (value & !COMMAND_MASTER).to_le_bytes();
        config.write_all_at(&cleared, COMMAND).map_err(|e| failed("clear bus mastering in", e))
    }

    /// The methods for the function that is open as `files`: without a hot reset that sysfs allows and VFIO does not.
    fn reset_of(&self, files: &DeviceFiles) -> Reset {
        let mut reset = self.reset();
        if reset.methods.contains(&ResetMethod::Hot)
            && let Err(error) =
                self.required_group().map_err(io::Error::other).and_then(|group| files.check_hot_reset(group))
        {
            tracing::warn!("{}: there is no hot reset: {error}", self.bdf());
            reset.methods.retain(|method| *method != ResetMethod::Hot);
        }
        reset
    }

    /// The words that have the kernel try the function's reset methods in the order of [`Reset::methods`]; `None` where there is nothing
    /// to order.
    pub(crate) fn reset_order(&self) -> Option<String> {
        let reset = self.reset();
        let named: Vec<_> = reset.methods().iter().filter(|method| **method != ResetMethod::Hot).collect();
        // A method whose word is not known here cannot be named to the kernel.
        let ordered = named.len() > 1 && !named.contains(&&ResetMethod::Other);
        ordered.then(|| named.iter().map(|method| method.word()).collect::<Vec<_>>().join(" "))
    }

    /// Gives the kernel that order, for whoever may not change it later.
    ///
    /// # Errors
    ///
    /// It does not take it.
    pub fn order_resets(&self) -> Result<(), Error> {
        self.reset_order().map_or(Ok(()), |order| self.write_order(&order))
    }

    fn write_order(&self, words: &str) -> Result<(), Error> {
        let path = self.directory().join("reset_method");
        fs::write(&path, words).map_err(|source| Error::Sysfs { operation: "order the reset methods in", path, source })
    }

    /// Resets by the first of [`Reset::methods`] that succeeds. Where the kernel has another order, that is put aside meanwhile.
    fn reset_in_order(&self, files: &Arc<DeviceFiles>, deadline: Instant) -> Result<Option<ResetMethod>, Error> {
        let path = self.directory().join("reset_method");
        let reset = self.reset_of(files);
        let kernels = fs::read_to_string(&path).unwrap_or_default();
        let words: Vec<_> = reset.methods().iter().map(|method| method.word()).collect();
        let own = reset.acceptable_order(&kernels);
        let in_order = words.join(" ") == own;
        // A method whose word is not known here cannot be named to the kernel.
        if in_order || reset.methods().contains(&ResetMethod::Other) || !is_writable(&path) {
            return self.reset_as_it_stands(files, &reset, &own, deadline);
        }
        let (mut outcome, mut put_aside) = (Ok(None), false);
        for method in reset.methods() {
            let done = if *method == ResetMethod::Hot {
                self.hot_reset(files, deadline)
            } else {
                put_aside = true;
                self.write_order(method.word()).and_then(|()| self.write_reset(files, deadline))
            };
            outcome = done.map(|()| Some(*method));
            match &outcome {
                Err(error) if Instant::now() < deadline => tracing::debug!(%method, %error, "the reset method failed"),
                _ => break,
            }
        }
        if put_aside {
            self.write_order(&own)?;
        }
        outcome
    }

    /// Resets by the first of the methods in the kernel's `order`; but with the whole slot, if that is best: VFIO needs no order for it.
    fn reset_as_it_stands(
        &self,
        files: &Arc<DeviceFiles>,
        reset: &Reset,
        order: &str,
        deadline: Instant,
    ) -> Result<Option<ResetMethod>, Error> {
        if reset.best() == Some(ResetMethod::Hot) {
            match self.hot_reset(files, deadline) {
                Ok(()) => return Ok(Some(ResetMethod::Hot)),
                Err(error) => tracing::debug!(%error, "the hot reset failed"),
            }
        }
        let first = order.split_whitespace().next().map(ResetMethod::from_word);
        match first.or(reset.best()) {
            Some(method) if method != ResetMethod::Hot => self.write_reset(files, deadline).map(|()| Some(method)),
            _ => Ok(None),
        }
    }

    fn write_reset(&self, files: &Arc<DeviceFiles>, deadline: Instant) -> Result<(), Error> {
        let path = self.directory().join("reset");
        let (file, files) = (path.clone(), Arc::clone(files));
        let failed = |source| Error::Sysfs { operation: "reset the device by writing to", path, source };
        self.within(deadline, failed, move || match fs::write(file, "1") {
            Err(error) if error.kind() == ErrorKind::PermissionDenied => files.reset(),
            done => done,
        })
    }

    fn hot_reset(&self, files: &Arc<DeviceFiles>, deadline: Instant) -> Result<(), Error> {
        let files = Arc::clone(files);
        let failed = |source| Error::Vfio { operation: "reset the whole slot", bdf: self.bdf(), source };
        self.within(deadline, failed, move || files.hot_reset())
    }

    /// Has a thread do `work`, and waits for it until `deadline`.
    fn within(
        &self,
        deadline: Instant,
        failed: impl FnOnce(io::Error) -> Error,
        work: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> Result<(), Error> {
        let (sender, receiver) = mpsc::channel();
        let thread = thread::Builder::new().name(format!("reset {}", self.bdf()));
        if let Err(error) = thread.spawn(move || sender.send(work())) {
            return Err(failed(error));
        }
        let start = Instant::now();
        match receiver.recv_timeout(deadline.saturating_duration_since(start)) {
            Ok(result) => result.map_err(failed),
            Err(_) => Err(Error::ResetTimeout { bdf: self.bdf(), limit_s: deadline.duration_since(start).as_secs() }),
        }
    }
}

fn is_writable(path: &Path) -> bool {
    OpenOptions::new().write(true).open(path).is_ok()
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::super::sysfs::tests::FakeBus;
    use super::*;

    fn device_with_command(bus: &FakeBus, command: u16) -> HostDevice {
        let device = bus.add("0000:01:00.0", Some(1), Some("vfio-pci"));
        let mut config = vec![0; 256];
        config[4..6].copy_from_slice(&command.to_le_bytes());
        fs::write(device.directory().join("config"), config).unwrap();
        device
    }

    /// Files that know no request of VFIO.
    fn files(device: &HostDevice) -> Arc<DeviceFiles> {
        let null = || File::open("/dev/null").unwrap().into();
        Arc::new(DeviceFiles::received(device.bdf(), vec![null(), null(), null()]).unwrap())
    }

    fn perform(device: &HostDevice) -> ResetDone {
        device.perform_reset(&files(device), Duration::from_secs(5)).unwrap()
    }

    #[test]
    fn methods_are_the_kernels_but_pm_is_the_last_resort() {
        let new = |methods, has_reset| Reset::new(methods, has_reset, Siblings::Nobody);
        let reset = new(Some("flr pm bus\n"), true);
        assert_eq!(reset.methods(), [ResetMethod::Flr, ResetMethod::Bus, ResetMethod::Pm]);
        assert_eq!(new(Some("\n"), false).best(), None);
        assert_eq!(new(None, true).best(), Some(ResetMethod::Other));
        assert!(new(None, false).describe().contains("own new driver VM"));
    }

    #[test]
    fn a_slot_in_hand_is_reset_as_a_whole_rather_than_by_pm() {
        let new = |methods| Reset::new(methods, true, Siblings::InHand);
        assert_eq!(new(Some("flr pm")).methods(), [ResetMethod::Flr, ResetMethod::Hot, ResetMethod::Pm]);
        assert_eq!(new(Some("")).best(), Some(ResetMethod::Hot));
        assert!(new(Some("pm")).describe().contains("other functions of its slot"));
        assert_eq!(new(Some("pm bus")).methods(), [ResetMethod::Hot, ResetMethod::Pm]);
        assert_eq!(new(None).methods(), [ResetMethod::Other]);
    }

    #[test]
    fn what_keeps_a_slot_from_its_reset_is_said_where_it_is_missed() {
        let new = |methods| Reset::new(Some(methods), true, Siblings::InTheWay("0000:01:00.1 is there".into()));
        for methods in ["pm", ""] {
            let said = new(methods).describe();
            assert!(said.ends_with("; its slot cannot be reset as a whole: 0000:01:00.1 is there"), "{said}");
        }
        assert!(!new("flr pm").describe().contains("slot"));
        assert!(new("flr pm").describe_use(Some(ResetMethod::Pm)).contains("slot"));
    }

    #[test]
    fn without_vfios_word_for_it_there_is_no_hot_reset() {
        let bus = FakeBus::new();
        let device = bus.add_behind("0000:00:1c.0", "0000:01:00.0", Some(1), Some("vfio-pci"));
        bus.add_behind("0000:00:1c.0", "0000:01:00.1", Some(1), Some("vfio-pci"));
        fs::write(device.directory().join("config"), [0; 256]).unwrap();
        fs::write(device.directory().join("reset_method"), "pm bus\n").unwrap();
        fs::write(device.directory().join("reset"), "").unwrap();
        assert_eq!(device.reset().best(), Some(ResetMethod::Hot));
        assert_eq!(perform(&device).method, Some(ResetMethod::Pm));
        assert_eq!(
            fs::read_to_string(device.directory().join("reset_method")).unwrap(),
            "pm bus\n",
            "nothing to order"
        );
        fs::write(device.directory().join("reset_method"), "\n").unwrap();
        assert_eq!(perform(&device).method, None);
    }

    #[test]
    fn bus_mastering_is_cleared_before_the_reset() {
        let bus = FakeBus::new();
        let device = device_with_command(&bus, 0x0107);
        fs::write(device.directory().join("reset_method"), "pm\n").unwrap();
        fs::write(device.directory().join("reset"), "").unwrap();
        assert_eq!(perform(&device).method, Some(ResetMethod::Pm));
        assert_eq!(fs::read(device.directory().join("config")).unwrap()[4..6], [0x03, 0x01]);
        assert_eq!(fs::read(device.directory().join("reset")).unwrap(), b"1");
    }

    #[test]
    fn the_kernels_order_stands_again_after_the_reset() {
        let bus = FakeBus::new();
        let device = device_with_command(&bus, 0);
        fs::write(device.directory().join("reset_method"), "pm bus\n").unwrap();
        fs::write(device.directory().join("reset"), "").unwrap();
        assert_eq!(perform(&device).method, Some(ResetMethod::Bus));
        assert_eq!(fs::read_to_string(device.directory().join("reset_method")).unwrap(), "pm bus");
    }

    #[test]
    fn an_order_is_given_where_there_is_one_and_all_words_are_known() {
        let bus = FakeBus::new();
        let device = device_with_command(&bus, 0);
        let path = device.directory().join("reset_method");
        for (before, after) in [("pm bus\n", "bus pm"), ("flr\n", "flr\n"), ("\n", "\n"), ("new pm\n", "new pm\n")] {
            fs::write(&path, before).unwrap();
            device.order_resets().unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), after);
        }
        fs::remove_file(&path).unwrap();
        device.order_resets().unwrap();
        assert!(!path.exists(), "a kernel that has no order");
    }

    #[test]
    fn where_the_order_cannot_be_changed_the_kernel_s_first_method_is_what_was_used() {
        let bus = FakeBus::new();
        let device = device_with_command(&bus, 0);
        fs::write(device.directory().join("reset"), "").unwrap();
        let used = |methods: &str| {
            let (files, reset) = (files(&device), Reset::new(Some(methods), true, Siblings::Nobody));
            device.reset_as_it_stands(&files, &reset, methods, Instant::now() + Duration::from_secs(60)).unwrap()
        };
        assert_eq!(used("pm bus"), Some(ResetMethod::Pm));
        assert_eq!(used("bus pm"), Some(ResetMethod::Bus));
        assert_eq!(used(""), None);
        let (files, reset) = (files(&device), Reset::new(Some("pm"), true, Siblings::InHand));
        assert_eq!(reset.best(), Some(ResetMethod::Hot));
        let used = device.reset_as_it_stands(&files, &reset, "pm", Instant::now() + Duration::from_secs(60)).unwrap();
        assert_eq!(used, Some(ResetMethod::Pm), "these files know no hot reset");
    }

    #[test]
    fn a_device_without_a_method_still_loses_bus_mastering() {
        let bus = FakeBus::new();
        let device = device_with_command(&bus, 0x0006);
        assert_eq!(perform(&device).method, None);
        assert_eq!(fs::read(device.directory().join("config")).unwrap()[4], 0x02);
        assert!(!device.directory().join("reset").exists());
    }
}
