//! What an interface keeps of the frames that it cannot send yet (its root queueing discipline, linux/pkt_sched.h). The kernel's own bound
//! is 32 MiB each, more than a driver VM has: a guest that takes nothing while frames for it come, or a slow wire, would take all memory.

use nix::errno::Errno;

use crate::forward::{TCA_KIND, TCA_OPTIONS, tcmsg};
use crate::interface::Interface;
use crate::netlink::{Netlink, Request};
use crate::{kernel_log, system};

/// The parent of a root queue (`TC_H_ROOT`).
const ROOT: u32 = u32::MAX;
/// Attribute of `fq_codel`, bytes with what they take beside their content.
const TCA_FQ_CODEL_MEMORY_LIMIT: u16 = 9;
/// All queues together keep this part of the memory that is available.
const SHARE: u64 = 4;
/// The least and the most that one keeps, bytes: some frames of the largest kind, and the kernel's own bound.
const LEAST: u64 = 256 << 10;
const MOST: u64 = 32 << 20;

/// What each of so many queues may keep, bytes.
pub fn bound(queues: usize) -> u32 {
    share_of(system::available_memory(), queues)
}

fn share_of(available: u64, queues: usize) -> u32 {
    let queues = u64::try_from(queues).unwrap_or(u64::MAX).max(1);
    u32::try_from((available / SHARE / queues).clamp(LEAST, MOST)).unwrap_or(u32::MAX)
}

/// Bounds what `of` keeps, to so many bytes; one queue serves all of its rings. Where the kernel refuses it goes on with its own bound.
pub fn limit(netlink: &mut Netlink, of: &Interface, bytes: u32) {
    let queue = tcmsg(of.index, 0, ROOT, 0);
    let new = |kind: &str| {
        Request::new(libc::RTM_NEWQDISC, libc::NLM_F_CREATE | libc::NLM_F_REPLACE, &queue).text(TCA_KIND, kind)
    };
    let fair = new("fq_codel").nest(TCA_OPTIONS).attribute(TCA_FQ_CODEL_MEMORY_LIMIT, &bytes.to_ne_bytes()).end();
    let done = match netlink.call(fair) {
        // A kernel without it: one queue in order, whose bound counts content alone.
        Err(e) if e.errno() == Errno::ENOENT => {
            netlink.call(new("bfifo").attribute(TCA_OPTIONS, &(bytes / 2).to_ne_bytes()))
        }
        done => done,
    };
    if let Err(error) = done {
        kernel_log::error(&format!("{} keeps as much as it likes of what it cannot send: {error}", of.name));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_queues_together_keep_a_quarter_of_what_is_available() {
        assert_eq!(share_of(32 << 20, 2), 4 << 20);
        assert_eq!(share_of(32 << 20, 8), 1 << 20);
        assert_eq!(share_of(1 << 40, 2), 32 << 20);
        assert_eq!((share_of(0, 0), share_of(32 << 20, 1000)), (256 << 10, 256 << 10));
    }
}
