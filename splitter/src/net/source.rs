//! Which source addresses a guest may send with on a NIC that it shares, and what its frames show of the wire. Pure: addresses and
//! times go in.
//!
//! A guest has the address that it was configured with, plus those that nobody else has. An address is another's if it was configured for
//! another end of the NIC, or if a frame with that source has come in within [`AGEING`]: from the wire, or from a neighbour through the
//! driver VM's bridge. Frames with such a source, or with a group address, would make the bridge and the network's switches send the
//! other's frames here, so they are dropped. The configured address passes always, whoever else uses it.
//!
//! Where the NIC has a spare, the addresses that the guest sends with are kept as well: hosts behind a bridge in it. A take-over moves
//! them to another port of the network's switches, which is announced, so that one that does not speak by itself can be reached. One that
//! is heard on the wire meanwhile has moved there, and is kept no more.
//!
//! Not covered: an address that has not been heard of (its owner has sent nothing that came here), and an attacker on the wire who fills
//! the table with addresses until another's is forgotten.

use std::time::Duration;

use umbra_shadow::net::rx_mode::{Mac, RxFilter};

use crate::pump::{Addresses, HandoverLog};

use super::in_flight::InFlight;

/// Time after which an address that was not heard again is free: a bridge's default (IEEE 802.1Q, table 8-6).
pub const AGEING: Duration = Duration::from_secs(300);

/// Shortest time between two warnings of one device: often enough to show that it goes on.
pub const WARN_EVERY: Duration = Duration::from_secs(300);

/// Time after an announcement in which nothing is learned: the splitter's own broadcasts, and the guest's last ones through the link
/// before, may come back through the link that serves now.
const ECHO: Duration = Duration::from_secs(1);

/// Most addresses behind the guest that are announced: those used last. An announcement is a frame in the link's ring, in front of the
/// guest's own.
const MOST_ANNOUNCED: usize = 64;

/// Buckets of the table and addresses in each: 1024 in all, more than one network segment has, in 12 KiB. The one not heard of for the
/// longest time gives way.
const BUCKETS: usize = 256;
const WAYS: usize = 4;

/// An address and when it was last heard, s.
#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    mac: Mac,
    /// 0: no entry.
    heard_s: u32,
}

/// The addresses heard of.
#[derive(Debug)]
struct Table(Box<[[Entry; WAYS]; BUCKETS]>);

impl Default for Table {
    fn default() -> Self {
        Self(Box::new([[Entry::default(); WAYS]; BUCKETS]))
    }
}

impl Table {
    fn place(mac: Mac) -> usize {
        let [a, b, c, d, e, f] = mac;
        // Fibonacci hashing: the upper bits of a product depend on all bits of the address.
        let product = u64::from_be_bytes([0, 0, a, b, c, d, e, f]).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        usize::try_from(product >> 56).unwrap_or(0) % BUCKETS
    }

    fn knows(&self, mac: Mac, now_s: u32) -> bool {
        self.0[Self::place(mac)].iter().any(|entry| entry.mac == mac && entry.is_fresh(now_s))
    }

    fn forget(&mut self, mac: Mac) {
        for entry in self.0[Self::place(mac)].iter_mut().filter(|entry| entry.mac == mac) {
            *entry = Entry::default();
        }
    }

    /// The addresses heard of that have not aged, the newest first.
    fn fresh(&self, now_s: u32) -> Vec<Mac> {
        let mut fresh: Vec<_> = self.0.iter().flatten().filter(|entry| entry.is_fresh(now_s)).collect();
        fresh.sort_by_key(|entry| std::cmp::Reverse((entry.heard_s, entry.mac)));
        fresh.into_iter().map(|entry| entry.mac).collect()
    }

    fn hear(&mut self, mac: Mac, now_s: u32) {
        let bucket = &mut self.0[Self::place(mac)];
        let known = bucket.iter().position(|entry| entry.mac == mac);
        let oldest = (0..WAYS).min_by_key(|way| bucket[*way].heard_s).unwrap_or(0);
        bucket[known.unwrap_or(oldest)] = Entry { mac, heard_s: now_s };
    }
}

impl Entry {
    fn is_fresh(&self, now_s: u32) -> bool {
        self.heard_s != 0 && u64::from(now_s.saturating_sub(self.heard_s)) < AGEING.as_secs()
    }
}

/// The guard of one guest's device.
#[derive(Debug)]
pub struct Sources {
    own: Mac,
    /// Addresses that were configured for the NIC's other ends.
    neighbours: Vec<Mac>,
    /// `None`: the guest may use any address.
    table: Option<Table>,
    /// Addresses other than its own that the guest sends with; `None`: they never have to be announced.
    behind: Option<Table>,
    now: Duration,
    /// The source heard last in this second, which needs no second look.
    last: Entry,
    /// The same of the guest's frames.
    last_sent: Entry,
    deaf_until: Duration,
    warned: Option<Duration>,
    warning: Option<Mac>,
}

