//! What a snapshot is of, in words: a small JSON text in its file, for `umbra snapshots`. A VM is found by its key, never by this.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::format::MAX_DESCRIPTION;
use super::key::HostFacts;
use crate::wire::messages::{SnapshotOf, VmSpec};

/// What a snapshot is of. A field that another build does not know is left out, one that it lacks is empty.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Description {
    /// Folder of the driver VM image; empty where its name is too long.
    pub image: String,
    /// Release of the image's kernel.
    pub kernel: String,
    /// Drivers of the device in the image.
    pub drivers: Vec<String>,
    /// PCI address of the device that the VM's kernel knows already; `None`: it knows none.
    pub device: Option<String>,
    /// vCPUs.
    pub cpus: u8,
    /// Memory of the VM, bytes.
    pub memory: u64,
    /// When it was taken, seconds since 1970 (UTC).
    pub taken: u64,
    /// By what, and under which kernel of the host: another program or kernel does not use it.
    pub by: HostFacts,
}

impl Description {
    /// Of a snapshot of the VM of `spec`, taken now.
    pub(super) fn new(spec: &VmSpec, of: &SnapshotOf, by: HostFacts) -> Self {
        let image = spec.kernel.parent().map(|folder| folder.display().to_string());
        Self {
            image: image.unwrap_or_default(),
            kernel: of.kernel.clone(),
            drivers: of.drivers.clone(),
            device: spec.awaited.as_ref().map(|function| function.bdf().to_string()),
            cpus: spec.cpus,
            memory: spec.memory.0,
            taken: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
            by,
        }
    }

    /// As it is in the file, at most [`MAX_DESCRIPTION`] bytes: what is too long is left out.
    pub(super) fn encode(&self) -> Vec<u8> {
        let short = Self { image: String::new(), drivers: Vec::new(), ..self.clone() };
        let texts = [self, &short].map(|description| serde_json::to_vec(description).unwrap_or_default());
        texts.into_iter().find(|text| text.len() <= MAX_DESCRIPTION).unwrap_or_default()
    }

    /// Reads what [`Self::encode`] wrote; `None`: that is something else.
    pub fn decode(text: &[u8]) -> Option<Self> {
        serde_json::from_slice(text).ok()
    }

    /// Why the program that runs now, on `host`, does not use the snapshot; `None`: as far as this tells, it does.
    pub(super) fn unusable(&self, host: &HostFacts) -> Option<String> {
        if self.by.program != host.program {
            return Some(format!("it was taken by another build of umbra (version {})", self.by.program.0));
        }
        let [release, _] = &self.by.kernel;
        (self.by.kernel != host.kernel).then(|| format!("it was taken under another kernel of the host ({release})"))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::vm::snapshot::key::Build;

    fn host(version: &str, kernel: &str) -> HostFacts {
        HostFacts { program: (version.into(), Build::Checksum(7)), kernel: [kernel.into(), "#1".into()] }
    }

    #[test]
    fn what_is_written_is_read_and_what_is_too_long_is_left_out() {
        let mut description =
            Description { image: "images/nic0".into(), cpus: 2, by: host("1", "6.1"), ..Default::default() };
        description.drivers = vec!["e1000e".into()];
        assert_eq!(Description::decode(&description.encode()), Some(description.clone()));
        description.image = "\u{1b}".repeat(4000);
        let text = description.encode();
        assert!(!text.is_empty() && text.len() <= MAX_DESCRIPTION);
        let read = Description::decode(&text).unwrap();
        assert_eq!((read.image.as_str(), read.cpus), ("", 2));
        assert_eq!(Description::decode(b"no text"), None);
        assert_eq!(Description::decode(b"{\"another\":1}"), Some(Description::default()));
    }

    #[test]
    fn another_program_or_kernel_does_not_use_it() {
        let description = Description { by: host("1", "6.1"), ..Default::default() };
        assert_eq!(description.unusable(&host("1", "6.1")), None);
        assert!(description.unusable(&host("2", "6.1")).unwrap().contains("another build of umbra (version 1)"));
        assert!(description.unusable(&host("1", "6.2")).unwrap().contains("another kernel of the host (6.1)"));
    }
}
