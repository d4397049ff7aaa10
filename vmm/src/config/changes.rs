//! What differs between the machine that runs and its file, and what of that the machine can take over as it runs. Pure.
//!
//! Invariant: what is taken over makes a machine that passes [`Machine::check`], and every change is either in it or named as left.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Driver, Guest, Machine, Problem};

/// When a change of the machine file takes effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Effect {
    /// At once.
    Now,
    /// In processes that are started from now on.
    NextProcess,
    /// With the guest's next start.
    NextStart,
    /// In lives of the driver VM that begin from now on; what waits is begun again.
    NextLife,
    /// With another command.
    Command,
    /// When the machine is started again.
    NextRun,
}

/// A key of the machine file whose value differs, or a table that was added or removed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// Its place in the file, as `guest.web.cpus`.
    pub key: String,
    /// Its value in the machine that runs; `None`: it is a table that was added.
    pub before: Option<String>,
    /// Its value in the file; `None`: it is a table that was removed.
    pub after: Option<String>,
    /// When it takes effect.
    pub effect: Effect,
    /// What to do for it to take effect, where that is not done by itself.
    pub remedy: Option<String>,
}

impl Change {
    /// Whether the machine takes it over as it runs.
    pub fn is_taken(&self) -> bool {
        !matches!(self.effect, Effect::Command | Effect::NextRun)
    }
}

/// What becomes of a machine that runs.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The machine, with all that it can take over.
    pub machine: Machine,
    /// All that differs, in the order of its keys.
    pub changes: Vec<Change>,
}

/// What a machine that runs as `now` can take over of `file`.
///
/// # Errors
///
/// What can be taken over and what cannot contradict each other.
pub fn plan(now: &Machine, file: &Machine) -> Result<Plan, Problem> {
    let mut machine = now.clone();
    machine.metrics.clone_from(&file.metrics);
    machine.confine = file.confine;
    for (name, guest) in &mut machine.guest {
        if let Some(file) = file.guest.get(name) {
            guest.take(file);
        }
    }
    for (name, driver) in &mut machine.driver {
        if let Some(file) = file.driver.get(name) {
            driver.take(file);
        }
    }
    let (guests, drivers) = added(now, file);
    machine.guest.extend(guests.into_iter().map(|name| (name.clone(), file.guest[&name].clone())));
    machine.driver.extend(drivers.into_iter().map(|name| (name.clone(), file.driver[&name].clone())));
    let changes = changes(now, &machine, file);
    machine.check()?;
    Ok(Plan { machine, changes })
}

/// The guests and driver VMs of `file` that can be added to `now`: those that have to do with each other alone. A driver VM has the
/// connections with its guests from its beginning.
fn added(now: &Machine, file: &Machine) -> (BTreeSet<String>, BTreeSet<String>) {
    let mut guests: BTreeSet<_> = file.guest.keys().filter(|name| !now.guest.contains_key(*name)).cloned().collect();
    let mut drivers: BTreeSet<_> = file.driver.keys().filter(|name| !now.driver.contains_key(*name)).cloned().collect();
    loop {
        let before = (guests.len(), drivers.len());
        guests.retain(|name| file.guest[name].drivers().all(|driver| drivers.contains(driver)));
        drivers.retain(|driver| {
            file.guest
                .iter()
                .filter(|(_, guest)| guest.drivers().any(|of| of == driver))
                .all(|(name, _)| guests.contains(name))
        });
        if (guests.len(), drivers.len()) == before {
            return (guests, drivers);
        }
    }
}

impl Guest {
    /// The names of the driver VMs of its devices.
    fn drivers(&self) -> impl Iterator<Item = &str> {
        let nets = self.net.iter().filter_map(|net| net.driver.as_deref());
        let disks = self.disk.iter().filter_map(|disk| disk.driver.as_deref());
        nets.chain(disks).chain(self.sound.iter().map(|sound| sound.driver.as_str()))
    }

    /// Takes over what a guest that runs can.
    fn take(&mut self, file: &Self) {
        let Self { kernel, initrd, cmdline, cpus, cpu_max, on_reset, on_crash, restart, .. } = file.clone();
        // A guest with a device that is passed through has its memory locked, which is checked before anything starts.
        let memory = if self.passthrough.is_empty() { file.memory } else { self.memory };
        *self = Self { kernel, initrd, cmdline, cpus, cpu_max, memory, on_reset, on_crash, restart, ..self.clone() };
    }
}