impl Sources {
    /// Of a device that has its NIC for itself.
    pub fn new(own: Mac) -> Self {
        Self {
            own,
            neighbours: Vec::new(),
            table: None,
            behind: None,
            now: Duration::ZERO,
            last: Entry::default(),
            last_sent: Entry::default(),
            deaf_until: Duration::ZERO,
            warned: None,
            warning: None,
        }
    }

    /// The NIC has other ends, with these addresses; `any`: this guest may send with any source nevertheless.
    pub fn share(&mut self, neighbours: Vec<Mac>, any: bool) {
        self.table = (!any && !neighbours.is_empty()).then(Table::default);
        self.neighbours = neighbours;
    }

    /// The NIC has a spare: what the guest sends with is to be announced after a take-over.
    pub fn keep_behind(&mut self) {
        self.behind = Some(Table::default());
    }

    /// Whether the guest must not use all sources.
    pub fn is_guarded(&self) -> bool {
        self.table.is_some()
    }

    /// Whether sources are looked at.
    pub fn looks(&self) -> bool {
        self.table.is_some() || self.behind.is_some()
    }

    /// What follows happens at `now` (any clock that does not go back).
    pub fn set_time(&mut self, now: Duration) {
        self.now = now;
    }

    fn now_s(&self) -> u32 {
        // Not 0, which marks an entry that is none.
        u32::try_from(self.now.as_secs()).unwrap_or(u32::MAX).saturating_add(1)
    }

    /// Whether the guest may send with this source. If not, a warning may be due ([`Self::take_warning`]).
    #[inline]
    pub fn admits(&mut self, source: Mac) -> bool {
        if source == self.own || !self.looks() {
            return true;
        }
        let admitted = !self.is_foreign(source);
        if admitted {
            self.sent(source);
        } else {
            self.warn(source);
        }
        admitted
    }

    /// The guest sends with this source, which is not its own.
    #[inline]
    fn sent(&mut self, source: Mac) {
        let now_s = self.now_s();
        if let Some(behind) = &mut self.behind
            && (self.last_sent.mac, self.last_sent.heard_s) != (source, now_s)
            && !is_group(source)
        {
            behind.hear(source, now_s);
            self.last_sent = Entry { mac: source, heard_s: now_s };
            // One that is heard on the wire in this second is looked at again.
            self.last = Entry::default();
        }
    }

    fn is_foreign(&self, source: Mac) -> bool {
        let Some(table) = self.table.as_ref().filter(|_| source != self.own) else { return false };
        is_group(source) || self.neighbours.contains(&source) || table.knows(source, self.now_s())
    }

    /// A frame with this source has come in.
    #[inline]
    pub fn hear(&mut self, source: Mac) {
        let now_s = self.now_s();
        if self.last.mac == source && self.last.heard_s == now_s {
            return;
        }
        self.last = Entry { mac: source, heard_s: now_s };
        if source == self.own || is_group(source) || self.now < self.deaf_until {
            return;
        }
        if let Some(table) = &mut self.table {
            table.hear(source, now_s);
        }
        if let Some(behind) = &mut self.behind {
            behind.forget(source);
            self.last_sent = Entry::default();
        }
    }

    /// The guest's addresses have been announced.
    pub fn announced(&mut self) {
        self.deaf_until = self.now + ECHO;
    }

    /// Whether a frame that came in shows that the NIC forwards: one from the wire, and not one that even a port that does not
    /// forward lets through (IEEE 802.1Q, table 8-1: 01-80-c2-00-00-00 to 0f).
    pub fn is_from_wire(&self, addresses: &Addresses) -> bool {
        let [head @ .., last] = addresses.destination;
        let reserved = head == [0x01, 0x80, 0xc2, 0, 0] && last < 0x10;
        !reserved && !self.neighbours.contains(&addresses.source)
    }

    /// The addresses of `filter` that the guest may use, its own first if it has that.
    pub fn own_of(&self, filter: &RxFilter) -> Vec<Mac> {
        filter.unicast().into_iter().filter(|mac| !self.is_foreign(*mac)).collect()
    }

    /// The addresses that are announced: those of [`Self::own_of`], and those behind the guest.
    pub fn to_announce(&self, filter: &RxFilter) -> Vec<Mac> {
        let mut all = self.own_of(filter);
        let behind = self.behind.as_ref().map(|behind| behind.fresh(self.now_s())).unwrap_or_default();
        let behind = behind.into_iter().filter(|mac| !all.contains(mac) && !self.is_foreign(*mac));
        let behind: Vec<_> = behind.take(MOST_ANNOUNCED).collect();
        all.extend(behind);
        all
    }

