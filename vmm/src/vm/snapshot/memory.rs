//! A VM's memory into a snapshot's file, and out of it. The file has the memory without its hole below 4 GiB, as the memfd has.

use std::fs::File;
use std::io;

use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress};

use super::Error;
use super::format::{Checksum, FormatError, MAX_RUN, PAGE, Run, Source, Writer};
use crate::base::parallel::in_parallel;
use crate::vm::machine::memory::{discard, memfd_offset};
use crate::vm::machine::unused::Unused;

/// Bytes read at once when a snapshot is taken.
const PIECE: usize = MAX_RUN * PAGE;
/// Most threads that fill memory: it is bound by memory, not by processors.
const MAX_THREADS: usize = 4;

/// Bytes of memory.
pub fn size(memory: &GuestMemoryMmap) -> u64 {
    memory.iter().map(GuestMemoryRegion::len).sum()
}

/// The region that byte `offset` of the memfd is in, and where in it.
fn place(memory: &GuestMemoryMmap, mut offset: u64) -> Option<(&vm_memory::GuestRegionMmap, MemoryRegionAddress)> {
    for region in memory.iter() {
        if offset < region.len() {
            return Some((region, MemoryRegionAddress(offset)));
        }
        offset -= region.len();
    }
    None
}

/// Writes what `memory` holds, but for what is `unused`: to read that would take room for it again. Nothing may write to the memory
/// meanwhile. Between two pieces `go_on` is asked whether to.
pub fn save(
    (memory, unused): (&GuestMemoryMmap, &Unused),
    writer: &mut Writer<'_>,
    go_on: &mut dyn FnMut() -> bool,
) -> Result<(), Error> {
    let mut piece = vec![0; PIECE];
    for (start, length) in unused.rest(memory, PIECE) {
        if !go_on() {
            return Err(Error::Interrupted);
        }
        let piece = &mut piece[..length];
        memory.read_slice(piece, start).map_err(|error| Error::Memory(io::Error::other(error)))?;
        let offset = memfd_offset(memory, start).ok_or_else(|| Error::Memory(io::ErrorKind::InvalidInput.into()))?;
        writer.add(piece, offset).map_err(Error::Write)?;
    }
    Ok(())
}

/// Fills `memory`, which holds zeros and which nobody else has yet, with the pages of `runs` from `file`, by several threads.
///
/// # Errors
/// The file cannot be read, or a page is damaged: then the memory holds anything.
pub fn fill(memory: &GuestMemoryMmap, runs: &[Run], file: &File) -> Result<(), Error> {
    in_parallel(MAX_THREADS, runs, || (), |(), run| fill_run(memory, run, file))
}

/// Reads a run into its place, and checks it there: a copy in between would take as long again.
fn fill_run(memory: &GuestMemoryMmap, run: &Run, file: &File) -> Result<(), Error> {
    let mut sum = Checksum::default();
    let mut done = 0;
    // A run may reach over the hole.
    while done < run.length {
        let outside = || Error::Memory(io::ErrorKind::InvalidInput.into());
        let (region, at) = place(memory, run.memory + done as u64).ok_or_else(outside)?;
        let rest = run.length - done;
        let length = usize::try_from(region.len() - at.0).unwrap_or(rest).min(rest);
        let part = region.get_slice(at, length).map_err(|error| Error::Memory(io::Error::other(error)))?;
        let part = part.ptr_guard_mut();
        // SAFETY: the slice was checked to be in the region, which stays mapped. No VM has this memory yet and no other process, and each
        // run is read by one thread, so nobody else reads or writes there while the borrow lasts.
        let bytes = unsafe { std::slice::from_raw_parts_mut(part.as_ptr(), length) };
        Source::read_at(file, bytes, run.file + done as u64).map_err(FormatError::Read)?;
        sum.add(bytes);
        done += length;
    }
    if sum.get() == run.sum { Ok(()) } else { Err(FormatError::Damaged("memory").into()) }
}

/// Makes all of `memory` hold zeros again, and take no room.
pub fn clear(memory: &GuestMemoryMmap) -> io::Result<()> {
    memory.iter().try_for_each(|region| discard(memory, region.start_addr().0, region.len()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use vm_memory::GuestAddress;

    use super::super::format::{Contents, Key};
    use super::*;
    use crate::vm::machine::{layout, memory::create};

    const KEY: Key = Key([1; 32]);

    #[test]
    fn memory_comes_back_on_both_sides_of_the_hole() {
        // Sparse: the file system and the memory have only what is touched.
        let size_of_both = layout::LOW_RAM_LIMIT + (4 << 20);
        let before = create("test", size_of_both).unwrap();
        let last_low = GuestAddress(layout::LOW_RAM_LIMIT - 1);
        let first_high = GuestAddress(layout::HIGH_RAM_START);
        before.write_obj(1u8, GuestAddress(0x5000)).unwrap();
        before.write_obj(2u8, last_low).unwrap();
        before.write_obj(3u8, first_high).unwrap();
        let file = tempfile::tempfile().unwrap();
        let mut writer = Writer::new(&file);
        save((&before, &Unused::default()), &mut writer, &mut || true).unwrap();
        let length = writer.finish(&KEY, size_of_both, (b"{}", b"of a test")).unwrap();
        assert!(length < 6 * PAGE as u64, "{length} bytes");

        let contents = Contents::read(&file, &KEY, size_of_both).unwrap();
        let after = create("test", size_of_both).unwrap();
        fill(&after, &contents.runs, &file).unwrap();
        let bytes = [GuestAddress(0x5000), last_low, first_high].map(|at| after.read_obj::<u8>(at).unwrap());
        assert_eq!(bytes, [1, 2, 3]);
        clear(&after).unwrap();
        assert_eq!(after.read_obj::<u8>(last_low).unwrap(), 0);
    }

    #[test]
    fn many_pages_come_back_through_several_threads_and_damage_is_found() {
        let before = create("test", 8 << 20).unwrap();
        for page in (0..2048u64).filter(|page| page % 3 != 0) {
            before.write_obj(page, GuestAddress(page * PAGE as u64 + 8)).unwrap();
        }
        let file = tempfile::tempfile().unwrap();
        let mut writer = Writer::new(&file);
        save((&before, &Unused::default()), &mut writer, &mut || true).unwrap();
        writer.finish(&KEY, 8 << 20, (b"{}", b"")).unwrap();
        let contents = Contents::read(&file, &KEY, 8 << 20).unwrap();
        let after = create("test", 8 << 20).unwrap();
        fill(&after, &contents.runs, &file).unwrap();
        for page in 0..2048u64 {
            let should = if page % 3 == 0 { 0 } else { page };
            assert_eq!(after.read_obj::<u64>(GuestAddress(page * PAGE as u64 + 8)).unwrap(), should);
        }
        let run = contents.runs[contents.runs.len() / 2];
        std::os::unix::fs::FileExt::write_all_at(&file, &[0xff], run.file).unwrap();
        let error = fill(&after, &contents.runs, &file).unwrap_err();
        assert_eq!(crate::base::error::chain(&error), "its memory is damaged");
    }

    #[test]
    fn taking_a_snapshot_can_be_interrupted() {
        let memory = create("test", 8 << 20).unwrap();
        let file = tempfile::tempfile().unwrap();
        let mut asked = 0;
        let mut twice = || {
            asked += 1;
            asked < 3
        };
        let error = save((&memory, &Unused::default()), &mut Writer::new(&file), &mut twice).unwrap_err();
        assert!(matches!(error, Error::Interrupted));
    }
}
