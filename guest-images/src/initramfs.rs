//! Collects files into an initramfs: folders come by themselves, the archive is the same for the same contents.
//!
//! Kernel modules are added plain, with a list of their paths in load order at [`MODULES_LIST`], one a line, so that a
//! shell's `while read m; do insmod $m; done` or the agent can load them.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cpio::{Kind, Writer};
use crate::files::{self, FileError, context};
use crate::modules::{ModuleTree, ModulesError};

/// Paths of the modules to load at boot, in order, one a line.
pub const MODULES_LIST: &str = "etc/umbra/modules";

/// Why an initramfs cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum InitramfsError {
    /// A file cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// A module cannot be had.
    #[error(transparent)]
    Modules(#[from] ModulesError),
    /// A program cannot be asked for its applets or libraries.
    #[error("cannot ask {} for its {what}", program.display())]
    Program {
        /// The program.
        program: PathBuf,
        /// What was asked.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// Too large for the format.
    #[error("the archive cannot be written")]
    Archive(#[source] std::io::Error),
}

#[derive(Clone, Debug)]
enum Entry {
    Dir(u32),
    File(u32, Vec<u8>),
    Symlink(String),
    CharDevice(u32, u32, u32),
}

/// A module that was added.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddedModule {
    /// Its name.
    pub name: String,
    /// Its path in the archive, with leading slash.
    pub path: String,
    /// Size, bytes.
    pub size: u64,
    /// Firmware that it may ask for.
    pub firmware: Vec<String>,
}

/// An initramfs to be.
#[derive(Clone, Debug)]
pub struct Initramfs {
    entries: BTreeMap<String, Entry>,
}

impl Default for Initramfs {
    fn default() -> Self {
        Self::new()
    }
}

impl Initramfs {
    /// With the mount points that every init wants, and `/dev/console`, which the kernel opens for it.
    pub fn new() -> Self {
        let mut new = Self { entries: BTreeMap::new() };
        for dir in ["dev", "proc", "sys", "run", "tmp", "etc"] {
            new.add_dir(dir);
        }
        new.add_char_device("dev/console", 0o600, 5, 1);
        new.add_char_device("dev/null", 0o666, 1, 3);
        new
    }

    /// Adds an empty folder.
    pub fn add_dir(&mut self, path: &str) {
        self.insert(path, Entry::Dir(0o755));
    }

    /// Adds a file with these contents and permission bits; replaces what was there.
    pub fn add_file(&mut self, path: &str, mode: u32, contents: impl Into<Vec<u8>>) {
        self.insert(path, Entry::File(mode, contents.into()));
    }

    /// Adds a symbolic link.
    pub fn add_symlink(&mut self, path: &str, target: &str) {
        self.insert(path, Entry::Symlink(target.into()));
    }

    /// Adds a character device node.
    pub fn add_char_device(&mut self, path: &str, mode: u32, major: u32, minor: u32) {
        self.insert(path, Entry::CharDevice(mode, major, minor));
    }

    /// Adds a file of this system, with its permission bits.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn add_host_file(&mut self, host: &Path, path: &str) -> Result<(), InitramfsError> {
        let mode = fs::metadata(host).map_err(context("read", host))?.permissions().mode() & 0o777;
        self.add_file(path, mode, files::read(host)?);
        Ok(())
    }

    /// Adds a folder of this system with all that is in it (files, folders, symbolic links).
    ///
    /// # Errors
    /// When something in it cannot be read.
    pub fn add_host_dir(&mut self, host: &Path, path: &str) -> Result<(), InitramfsError> {
        self.add_dir(path);
        for entry in fs::read_dir(host).map_err(context("list", host))? {
            let entry = entry.map_err(context("list", host))?;
            let (from, to) = (entry.path(), format!("{path}/{}", entry.file_name().to_string_lossy()));
            let kind = entry.file_type().map_err(context("read", &from))?;
            if kind.is_dir() {
                self.add_host_dir(&from, &to)?;
            } else if kind.is_symlink() {
                let target = fs::read_link(&from).map_err(context("read", &from))?;
                self.add_symlink(&to, &target.to_string_lossy());
            } else if kind.is_file() {
                self.add_host_file(&from, &to)?;
            }
        }
        Ok(())
    }

    /// Adds a static busybox as `/bin/busybox`, and a link for each of its applets.
    ///
    /// # Errors
    /// When it cannot be read or run.
    pub fn add_busybox(&mut self, host: &Path) -> Result<(), InitramfsError> {
        self.add_file("bin/busybox", 0o755, files::read(host)?);
        for applet in output_of(host, "applets", Command::new(host).arg("--list-full"))?.lines() {
            if applet != "bin/busybox" && !self.entries.contains_key(applet) {
                self.add_symlink(applet, "/bin/busybox");
            }
        }
        Ok(())
    }

    /// Adds a program of this system under its own path, and the shared libraries that it needs.
    ///
    /// # Errors
    /// When it cannot be read, or `ldd` cannot be run.
    pub fn add_program(&mut self, host: &Path) -> Result<(), InitramfsError> {
        self.add_host_file(host, &host.to_string_lossy())?;
        self.add_libraries(host)
    }

    /// Adds the shared libraries that a program of this system needs, under their own paths.
    ///
    /// # Errors
    /// When one cannot be read, or `ldd` cannot be run.
    pub fn add_libraries(&mut self, host: &Path) -> Result<(), InitramfsError> {
        // `ldd` fails on a static program; then there is nothing to add.
        let libraries = output_of(host, "libraries", Command::new("ldd").arg(host))?;
        for line in libraries.lines() {
            let path = line.split("=>").last().and_then(|end| end.split_whitespace().next());
            if let Some(path) = path.filter(|path| path.starts_with('/')) {
                self.add_host_file(Path::new(path), path)?;
            }
        }
        Ok(())
    }

    /// Adds modules with all that they depend on and appends them to the load order at [`MODULES_LIST`].
    ///
    /// # Errors
    /// When one is missing or damaged; the error names it.
    pub fn add_modules<S: AsRef<str>>(
        &mut self,
        tree: &ModuleTree,
        names: &[S],
    ) -> Result<Vec<AddedModule>, InitramfsError> {
        self.add_modules_to(MODULES_LIST, tree, names)
    }

    /// As [`Initramfs::add_modules`], with the load order in the file `list`.
    ///
    /// # Errors
    /// As [`Initramfs::add_modules`].
    pub fn add_modules_to<S: AsRef<str>>(
        &mut self,
        list: &str,
        tree: &ModuleTree,
        names: &[S],
    ) -> Result<Vec<AddedModule>, InitramfsError> {
        let mut added = Vec::new();
        let mut lines = match self.entries.get(list) {
            Some(Entry::File(_, text)) => String::from_utf8_lossy(text).into_owned(),
            _ => String::new(),
        };
        for name in tree.load_order(names)? {
            let path = format!("/lib/modules/{}/{name}.ko", tree.release());
            let contents = tree.read(&name)?;
            if !lines.lines().any(|line| line == path) {
                lines.push_str(&format!("{path}\n"));
            }
            added.push(AddedModule {
                size: contents.len() as u64,
                firmware: ModuleTree::firmware_of(&contents),
                name,
                path: path.clone(),
            });
            self.add_file(&path, 0o644, contents);
        }
        self.add_file(list, 0o644, lines);
        Ok(added)
    }

    /// The archive.
    ///
    /// # Errors
    /// When a file is too large for the format.
    pub fn to_bytes(&self) -> Result<Vec<u8>, InitramfsError> {
        let mut writer = Writer::new(Vec::new());
        let mut write = || {
            // A folder sorts before what is in it: its path is a prefix of theirs.
            for (path, entry) in &self.entries {
                match entry {
                    Entry::Dir(mode) => writer.add(path, *mode, &Kind::Dir)?,
                    Entry::File(mode, contents) => writer.add(path, *mode, &Kind::File(contents))?,
                    Entry::Symlink(target) => writer.add(path, 0o777, &Kind::Symlink(target))?,
                    &Entry::CharDevice(mode, major, minor) => {
                        writer.add(path, mode, &Kind::CharDevice { major, minor })?;
                    }
                }
            }
            Ok(())
        };
        write().map_err(InitramfsError::Archive)?;
        writer.finish().map_err(InitramfsError::Archive)
    }

    /// Writes the archive in one step.
    ///
    /// # Errors
    /// When it cannot be made or written.
    pub fn write_to(&self, path: &Path) -> Result<(), InitramfsError> {
        Ok(files::write_atomically(path, &self.to_bytes()?)?)
    }

    fn insert(&mut self, path: &str, entry: Entry) {
        let path = path.trim_matches('/');
        for (slash, _) in path.match_indices('/') {
            self.entries.entry(path[..slash].into()).or_insert(Entry::Dir(0o755));
        }
        match (&entry, self.entries.get(path)) {
            (Entry::Dir(_), Some(Entry::Dir(_))) => {}
            _ => {
                self.entries.insert(path.into(), entry);
            }
        }
    }
}

