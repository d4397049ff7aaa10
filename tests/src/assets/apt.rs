//! Gets what is missing from the distribution's own archive, saying so first.
//!
//! On Debian 12 QEMU and the kernel come from backports; the suite is added in a sources file of its own, for the
//! mirror that the system uses already. Nothing is upgraded that is not asked for by name.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use super::{AssetError, Say};

const BACKPORTS_FILE: &str = "/etc/apt/sources.list.d/umbra-backports.sources";

/// What apt says when another package manager holds one of its locks.
const LOCKED: [&str; 4] = ["Could not get lock", "Unable to acquire", "Unable to lock", "is another process using it"];
/// How long apt itself waits for dpkg's locks, s, so that a quick one costs no word; for those of the index and of the downloads it
/// does not wait.
const LOCK_TIMEOUT: &str = "DPkg::Lock::Timeout=3";
/// Time between two looks whether the other package manager is done.
const LOOK_AGAIN: Duration = Duration::from_secs(3);

/// Packages that the bench needs, and the program by which each is recognised.
const PACKAGES: [(&str, &str); 11] = [
    ("qemu-system-x86", "/usr/bin/qemu-system-x86_64"),
    ("busybox-static", "/bin/busybox"),
    ("cpio", "/usr/bin/cpio"),
    ("binutils", "/usr/bin/strip"),
    ("iproute2", "/bin/ip"),
    ("mpg123", "/usr/bin/mpg123"),
    ("alsa-utils", "/usr/bin/aplay"),
    ("lame", "/usr/bin/lame"),
    ("pulseaudio", "/usr/bin/pulseaudio"),
    ("sqlite3", "/usr/bin/sqlite3"),
    ("e2fsprogs", "/sbin/mke2fs"),
];

/// Installs what is missing.
///
/// # Errors
/// Without root: the command that the user has to run.
pub(super) fn install_missing(say: Say<'_>) -> Result<(), AssetError> {
    let mut missing: Vec<&str> =
        PACKAGES.iter().filter(|(_, program)| !Path::new(program).exists()).map(|(package, _)| *package).collect();
    if !missing.contains(&"busybox-static") && !is_static(Path::new("/bin/busybox")) {
        missing.push("busybox-static");
    }
    let old = !missing.contains(&"qemu-system-x86") && super::qemu_major().is_some_and(|major| major < 8);
    if missing.is_empty() && !(old && nix::unistd::geteuid().is_root() && codename().as_deref() == Some("bookworm")) {
        return Ok(());
    }
    if old {
        missing.push("qemu-system-x86");
    }
    if !nix::unistd::geteuid().is_root() {
        return Err(AssetError::NotRoot { packages: missing.join(" ") });
    }
    say(&format!("installing from this system's package archive: {}", missing.join(", ")));
    refresh(say)?;
    // A newer one than the kernel's: Debian 12's own QEMU has no igb and is unsteady with two emulated CPUs.
    let suite = codename().map(|name| format!("{name}-backports")).filter(|suite| known_suite(suite));
    for package in missing {
        let from_backports = package == "qemu-system-x86" && suite.is_some();
        let mut arguments = vec!["install", "-y", "--no-install-recommends"];
        if let (true, Some(suite)) = (from_backports, &suite) {
            arguments.extend(["-t", suite]);
        }
        arguments.push(package);
        apt_get(&arguments, None, say)?;
    }
    Ok(())
}

fn is_static(program: &Path) -> bool {
    // `ldd` fails on a static program.
    let ldd = Command::new("ldd").arg(program).stdout(Stdio::null()).stderr(Stdio::null()).status();
    ldd.is_ok_and(|status| !status.success())
}

