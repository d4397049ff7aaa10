//! The chips that KVM emulates for all vCPUs: interrupt controllers, timer, clock.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip, kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use super::Error;

/// The interrupt controllers, in the order in which they are restored.
const IRQCHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

/// The state of the chips.
#[derive(Debug, Serialize, Deserialize)]
pub struct ChipsState {
    irqchips: [kvm_irqchip; IRQCHIPS.len()],
    pit: kvm_pit_state2,
    /// Nanoseconds of the VM's clock (kvmclock).
    clock: u64,
}

impl ChipsState {
    /// Takes the state; no vCPU may run.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn take(vm: &VmFd) -> Result<Self, Error> {
        let clock = vm.get_clock().map_err(Error::kvm("KVM_GET_CLOCK"))?.clock;
        let mut irqchips = IRQCHIPS.map(|chip_id| kvm_irqchip { chip_id, ..Default::default() });
        for chip in &mut irqchips {
            vm.get_irqchip(chip).map_err(Error::kvm("KVM_GET_IRQCHIP"))?;
        }
        let pit = vm.get_pit2().map_err(Error::kvm("KVM_GET_PIT2"))?;
        Ok(Self { irqchips, pit, clock })
    }

    pub(super) fn restore(&self, vm: &VmFd) -> Result<(), Error> {
        // The timer first: set behind the controllers, its interrupt would come a second time.
        vm.set_pit2(&self.pit).map_err(Error::kvm("KVM_SET_PIT2"))?;
        for (chip, chip_id) in self.irqchips.iter().zip(IRQCHIPS) {
            let chip = kvm_irqchip { chip_id, ..*chip };
            vm.set_irqchip(&chip).map_err(Error::kvm("KVM_SET_IRQCHIP"))?;
        }
        // Without a flag: the clock goes on where it stood, however long ago that was.
        let clock = kvm_clock_data { clock: self.clock, ..Default::default() };
        vm.set_clock(&clock).map_err(Error::kvm("KVM_SET_CLOCK"))
    }
}
