//! Folders of root and of users, as the environment and the XDG Base Directory Specification name them.

use std::path::{Path, PathBuf};

use nix::unistd::geteuid;

/// `$variable` where it is set; else `root` for root; else `name` below `$xdg`, or below `home` in the user's home, for `(xdg, home)`.
/// `None`: there is no home.
pub fn of(variable: &str, root: &str, (xdg, home): (&str, &str), name: &str) -> Option<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(folder) = set(variable) {
        return Some(folder);
    }
    if geteuid().is_root() {
        return Some(Path::new(root).into());
    }
    set(xdg).or_else(|| set("HOME").map(|folder| folder.join(home))).map(|base| base.join(name))
}
