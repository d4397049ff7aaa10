//! A log file of bounded size. At [`MAX_FILE`] bytes it is renamed to `NAME.1`, or copied there, in place of the one before it, and
//! begun afresh: the two together hold at most twice as much, whatever they held before.
//!
//! What is no regular file (a terminal, a FIFO, `/dev/null`) is written to without any of this. An error costs the bytes of that
//! write; the next write opens the file again, unless it is one that nothing opens by its name any more ([`RotatingFile::open`]).

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Size at which the file is renamed, in bytes: the boots and panics of many lives, and little beside any disk.
pub const MAX_FILE: u64 = 4 << 20;

/// Bytes kept in place of a file that cannot be renamed (a folder that belongs to somebody else).
const KEPT_IN_PLACE: u64 = MAX_FILE / 2;

/// The file.
#[derive(Debug)]
pub struct RotatingFile {
    path: PathBuf,
    open: Option<Open>,
    held: Option<Held>,
}

/// What else is open of a file that is never opened by its name again.
#[derive(Debug)]
struct Held {
    /// The file, at any place.
    whole: File,
    /// The one before it; `None`: it has to do without.
    older: Option<File>,
}

#[derive(Debug)]
struct Open {
    file: File,
    /// Bytes in it; `None` for what is no regular file.
    size: Option<u64>,
}

impl RotatingFile {
    /// The file `path`, which the first write opens.
    pub fn new(path: PathBuf) -> Self {
        Self { path, open: None, held: None }
    }

    /// The file `path`, opened now, and nothing by its name later: what is full is copied, where others rename it.
    ///
    /// # Errors
    /// It cannot be opened for writing.
    pub fn open(path: &Path) -> io::Result<Self> {
        let open = Open::new(path)?;
        // A link stays where it is; the older file is beside the one behind it.
        let path = fs::canonicalize(path).unwrap_or_else(|_| path.into());
        let mut this = Self { path, open: None, held: None };
        if open.size.is_some() {
            let any_place = |path| OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
            this.held = Some(Held { whole: any_place(this.path.clone())?, older: any_place(this.older()).ok() });
        }
        this.open = Some(open);
        Ok(this)
    }

    /// Where the file before this one is.
    fn older(&self) -> PathBuf {
        let mut name = OsString::from(&self.path);
        name.push(".1");
        name.into()
    }

    /// Makes room in a file that is full.
    fn rotate(&mut self) -> io::Result<()> {
        if let (Some(held), Some(open)) = (&self.held, &mut self.open) {
            open.size = Some(held.make_room()?);
            return Ok(());
        }
        self.open = None;
        let older = self.older();
        if fs::rename(&self.path, &older).is_err() {
            return keep_end_of(&self.path, KEPT_IN_PLACE);
        }
        // Longer only if it was so when it was opened: that is cut once.
        keep_end_of(&older, MAX_FILE)
    }

    /// The file, which is opened if it is not open.
    fn opened(&mut self) -> io::Result<&mut Open> {
        let open = match self.open.take() {
            Some(open) => open,
            None => Open::new(&self.path)?,
        };
        Ok(self.open.insert(open))
    }

    fn try_write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.opened()?.is_full(bytes.len()) {
            self.rotate()?;
        }
        let open = self.opened()?;
        let written = open.file.write(bytes)?;
        open.size = open.size.map(|size| size + written as u64);
        Ok(written)
    }
}

impl Write for RotatingFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.try_write(bytes);
        let failed = written.as_ref().is_err_and(|error| error.kind() != io::ErrorKind::Interrupted);
        if failed && self.held.is_none() {
            self.open = None;
        }
        written
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Open {
    fn new(path: &Path) -> io::Result<Self> {
        let fifo = fs::metadata(path).is_ok_and(|meta| meta.file_type().is_fifo());
        // Opened for reading too, a FIFO without a reader neither waits here nor refuses what is written.
        let file = OpenOptions::new().append(true).read(fifo).create(true).open(path)?;
        let meta = file.metadata()?;
        Ok(Self { file, size: meta.is_file().then(|| meta.size()) })
    }

    /// `more` bytes are too many for it.
    fn is_full(&self, more: usize) -> bool {
        self.size.is_some_and(|size| size > 0 && size + more as u64 > MAX_FILE)
    }
}