/// Downloads the newest 6.12 kernel package (or, without one, the newest) into `dir`; returns its file.
pub(super) fn download_kernel(dir: &Path, say: Say<'_>) -> Result<PathBuf, AssetError> {
    let mut names = kernel_packages();
    if !names.iter().any(|name| name.starts_with("linux-image-6.12")) && nix::unistd::geteuid().is_root() {
        refresh(say)?;
        names = kernel_packages();
    }
    let newest = |wanted: &str| names.iter().filter(|n| n.starts_with(wanted)).max_by_key(|n| numbers(n)).cloned();
    let name = newest("linux-image-6.12").or_else(|| newest("linux-image-")).ok_or(AssetError::NoKernelPackage)?;
    say(&format!("downloading the kernel package {name} (about 100 MB)"));
    let fresh = tempfile::tempdir_in(dir).map_err(|e| AssetError::file("make a folder in", dir, e))?;
    apt_get(&["download", &name], Some(fresh.path()), say)?;
    let entries = fs::read_dir(fresh.path()).map_err(|e| AssetError::file("list", fresh.path(), e))?;
    let package = entries.flatten().map(|entry| entry.path()).find(|path| path.extension().is_some_and(|e| e == "deb"));
    let package = package.ok_or(AssetError::NoKernelPackage)?;
    let place = dir.join(package.file_name().unwrap_or_default());
    fs::rename(&package, &place).map_err(|e| AssetError::file("move", &package, e))?;
    Ok(place)
}

/// Downloads the packages `names` and all that they need, as if this system had none of it; returns the folder with them, in `dir`.
pub(super) fn download_all(names: &[&str], dir: &Path, say: Say<'_>) -> Result<PathBuf, AssetError> {
    let (status, archives) = (dir.join("status"), dir.join("archives"));
    let partial = archives.join("partial");
    fs::create_dir_all(&partial).map_err(|e| AssetError::file("make", &partial, e))?;
    fs::write(&status, "").map_err(|e| AssetError::file("write", &status, e))?;
    let options = [format!("Dir::State::status={}", status.display()), format!("Dir::Cache={}", dir.display())];
    let mut arguments = vec!["install", "-y", "--download-only", "--no-install-recommends"];
    arguments.extend(options.iter().flat_map(|option| ["-o", option]));
    arguments.extend(names);
    if apt_get(&arguments, Some(dir), say).is_err() {
        // Of a system that has never looked, or whose index is of packages that are there no more.
        refresh(say)?;
        apt_get(&arguments, Some(dir), say)?;
    }
    Ok(archives)
}

/// Names of kernel packages: generic ones, not those for clouds, real time or debugging.
fn kernel_packages() -> Vec<String> {
    let pattern = r"^linux-image-[0-9].*-amd64$";
    let output = Command::new("apt-cache").args(["search", "--names-only", pattern]).output();
    let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
    let names = text.lines().filter_map(|line| line.split_whitespace().next());
    names
        .filter(|n| !["-cloud-", "-rt-", "-dbg", "-unsigned"].iter().any(|no| n.contains(no)))
        .map(Into::into)
        .collect()
}

/// The numbers in a name, for comparison.
fn numbers(name: &str) -> Vec<u64> {
    name.split(|c: char| !c.is_ascii_digit()).filter_map(|digits| digits.parse().ok()).collect()
}

/// Brings the package index up to date, with backports where the release needs them.
fn refresh(say: Say<'_>) -> Result<(), AssetError> {
    if codename().as_deref() == Some("bookworm") && !known_suite("bookworm-backports") {
        add_backports("bookworm", say)?;
    }
    say("updating the package index");
    apt_get(&["update"], None, say)
}

fn codename() -> Option<String> {
    let text = fs::read_to_string("/etc/os-release").ok()?;
    text.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME=")).map(|name| name.trim_matches('"').to_owned())
}

fn source_files() -> Vec<String> {
    let mut paths = vec![PathBuf::from("/etc/apt/sources.list")];
    paths.extend(fs::read_dir("/etc/apt/sources.list.d").into_iter().flatten().flatten().map(|entry| entry.path()));
    paths.iter().filter_map(|path| fs::read_to_string(path).ok()).collect()
}

fn known_suite(suite: &str) -> bool {
    let active = |text: &String| text.lines().any(|line| !line.trim_start().starts_with('#') && line.contains(suite));
    source_files().iter().any(active)
}

fn add_backports(codename: &str, say: Say<'_>) -> Result<(), AssetError> {
    let sources = source_files();
    let mirror = sources.iter().find_map(|text| mirror_of(text, codename)).ok_or(AssetError::NoMirror)?;
    say(&format!("adding the suite {codename}-backports in {BACKPORTS_FILE}"));
    let text = format!(
        "# Added by umbra-bench for QEMU and the kernel of its test machines; may be removed.\n\
         Types: deb\nURIs: {mirror}\nSuites: {codename}-backports\nComponents: main\n\
         Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n"
    );
    fs::write(BACKPORTS_FILE, text).map_err(|e| AssetError::file("write", Path::new(BACKPORTS_FILE), e))
}

