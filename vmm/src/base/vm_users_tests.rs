//! Ranges of users as files have them, and numbers that are taken from them.

use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

use super::*;

/// A host with the user `umbra-vm` and these ranges.
fn host(subuid: &str, subgid: &str) -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    std::fs::create_dir(root.path().join("etc")).unwrap();
    let files =
        [(USERS, "root:x:0:0::/:/bin/sh\numbra-vm:x:987:986::/:/bin/false\n"), (SUBUID, subuid), (SUBGID, subgid)];
    for (file, text) in files {
        std::fs::write(below(root.path(), file), text).unwrap();
    }
    root
}

fn found(subuid: &str, subgid: &str) -> Result<Vec<Range<u32>>, String> {
    let users = VmUsers::find(host(subuid, subgid).path()).unwrap();
    users.range().map(<[_]>::to_vec).map_err(|error| chain(error))
}

#[test]
fn the_range_is_what_the_lines_of_both_files_have_in_common() {
    assert_eq!(found("", ""), Ok(vec![]));
    assert_eq!(found("jane:100000:65536\n\nodd\numbra-vm2:1:2", "umbra:7:8"), Ok(vec![]), "lines of others");
    assert_eq!(
        found("umbra-vm:100000:65536\n", "umbra-vm:100000:65536\n"),
        Ok(std::iter::once(100_000..165_536).collect())
    );
    // By number, in several lines, and the last number that is one.
    let two = "jane:1:9\n987:300:10\numbra-vm:4294967290:5\n";
    assert_eq!(found(two, "umbra-vm : 305 : 4294966990"), Ok(vec![305..310, 4_294_967_290..4_294_967_295]));
    let none = VmUsers::find(tempfile::tempdir().unwrap().path());
    assert!(none.is_none(), "{none:?}");
    let root = host("", "");
    std::fs::remove_file(below(root.path(), SUBGID)).unwrap();
    assert!(VmUsers::find(root.path()).unwrap().range().unwrap().is_empty(), "a file that is not there has no lines");
    std::fs::write(below(root.path(), USERS), "umbra-vm:x:0:0::/:/bin/false\n").unwrap();
    assert!(VmUsers::find(root.path()).is_none(), "root by another name");
}

#[test]
fn each_mistake_is_told_with_its_place() {
    let good = "umbra-vm:100000:65536\n";
    for wrong in [
        "umbra-vm",
        "umbra-vm:",
        "umbra-vm:100000",
        "umbra-vm:100000:",
        "umbra-vm:a:b",
        "umbra-vm:-5:10",
        "umbra-vm:100000:65536:1",
        // Root, nobody at all, and numbers that are none.
        "umbra-vm:0:65536",
        "umbra-vm:100000:0",
        "umbra-vm:4294967295:1",
        "umbra-vm:100000:4294967295",
        "987:0:1",
    ] {
        let text = format!("jane:1:2\n{wrong}\n");
        let told = found(&text, good).unwrap_err();
        assert!(
            told.contains(&format!("etc/subuid:2: {wrong:?} is no range")) && told.contains("write umbra-vm:"),
            "{told}"
        );
        let told = found(good, &text).unwrap_err();
        assert!(told.contains(&format!("etc/subgid:2: {wrong:?} is no range")), "{told}");
    }
    for (uids, gids) in [(good, ""), ("", good), (good, "umbra-vm:165536:65536\n")] {
        let told = found(uids, gids).unwrap_err();
        assert!(told.contains("no number in common: give it the same range in both"), "{told}");
    }
    let root = host(good, good);
    std::fs::write(below(root.path(), SUBUID), b"\xff\xfe").unwrap();
    let told = chain(VmUsers::find(root.path()).unwrap().range().unwrap_err());
    assert!(told.starts_with("read ") && told.contains("etc/subuid"), "{told}");
}

