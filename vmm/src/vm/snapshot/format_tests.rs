//! Any file is refused or read, whatever was done to it.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;

const KEY: Key = Key([7; 32]);
const MEMORY: u64 = 1 << 20;

/// A snapshot of 1 MiB with three pages in two runs.
fn small() -> Vec<u8> {
    let file = tempfile::tempfile().unwrap();
    let mut memory = vec![0; PAGE * 8];
    (memory[PAGE], memory[PAGE * 2 + 9], memory[PAGE * 5 + PAGE - 1]) = (1, 2, 3);
    let mut writer = Writer::new(&file);
    writer.add(&memory, 16 * PAGE as u64).unwrap();
    let length = writer.finish(&KEY, MEMORY, (b"{\"state\":1}", b"of a test")).unwrap();
    let mut bytes = vec![0; usize::try_from(length).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(file.metadata().unwrap().len(), length);
    bytes
}

/// Reads everything, pages included, as a restore does.
fn read_all(bytes: &[u8]) -> Result<Vec<(u64, Vec<u8>)>, FormatError> {
    let contents = Contents::read(bytes, &KEY, MEMORY)?;
    let read = |run: &Run| {
        let mut page = vec![0; run.length];
        Source::read_at(bytes, &mut page, run.file).map_err(FormatError::Read)?;
        if checksum(&page) == run.sum { Ok((run.memory, page)) } else { Err(FormatError::Damaged("page")) }
    };
    contents.runs.iter().map(read).collect()
}

#[test]
fn what_was_written_is_read() {
    let bytes = small();
    assert_eq!(Contents::read(&bytes[..], &KEY, MEMORY).unwrap().state, b"{\"state\":1}");
    let summary = Summary::read(&bytes[..]).unwrap();
    assert_eq!((summary.key, &summary.description[..]), (KEY, &b"of a test"[..]));
    let runs = read_all(&bytes).unwrap();
    assert_eq!(
        runs.iter().map(|(at, page)| (*at, page.len())).collect::<Vec<_>>(),
        [(17 * PAGE as u64, 2 * PAGE), (21 * PAGE as u64, PAGE)]
    );
    assert_eq!((runs[0].1[0], runs[0].1[PAGE + 9], runs[1].1[PAGE - 1]), (1, 2, 3));
    // Pages of zeros take no room.
    assert!(bytes.len() < 5 * PAGE, "{}", bytes.len());
}

#[test]
fn each_byte_that_changes_is_noticed() {
    let mut bytes = small();
    for at in 0..bytes.len() {
        let change = 1 << (at % 8);
        bytes[at] ^= change;
        assert!(read_all(&bytes).is_err(), "byte {at} changed by {change:#x}");
        bytes[at] ^= change;
    }
    assert!(read_all(&bytes).is_ok());
}

#[test]
fn each_other_length_is_noticed() {
    let mut bytes = small();
    for length in 0..bytes.len() {
        assert!(read_all(&bytes[..length]).is_err(), "cut to {length} bytes");
    }
    bytes.push(0);
    assert!(matches!(read_all(&bytes), Err(FormatError::Length { .. })));
}

#[test]
fn another_key_memory_or_version_is_refused_by_name() {
    let mut bytes = small();
    let other = Contents::read(&bytes[..], &Key([8; 32]), MEMORY).unwrap_err();
    assert_eq!(other.to_string(), "it is of another VM or another host");
    assert!(Contents::read(&bytes[..], &KEY, 2 * MEMORY).is_err());
    bytes[8] = 9;
    let error = Contents::read(&bytes[..], &KEY, MEMORY).unwrap_err();
    assert_eq!(error.to_string(), "it has format 9; this program writes and reads format 4");
}

/// A header that is wrong, with checksums that are right.
fn forged(change: impl FnOnce(&mut Header)) -> Vec<u8> {
    let mut bytes = small();
    let (mut header, _) = Header::read_from_prefix(&bytes[..]).unwrap();
    change(&mut header);
    header.sum = checksum(&header.as_bytes()[..HEADER - 8]).into();
    bytes[..HEADER].copy_from_slice(header.as_bytes());
    bytes
}

#[test]
fn lengths_that_cannot_be_true_allocate_nothing() {
    let huge = [u64::MAX, 1 << 62, MAX_STATE + 1];
    for value in huge {
        assert!(read_all(&forged(|header| header.pages = value.into())).is_err());
        assert!(read_all(&forged(|header| header.runs = value.into())).is_err());
        assert!(read_all(&forged(|header| header.state = value.into())).is_err());
        assert!(read_all(&forged(|header| header.memory = value.into())).is_err());
        let summary = Summary::read(&forged(|header| header.memory = value.into())[..]);
        assert!(summary.is_err() || value <= MAX_MEMORY);
        assert!(Summary::read(&forged(|header| header.state = value.into())[..]).is_err());
    }
    for length in [u32::MAX, u32::try_from(MAX_DESCRIPTION).unwrap() + 1, 0, 8] {
        assert!(Summary::read(&forged(|header| header.description = length.into())[..]).is_err());
    }
}

#[test]
fn a_description_has_room_in_the_first_page_and_no_more() {
    let write = |length: usize| {
        let file = tempfile::tempfile().unwrap();
        Writer::new(&file).finish(&KEY, MEMORY, (b"{}", &vec![b'x'; length])).map(|_| file)
    };
    let file = write(MAX_DESCRIPTION).unwrap();
    assert_eq!(Summary::read(&file).unwrap().description.len(), MAX_DESCRIPTION);
    assert!(Contents::read(&file, &KEY, MEMORY).unwrap().runs.is_empty());
    assert_eq!(write(MAX_DESCRIPTION + 1).unwrap_err().kind(), io::ErrorKind::InvalidInput);
}

proptest! {
    #[test]
    fn runs_are_disjoint_and_inside(entries in prop::collection::vec((0u64..300, 0u64..300, any::<u64>()), 0..6)) {
        let pages = entries.iter().map(|entry| entry.1).sum();
        let table: Vec<_> = entries.iter().map(|&(first, pages, sum)| RunEntry {
            first: first.into(), pages: pages.into(), sum: sum.into(),
        }).collect();
        if let Ok(runs) = runs(table.as_bytes(), pages, MEMORY) {
            let mut end = 0;
            for run in runs {
                prop_assert!(run.memory >= end && run.length > 0);
                end = run.memory + run.length as u64;
                prop_assert!(end <= MEMORY);
            }
        }
    }

    #[test]
    fn any_bytes_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..PAGE + 100)) {
        prop_assert!(read_all(&bytes).is_err());
        prop_assert!(Summary::read(&bytes[..]).is_err());
    }
}
