//! The PC's fixed ports: serial line, ACPI power management, pvpanic, reset controls, clock. One `match` from
//! port to device; what nobody answers reads as ones.

mod backlog;
mod cmos;
mod output;
mod power;
mod pvpanic;
mod serial;
mod state;

use std::sync::{Arc, Mutex};

use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;

pub use backlog::{Backlog, KEPT, Part};
pub use power::SLEEP_TYPE_S5;
pub use serial::{Error as SerialError, SerialLine};
pub use state::LegacyState;

use cmos::Cmos;
use power::{Action, PowerManagement};
use pvpanic::Pvpanic;

use super::end::End;
use super::layout;
use crate::base::lock::lock;
use crate::wire::messages::VmEnd;

/// Command of the keyboard controller that pulses the CPU's reset line.
const I8042_RESET: u8 = 0xfe;
/// Reset control register: reset the CPU.
const RESET_CPU: u8 = 1 << 2;

/// The devices on fixed ports.
pub struct Legacy {
    vm: Arc<VmFd>,
    end: Arc<End>,
    serial: Arc<Mutex<SerialLine>>,
    power: Mutex<PowerManagement>,
    cmos: Mutex<Cmos>,
    pvpanic: Pvpanic,
}

impl Legacy {
    /// The devices of `vm`. `panicked` is signalled when the guest says for the first time that it has panicked.
    pub fn new(vm: Arc<VmFd>, end: Arc<End>, serial: Arc<Mutex<SerialLine>>, panicked: EventFd) -> Self {
        Self { vm, end, serial, power: Mutex::default(), cmos: Mutex::default(), pvpanic: Pvpanic::new(panicked) }
    }

    /// Reads a port; false if it is none of these devices'.
    pub fn read(&self, port: u16, data: &mut [u8]) -> bool {
        let one = |data: &mut [u8], value| {
            data.fill(0xff);
            if let Some(first) = data.first_mut() {
                *first = value;
            }
        };
        match port {
            layout::COM1..=layout::COM1_LAST => one(data, lock(&self.serial).read(port - layout::COM1)),
            layout::PM1A_EVENT..=layout::ACPI_LAST => lock(&self.power).read(port - layout::PM1A_EVENT, data),
            layout::PVPANIC => one(data, self.pvpanic.read()),
            layout::CMOS_INDEX | layout::CMOS_DATA => one(data, lock(&self.cmos).read(port)),
            // Keyboard controller: nothing received, ready for commands.
            layout::I8042_DATA | layout::I8042_COMMAND => one(data, 0),
            layout::RESET_CONTROL if data.len() == 1 => one(data, 0),
            _ => return false,
        }
        true
    }

    /// Writes a port; false if it is none of these devices'.
    pub fn write(&self, port: u16, data: &[u8]) -> bool {
        let first = data.first().copied().unwrap_or_default();
        match port {
            layout::COM1..=layout::COM1_LAST => lock(&self.serial).write(port - layout::COM1, first),
            layout::PM1A_EVENT..=layout::ACPI_LAST => self.power(|power| power.write(port - layout::PM1A_EVENT, data)),
            layout::PVPANIC => self.pvpanic.write(first),
            layout::CMOS_INDEX | layout::CMOS_DATA => lock(&self.cmos).write(port, first),
            layout::I8042_COMMAND if first == I8042_RESET => self.end.set(VmEnd::Reset),
            layout::RESET_CONTROL if data.len() == 1 && first & RESET_CPU != 0 => self.end.set(VmEnd::Reset),
            layout::I8042_DATA | layout::I8042_COMMAND => {}
            layout::RESET_CONTROL if data.len() == 1 => {}
            _ => return false,
        }
        true
    }

    /// Presses the power button.
    pub fn press_power_button(&self) {
        self.power(|power| {
            power.press_button();
            Action::None
        });
    }

    /// Tells the guest that the VM has another generation ID. In a VM that is restored the interrupt controllers have their state: it
    /// would overwrite the interrupt.
    pub fn change_generation_id(&self) {
        self.power(|power| {
            power.change_generation_id();
            Action::None
        });
    }

    fn power(&self, act: impl FnOnce(&mut PowerManagement) -> Action) {
        let mut power = lock(&self.power);
        let before = power.interrupts();
        let action = act(&mut power);
        let after = power.interrupts();
        if before != after
            && let Err(error) = self.vm.set_irq_line(layout::SCI_IRQ, after)
        {
            tracing::warn!(%error, "set the SCI");
        }
        drop(power);
        if action == Action::PowerOff {
            self.end.set(VmEnd::PowerOff);
        }
    }
}
