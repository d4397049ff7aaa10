//! Binding, on a made-up bus on which writes do what the kernel would do.

use std::cell::RefCell;
use std::os::unix::fs::symlink;

use super::*;
use crate::host::sysfs::tests::FakeBus;

/// The kernel: functions have a driver of their own, and `vfio-pci` refuses one of them.
struct Kernel<'a> {
    bus: &'a FakeBus,
    refused: Option<&'a str>,
    writes: RefCell<Vec<String>>,
}

impl<'a> Kernel<'a> {
    fn new(bus: &'a FakeBus, refused: Option<&'a str>) -> Self {
        fs::create_dir_all(bus.0.path().join("drivers/vfio-pci")).unwrap();
        Self { bus, refused, writes: RefCell::default() }
    }

    fn write(&self, path: &Path, text: &str) -> Result<(), Error> {
        let path = path.strip_prefix(self.bus.0.path()).unwrap().to_str().unwrap();
        self.writes.borrow_mut().push(format!("{path}: {}", text.trim()));
        let bind = |bdf: &str, driver: &str| {
            let link = self.bus.0.path().join("devices").join(bdf).join("driver");
            if !link.exists() {
                symlink(self.bus.0.path().join("drivers").join(driver), link).unwrap();
            }
        };
        let words: Vec<_> = path.split('/').collect();
        match words[..] {
            ["devices", _, "driver_override"] => fs::write(self.bus.0.path().join(path), text).unwrap(),
            ["devices", bdf, "driver", "unbind"] => {
                fs::remove_file(self.bus.0.path().join("devices").join(bdf).join("driver")).unwrap();
            }
            ["drivers_probe"] => {
                let chosen = self.bus.0.path().join("devices").join(text).join("driver_override");
                match fs::read_to_string(chosen).unwrap_or_default().trim() {
                    "vfio-pci" if self.refused == Some(text) => {}
                    "" => bind(text, "e1000e"),
                    driver => bind(text, driver),
                }
            }
            ["drivers", driver, "bind"] => bind(text, driver),
            _ => panic!("{path}"),
        }
        Ok(())
    }

    fn bind(&self, devices: &[&HostDevice]) -> Result<Vec<Option<String>>, Error> {
        let devices: Vec<_> = devices.iter().map(|device| (*device).clone()).collect();
        bind_by(&devices, &|path, text| self.write(path, text))
    }
}

fn chosen(device: &HostDevice) -> String {
    fs::read_to_string(device.directory().join("driver_override")).unwrap_or_default().trim().into()
}

#[test]
fn a_function_whose_group_is_in_use_is_not_touched() {
    let bus = FakeBus::new();
    let nic = bus.add("0000:05:00.0", Some(7), Some("e1000e"));
    bus.add("0000:05:00.1", Some(7), Some("snd_hda_intel"));
    let kernel = Kernel::new(&bus, None);
    let error = kernel.bind(&[&nic]).unwrap_err().to_string();
    assert!(error.contains("`umbra bind 0000:05:00.0 0000:05:00.1`"), "{error}");
    assert!(kernel.writes.borrow().is_empty(), "{:?}", kernel.writes);
    assert_eq!(nic.driver().as_deref(), Some("e1000e"));
}

#[test]
fn the_functions_of_a_group_are_bound_together() {
    let bus = FakeBus::new();
    let nic = bus.add("0000:05:00.0", Some(7), Some("e1000e"));
    let card = bus.add("0000:05:00.1", Some(7), Some("snd_hda_intel"));
    let kernel = Kernel::new(&bus, None);
    let before = kernel.bind(&[&nic, &card]).unwrap();
    assert_eq!(before, [Some("e1000e".into()), Some("snd_hda_intel".into())]);
    assert!(nic.is_bound_to_vfio() && card.is_bound_to_vfio());
    kernel.writes.borrow_mut().clear();
    kernel.bind(&[&nic, &card]).unwrap();
    assert!(kernel.writes.borrow().is_empty(), "they are bound already");
}

#[test]
fn a_failure_midway_undoes_what_was_done() {
    let bus = FakeBus::new();
    let nic = bus.add("0000:05:00.0", Some(7), Some("e1000e"));
    let card = bus.add("0000:05:00.1", Some(7), Some("snd_hda_intel"));
    let idle = bus.add("0000:05:00.2", Some(7), None);
    fs::write(idle.directory().join("driver_override"), "pci-stub\n").unwrap();
    fs::write(nic.directory().join("driver_override"), "(null)\n").unwrap();
    let kernel = Kernel::new(&bus, Some("0000:05:00.1"));
    let error = kernel.bind(&[&nic, &idle, &card]).unwrap_err().to_string();
    assert!(error.contains("0000:05:00.1 was offered to vfio-pci"), "{error}");
    assert_eq!((nic.driver().as_deref(), chosen(&nic).as_str()), (Some("e1000e"), ""));
    assert_eq!((card.driver().as_deref(), chosen(&card).as_str()), (Some("snd_hda_intel"), ""));
    assert_eq!((idle.driver(), chosen(&idle).as_str()), (None, "pci-stub"));
}

#[test]
fn a_function_that_the_host_has_is_not_taken_from_it_to_be_given_back() {
    let bus = FakeBus::new();
    let nic = bus.add("0000:05:00.0", Some(7), Some("e1000e"));
    let kernel = Kernel::new(&bus, None);
    let write = |path: &Path, text: &str| kernel.write(path, text);
    for (chosen, writes) in [
        ("(null)\n", &[][..]),
        ("pci-stub\n", &[]),
        // `umbra bind` was killed, or the rule of `--persist` was read when the host's driver had the function.
        ("vfio-pci\n", &["devices/0000:05:00.0/driver_override: "]),
    ] {
        fs::write(nic.directory().join("driver_override"), chosen).unwrap();
        kernel.writes.borrow_mut().clear();
        assert_eq!(nic.give_back(&write).unwrap().as_deref(), Some("e1000e"));
        assert_eq!(*kernel.writes.borrow(), writes, "{chosen}");
    }
    kernel.bind(&[&nic]).unwrap();
    assert_eq!((nic.give_back(&write).unwrap().as_deref(), chosen(&nic).as_str()), (Some("e1000e"), ""));
    // As with the kernel's parameter `vfio-pci.ids`.
    kernel.bind(&[&nic]).unwrap();
    let again = |path: &Path, text: &str| match path.file_name().unwrap().to_str() {
        Some("drivers_probe") => kernel.write(&bus.0.path().join("drivers/vfio-pci/bind"), text),
        _ => kernel.write(path, text),
    };
    let error = nic.give_back(&again).unwrap_err().to_string();
    assert!(error.contains("vfio-pci has taken it again") && error.contains("vfio-pci.ids="), "{error}");
    nic.give_back(&write).unwrap();
    // As if `umbra bind` was killed when no driver had it.
    nic.release(&write).unwrap();
    nic.choose(VFIO_PCI, &write).unwrap();
    assert_eq!((nic.give_back(&write).unwrap().as_deref(), chosen(&nic).as_str()), (Some("e1000e"), ""));
}
