//! `make deb`: the packages are the same each time, are installed into and removed from a Debian root, and their hook builds driver VM
//! images again when a kernel is installed.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;

use common::{assets, done, packages, skipped, skipped_without_root};

/// The files of a package, as paths from the root.
fn files(package: &Path) -> Vec<String> {
    let list = done(Command::new("dpkg-deb").arg("-c").arg(package));
    let names = list.lines().filter(|line| line.starts_with('-')).filter_map(|line| line.split(" ./").nth(1));
    names.map(|name| format!("/{name}")).collect()
}

/// All that is in `root` and is no folder, but the database of `dpkg`.
fn left_in(root: &Path) -> Vec<String> {
    let list = done(Command::new("find").arg(root).args(["-not", "-type", "d", "-printf", "/%P\n"]));
    let mut left: Vec<_> = list.lines().filter(|path| !path.starts_with("/var/lib/dpkg/")).map(str::to_owned).collect();
    left.sort();
    left
}

#[test]
fn a_package_is_the_same_each_time_and_is_installed_and_removed_without_root() {
    if skipped() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let [package, symbols] = packages(&dir.path().join("one"), "022");
    let again = packages(&dir.path().join("two"), "077");
    for (one, two) in [&package, &symbols].into_iter().zip(&again) {
        assert!(fs::read(one).unwrap() == fs::read(two).unwrap(), "{} differs", one.display());
    }

    // A root with nothing but the database of `dpkg`, in which the C library is said to be installed.
    let root = dir.path().join("root");
    let database = root.join("var/lib/dpkg");
    fs::create_dir_all(database.join("info")).unwrap();
    fs::create_dir_all(database.join("updates")).unwrap();
    let libc = "Package: libc6\nStatus: install ok installed\nArchitecture: amd64\nVersion: 99\nProvides: passwd\n\
                Maintainer: nobody <n@localhost>\nDescription: none\n";
    fs::write(database.join("status"), libc).unwrap();
    let dpkg = |words: &[&str]| {
        let root = format!("--root={}", root.display());
        // The scripts run with the machine's own shell.
        let mut command = Command::new("dpkg");
        command.args([&root, "--force-not-root", "--force-script-chrootless", "--log=/dev/null"]).args(words);
        done(&mut command)
    };
    dpkg(&["-i", package.to_str().unwrap(), symbols.to_str().unwrap()]);
    let mut installed = [files(&package), files(&symbols)].concat();
    installed.sort();
    assert_eq!(left_in(&root), installed);
    for file in [
        "/usr/bin/umbra",
        "/usr/bin/umbra-agent",
        "/usr/bin/umbra-sound",
        "/usr/lib/debug/usr/bin/umbra.debug",
        "/usr/lib/systemd/system/umbra@.service",
        "/usr/lib/systemd/system/umbra-sleep.service",
        "/usr/lib/systemd/system/sleep.target.d/umbra.conf",
        "/usr/share/man/man1/umbra-run.1.gz",
        "/usr/share/bash-completion/completions/umbra",
        "/usr/share/doc/umbra/copyright",
        "/etc/kernel/postinst.d/zz-umbra",
    ] {
        assert!(installed.iter().any(|path| path == file), "no {file} in {installed:#?}");
    }
    for program in ["umbra", "umbra-agent", "umbra-sound"] {
        let said = done(Command::new(root.join("usr/bin").join(program)).arg("--version"));
        assert_eq!(said, format!("{program} {}\n", env!("CARGO_PKG_VERSION")), "as the package");
    }

    // What the program makes in use, and what is the user's own.
    let made = [
        "var/cache/umbra/snapshots/a",
        "var/lib/umbra/web/1/events.jsonl",
        "etc/udev/rules.d/10-umbra-0000:03:00.0.rules",
    ];
    let own = ["etc/umbra/web.toml", "etc/udev/rules.d/10-mine.rules"];
    for file in made.iter().chain(&own) {
        let path = root.join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "").unwrap();
    }
    dpkg(&["-r", "umbra-dbgsym", "umbra"]);
    let after = left_in(&root);
    assert_eq!(after.len(), 1 + made.len() + own.len(), "configuration is kept: {after:#?}");
    dpkg(&["-P", "umbra"]);
    let own: Vec<_> = own.iter().rev().map(|path| format!("/{path}")).collect();
    assert_eq!(left_in(&root), own);
}