    /// The part of `filter` that is sent to the driver VM. A bridge sends every frame for a unicast address in it to this guest,
    /// whoever has that address; so only the configured address is sent, and the bridge learns others from the frames that the
    /// guest sends with them.
    pub fn narrowed(&mut self, filter: &RxFilter) -> RxFilter {
        let mut told = filter.clone();
        if self.is_guarded() {
            if let Some(foreign) = filter.unicast().into_iter().find(|mac| self.is_foreign(*mac)) {
                self.warn(foreign);
            }
            told.keep_permanent();
        }
        told
    }

    fn warn(&mut self, mac: Mac) {
        if self.warned.is_none_or(|at| self.now.saturating_sub(at) >= WARN_EVERY) {
            (self.warned, self.warning) = (Some(self.now), Some(mac));
        }
    }

    /// The address of another device that the guest has used or asked for, when a warning is due: at the first one, then at most
    /// every [`WARN_EVERY`].
    pub fn take_warning(&mut self) -> Option<Mac> {
        self.warning.take()
    }
}

fn is_group(mac: Mac) -> bool {
    mac[0] & 1 != 0
}

/// Frames of the guest, looked at and recorded.
pub struct Outward<'a> {
    /// The guest's guard.
    pub sources: &'a mut Sources,
    /// The link's record.
    pub in_flight: &'a mut InFlight,
}

impl HandoverLog for Outward<'_> {
    const LOOKS: bool = true;

    #[inline]
    fn admits(&mut self, addresses: &Addresses) -> bool {
        self.sources.admits(addresses.source)
    }

    #[inline]
    fn handed(&mut self, used: u16, heads: impl Iterator<Item = u16>) {
        self.in_flight.handed(used, heads);
    }
}

/// Frames for the guest, listened to.
pub struct Inward<'a> {
    /// The guest's guard.
    pub sources: &'a mut Sources,
    /// One of them came from the wire.
    pub heard: bool,
}

