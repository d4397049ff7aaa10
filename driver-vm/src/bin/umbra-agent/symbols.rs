//! Where functions of the kernel are.

use std::fs::File;
use std::io::{BufRead, BufReader};

use umbra_driver_vm::protocol::MAX_PANIC_ENTRIES;

use crate::kernel_log;

/// What a kernel calls first when it dies: at a fault of its own (`oops_enter` comes before its report and, with `oops=panic`, ends
/// in a panic), and at anything else that it cannot survive.
const DYING: [&str; 2] = ["oops_enter", "panic"];
const _: () = assert!(DYING.len() <= MAX_PANIC_ENTRIES);

/// The addresses of the functions that the kernel calls first when it dies. Empty where it does not say: a kernel without
/// `CONFIG_KALLSYMS`.
pub fn panic_entries() -> Vec<u64> {
    let entries = File::open("/proc/kallsyms").map(|file| addresses(BufReader::with_capacity(1 << 16, file)));
    entries.unwrap_or_else(|error| {
        kernel_log::error(&format!("cannot read the kernel's symbols: {error}"));
        Vec::new()
    })
}

/// Of [`DYING`], what is in `symbols`: lines of "ADDRESS TYPE NAME", those of modules with "[MODULE]" behind, which come last. An address
/// of 0 is one that the kernel does not tell.
fn addresses(mut symbols: impl BufRead) -> Vec<u64> {
    let (mut found, mut line) = (Vec::new(), String::new());
    while found.len() < DYING.len() {
        line.clear();
        if !symbols.read_line(&mut line).is_ok_and(|read| read > 0) {
            break;
        }
        let mut words = line.split_ascii_whitespace();
        let (Some(address), Some(_), Some(name), module) = (words.next(), words.next(), words.next(), words.next())
        else {
            continue;
        };
        if module.is_some() {
            break;
        }
        if DYING.contains(&name)
            && let Ok(address @ 1..) = u64::from_str_radix(address, 16)
        {
            found.push(address);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_s_own_are_found_and_those_of_modules_are_not() {
        let symbols = "ffffffff81000000 T _text\nffffffff81c00000 t panic_print\nffffffff81c00010 T panic\n\
            ffffffffc0000000 t oops_enter\t[e1000e]\n";
        assert_eq!(addresses(symbols.as_bytes()), [0xffff_ffff_81c0_0010]);
        let symbols = "ffffffff810a1b20 T oops_enter\nffffffff81c00010 T panic\nffffffff81c00020 T panic\n";
        assert_eq!(addresses(symbols.as_bytes()), [0xffff_ffff_810a_1b20, 0xffff_ffff_81c0_0010]);
        for nothing in
            [&b"0000000000000000 T panic\n0000000000000000 T oops_enter\n"[..], b"\nnonsense\nx T panic\n\xff\xff\n"]
        {
            assert!(addresses(nothing).is_empty());
        }
    }
}