impl Held {
    /// Makes room in the file, which is full; returns how many bytes are left in it.
    fn make_room(&self) -> io::Result<u64> {
        let Some(older) = &self.older else {
            keep_end(&self.whole, KEPT_IN_PLACE)?;
            return Ok(self.whole.metadata()?.size());
        };
        // Longer only if it was so when it was opened: of that the end is kept.
        keep_end(&self.whole, MAX_FILE)?;
        older.set_len(0)?;
        let (mut piece, mut at) = (vec![0; 64 << 10], 0);
        loop {
            let length = self.whole.read_at(&mut piece, at)?;
            if length == 0 {
                break;
            }
            older.write_all_at(&piece[..length], at)?;
            at += length as u64;
        }
        self.whole.set_len(0)?;
        Ok(0)
    }
}

/// As [`keep_end`], of the file `path`.
fn keep_end_of(path: &Path, most: u64) -> io::Result<()> {
    keep_end(&OpenOptions::new().read(true).write(true).open(path)?, most)
}

/// Cuts the beginning of `file` off, so that its last `most` bytes are left. Takes no room on the disk.
fn keep_end(file: &File, most: u64) -> io::Result<()> {
    let size = file.metadata()?.size();
    let Some(from) = size.checked_sub(most).filter(|from| *from > 0) else { return Ok(()) };
    // `most` is `MAX_FILE` or less.
    let mut end = vec![0; usize::try_from(most).unwrap_or_default()];
    file.read_exact_at(&mut end, from)?;
    file.write_all_at(&end, 0)?;
    file.set_len(most)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn sizes(path: &Path) -> [u64; 2] {
        [path.to_owned(), RotatingFile::new(path.into()).older()]
            .map(|path| fs::metadata(path).map_or(0, |meta| meta.len()))
    }

    #[test]
    fn the_file_and_the_one_before_it_are_bounded_and_hold_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("web.txt");
        let mut file = RotatingFile::open(&path).unwrap();
        for n in 0..10_000 {
            file.write_all(format!("{n:999}\n").as_bytes()).unwrap();
        }
        let [new, old] = sizes(&path);
        assert!(new <= MAX_FILE && old <= MAX_FILE && old > MAX_FILE - 1000, "{new} {old}");
        assert!(fs::read_to_string(&path).unwrap().ends_with(" 9999\n"));
        assert!(dir.path().join("web.txt.1").exists());
    }

    #[test]
    fn what_earlier_runs_left_counts() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("web.log");
        let mut text = vec![b'x'; 8 << 20];
        text.extend(b"the end");
        fs::write(&path, text).unwrap();
        RotatingFile::new(path.clone()).write_all(b"a new run").unwrap();
        assert_eq!(sizes(&path), [9, MAX_FILE]);
        assert!(fs::read(dir.path().join("web.log.1")).unwrap().ends_with(b"xthe end"));
        // Many short runs are no more than a long one.
        for _ in 0..100 {
            RotatingFile::open(&path).unwrap().write_all(&[b'y'; 200_000]).unwrap();
        }
        assert!(sizes(&path).iter().all(|size| *size <= MAX_FILE), "{:?}", sizes(&path));
    }

    #[test]
    fn a_link_stays_and_a_place_that_is_no_file_is_written_to() {
        let dir = tempfile::tempdir().unwrap();
        let (link, path) = (dir.path().join("link"), dir.path().join("file"));
        fs::write(&path, vec![b'x'; 4 << 20]).unwrap();
        symlink(&path, &link).unwrap();
        RotatingFile::open(&link).unwrap().write_all(b"new").unwrap();
        assert!(link.is_symlink());
        assert_eq!((fs::read(&link).unwrap(), sizes(&path)), (b"new".into(), [3, MAX_FILE]));
        let mut null = RotatingFile::open(Path::new("/dev/null")).unwrap();
        (0..10).for_each(|_| null.write_all(&[0; 1 << 20]).unwrap());
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        RotatingFile::open(&fifo).unwrap().write_all(b"no reader").unwrap();
    }

    #[test]
    fn an_error_is_no_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sub/web.log");
        let mut file = RotatingFile::new(path.clone());
        assert!(file.write_all(b"lost").is_err());
        fs::create_dir(dir.path().join("sub")).unwrap();
        file.write_all(b"kept").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"kept");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    }

    #[test]
    fn a_file_that_cannot_be_renamed_keeps_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("web.log");
        // A folder in the place of the older file cannot be replaced by a file.
        fs::create_dir(dir.path().join("web.log.1")).unwrap();
        fs::write(&path, vec![b'x'; 5 << 20]).unwrap();
        RotatingFile::open(&path).unwrap().write_all(b"new").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), KEPT_IN_PLACE + 3);
        assert!(fs::read(&path).unwrap().ends_with(b"xnew"));
    }
}
