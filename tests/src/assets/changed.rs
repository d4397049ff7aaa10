//! Driver VM images that are others than they should be: another archive behind the initramfs puts a program before the agent.

use std::fs;
use std::path::{Path, PathBuf};

use umbra_guest_images::cache::sha256;
use umbra_guest_images::files;
use umbra_guest_images::image::{FileEntry, Image};
use umbra_guest_images::initramfs::Initramfs;

use super::{AssetError, BUSYBOX};
use crate::hostile::vm::AGENT;

/// A copy of `image` in the folder `dir`, whose boot waits for `seconds` before `agent`, the program that is otherwise `/init`,
/// is started.
pub(super) fn slow(image: &Path, agent: &Path, dir: &Path, seconds: u32) -> Result<PathBuf, AssetError> {
    let mut archive = Initramfs::new();
    archive.add_host_file(agent, AGENT)?;
    add_init(&mut archive, &format!("/bin/busybox sleep {seconds}\nexec {AGENT} \"$@\""))?;
    copy(image, &archive, dir)
}

/// A copy of `image` in the folder `dir`, whose first process is that of the campaign `seed`; it starts `agent`.
pub(super) fn hostile(
    image: &Path,
    (agent, probe): (&Path, &Path),
    dir: &Path,
    seed: u64,
) -> Result<PathBuf, AssetError> {
    let mut archive = Initramfs::new();
    archive.add_host_file(agent, AGENT)?;
    archive.add_host_file(probe, "probe")?;
    add_init(&mut archive, &format!("exec /probe hostile {seed}"))?;
    copy(image, &archive, dir)
}

fn add_init(archive: &mut Initramfs, script: &str) -> Result<(), AssetError> {
    archive.add_host_file(Path::new(BUSYBOX), "bin/busybox")?;
    archive.add_file("init", 0o755, format!("#!/bin/busybox sh\n{script}\n"));
    Ok(())
}

fn copy(image: &Path, archive: &Initramfs, dir: &Path) -> Result<PathBuf, AssetError> {
    let Image { vmlinux, initramfs, mut manifest } = Image::open(image)?;
    let mut both = files::read(&initramfs)?;
    both.extend(archive.to_bytes()?);
    manifest.initramfs = FileEntry { size: both.len() as u64, sha256: sha256(&both) };
    fs::create_dir_all(dir).map_err(|e| AssetError::file("make", dir, e))?;
    let write = |name: &str, bytes: &[u8]| {
        let path = dir.join(name);
        fs::write(&path, bytes).map_err(|e| AssetError::file("write", &path, e))
    };
    fs::copy(&vmlinux, dir.join("vmlinux")).map_err(|e| AssetError::file("copy", &vmlinux, e))?;
    write("initramfs.cpio", &both)?;
    write("manifest.json", &serde_json::to_vec_pretty(&manifest).unwrap_or_default())?;
    Image::open(dir)?;
    Ok(dir.into())
}
