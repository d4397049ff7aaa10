//! A Debian system with systemd, udev and dpkg for a test host to run: a file system with the distribution's own packages, installed by
//! their own dpkg and scripts.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use umbra_guest_images::cache::{Cache, sha256};

use super::sound::run;
use super::unpacked::UNPACK;
use super::{AssetError, Say, apt};

/// What is installed, with what it needs. What every Debian system has is said too: nothing depends on it.
const PACKAGES: [&str; 23] = [
    "base-files",
    "base-passwd",
    "bash",
    "coreutils",
    "dash",
    "dbus",
    "debianutils",
    "diffutils",
    "dpkg",
    "findutils",
    "grep",
    "gzip",
    "hostname",
    "init-system-helpers",
    "kmod",
    "libc-bin",
    "mount",
    "passwd",
    "perl-base",
    "sed",
    "systemd-sysv",
    "udev",
    "util-linux",
];

/// How it is made of them, when they are unpacked.
const INSTALL: &str = include_str!("debian.sh");

/// Size of the file system, bytes; empty parts take no room. As much as its packages have and a machine with its images.
const SIZE: u64 = 1 << 30;

/// The file's name in its folder of the cache.
const IMAGE: &str = "root.ext4";

/// An ext4 file system with it, made once. Needs root, as whoever installs packages does.
pub(super) fn root(cache: &Cache, say: Say<'_>) -> Result<PathBuf, AssetError> {
    let recipe = [UNPACK, INSTALL].concat();
    let key = &sha256([PACKAGES.join(" ").as_str(), &recipe].concat().as_bytes())[..24];
    let dir = cache.dir("debian", key, |dir| {
        let parts = dir.join("parts");
        let root = parts.join("root");
        fs::create_dir_all(&root).map_err(|e| AssetError::file("make", &root, e))?;
        say("downloading the packages of a small Debian system (about 40 MB)");
        let packages = apt::download_all(&PACKAGES, &parts, say)?;
        say("installing them in a file system for a test host with systemd");
        run(Command::new("sh").args(["-c", &recipe, "debian.sh"]).args([&root, &packages]))?;
        let image = dir.join(IMAGE);
        let made = fs::File::create(&image).and_then(|file| file.set_len(SIZE));
        made.map_err(|e| AssetError::file("make", &image, e))?;
        run(Command::new("/sbin/mke2fs").args(["-q", "-F", "-t", "ext4", "-d"]).args([&root, &image]))?;
        fs::remove_dir_all(&parts).map_err(|e| AssetError::file("remove", &parts, e))
    })?;
    Ok(dir.join(IMAGE))
}
