//! What VM processes say of their vCPUs when they are asked. Invariant: a process that has not answered yet is not asked again, so that
//! one which does not read gets no more than one question.

use crate::wire::messages::VcpuCounts;

/// The last answer of a process.
#[derive(Debug, Default)]
pub(super) struct VcpuAnswers {
    last: Option<VcpuCounts>,
    /// Another one is due.
    due: bool,
}

impl VcpuAnswers {
    /// Whether to ask: its vCPUs run, and no answer is due.
    pub(super) fn expect(&mut self) -> bool {
        let asks = self.last.is_some() && !self.due;
        self.due |= asks;
        asks
    }

    pub(super) fn keep(&mut self, counts: VcpuCounts) {
        *self = Self { last: Some(counts), due: false };
    }

    /// Whether no answer is due.
    pub(super) fn is_fresh(&self) -> bool {
        !self.due
    }

    pub(super) fn last(&self) -> Option<VcpuCounts> {
        self.last
    }
}