fn output_of(program: &Path, what: &'static str, command: &mut Command) -> Result<String, InitramfsError> {
    let output =
        command.output().map_err(|source| InitramfsError::Program { program: program.into(), what, source })?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Unpacks with the system's cpio and returns the listing.
    fn list(archive: &Path) -> String {
        let output =
            Command::new("cpio").args(["-tv", "--quiet", "-F"]).arg(archive).env("TZ", "UTC").output().unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap()
    }

    #[test]
    fn another_cpio_reads_it() {
        let dir = tempfile::tempdir().unwrap();
        let archive = dir.path().join("x.cpio");
        let mut initramfs = Initramfs::new();
        initramfs.add_file("/init", 0o755, "#!/bin/sh\n");
        initramfs.add_file("a/b/c", 0o600, vec![7; 10_001]);
        initramfs.add_symlink("a/link", "b/c");
        initramfs.write_to(&archive).unwrap();
        let listing = list(&archive);
        let line = |end: &str| listing.lines().find(|l| l.ends_with(end)).unwrap_or_else(|| panic!("{listing}"));
        assert!(line(" init").starts_with("-rwxr-xr-x"));
        assert!(line(" a/b").starts_with("drwxr-xr-x"));
        assert!(line(" a/b/c").contains(" 10001 "));
        assert!(line("a/link -> b/c").starts_with("lrwx"));
        assert!(line("dev/console").starts_with("crw-------") && line("dev/console").contains("5,   1"));
    }

    #[test]
    fn the_same_contents_give_the_same_archive_in_any_order() {
        let (mut one, mut two) = (Initramfs::new(), Initramfs::new());
        one.add_file("x/a", 0o644, "a");
        one.add_file("x/b", 0o644, "b");
        two.add_file("x/b", 0o644, "b");
        two.add_file("/x/a", 0o644, "a");
        assert_eq!(one.to_bytes().unwrap(), two.to_bytes().unwrap());
    }
}
