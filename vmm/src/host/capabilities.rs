//! Where a function's capabilities are (PCI 3.0, section 6.7; PCI Express 5.0, section 7.6).

use crate::host::region::HostConfig;

pub(crate) const STATUS: u16 = 0x06;
/// Status bit: there is a capability list.
pub(crate) const STATUS_CAPABILITIES: u16 = 1 << 4;
const CAPABILITY_POINTER: u16 = 0x34;

/// Capabilities lie behind the header and are aligned to 4 bytes: there can be no more in 256 bytes.
const MAX_CAPABILITIES: usize = 48;
/// The same for extended capabilities, in 4096 bytes.
const MAX_EXTENDED: usize = 960;
const HEADER_END: u8 = 0x40;

pub(crate) const CAPABILITY_POWER: u8 = 0x01;
const CAPABILITY_MSI: u8 = 0x05;
const CAPABILITY_MSIX: u8 = 0x11;
const CAPABILITY_EXPRESS: u8 = 0x10;
/// Power management: control and status, behind the capability's start.
pub const POWER_CONTROL: u16 = 4;

const EXTENDED_FIRST: u16 = 0x100;
/// Advanced error reporting.
pub(crate) const EXTENDED_ERRORS: u16 = 0x01;
const EXTENDED_ARI: u16 = 0x0E;
pub(crate) const EXTENDED_SRIOV: u16 = 0x10;
const EXTENDED_REBAR: u16 = 0x15;
const EXTENDED_VF_REBAR: u16 = 0x24;
/// Extended capabilities that are hidden: they would name functions and address space of the host.
const HIDDEN: [u16; 4] = [EXTENDED_ARI, EXTENDED_SRIOV, EXTENDED_REBAR, EXTENDED_VF_REBAR];

/// Where the capabilities are that matter here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// MSI.
    pub msi: Option<u16>,
    /// MSI-X.
    pub msix: Option<u16>,
    /// Power management.
    pub power: Option<u16>,
    /// PCI Express.
    pub express: Option<u16>,
    /// Extended ones to hide.
    pub hidden: Vec<u16>,
}

impl Capabilities {
    /// Walks both lists. A list that loops or leaves the space ends there.
    pub fn scan(host: &dyn HostConfig) -> Self {
        let mut this = Self::default();
        let listed = host.config16(STATUS) & STATUS_CAPABILITIES != 0;
        let mut next = if listed { host.config8(CAPABILITY_POINTER) & !0b11 } else { 0 };
        for _ in 0..MAX_CAPABILITIES {
            if next < HEADER_END {
                break;
            }
            let offset = u16::from(next);
            match host.config8(offset) {
                CAPABILITY_MSI => this.msi = this.msi.or(Some(offset)),
                CAPABILITY_MSIX => this.msix = this.msix.or(Some(offset)),
                CAPABILITY_POWER => this.power = this.power.or(Some(offset)),
                CAPABILITY_EXPRESS => this.express = this.express.or(Some(offset)),
                _ => {}
            }
            next = host.config8(offset + 1) & !0b11;
        }
        let hidden = extended(host).into_iter().filter(|(id, _)| HIDDEN.contains(id));
        this.hidden = hidden.map(|(_, offset)| offset).collect();
        this
    }
}

/// Extended capabilities: what each is, and where.
pub(crate) fn extended(host: &dyn HostConfig) -> Vec<(u16, u16)> {
    let mut found = Vec::new();
    let mut offset = EXTENDED_FIRST;
    for _ in 0..MAX_EXTENDED {
        let header = host.config32(offset);
        if header == 0 || header == u32::MAX {
            break;
        }
        let [low, high, ..] = header.to_le_bytes();
        found.push((u16::from_le_bytes([low, high]), offset));
        offset = u16::try_from(header >> 20 & !0b11).unwrap_or(0);
        if offset < EXTENDED_FIRST {
            break;
        }
    }
    found
}
