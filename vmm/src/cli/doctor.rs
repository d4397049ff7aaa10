//! `umbra doctor` checks the host: what works, what is missing, how to fix it; and lists candidate cards.

use anyhow::bail;
use serde::Serialize;

use crate::base::pci_address::Bdf;
use crate::host::HostDevice;
use crate::host::doctor::list::{self, Card};
use crate::host::doctor::{Finding, Root, Text, device, host, missing};
use crate::record::status::{Column, or_dash, table};

/// Arguments of `umbra doctor`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Exit status: 0 when nothing is missing, 1 when something is. Nothing is changed.")]
pub struct Args {
    /// A PCI function to look at closely, as 0000:03:00.0; without one, network cards, sound cards and storage controllers
    /// are listed.
    device: Option<Bdf>,
    /// Print the findings as JSON.
    #[arg(long)]
    json: bool,
}

/// The whole answer.
#[derive(Serialize)]
struct Answer {
    host: Vec<Finding>,
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<Vec<Finding>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cards: Option<Vec<Card>>,
    missing: usize,
}

/// Checks the host, and the device if one is named, and prints what was found.
///
/// # Errors
///
/// Something is missing, or there is no such device.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let root = Root::default();
    let found = args.device.map(HostDevice::find).transpose()?;
    let host = host::findings(&root, host::Caller::this());
    let device = found.map(|found| device::findings(&root, &found));
    let cards = device.is_none().then(|| list::cards(&root));
    let count = missing(&host) + device.as_deref().map_or(0, missing);
    let answer = Answer { host, device, cards, missing: count };
    if args.json {
        super::print_json(&answer)?;
    } else {
        super::print(&answer.text(args.device))?;
    }
    match count {
        0 => Ok(()),
        1 => bail!("one thing is missing"),
        n => bail!("{n} things are missing"),
    }
}

impl Answer {
    fn text(&self, bdf: Option<Bdf>) -> String {
        let mut text = format!("This host\n{}", Text(&self.host));
        if let (Some(findings), Some(bdf)) = (&self.device, bdf) {
            text.push_str(&format!("\n{bdf}\n{}", Text(findings)));
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
