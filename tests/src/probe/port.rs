//! Finds a virtio-console port by its name, as udev's `/dev/virtio-ports/NAME` does where udev runs.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Opens the port called `name`; waits up to `patience` for it to appear.
///
/// # Errors
/// `NotFound` when no port has that name in time; what opening says otherwise.
pub fn open(name: &str, patience: Duration) -> io::Result<File> {
    let start = Instant::now();
    loop {
        if let Some(path) = find(name) {
            return OpenOptions::new().read(true).write(true).open(path);
        }
        if start.elapsed() > patience {
            return Err(io::Error::new(
                io::ErrorKind::NotFound,
                format!("this machine has no virtio-console port called {name}"),
            ));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn find(name: &str) -> Option<PathBuf> {
    for entry in fs::read_dir("/sys/class/virtio-ports").ok()?.flatten() {
        let given = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        if given.trim_end() == name {
            return Some(PathBuf::from("/dev").join(entry.file_name()));
        }
    }
    None
}
