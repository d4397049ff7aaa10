//! The index of a module tree: name, path, dependencies, soft dependencies and aliases of each module.
//!
//! A tree that `depmod` has seen is read from `modules.dep`, `modules.alias` and `modules.softdep`. A tree straight
//! from a package has none of these; there every module is opened and asked (`depends=`, `softdep=`, `alias=` in its
//! `.modinfo`), which takes seconds, so the result is cached.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use serde::{Deserialize, Serialize};

use super::{ModulesError, normal};
use crate::cache::{Cache, sha256};
use crate::decompress::decompress_any;
use crate::files::{self, FileError, context};
use crate::modinfo::Modinfo;

/// Largest module, unpacked: amdgpu with debug information stays below it.
pub(super) const MAX_MODULE: usize = 512 << 20;
/// Most bytes of all modules of a tree, unpacked: with debug information they are some 6 GiB.
const MAX_TREE: u64 = 32 << 30;
/// Changed when the cached form changes.
const FORMAT: &str = "index-1";

/// What is known of one module.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Module {
    /// The file, relative to the tree.
    pub(super) path: PathBuf,
    /// Modules that must be loaded before it.
    pub(super) depends: Vec<String>,
    /// Modules that should be loaded before it, where they exist.
    pub(super) before: Vec<String>,
    /// Modules that should be loaded after it, where they exist.
    pub(super) after: Vec<String>,
    /// Patterns of the devices and services that it drives.
    pub(super) aliases: Vec<String>,
}

/// Modules by name (`_` for `-`).
pub(super) type Index = BTreeMap<String, Module>;

/// Reads or makes the index of the tree at `dir`.
pub(super) fn open(dir: &Path, cache: &Cache) -> Result<Index, ModulesError> {
    if dir.join("modules.dep").is_file() {
        return from_depmod(dir);
    }
    let files = module_files(dir)?;
    let mut identity = String::from(FORMAT);
    for (path, size, time) in &files {
        identity.push_str(&format!("\n{} {size} {time}", path.display()));
    }
    let cached = cache.file("modules", &format!("{}.json", sha256(identity.as_bytes())), || {
        tracing::info!(modules = files.len(), "reading every module once (there is no modules.dep)");
        let index = from_modules(dir, files.iter().map(|(path, ..)| path.as_path()))?;
        serde_json::to_vec(&index).map_err(|e| ModulesError::Index(e.to_string()))
    })?;
    serde_json::from_slice(&files::read(&cached)?)
        .map_err(|e| ModulesError::Index(format!("{}: {e}; delete the file", cached.display())))
}

fn from_depmod(dir: &Path) -> Result<Index, ModulesError> {
    let mut index = Index::new();
    for line in files::read_text(&dir.join("modules.dep"))?.lines() {
        let Some((path, depends)) = line.split_once(':') else { continue };
        if !is_below(Path::new(path)) {
            continue;
        }
        let depends = depends.split_whitespace().filter_map(|p| name_of(Path::new(p))).collect();
        if let Some(name) = name_of(Path::new(path)) {
            index.insert(name, Module { path: path.into(), depends, ..Module::default() });
        }
    }
    // Both may be missing: a kernel without aliases or soft dependencies is possible.
    for line in files::read_text(&dir.join("modules.alias")).unwrap_or_default().lines() {
        let mut words = line.split_whitespace();
        if let (Some("alias"), Some(pattern), Some(name)) = (words.next(), words.next(), words.next())
            && let Some(module) = index.get_mut(&normal(name))
        {
            module.aliases.push(pattern.into());
        }
    }
    for line in files::read_text(&dir.join("modules.softdep")).unwrap_or_default().lines() {
        if let Some((name, text)) = line.strip_prefix("softdep ").and_then(|rest| rest.split_once(' '))
            && let Some(module) = index.get_mut(&normal(name))
        {
            soft_dependencies(text, module);
        }
    }
    Ok(index)
}

