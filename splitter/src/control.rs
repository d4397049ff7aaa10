//! The control queue of virtio-net (virtio 1.2, section 5.1.6.5): bytes into a command, pure; and the command into
//! the shadow's record. A malformed or unknown command is answered with `VIRTIO_NET_ERR` and changes nothing.

use umbra_shadow::net::rx_mode::{MAX_ADDRESSES, Mac, RxFilter};

use crate::copy::{gather, scatter};
use crate::queue::{Chain, RingFault, Virtqueue};

/// Bytes of the longest command but for [`TABLES`]: with an address.
const MAX_COMMAND: usize = 8;
/// Class and command of `VIRTIO_NET_CTRL_MAC_TABLE_SET`, which is as long as a driver has addresses.
const TABLES: [u8; 2] = [1, 0];
/// Most entries of a table that are read: one more than the record has place for, by which it sees that there are too many.
const MAX_ENTRIES: u32 = 65;
const _: () = assert!(MAX_ENTRIES as usize > MAX_ADDRESSES);
/// Bytes of a table's count, and of an entry.
const COUNT: usize = 4;
const ENTRY: usize = 6;

/// Commands handled in one call, as many as a queue holds that a driver does not refill meanwhile.
pub const MAX_COMMANDS: usize = 64;

const OK: u8 = 0;
const ERR: u8 = 1;

/// A command of the guest's driver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command<'a> {
    /// `VIRTIO_NET_CTRL_RX_PROMISC`.
    Promiscuous(bool),
    /// `VIRTIO_NET_CTRL_RX_ALLMULTI`.
    AllMulticast(bool),
    /// `VIRTIO_NET_CTRL_MAC_TABLE_SET`: unicast and multicast, six bytes an entry.
    Tables(&'a [u8], &'a [u8]),
    /// `VIRTIO_NET_CTRL_MAC_ADDR_SET`.
    Address(Mac),
    /// `VIRTIO_NET_CTRL_VLAN_ADD` (true) and `_DEL`.
    Vlan(u16, bool),
}

impl<'a> Command<'a> {
    /// Parses a command: class, command, data.
    pub fn parse(bytes: &'a [u8]) -> Option<Self> {
        let (&[class, command], data) = bytes.split_first_chunk::<2>()?;
        let switch = || match data.first() {
            Some(0) => Some(false),
            Some(1) => Some(true),
            _ => None,
        };
        match (class, command) {
            (0, 0) => switch().map(Self::Promiscuous),
            (0, 1) => switch().map(Self::AllMulticast),
            (1, 0) => {
                let (unicast, rest) = table(data)?;
                let (multicast, _) = table(rest)?;
                Some(Self::Tables(unicast, multicast))
            }
            (1, 1) => data.first_chunk::<6>().filter(|mac| is_unicast(mac)).map(|mac| Self::Address(*mac)),
            (2, 0 | 1) => Some(Self::Vlan(u16::from_le_bytes(*data.first_chunk::<2>()?), command == 0)),
            _ => None,
        }
    }

    /// Writes the command into the record; false if it does not apply.
    pub fn apply(&self, filter: &mut RxFilter) -> bool {
        match *self {
            Self::Promiscuous(on) => filter.set_promiscuous(on),
            Self::AllMulticast(on) => filter.set_all_multicast(on),
            Self::Tables(unicast, multicast) => filter.set_tables(addresses(unicast), addresses(multicast)),
            Self::Address(mac) => filter.set_mac(mac),
            Self::Vlan(vlan, through) => return filter.set_vlan(vlan, through),
        }
        true
    }
}

/// `struct virtio_net_ctrl_mac`: a count and as many addresses, and what stands behind.
fn table(data: &[u8]) -> Option<(&[u8], &[u8])> {
    let (count, rest) = data.split_first_chunk::<COUNT>()?;
    let len = usize::try_from(u32::from_le_bytes(*count)).ok()?.checked_mul(ENTRY)?;
    (len <= rest.len()).then(|| rest.split_at(len))
}

fn addresses(table: &[u8]) -> impl Iterator<Item = Mac> + '_ {
    table.chunks_exact(ENTRY).filter_map(|entry| entry.try_into().ok())
}

fn is_unicast(mac: &Mac) -> bool {
    mac[0] & 1 == 0 && *mac != [0; 6]
}

/// What came of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Served {
    /// The record is another.
    pub changed: bool,
    /// More commands wait, for which no kick will come: call again.
    pub more: bool,
}

/// Answers the commands that wait, at most [`MAX_COMMANDS`].
pub fn serve(queue: &mut Virtqueue, filter: &mut RxFilter) -> Result<Served, RingFault> {
    let before = filter.clone();
    let served = serve_commands(queue, filter);
    let told = queue.notify();
    let more = served?;
    told?;
    Ok(Served { changed: *filter != before, more })
}

/// True: more wait.
fn serve_commands(queue: &mut Virtqueue, filter: &mut RxFilter) -> Result<bool, RingFault> {
    let mut ring = queue.open()?;
    let mut chain = Chain::default();
    for _ in 0..MAX_COMMANDS {
        if ring.available()? == 0 && !ring.listen(0)? {
            return Ok(false);
        }
        let head = ring.head(0)?;
        let answered = match ring.walk(head, &mut chain) {
            Ok(()) => answer(&chain, filter),
            Err(_) => 0,
        };
        ring.take(1);
        ring.complete(head, answered)?;
    }
    // More than any driver sends at once: what came meanwhile has had its kick.
    ring.listen(0)
}

/// Carries one command out and writes its acknowledgement; returns the bytes written.
fn answer(chain: &Chain<'_>, filter: &mut RxFilter) -> u32 {
    let done = read(chain).is_some_and(|bytes| Command::parse(&bytes).is_some_and(|command| command.apply(filter)));
    let ack = if done { OK } else { ERR };
    u32::try_from(scatter(&[ack], chain.writable(), 0)).unwrap_or(0)
}

/// A command, tables cut to [`MAX_ENTRIES`]; `None` if it is shorter than they are.
fn read(chain: &Chain<'_>) -> Option<Vec<u8>> {
    let bytes = |at, most| {
        let mut bytes = vec![0; most];
        let there = gather(chain.readable(), at, &mut bytes);
        bytes.truncate(there);
        bytes
    };
    let mut command = bytes(0, MAX_COMMAND);
    if !command.starts_with(&TABLES) {
        return Some(command);
    }
    let mut at = TABLES.len();
    command.truncate(at);
    for _ in 0..2 {
        let count = u32::from_le_bytes(bytes(at, COUNT).try_into().ok()?);
        let kept = count.min(MAX_ENTRIES);
        command.extend(kept.to_le_bytes());
        command.extend(bytes(at + COUNT, kept as usize * ENTRY));
        at = at.checked_add(COUNT + count as usize * ENTRY)?;
    }
    (at <= chain.readable_len()).then_some(command)
}