#[test]
fn maps_of_namespaces_are_read() {
    let line = |line: &'static str| mapped(line.split_whitespace());
    assert_eq!(line("         0          0 4294967295"), Some(0..u32::MAX));
    assert_eq!(line("1000 7 1"), Some(1000..1001));
    assert_eq!([line(""), line("0"), line("0 0"), line("a 0 1")], [None, None, None, None]);
    assert_eq!(common(&[1..5, 8..20], &[4..10, 30..40]), [4..5, 8..10]);
}

#[test]
fn an_unused_range_is_behind_all_that_are_used() {
    let unused = |uids, gids| unused_range(host(uids, gids).path());
    assert_eq!(unused("", "odd\n"), (100_000, 165_535));
    assert_eq!(unused("jane:100000:65536\n", "joe:200000:5\n"), (200_005, 265_540));
    assert_eq!(unused("joe:4294967294:1\n", "").1, u32::MAX - 1);
}

fn uids(taken: &[Taken]) -> Vec<u32> {
    taken.iter().map(|taken| taken.user.uid).collect()
}

#[test]
fn each_number_is_one_process_s_also_among_supervisors_until_all_are_taken() {
    let root = host("umbra-vm:500:2\numbra-vm:700:2", "umbra-vm:500:201\n");
    let [one, other] = [(); 2].map(|()| VmUsers::find(root.path()).unwrap());
    let mut taken: Vec<_> = [&one, &other, &one, &other, &one].map(VmUsers::take).into();
    assert_eq!(uids(&taken), [500, 501, 700, 987, 987]);
    assert!(taken[..3].iter().all(|taken| taken.user.gid == taken.user.uid && taken.lock.is_some()));
    assert!(taken[3].lock.is_none() && taken[3].user.gid == 986);
    assert!(one.has_warned.load(Ordering::Relaxed) && other.has_warned.load(Ordering::Relaxed));
    drop(taken.remove(1));
    assert_eq!(other.take().user.uid, 501, "it is free again");
    let plain = VmUsers::find(host("", "").path()).unwrap();
    assert_eq!(uids(&[plain.take(), plain.take()]), [987, 987]);
    assert!(!plain.has_warned.load(Ordering::Relaxed), "nothing was promised");
}

#[test]
fn numbers_that_cannot_be_locked_are_nobody_s_and_that_is_no_failure() {
    let root = host("umbra-vm:500:2\n", "umbra-vm:500:2\n");
    std::fs::write(root.path().join("run"), "in the way").unwrap();
    let users = VmUsers::find(root.path()).unwrap();
    assert_eq!(users.take().user, User { uid: 987, gid: 986 });
    assert!(users.has_warned.load(Ordering::Relaxed));
}

/// A process that has inherited `file`.
fn holder(file: &File) -> Child {
    let fd = file.as_raw_fd();
    let mut command = Command::new("sleep");
    // SAFETY: between fork and exec it makes one system call, on a descriptor that is open.
    unsafe {
        command.pre_exec(move || match libc::fcntl(fd, libc::F_SETFD, 0) {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        });
    }
    command.arg("1000").spawn().unwrap()
}

#[test]
fn a_number_stays_a_process_s_when_the_supervisor_is_gone() {
    let root = host("umbra-vm:500:2\n", "umbra-vm:500:2\n");
    let users = VmUsers::find(root.path()).unwrap();
    let taken = users.take();
    let mut child = holder(taken.lock.as_ref().unwrap());
    drop(taken);
    assert_eq!(users.take().user.uid, 501);
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(users.take().user.uid, 500);
}

/// What a process inherits it cannot write to.
#[test]
fn locks_are_root_s_and_only_read() {
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;

    let root = host("umbra-vm:500:2\n", "umbra-vm:500:2\n");
    let mut lock = VmUsers::find(root.path()).unwrap().take().lock.unwrap();
    assert_eq!(lock.write(b"x").unwrap_err().raw_os_error(), Some(libc::EBADF));
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&below(root.path(), LOCKS)), mode(&below(root.path(), LOCKS).join("500"))), (0o700, 0o400));
}
