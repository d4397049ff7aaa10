//! Loads the image's kernel modules: the device's drivers and those of the link to the host side by side, because a driver's probe
//! mostly sleeps. The main loop learns of it by a channel and an event descriptor; it never waits.

use std::ffi::CString;
use std::fs::{self, File};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use anyhow::Context;
use nix::errno::Errno;
use nix::kmod::{ModuleInitFlags, finit_module};
use nix::sys::eventfd::{EfdFlags, EventFd};

/// Lists of module paths in load order, one a line (see `umbra-guest-images`).
const LISTS: [&str; 2] = ["/etc/umbra/drivers", "/etc/umbra/modules"];
/// Parameters of some of them: a line for each module, as `usb_storage delay_use=0`.
const PARAMETERS: &str = "/etc/umbra/parameters";

/// The loading of modules, under way or done.
#[derive(Debug)]
pub struct Loading {
    results: Receiver<Vec<String>>,
    wake: Arc<EventFd>,
    running: usize,
    failures: Vec<String>,
}

impl Loading {
    /// Starts loading.
    ///
    /// # Errors
    /// When no event descriptor or thread can be made.
    pub fn start() -> anyhow::Result<Self> {
        let (sender, results) = channel();
        let wake = Arc::new(
            EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)
                .context("cannot make an event descriptor")?,
        );
        for list in LISTS {
            let (sender, wake) = (sender.clone(), Arc::clone(&wake));
            std::thread::Builder::new()
                .name("modules".into())
                .spawn(move || load_list(list, &sender, &wake))
                .context("cannot start a thread")?;
        }
        Ok(Self { results, wake, running: LISTS.len(), failures: Vec::new() })
    }

    /// Readable when [`Loading::collect`] has something new.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// Takes what the threads have reported; the failures that are new.
    pub fn collect(&mut self) -> Vec<String> {
        let mut new = Vec::new();
        let _ = self.wake.read(); // before the results, so that none comes unseen in between
        while let Ok(failures) = self.results.try_recv() {
            self.running -= 1;
            new.extend(failures);
        }
        self.failures.extend_from_slice(&new);
        new
    }

    /// All modules are loaded or have failed.
    pub fn done(&self) -> bool {
        self.running == 0
    }

    /// What has failed so far.
    pub fn failures(&self) -> &[String] {
        &self.failures
    }
}

fn load_list(list: &str, sender: &Sender<Vec<String>>, wake: &EventFd) {
    let parameters = fs::read_to_string(PARAMETERS).unwrap_or_default();
    let load = |path: &str| load(path, parameters_of(&parameters, path)).err().map(|e| format!("{e:#}"));
    let failures = match fs::read_to_string(list) {
        Ok(text) => text.lines().filter_map(load).collect(),
        Err(error) => vec![format!("cannot read {list}: {error}")],
    };
    let _ = sender.send(failures);
    let _ = wake.write(1);
}

/// The parameters of the module at `path` among all of them.
fn parameters_of<'a>(parameters: &'a str, path: &str) -> &'a str {
    let name = Path::new(path).file_stem().and_then(|name| name.to_str());
    let mut lines = parameters.lines().filter_map(|line| line.split_once(' '));
    lines.find(|(module, _)| Some(*module) == name).map_or("", |(_, parameters)| parameters)
}

fn load(path: &str, parameters: &str) -> anyhow::Result<()> {
    let file = File::open(path).with_context(|| format!("cannot open the module {path}"))?;
    match finit_module(&file, &CString::new(parameters)?, ModuleInitFlags::empty()) {
        // Both lists may name it; the kernel says this only once the other thread's load has ended.
        Ok(()) | Err(Errno::EEXIST) => Ok(()),
        Err(error) => Err(error).with_context(|| format!("cannot load the module {path}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_gets_its_own_parameters() {
        let parameters = "usb_storage delay_use=0\nnvme_core multipath=N x=1\n";
        assert_eq!(parameters_of(parameters, "/lib/modules/6.1.0/nvme_core.ko"), "multipath=N x=1");
        assert_eq!(parameters_of(parameters, "/lib/modules/6.1.0/nvme.ko"), "");
        assert_eq!(parameters_of("", "/lib/modules/6.1.0/nvme.ko"), "");
    }
}
