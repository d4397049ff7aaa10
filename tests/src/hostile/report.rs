//! What a campaign has shown: a table, and JSON.

use std::collections::BTreeMap;

use serde::Serialize;

use super::bystander::Seen;
use super::campaign::{Attacker, HostileSpec, NOTHING, Outcome, Tally};
use super::host::HostState;
use super::plan::{ATTACKS, Attack};

/// Letters of a reason in the table.
const SHOWN: usize = 70;

/// See the module.
#[derive(Clone, Debug, Serialize)]
pub struct HostileResult {
    /// Who attacked.
    pub by: Attacker,
    /// The model of the attacked NIC.
    pub nic: String,
    /// Determines what each life did.
    pub seed: u64,
    /// For how long lives attacked.
    pub seconds: u32,
    /// Lives that attacked, by attack and by what stopped them.
    pub attacks: BTreeMap<Attack, BTreeMap<String, Outcome>>,
    /// Honest lives of the same driver between them, or lives of the guest that attacks, before it does.
    pub served: u32,
    /// The longest outage of the victim before one of these, ms.
    pub outage_ms: f64,
    /// The honest guest.
    pub bystander: Seen,
    /// Descriptors and memory (KiB) of the supervisor, before and after.
    pub supervisor: [(u64, u64); 2],
    /// Accesses that the IOMMU refused.
    pub iommu_faults: u64,
    /// What must not have happened; none.
    pub breaches: Vec<String>,
}

impl HostileResult {
    pub(super) fn new(
        spec: &HostileSpec,
        tally: Tally,
        bystander: Seen,
        (before, after): (&HostState, &HostState),
        iommu_faults: u64,
    ) -> Self {
        let mut breaches = tally.breaches;
        let outlived = |attack: &&Attack| tally.outcomes.get(attack).is_some_and(|by| by.contains_key(NOTHING));
        let outlived = ATTACKS.iter().filter(|attack| attack.has_to_be_stopped()).filter(outlived);
        breaches.extend(outlived.map(|attack| format!("nothing has stopped {attack:?}")));
        Self {
            by: spec.by,
            nic: spec.nic.to_string(),
            seed: spec.seed,
            seconds: spec.seconds,
            attacks: tally.outcomes,
            served: tally.served,
            outage_ms: tally.outage_ms,
            bystander,
            supervisor: [before, after].map(|state| (state.descriptors, state.memory_kib)),
            iommu_faults,
            breaches,
        }
    }

    /// Nothing happened that must not.
    pub fn is_sound(&self) -> bool {
        self.breaches.is_empty()
    }

    /// For people.
    pub fn table(&self) -> String {
        let mut text =
            format!("\n{:<20}{:>6}  {:<18}{}\n", "attack", "lives", "stopped by", "in the words of the first");
        for (attack, outcomes) in &self.attacks {
            for (by, outcome) in outcomes {
                let reason: String = outcome.reason.chars().map(shown).take(SHOWN).collect();
                text.push_str(&format!("{:<20}{:>6}  {by:<18}{reason}\n", name(*attack), outcome.lives));
            }
        }
        let Self { by, nic, seed, seconds, served, outage_ms, bystander, iommu_faults, .. } = self;
        let [(descriptors, memory), (more_descriptors, more_memory)] = self.supervisor;
        text.push_str(&format!(
            "\n{nic}, seed {seed}, {seconds} s of attacks: {}\n\
             honest guest: {} ticks, {} lost, longest gap {:.0} ms ({:.0} ms of its own); {} downloads whole, {} broken\n\
             supervisor: {descriptors} descriptors, {memory} KiB before; {more_descriptors}, {more_memory} KiB after; \
             accesses that the IOMMU refused: {iommu_faults}\n",
            match by {
                Attacker::DriverVm => {
                    format!("{served} honest lives between them served, after {outage_ms:.0} ms at most")
                }
                Attacker::Guest => format!("the guest that attacks was served {served} times between them"),
            },
            bystander.ticks,
            bystander.lost_ticks,
            bystander.gap_ms,
            bystander.still_ms,
            bystander.downloads,
            bystander.broken,
        ));
        for breach in &self.breaches {
            text.push_str(&format!("BREACH: {breach}\n"));
        }
        text
    }
}

/// What stands for a character in the table: the words are an attacker's.
fn shown(character: char) -> char {
    if character.is_ascii_graphic() || character == ' ' { character } else { '?' }
}

fn name(attack: Attack) -> String {
    serde_json::to_value(attack).ok().and_then(|name| name.as_str().map(str::to_owned)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen() -> Seen {
        Seen {
            ticks: 5,
            lost_ticks: 0,
            gap_ms: 12.0,
            still_ms: 11.0,
            downloads: 2,
            broken: 0,
            resets: 0,
            noticed: Vec::new(),
        }
    }

    fn result(attack: Attack, by: &str) -> HostileResult {
        let spec = HostileSpec { by: Attacker::DriverVm, nic: "rtl8139".into(), seconds: 9, seed: 4 };
        let outcome = Outcome { lives: 3, reason: "it\u{1b} said".into() };
        let outcomes = [(attack, [(by.to_owned(), outcome)].into())].into();
        let tally = Tally { outcomes, ..Tally::default() };
        HostileResult::new(&spec, tally, seen(), (&HostState::default(), &HostState::default()), 0)
    }

    #[test]
    fn the_table_says_what_stopped_an_attack_and_hides_control_characters() {
        let table = result(Attack::Garbage, "control-stream").table();
        assert!(table.lines().any(|line| line.starts_with("garbage") && line.contains("3  control-stream")), "{table}");
        assert!(!table.contains('\u{1b}') && !table.contains("BREACH"), "{table}");
    }

    #[test]
    fn an_attack_that_nothing_stops_is_a_breach_where_it_has_to_be_stopped() {
        assert!(!result(Attack::Mute, NOTHING).is_sound());
        assert!(result(Attack::Console, NOTHING).is_sound());
        let mut lost = seen();
        lost.lost_ticks = 1;
        assert_eq!(lost.breaches().len(), 1);
        assert!(seen().breaches().is_empty());
    }
}