/// In a root that is this machine's with a layer above, `$1`: the package `$2` is installed, a machine's image made of the kernel `$4` in
/// the folder `$3`, and the hook called for another release, as a kernel's package does it. Then all is removed.
const IN_A_DEBIAN_ROOT: &str = r#"
set -e
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" "$1/root"
mount --bind /dev "$1/root/dev"
mount --bind /proc "$1/root/proc"
mkdir -p "$1/root/mnt/kernel" "$1/root/lib/modules" "$1/root/boot"
mount --bind "$3" "$1/root/mnt/kernel"
cp "$2" "$1/root/mnt/umbra.deb"
chroot "$1/root" sh -e -s "$4" <<'IN'
dpkg -i /mnt/umbra.deb
grep '^umbra-vm:.*nologin$' /etc/passwd
[ "$(grep -h '^umbra-vm:' /etc/subuid /etc/subgid | sort -u | wc -l)" = 1 ]
umbra doctor | tr -s ' \n' ' ' | grep "go on as users of umbra-vm's range, each as another (65536 from "
for release in "$1" "$1-next"; do
  ln -s "/mnt/kernel/lib/modules/$1" "/lib/modules/$release" 2>/dev/null || ln -s "/mnt/kernel/usr/lib/modules/$1" "/lib/modules/$release"
  ln -s "/mnt/kernel/boot/vmlinuz-$1" "/boot/vmlinuz-$release"
done
export UMBRA_CACHE=/mnt/cache
umbra image --driver e1000e --release "$1" -o /mnt/nic0
cat > /etc/umbra/web.toml <<END
guest.web = { kernel = "/k", net = [{ driver = "nic0" }] }
driver.nic0 = { device = "0000:03:00.0", image = "/mnt/nic0" }
END
echo 'guest = 1' > /etc/umbra/wrong.toml
export DEB_MAINT_PARAMS="'configure' '$1'"
run-parts --report --exit-on-error --arg="$1-next" --arg="/boot/vmlinuz-$1-next" --regex '^zz-umbra$' /etc/kernel/postinst.d 2>&1
dpkg -r umbra
run-parts --report --exit-on-error --arg="$1" --arg="/boot/vmlinuz-$1" --regex '^zz-umbra$' /etc/kernel/postinst.d 2>&1
dpkg -P umbra
if grep '^umbra-vm:' /etc/passwd /etc/subuid /etc/subgid; then exit 1; fi
rm -r /etc/umbra/web.toml /etc/umbra/wrong.toml /lib/modules/$1* /boot/vmlinuz-$1*
IN
umount "$1/root/mnt/kernel" "$1/root/dev" "$1/root/proc"
rm -r "$1/root/mnt/umbra.deb" "$1/root/mnt/cache"
grep -h '"kernel"' "$1/root/mnt/nic0/manifest.json"
rm -r "$1/root/mnt/nic0"
umount "$1/root"
"#;

#[test]
fn a_kernel_that_is_installed_renews_the_images_of_machines() {
    if skipped() || skipped_without_root() {
        return;
    }
    let assets = assets();
    let image = assets.kernel();
    let release = image.file_name().unwrap().to_str().unwrap().strip_prefix("vmlinuz-").unwrap();
    let kernel = image.parent().and_then(Path::parent).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let [package, _] = packages(&dir.path().join("debs"), "022");
    let layer = dir.path().join("layer");
    fs::create_dir(&layer).unwrap();
    let said = done(
        Command::new("unshare")
            .args(["--mount", "bash", "-c", IN_A_DEBIAN_ROOT, "bash"])
            .args([&layer, &package])
            .arg(kernel)
            .arg(release),
    );
    for words in [
        format!("/mnt/nic0: is of kernel {release}-next now, was of {release}"),
        format!("\"kernel\": \"{release}-next\""),
        "umbra: /etc/umbra/wrong.toml:1: ".into(),
    ] {
        assert!(said.contains(&words), "no word of {words}:\n{said}");
    }
    let left = left_in(&layer.join("upper"));
    // An Umbra of this machine's own may have been purged with it, in the layer: what it had shows there as gone.
    let foreign = |path: &&String| path.contains("umbra") && !Path::new(path).exists();
    assert_eq!(left.iter().find(foreign), None, "{left:#?}");
}