/// The mirror of `codename` in a sources file of either form.
fn mirror_of(text: &str, codename: &str) -> Option<String> {
    let one_line = text.lines().filter(|line| line.starts_with("deb ")).find_map(|line| {
        let words: Vec<_> = line.split_whitespace().filter(|w| !w.starts_with('[') && !w.ends_with(']')).collect();
        (words.get(2) == Some(&codename)).then(|| words.get(1).map(|&uri| uri.to_owned())).flatten()
    });
    let field = |paragraph: &str, name: &str| {
        paragraph.lines().find_map(|line| line.strip_prefix(name)).map(|value| value.trim().to_owned())
    };
    one_line.or_else(|| {
        text.split("\n\n").find_map(|paragraph| {
            let suites = field(paragraph, "Suites:")?;
            suites.split_whitespace().any(|s| s == codename).then(|| field(paragraph, "URIs:")).flatten()
        })
    })
}

fn apt_get(arguments: &[&str], dir: Option<&Path>, say: Say<'_>) -> Result<(), AssetError> {
    let mut command = Command::new("apt-get");
    command
        .args(["-q", "-o", "Dpkg::Use-Pty=0", "-o", LOCK_TIMEOUT])
        .args(arguments)
        .env("DEBIAN_FRONTEND", "noninteractive");
    if let Some(dir) = dir {
        command.current_dir(dir);
        if nix::unistd::geteuid().is_root() {
            command.args(["-o", "APT::Sandbox::User=root"]);
        }
    }
    let failed = |what: String| AssetError::Apt { arguments: arguments.join(" "), what };
    command.stdin(Stdio::null());
    wait_for_others(&mut command, say).map_err(failed)
}

/// Runs a package manager until it is not turned away because another one is at work; the end of its complaints where it fails for
/// another reason. How long the other one takes is not ours to bound: the user is told, and can end it or this program.
fn wait_for_others(command: &mut Command, say: Say<'_>) -> Result<(), String> {
    let mut told = false;
    loop {
        let output = command.output().map_err(|e| e.to_string())?;
        if output.status.success() {
            return Ok(());
        }
        let text = String::from_utf8_lossy(&output.stderr);
        if !LOCKED.iter().any(|words| text.contains(words)) {
            let lines: Vec<_> = text.lines().collect();
            return Err(lines[lines.len().saturating_sub(8)..].join("\n"));
        }
        if !told {
            say("another package manager is at work; waiting until it is done");
            told = true;
        }
        std::thread::sleep(LOOK_AGAIN);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mirror_is_found_in_both_forms() {
        let old = "deb [signed-by=/k] http://mirror.example/debian bookworm main\n";
        assert_eq!(mirror_of(old, "bookworm").as_deref(), Some("http://mirror.example/debian"));
        let new = "Types: deb\nURIs: http://sec.example/\nSuites: bookworm-security\n\nTypes: deb\n# x\n\
                   URIs: http://mirror.example/debian\nSuites: bookworm bookworm-updates\n";
        assert_eq!(mirror_of(new, "bookworm").as_deref(), Some("http://mirror.example/debian"));
        assert_eq!(mirror_of(new, "trixie"), None);
    }

    #[test]
    fn a_busy_package_manager_is_waited_for_with_a_word() {
        let dir = tempfile::tempdir().unwrap();
        let done = dir.path().join("done");
        // Turned away the first time, as apt says it; through the second.
        let script = format!(
            "[ -e {0} ] && exit 0; : >{0}; echo 'E: Could not get lock /var/lib/apt/lists/lock. It is held by process 9' >&2; exit 100",
            done.display()
        );
        let said = std::cell::RefCell::new(Vec::new());
        let say = |what: &str| said.borrow_mut().push(what.to_owned());
        wait_for_others(Command::new("sh").args(["-c", &script]), &say).unwrap();
        assert_eq!(*said.borrow(), ["another package manager is at work; waiting until it is done"]);
        let failed = wait_for_others(Command::new("sh").args(["-c", "echo 'E: no such package' >&2; exit 100"]), &say);
        assert_eq!(failed, Err("E: no such package".into()));
    }

    #[test]
    fn versions_compare_as_numbers() {
        assert!(numbers("linux-image-6.12.9+deb12-amd64") < numbers("linux-image-6.12.74+deb12-amd64"));
    }
}
