//! `umbra doctor` checks the host: what works, what is missing, how to fix it; lists candidate cards, and holds a machine file against
//! the host.

use std::path::PathBuf;
use std::str::FromStr;

use anyhow::bail;
use serde::Serialize;

use crate::base::pci_address::Bdf;
use crate::config::Machine;
use crate::host::HostDevice;
use crate::host::doctor::list::{self, Card};
use crate::host::doctor::{Finding, Root, Text, device, host, missing};
use crate::record::status_text::{Column, or_dash, table};
use crate::supervisor;
use crate::supervisor::start::host_check::{self, Section};

/// Arguments of `umbra doctor`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Exit status: 0 when nothing is missing, 1 when something is. Nothing is changed.")]
pub struct Args {
    /// A PCI function to look at closely, as 0000:03:00.0, or a machine file, of which all that it needs is looked at; without one,
    /// network cards, sound cards and storage controllers are listed.
    #[arg(value_name = "DEVICE | MACHINE.toml")]
    of: Option<Target>,
    /// Print the findings as JSON.
    #[arg(long)]
    json: bool,
}

/// What is looked at beside the host.
#[derive(Clone, Debug)]
enum Target {
    Device(Bdf),
    Machine(PathBuf),
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse() {
            Ok(device) => Ok(Self::Device(device)),
            Err(_) if text.contains('/') || text.ends_with(".toml") => Ok(Self::Machine(text.into())),
            Err(error) => Err(format!("{error}; nor is it a machine file, MACHINE.toml")),
        }
    }
}

/// The whole answer.
#[derive(Serialize)]
struct Answer {
    host: Vec<Finding>,
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<Vec<Finding>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    machine: Option<Vec<Section>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cards: Option<Vec<Card>>,
    missing: usize,
}

/// Checks the host, and the device or machine if one is named, and prints what was found.
///
/// # Errors
///
/// Something is missing, there is no such device, or the machine file has a mistake.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let root = Root::default();
    match &args.of {
        Some(Target::Machine(path)) => machine(&Machine::read(path)?, args.json),
        Some(Target::Device(bdf)) => {
            let device = device::findings(&root, &HostDevice::find(*bdf)?);
            answer(Answer { device: Some(device), ..Answer::of_host(&root) }, Some(*bdf), args.json)
        }
        None => answer(Answer { cards: Some(list::cards(&root)), ..Answer::of_host(&root) }, None, args.json),
    }
}

/// Checks the host, and all that `machine` needs of it, and prints what was found.
///
/// # Errors
///
/// Something is missing.
pub(super) fn machine(machine: &Machine, json: bool) -> anyhow::Result<()> {
    let root = Root::default();
    let sections = host_check::sections(machine, &supervisor::Host::default(), &root);
    answer(Answer { machine: Some(sections), ..Answer::of_host(&root) }, None, json)
}

fn answer(mut answer: Answer, bdf: Option<Bdf>, json: bool) -> anyhow::Result<()> {
    let sections = answer.machine.iter().flatten().map(|section| missing(&section.findings));
    let count = missing(&answer.host) + answer.device.as_deref().map_or(0, missing) + sections.sum::<usize>();
    answer.missing = count;
    if json {
        super::print_json(&answer)?;
    } else {
        super::print(&answer.text(bdf))?;
    }
    match count {
        0 => Ok(()),
        1 => bail!("one thing is missing"),
        n => bail!("{n} things are missing"),
    }
}

impl Answer {
    fn of_host(root: &Root) -> Self {
        let host = host::findings(root, host::Caller::this());
        Self { host, device: None, machine: None, cards: None, missing: 0 }
    }

    fn text(&self, bdf: Option<Bdf>) -> String {
        let mut text = format!("This host\n{}", Text(&self.host));
        if let (Some(findings), Some(bdf)) = (&self.device, bdf) {
            text.push_str(&format!("\n{bdf}\n{}", Text(findings)));
        }
        for section in self.machine.iter().flatten() {
            text.push_str(&format!("\n{}\n{}", section.of, Text(&section.findings)));
        }
        if let Some(cards) = &self.cards {
            text.push_str("\nNetwork cards, sound cards and storage controllers\n");
            text.push_str(&list_of(cards));
        }
        text
    }
}

fn list_of(cards: &[Card]) -> String {
    if cards.is_empty() {
        return "none on the PCI bus\n".into();
    }
    let columns: [Column<Card>; 7] = [
        ("DEVICE", |card| card.device.clone()),
        ("KIND", |card| card.kind.into()),
        ("DRIVER", |card| or_dash(card.driver.as_ref())),
        ("GROUP", |card| or_dash(card.group)),
        ("RESET", |card| if card.resets.is_empty() { "none".into() } else { card.resets.join(" ") }),
        ("", |card| card.next.clone()),
        ("NAME", |card| card.name.clone()),
    ];
    table(&columns, cards)
}
