//! A machine file: no text panics, and a machine that is accepted is the same when it is printed and read again.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use umbra_vmm::config::Machine;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(machine) = Machine::parse(text, Path::new("m.toml")) else { return };
    let printed = machine.to_string();
    let again = Machine::parse(&printed, Path::new("m.toml")).expect("what is printed is a machine");
    assert_eq!(machine, again, "{printed}");
});