impl HandoverLog for Inward<'_> {
    const LOOKS: bool = true;

    #[inline]
    fn admits(&mut self, addresses: &Addresses) -> bool {
        self.sources.hear(addresses.source);
        self.heard = self.heard || self.sources.is_from_wire(addresses);
        true
    }

    #[inline]
    fn handed(&mut self, _used: u16, _heads: impl Iterator<Item = u16>) {}
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    const OWN: Mac = [2, 0, 0, 0, 0, 1];
    const NEIGHBOUR: Mac = [2, 0, 0, 0, 0, 2];

    fn shared() -> Sources {
        let mut sources = Sources::new(OWN);
        sources.share(vec![NEIGHBOUR], false);
        sources
    }

    fn mac(n: u16) -> Mac {
        let [high, low] = n.to_be_bytes();
        [2, 0, 0, 0, high, low]
    }

    #[test]
    fn a_neighbours_address_is_never_free_and_the_own_one_always_is() {
        let mut sources = shared();
        assert!(!sources.admits(NEIGHBOUR) && !sources.admits([0xff; 6]) && sources.admits([2, 9, 9, 9, 9, 9]));
        sources.hear(OWN);
        assert!(sources.admits(OWN));
        sources.set_time(100 * AGEING);
        assert!(!sources.admits(NEIGHBOUR));
    }

    #[test]
    fn alone_or_trusted_a_guest_may_use_any() {
        let (mut alone, mut trusted) = (Sources::new(OWN), Sources::new(OWN));
        alone.share(Vec::new(), false);
        trusted.share(vec![NEIGHBOUR], true);
        for sources in [&mut alone, &mut trusted] {
            sources.hear(NEIGHBOUR);
            assert!(!sources.is_guarded() && sources.admits(NEIGHBOUR));
            let mut filter = RxFilter::new(OWN);
            filter.set_mac(NEIGHBOUR);
            assert_eq!(sources.narrowed(&filter), filter);
            assert_eq!(sources.take_warning(), None);
        }
    }

    #[test]
    fn what_a_guest_asks_for_takes_nothing_away() {
        let mut sources = shared();
        let mut filter = RxFilter::new(OWN);
        filter.set_tables([[2, 7, 7, 7, 7, 7]].into_iter(), [[1; 6]].into_iter());
        assert_eq!((sources.narrowed(&filter).unicast(), sources.take_warning()), (vec![OWN], None));
        assert_eq!(sources.own_of(&filter), [OWN, [2, 7, 7, 7, 7, 7]]);
        filter.set_mac(NEIGHBOUR);
        let told = sources.narrowed(&filter);
        assert_eq!((told.unicast(), told.multicast()), (vec![OWN], &[[1; 6]][..]));
        assert_eq!(sources.take_warning(), Some(NEIGHBOUR));
        assert_eq!(sources.own_of(&filter), [[2, 7, 7, 7, 7, 7]]);
    }

    #[test]
    fn a_warning_is_told_at_the_first_and_seldom_after() {
        let mut sources = shared();
        let mut told = 0;
        for second in 0..3 * WARN_EVERY.as_secs() {
            sources.set_time(Duration::from_secs(second));
            assert!(!sources.admits(NEIGHBOUR));
            told += u32::from(sources.take_warning().is_some());
            assert!(second > 0 || told == 1);
        }
        assert_eq!(told, 3);
    }

    #[test]
    fn echoes_of_an_announcement_are_not_learned() {
        let mut sources = shared();
        sources.announced();
        sources.hear(mac(7));
        assert!(sources.admits(mac(7)));
        sources.set_time(ECHO);
        sources.hear(mac(7));
        assert!(!sources.admits(mac(7)));
    }

    #[test]
    fn what_a_guest_has_sent_with_of_late_is_announced_unless_it_has_moved() {
        let (mut alone, mut sharing) = (Sources::new(OWN), shared());
        for sources in [&mut alone, &mut sharing] {
            let filter = RxFilter::new(OWN);
            assert!(sources.admits(mac(7)));
            assert_eq!(sources.to_announce(&filter), [OWN], "there is no spare");
            sources.keep_behind();
            for second in 0..70 {
                sources.set_time(Duration::from_secs(second));
                assert!(sources.admits(mac(0x100 + u16::try_from(second).unwrap())) && sources.admits(OWN));
            }
            sources.admits([1, 0, 0, 0, 0, 1]);
            let told = sources.to_announce(&filter);
            assert_eq!((told.len(), told[0], told[1]), (1 + MOST_ANNOUNCED, OWN, mac(0x100 + 69)), "the newest first");
            // One speaks on the wire, and again behind the guest.
            sources.hear(mac(0x100 + 69));
            assert!(!sources.to_announce(&filter).contains(&mac(0x100 + 69)));
            assert_eq!(sources.admits(mac(0x100 + 69)), !sources.is_guarded(), "another's now, where that counts");
            assert_eq!(sources.to_announce(&filter).contains(&mac(0x100 + 69)), !sources.is_guarded());
            // What comes back of the announcement itself has not moved.
            sources.announced();
            sources.hear(mac(0x100 + 68));
            assert!(sources.to_announce(&filter).contains(&mac(0x100 + 68)));
            sources.set_time(Duration::from_secs(69) + AGEING);
            assert_eq!(sources.to_announce(&filter), [OWN], "switches have forgotten them as well");
        }
    }

    #[test]
    fn neither_neighbours_nor_what_a_blocked_port_lets_through_show_that_a_nic_forwards() {
        let sources = shared();
        let frame = |destination, source| Addresses { destination, source };
        assert!(sources.is_from_wire(&frame([0xff; 6], mac(9))));
        assert!(!sources.is_from_wire(&frame([0xff; 6], NEIGHBOUR)));
        assert!(!sources.is_from_wire(&frame([0x01, 0x80, 0xc2, 0, 0, 0], mac(9))));
        assert!(sources.is_from_wire(&frame([0x01, 0x80, 0xc2, 0, 0, 0x10], mac(9))));
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Against a map without bounds: nothing is foreign that was not heard within the time; what was heard is, unless as many others
        /// as a bucket holds were heard since.
        #[test]
        fn what_was_heard_is_foreign_until_it_ages(steps in prop::collection::vec((0u16..600, any::<bool>(), 0u64..30), 1..400)) {
            let mut sources = shared();
            let (mut heard, mut now) = (BTreeMap::new(), 0);
            for (n, comes_in, wait) in steps {
                now += wait;
                sources.set_time(Duration::from_secs(now));
                let address = mac(n + 0x100);
                if comes_in {
                    sources.hear(address);
                    heard.insert(address, now);
                    prop_assert!(!sources.admits(address));
                    continue;
                }
                let fresh = |at: &&u64| now - **at < AGEING.as_secs();
                let expected = heard.get(&address).filter(fresh);
                let since = expected.map_or(0, |at| {
                    let others = heard.iter().filter(|(other, t)| **t >= *at && Table::place(**other) == Table::place(address));
                    others.count() - 1
                });
                if expected.is_none() {
                    prop_assert!(sources.admits(address));
                } else if since < WAYS {
                    prop_assert!(!sources.admits(address));
                }
            }
        }
    }
}
