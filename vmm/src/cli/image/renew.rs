//! `umbra image --renew`: builds the images that machines name again, of an installed kernel. The hook of the Debian package does that
//! when a kernel is installed (`packaging/umbra.kernel`).
//!
//! Only an image that was made of the system's kernel follows it; one that was made of a package or a folder is left alone, and so is one
//! of another version of Umbra: a machine of that version may run, and could not talk to this version's agent.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::bail;
use umbra_guest_images::cache::Cache;
use umbra_guest_images::image::{Follows, Image, Recipe};
use umbra_guest_images::kernel::Kernel;

use super::{Args, agent, print, sound_service};
use crate::base::untrusted_text::block;
use crate::config::Machine;

/// Builds the images of the machines of `args` again, and says of each what became of it.
///
/// # Errors
///
/// An image, or all of a machine's, could not be looked at or built. The others were, and those of before are as they were.
pub(super) fn machines(args: &Args, cache: &Cache) -> anyhow::Result<()> {
    let mut failed = Vec::new();
    let mut images = BTreeSet::new();
    for path in &args.renew {
        match Machine::read(path) {
            Ok(machine) => images.extend(machine.driver.into_values().map(|driver| driver.image)),
            Err(error) => failed.push(format!("{:#}", anyhow::Error::from(error))),
        }
    }
    for dir in images {
        match image(Path::new("/"), &dir, args, cache) {
            Ok(what) => print(&block(&format!("{}: {what}", dir.display())))?,
            Err(error) => failed.push(format!("{}: {error:#}", dir.display())),
        }
    }
    match &failed[..] {
        [] => Ok(()),
        [one] => bail!("{one}"),
        several => bail!("{} did not succeed:\n{}", several.len(), several.join("\n")),
    }
}

/// Builds the image in the folder `dir` again, of the kernel that is installed below `root`; what became of it.
fn image(root: &Path, dir: &Path, args: &Args, cache: &Cache) -> anyhow::Result<String> {
    let before = Image::open(dir)?.manifest;
    let Some(Follows { drivers, firmware }) = before.follows.clone() else {
        return Ok(format!("is of kernel {}, which is not the system's, and stays as it is", before.kernel));
    };
    let kernel = Kernel::installed(root, args.release.as_deref(), cache)?;
    let (agent, sound) = (agent(args.agent.as_deref())?, sound_service(args.sound_service.as_deref())?);
    let devices = before.devices.clone();
    let now = Recipe { kernel, drivers, devices, agent, sound, firmware }.build(dir, cache)?.manifest;
    Ok(match now == before {
        true => format!("is of kernel {} already", now.kernel),
        false => format!("is of kernel {} now, was of {}", now.kernel, before.kernel),
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs;

    use super::*;

    /// A kernel that has all modules built in, below `root`.
    fn install(root: &Path, release: &str) {
        let modules = root.join("lib/modules").join(release);
        fs::create_dir_all(modules.join("kernel")).unwrap();
        fs::write(modules.join("modules.order"), "").unwrap();
        let names = [
            "nic",
            "virtio_pci",
            "virtio_console",
            "virtio_net",
            "sch_ingress",
            "cls_matchall",
            "act_mirred",
            "bridge",
        ];
        let builtin: String = names.iter().map(|name| format!("kernel/{name}.ko\n")).collect();
        fs::write(modules.join("modules.builtin"), builtin).unwrap();
        // The header of an ELF executable (type 2) for x86-64 (machine 62) is as much of a kernel as an image needs.
        let mut vmlinux = [0; 64];
        vmlinux[..6].copy_from_slice(b"\x7fELF\x02\x01");
        (vmlinux[16], vmlinux[18]) = (2, 62);
        fs::write(modules.join("vmlinuz"), vmlinux).unwrap();
    }

    fn args(root: &Path, release: &str) -> Args {
        let file = |name: &str| Some(root.join(name));
        Args { release: Some(release.into()), agent: file("agent"), sound_service: file("sound"), ..Args::default() }
    }

    #[test]
    fn an_image_follows_the_system_s_kernel() {
        let dir = tempfile::tempdir().unwrap();
        let (root, out, cache) = (dir.path(), dir.path().join("image"), Cache::at(dir.path().join("cache")));
        for file in ["agent", "sound"] {
            fs::write(root.join(file), "").unwrap();
        }
        for release in ["6.1", "6.2"] {
            install(root, release);
        }
        let recipe = |installed| Recipe {
            kernel: Kernel { installed, ..Kernel::installed(root, Some("6.1"), &cache).unwrap() },
            drivers: vec!["nic".into()],
            devices: vec![],
            agent: root.join("agent"),
            sound: None,
            firmware: vec![],
        };
        let renew = |release| image(root, &out, &args(root, release), &cache).map_err(|error| format!("{error:#}"));
        recipe(true).build(&out, &cache).unwrap();
        assert_eq!(renew("6.1").unwrap(), "is of kernel 6.1 already");
        assert_eq!(renew("6.2").unwrap(), "is of kernel 6.2 now, was of 6.1");
        assert_eq!(renew("6.2").unwrap(), "is of kernel 6.2 already");
        assert!(renew("6.3").unwrap_err().starts_with("kernel 6.3 has no modules in "));
        assert_eq!(Image::open(&out).unwrap().manifest.kernel, "6.2", "as it was");
        recipe(false).build(&out, &cache).unwrap();
        assert_eq!(renew("6.2").unwrap(), "is of kernel 6.1, which is not the system's, and stays as it is");
    }
}