impl Driver {
    /// Takes over what a driver VM can that runs. Its guests know its memory, and refuse links with more.
    fn take(&mut self, file: &Self) {
        let Self { device, spare, image, memory, .. } = self.clone();
        *self = Self { device, spare, image, memory, ..file.clone() };
    }
}

/// When the key at this place, which can be taken over, takes effect, and what has to be done for that.
fn effect(table: &str, name: &str, key: &str) -> (Effect, Option<String>) {
    match (table, key.split('.').next().unwrap_or(key)) {
        ("confine", _) => (Effect::NextProcess, None),
        ("guest", "kernel" | "initrd" | "cmdline" | "cpus" | "cpu_max" | "memory") => {
            (Effect::NextStart, Some(format!("`umbra reboot {name}`")))
        }
        ("driver", "cmdline" | "cpus" | "cpu_max" | "snapshots") => {
            (Effect::NextLife, Some(format!("`umbra restart {name}`")))
        }
        ("driver", "restart") if key == "restart.interrupts_per_s" => {
            (Effect::NextLife, Some(format!("`umbra restart {name}`")))
        }
        _ => (Effect::Now, None),
    }
}

/// All that differs between `now` and `file`; what is in `taken` is taken over.
fn changes(now: &Machine, taken: &Machine, file: &Machine) -> Vec<Change> {
    let [now, taken, file] = [now, taken, file].map(|machine| serde_json::to_value(machine).unwrap_or_default());
    let mut changes = Vec::new();
    for key in ["metrics", "confine", "cgroup", "history"] {
        compare(&mut changes, (key, "", ""), (&now[key], &taken[key], &file[key]));
    }
    for table in ["guest", "driver"] {
        for name in keys(&now[table], &file[table]) {
            let [now, taken, file] = [&now, &taken, &file].map(|machine| &machine[table][&name]);
            match (now.is_null(), file.is_null()) {
                (true, _) => changes.push(table_added(table, &name, !taken.is_null())),
                (_, true) => changes.push(table_removed(table, &name)),
                _ => {
                    for key in keys(now, file) {
                        compare(&mut changes, (table, &name, &key), (&now[&key], &taken[&key], &file[&key]));
                    }
                }
            }
        }
    }
    changes
}

/// The keys of two tables.
fn keys(one: &Value, other: &Value) -> BTreeSet<String> {
    let tables = [one, other].into_iter().filter_map(Value::as_object);
    tables.flat_map(|table| table.keys().cloned()).collect()
}

/// Adds what differs of a value in the machine that runs, in the one that it becomes, and in the file.
fn compare(changes: &mut Vec<Change>, place: (&str, &str, &str), values: (&Value, &Value, &Value)) {
    let ((table, name, key), (now, taken, file)) = (place, values);
    if now == file {
        return;
    }
    if key == "restart" {
        for inner in keys(now, file) {
            let values = (&now[&inner], &taken[&inner], &file[&inner]);
            compare(changes, (table, name, &format!("restart.{inner}")), values);
        }
        return;
    }
    let (effect, remedy) = match (taken == file, table, key) {
        (true, ..) => effect(table, name, key),
        (false, "driver", "image") => {
            let image = file.as_str().unwrap_or_default();
            (Effect::Command, Some(format!("`umbra restart {name} --image {image}`")))
        }
        _ => (Effect::NextRun, None),
    };
    let place = [table, name, key].into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(".");
    // What is not in the file has its default, which may be none.
    let text = |value: &Value| Some(if value.is_null() { "none".into() } else { value.to_string() });
    changes.push(Change { key: place, before: text(now), after: text(file), effect, remedy });
}

fn table_added(table: &str, name: &str, taken: bool) -> Change {
    let remedy = match (taken, table) {
        (true, _) => None,
        (false, "guest") => Some("a driver VM that runs gets no further guests".into()),
        (false, _) => Some("guests that run get no further devices".into()),
    };
    let effect = if taken { Effect::Now } else { Effect::NextRun };
    Change { key: format!("{table}.{name}"), before: None, after: Some("added".into()), effect, remedy }
}

fn table_removed(table: &str, name: &str) -> Change {
    let remedy = (table == "guest").then(|| format!("until then `umbra stop {name}` has it off"));
    let before = Some("there".into());
    Change { key: format!("{table}.{name}"), before, after: None, effect: Effect::NextRun, remedy }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
#[path = "changes_tests.rs"]
mod tests;
