//! A kernel's module tree (`/lib/modules/RELEASE`): which modules a device or a name needs, in the order in which they
//! are to be loaded, and their plain (uncompressed) contents.
//!
//! Works on an installed tree and on one unpacked from a package, which `depmod` has never seen. Modules that are
//! built into the kernel count as there and need no loading.

mod index;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use crate::cache::Cache;
use crate::decompress::DecompressError;
use crate::files::{self, FileError};
use crate::modinfo::Modinfo;
use crate::pattern;

/// Why a module cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ModulesError {
    /// A file cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// The folder holds no modules.
    #[error("{} holds no kernel modules (neither modules.dep nor modules.order nor modules.builtin)", .0.display())]
    NoTree(PathBuf),
    /// A module file cannot be unpacked or read as a module.
    #[error("the module {} is damaged", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Why, where unpacking failed.
        #[source]
        source: Option<DecompressError>,
    },
    /// No module and nothing built in has that name.
    #[error("kernel {release} has no module {name:?}{}", needed(needed_by))]
    Missing {
        /// What was asked for.
        name: String,
        /// Who needs it, if not the caller.
        needed_by: Option<String>,
        /// The kernel's release.
        release: String,
    },
    /// The index is unusable, or cannot be made.
    #[error("the index of modules cannot be used: {0}")]
    Index(String),
}

fn needed(by: &Option<String>) -> String {
    by.as_ref().map(|by| format!(", which {by} depends on")).unwrap_or_default()
}

/// A kernel driver for a device.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DriverName {
    /// The module's name.
    pub name: String,
    /// It is part of the kernel image.
    pub builtin: bool,
}

/// The module tree of one kernel.
#[derive(Debug)]
pub struct ModuleTree {
    dir: PathBuf,
    release: String,
    index: index::Index,
    /// What is built in, and where its source is, as for a module.
    builtin: BTreeMap<String, PathBuf>,
    /// Alias patterns of what is built in, and the name.
    builtin_aliases: Vec<(String, String)>,
}

/// Module names are compared with `_` for `-`.
fn normal(name: &str) -> String {
    name.replace('-', "_")
}

impl ModuleTree {
    /// Opens the tree at `dir`, whose last component is the kernel's release.
    ///
    /// # Errors
    /// When it is no module tree, or a module cannot be read while the index is made.
    pub fn open(dir: &Path, cache: &Cache) -> Result<Self, ModulesError> {
        if !["modules.dep", "modules.order", "modules.builtin"].iter().any(|f| dir.join(f).is_file()) {
            return Err(ModulesError::NoTree(dir.into()));
        }
        let release = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let names = files::read_text(&dir.join("modules.builtin")).unwrap_or_default();
        let stem = |path: &str| Path::new(path).file_stem()?.to_str().map(normal);
        let builtin = names.lines().filter_map(|line| Some((stem(line)?, line.into()))).collect();
        let info = files::read(&dir.join("modules.builtin.modinfo")).unwrap_or_default();
        let builtin_aliases = Modinfo::of_section(&info)
            .pairs()
            .filter_map(|(key, value)| Some((value.to_owned(), normal(key.strip_suffix(".alias")?))))
            .collect();
        Ok(Self { index: index::open(dir, cache)?, dir: dir.into(), release, builtin, builtin_aliases })
    }

    /// The kernel's release, as `6.12.95+deb12-amd64`.
    pub fn release(&self) -> &str {
        &self.release
    }

    /// Whether the kernel has this, as a module or built in.
    pub fn has(&self, name: &str) -> bool {
        let name = normal(name);
        self.builtin.contains_key(&name) || self.index.contains_key(&name)
    }

    /// Whether this is built into the kernel.
    pub fn is_builtin(&self, name: &str) -> bool {
        self.builtin.contains_key(&normal(name))
    }

    /// The file of a module below the tree, as `kernel/drivers/ata/ahci.ko.xz`; that of something built in is none, but named in the same
    /// way.
    pub fn path_of(&self, name: &str) -> Option<&Path> {
        let name = normal(name);
        self.index.get(&name).map(|module| &module.path).or_else(|| self.builtin.get(&name)).map(PathBuf::as_path)
    }

    /// The drivers whose aliases match a device's modalias; several may, and the kernel tries each.
    pub fn drivers_for(&self, modalias: &str) -> Vec<DriverName> {
        let modules = self
            .index
            .iter()
            .filter(|(_, module)| module.aliases.iter().any(|alias| pattern::matches(alias, modalias)));
        let builtin = self.builtin_aliases.iter().filter(|(alias, _)| pattern::matches(alias, modalias));
        let mut found: Vec<_> = modules
            .map(|(name, _)| DriverName { name: name.clone(), builtin: false })
            .chain(builtin.map(|(_, name)| DriverName { name: name.clone(), builtin: true }))
            .collect();
        found.sort();
        found.dedup();
        found
    }

    /// The modules, by name, of which an alias is as `wanted`. What is built in is none.
    pub fn with_alias(&self, wanted: impl Fn(&str) -> bool) -> Vec<String> {
        let modules = self.index.iter().filter(|(_, module)| module.aliases.iter().any(|alias| wanted(alias)));
        modules.map(|(name, _)| name.clone()).collect()
    }

    /// The modules to load, in order, so that all of `names` are in the kernel. Built-in ones are left out.
    ///
    /// # Errors
    /// [`ModulesError::Missing`] names the module and who depends on it.
    pub fn load_order<S: AsRef<str>>(&self, names: &[S]) -> Result<Vec<String>, ModulesError> {
        let mut order = Vec::new();
        let mut seen = BTreeSet::new();
        for name in names {
            self.visit(&normal(name.as_ref()), None, &mut seen, &mut order)?;
        }
        Ok(order)
    }

    /// Depth first; `seen` also ends circles, which only soft dependencies can have.
    fn visit(
        &self,
        name: &str,
        needed_by: Option<&str>,
        seen: &mut BTreeSet<String>,
        order: &mut Vec<String>,
    ) -> Result<(), ModulesError> {
        if self.builtin.contains_key(name) || !seen.insert(name.to_owned()) {
            return Ok(());
        }
        let module = self.index.get(name).ok_or_else(|| ModulesError::Missing {
            name: name.into(),
            needed_by: needed_by.map(Into::into),
            release: self.release.clone(),
        })?;
        for soft in module.before.iter().filter(|soft| self.has(soft)) {
            self.visit(soft, Some(name), seen, order)?;
        }
        for hard in &module.depends {
            self.visit(hard, Some(name), seen, order)?;
        }
        order.push(name.into());
        for soft in module.after.iter().filter(|soft| self.has(soft)) {
            self.visit(soft, Some(name), seen, order)?;
        }
        Ok(())
    }

    /// The plain `.ko` of a module.
    ///
    /// # Errors
    /// When there is none or its file is damaged.
    pub fn read(&self, name: &str) -> Result<Vec<u8>, ModulesError> {
        let name = normal(name);
        let module = self.index.get(&name).ok_or_else(|| ModulesError::Missing {
            name: name.clone(),
            needed_by: None,
            release: self.release.clone(),
        })?;
        index::read_module(&self.dir.join(&module.path))
    }

    /// The firmware files that a module (its plain `.ko`) may ask for, relative to the firmware folder.
    pub fn firmware_of(module: &[u8]) -> Vec<String> {
        Modinfo::of_module(module).map(|info| info.all("firmware").map(Into::into).collect()).unwrap_or_default()
    }
}
