//! A snapshot's file: no bytes panic, what is accepted fits into the file and into the memory. The checksums are made right first,
//! so that what is behind them is reached.
#![no_main]

use libfuzzer_sys::fuzz_target;
use umbra_vmm::vm::snapshot::description::Description;
use umbra_vmm::vm::snapshot::format::{Contents, Key, MAX_DESCRIPTION, MAX_MEMORY, PAGE, Summary, VERSION, checksum};

/// Where the header's fields are.
const DESCRIPTION: usize = 12;
const KEY: usize = 16;
const MEMORY: usize = 48;
const PAGES: usize = 56;
const RUNS: usize = 64;
const STATE: usize = 72;
const RUNS_SUM: usize = 80;
const STATE_SUM: usize = 88;
const DESCRIPTION_SUM: usize = 96;
const SUM: usize = 104;
/// Bytes of an entry of the run table.
const RUN: u64 = 24;

fuzz_target!(|data: &[u8]| {
    let Some((kind, data)) = data.split_first() else { return };
    let mut file = data.to_vec();
    // The fields, the description and the zeros behind them, and the rest.
    if kind & 1 != 0 && file.len() >= SUM {
        let mut rest = file.split_off(SUM);
        let described = rest
            .len()
            .min(usize::from(u16::from_le_bytes([file[DESCRIPTION], file[DESCRIPTION + 1]])) % MAX_DESCRIPTION);
        file.extend([0; 8]);
        file.extend(rest.drain(..described));
        file.resize(PAGE, 0);
        file.extend(rest);
        file[..8].copy_from_slice(b"UMBRASNP");
        file[8..DESCRIPTION].copy_from_slice(&VERSION.to_le_bytes());
        file[DESCRIPTION..KEY].copy_from_slice(&(described as u32).to_le_bytes());
        seal(&mut file, described);
    }
    let summary = Summary::read(&file[..]);
    if let Ok(summary) = &summary {
        assert!(summary.description.len() <= MAX_DESCRIPTION);
        // As text it is read or refused.
        let _ = Description::decode(&summary.description);
    }
    let (key, memory) = match file.get(KEY..MEMORY + 8) {
        Some(fields) => (Key(fields[..32].try_into().unwrap()), number(&file, MEMORY)),
        None => (Key([0; 32]), 1 << 20),
    };
    if let Ok(contents) = Contents::read(&file[..], &key, memory) {
        assert!(summary.is_ok_and(|summary| summary.key == key));
        assert!(memory <= MAX_MEMORY);
        let mut end = 0;
        for run in contents.runs {
            assert!(run.memory >= end && run.length > 0);
            end = run.memory + run.length as u64;
            assert!(end <= memory && run.file + run.length as u64 <= file.len() as u64);
        }
    }
});

fn number(file: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(file[at..at + 8].try_into().unwrap())
}

/// Makes the checksums right, as far as the parts are in the file.
fn seal(file: &mut [u8], described: usize) {
    let part = |start: u64, length: u64| {
        let (start, length) = (usize::try_from(start).ok()?, usize::try_from(length).ok()?);
        file.get(start..start.checked_add(length)?).map(checksum)
    };
    let runs_at = number(file, PAGES).checked_add(1).and_then(|pages| pages.checked_mul(PAGE as u64));
    let runs = number(file, RUNS).checked_mul(RUN);
    let sums = runs_at.zip(runs).and_then(|(at, length)| {
        Some([(RUNS_SUM, part(at, length)?), (STATE_SUM, part(at.checked_add(length)?, number(file, STATE))?)])
    });
    for (at, sum) in sums.into_iter().flatten() {
        file[at..at + 8].copy_from_slice(&sum.to_le_bytes());
    }
    let sum = checksum(&file[SUM + 8..SUM + 8 + described]);
    file[DESCRIPTION_SUM..SUM].copy_from_slice(&sum.to_le_bytes());
    let sum = checksum(&file[..SUM]);
    file[SUM..SUM + 8].copy_from_slice(&sum.to_le_bytes());
}
