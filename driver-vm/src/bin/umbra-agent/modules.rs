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
/// More of them, among the words of the kernel's command line, as `virtio_net.napi_tx=0`. The kernel itself leaves them to who loads
/// the module, as modprobe(8) does.
const COMMAND_LINE: &str = "/proc/cmdline";

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
    let [lines, words] = [PARAMETERS, COMMAND_LINE].map(|path| fs::read_to_string(path).unwrap_or_default());
    let load = |path: &str| load(path, parameters_of(&lines, &words, path)).err().map(|e| format!("{e:#}"));
    let failures = match fs::read_to_string(list) {
        Ok(text) => text.lines().filter_map(load).collect(),
        Err(error) => vec![format!("cannot read {list}: {error}")],
    };
    let _ = sender.send(failures);
    let _ = wake.write(1);
}

/// The parameters of the module at `path` among those of the image and the words of the command line, which come last: of two values
/// the kernel takes the last one.
fn parameters_of(lines: &str, words: &str, path: &str) -> String {
    // Names of modules have one sign for both.
    let name = |text: &str| text.replace('-', "_");
    let own = Path::new(path).file_stem().map(|stem| name(&stem.to_string_lossy())).unwrap_or_default();
    let lines = lines.lines().filter_map(|line| line.split_once(' '));
    let words = words.split_whitespace().filter_map(|word| word.split_once('.'));
    let all = lines.chain(words).filter(|(module, _)| name(module) == own);
    all.map(|(_, parameters)| parameters).collect::<Vec<_>>().join(" ")
}

fn load(path: &str, parameters: String) -> anyhow::Result<()> {
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
        let lines = "usb_storage delay_use=0\nnvme_core multipath=N x=1\n";
        let words = "quiet root=a.b virtio_net.napi_tx=0 nvme-core.x=2 nvme-core.y=3 virtio_net.csum=1\n";
        let of = |name: &str| parameters_of(lines, words, &format!("/lib/modules/6.1.0/{name}.ko"));
        assert_eq!(of("nvme_core"), "multipath=N x=1 x=2 y=3");
        assert_eq!(of("nvme-core"), of("nvme_core"));
        assert_eq!(of("virtio_net"), "napi_tx=0 csum=1");
        assert_eq!((of("nvme"), of("usb_storage")), (String::new(), "delay_use=0".into()));
    }
}
