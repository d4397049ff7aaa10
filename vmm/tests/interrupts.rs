//! MSI vectors as devices use them, against KVM: an eventfd write becomes an interrupt in the guest, and one
//! that was written while the vector was masked is not lost.
#![allow(clippy::unwrap_used)]

mod common;

use std::time::{Duration, Instant};

use common::{Code, Files, elf, kvm};
use umbra_vmm::vm::interrupt::MsiMessage;
use umbra_vmm::vm::machine::unused::Unused;
use umbra_vmm::vm::machine::vm::Vm;

/// The vector in the message, and what the handler prints.
const VECTOR: u8 = 0x40;

/// Prints `r`, then waits for interrupts; the handler prints `M` and acknowledges.
fn guest() -> Vec<u8> {
    const HANDLER: u32 = 0x10_0100;
    const IDT: u32 = 0x10_1000;
    let entry = IDT + u32::from(VECTOR) * 16;
    let mut code = Code::new();
    // mov esp, 0x110000; mov edi, entry
    code = code.raw(&[0xbc, 0, 0, 0x11, 0, 0xbf]).raw(&entry.to_le_bytes());
    // mov dword [rdi], selector << 16 | offset[15:0]
    code = code.raw(&[0xc7, 0x07]).raw(&(0x10 << 16 | (HANDLER & 0xffff)).to_le_bytes());
    // mov dword [rdi+4], offset[31:16] << 16 | present interrupt gate
    code = code.raw(&[0xc7, 0x47, 4]).raw(&(HANDLER & 0xffff_0000 | 0x8e00).to_le_bytes());
    // lidt [pointer]
    code = code.raw(&[0x0f, 0x01, 0x1c, 0x25]).raw(&(HANDLER + 0x80).to_le_bytes());
    // Local APIC on: mov ebx, 0xfee000f0; mov dword [rbx], 0x1ff
    code = code.raw(&[0xbb, 0xf0, 0, 0xe0, 0xfe, 0xc7, 0x03, 0xff, 0x01, 0, 0]);
    // sti; loop: hlt; jmp loop
    code = code.print("r").raw(&[0xfb, 0xf4, 0xeb, 0xfd]);
    code.0.resize(0x100, 0x90);
    // handler: print M; EOI: mov ebx, 0xfee000b0; mov dword [rbx], 0; iretq
    code = code.print("M").raw(&[0xbb, 0xb0, 0, 0xe0, 0xfe, 0xc7, 0x03, 0, 0, 0, 0, 0x48, 0xcf]);
    code.0.resize(0x180, 0x90);
    // The table's limit and address.
    code.raw(&0xfffu16.to_le_bytes()).raw(&u64::from(IDT).to_le_bytes()).0
}

fn wait_for(files: &Files, text: &str) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while files.printed() != text {
        assert!(Instant::now() < deadline, "the guest printed {:?}, not {text:?}", files.printed());
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn an_eventfd_interrupts_and_masked_interrupts_wait() {
    if !kvm() {
        return;
    }
    let files = Files::new(&elf(&guest()));
    let spec = files.spec();
    let memory = umbra_vmm::vm::machine::memory::create(&spec.name, spec.memory.0).unwrap();
    let vm = Vm::new(&spec, memory, Unused::default()).unwrap();
    let mut vector = vm.interrupts.msi_vector().unwrap();
    let vcpus = vm.start(vm.load(&spec).unwrap(), || Ok::<_, umbra_vmm::vm::machine::vm::Error>(())).unwrap();
    wait_for(&files, "r");

    let message = MsiMessage { address: 0xfee0_0000, data: VECTOR.into() };
    vector.unmask(message).unwrap();
    vector.event().write(1).unwrap();
    wait_for(&files, "rM");

    vector.mask().unwrap();
    vector.event().write(1).unwrap();
    assert!(vector.is_pending());
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(files.printed(), "rM");
    vector.unmask(message).unwrap();
    wait_for(&files, "rMM");
    assert!(!vector.is_pending());
    vcpus.stop();
}