/// Opens every module, on all CPUs.
fn from_modules<'a>(dir: &Path, paths: impl Iterator<Item = &'a Path>) -> Result<Index, ModulesError> {
    let paths: Vec<_> = paths.collect();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let next = AtomicUsize::new(0);
    let found = Mutex::new(Vec::new());
    let left = AtomicU64::new(MAX_TREE);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(path) = paths.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let module = from_module(dir, path, &left);
                    found.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(module);
                }
            });
        }
    });
    let mut found: Vec<_> =
        found.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner).into_iter().collect::<Result<_, _>>()?;
    // `updates/` comes last and so wins over `kernel/`, as with depmod.
    found.sort_by_key(|(_, module)| (module.path.starts_with("updates"), module.path.clone()));
    Ok(found.into_iter().collect())
}

fn from_module(dir: &Path, path: &Path, left: &AtomicU64) -> Result<(String, Module), ModulesError> {
    if left.load(Ordering::Relaxed) == 0 {
        return Err(ModulesError::Index(format!("all modules together are larger than {} GiB", MAX_TREE >> 30)));
    }
    let bytes = read_module(&dir.join(path))?;
    let size = bytes.len() as u64;
    // Cannot fail: the closure always has a value.
    let _ = left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| Some(left.saturating_sub(size)));
    let info =
        Modinfo::of_module(&bytes).ok_or_else(|| ModulesError::Damaged { path: dir.join(path), source: None })?;
    let mut module = Module { path: path.into(), ..Module::default() };
    for (key, value) in info.pairs() {
        match key {
            "depends" => module.depends.extend(value.split(',').filter(|d| !d.is_empty()).map(normal)),
            "alias" => module.aliases.push(value.into()),
            "softdep" => soft_dependencies(value, &mut module),
            _ => {}
        }
    }
    Ok((name_of(path).unwrap_or_default(), module))
}

/// Reads a module file and unpacks it.
pub(super) fn read_module(path: &Path) -> Result<Vec<u8>, ModulesError> {
    decompress_any(files::read_up_to(path, MAX_MODULE)?, MAX_MODULE)
        .map_err(|source| ModulesError::Damaged { path: path.into(), source: Some(source) })
}

/// `pre: a b post: c`.
fn soft_dependencies(text: &str, module: &mut Module) {
    let mut list: Option<&mut Vec<String>> = None;
    for word in text.split_whitespace() {
        match word {
            "pre:" => list = Some(&mut module.before),
            "post:" => list = Some(&mut module.after),
            name => {
                if let Some(list) = &mut list {
                    list.push(normal(name));
                }
            }
        }
    }
}

/// Whether `path` names something below the folder that it is relative to.
fn is_below(path: &Path) -> bool {
    path.components().all(|part| matches!(part, Component::Normal(_)))
}

/// A module's name by its file: `kernel/a/snd-hda.ko.xz` is `snd_hda`.
fn name_of(path: &Path) -> Option<String> {
    let file = path.file_name()?.to_str()?;
    Some(normal(file.split_once(".ko").filter(|(_, end)| end.is_empty() || end.starts_with('.'))?.0))
}

/// Every module file below `dir`, relative to it and sorted, with size and time.
fn module_files(dir: &Path) -> Result<Vec<(PathBuf, u64, i128)>, FileError> {
    let mut found = Vec::new();
    let mut folders = vec![PathBuf::new()];
    while let Some(folder) = folders.pop() {
        let place = dir.join(&folder);
        for entry in fs::read_dir(&place).map_err(context("list", &place))? {
            let entry = entry.map_err(context("list", &place))?;
            let path = folder.join(entry.file_name());
            // Links are not followed: `build` and `source` lead to the kernel's sources.
            let kind = entry.file_type().map_err(context("read", &place))?;
            if kind.is_dir() {
                folders.push(path);
            } else if kind.is_file() && name_of(&path).is_some() {
                let meta = entry.metadata().map_err(context("read", &place))?;
                let time = i128::from(meta.mtime()) * 1_000_000_000 + i128::from(meta.mtime_nsec());
                found.push((path, meta.size(), time));
            }
        }
    }
    found.sort();
    Ok(found)
}
