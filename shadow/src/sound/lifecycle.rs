//! The life cycle of a PCM stream (virtio 1.2, section 5.14.6.6.1), as one transition function.
//!
//! ```text
//!            SetParams            Prepare             Start
//!   Unset ─────────────> Set ──────────────> Prepared ──────> Running
//!                         ^ ^                 │   ^            │   ^
//!               SetParams │ │ SetParams       │   │ Prepare    │   │ Start
//!                         │ └──── Released <──┴───┼─────────┐  v   │
//!                         │            Release    └──────── Stopped
//!                         └───────────────────────────────────┘
//! ```
//! Linux's driver prepares a stopped stream afresh, or gives it new parameters, without a release when no message
//! is pending; both are taken as a release first. A closed stream is a released one.

/// What the guest asks of a stream; parameters travel beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// `VIRTIO_SND_R_PCM_SET_PARAMS`.
    SetParams,
    /// `VIRTIO_SND_R_PCM_PREPARE`.
    Prepare,
    /// `VIRTIO_SND_R_PCM_START`.
    Start,
    /// `VIRTIO_SND_R_PCM_STOP`: also what a pause is.
    Stop,
    /// `VIRTIO_SND_R_PCM_RELEASE`.
    Release,
}

/// Where a stream is in its life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum State {
    /// No parameters yet.
    #[default]
    Unset,
    /// Parameters are set.
    Set,
    /// Ready to start; takes messages.
    Prepared,
    /// Samples flow.
    Running,
    /// Halted; keeps its messages and goes on where it was when started.
    Stopped,
    /// Given back; keeps its parameters, has no messages.
    Released,
}

impl State {
    /// The state after `step`, or `None` where the life cycle has no such step.
    pub fn after(self, step: Step) -> Option<Self> {
        match (self, step) {
            (Self::Unset | Self::Set | Self::Prepared | Self::Stopped | Self::Released, Step::SetParams) => {
                Some(Self::Set)
            }
            (Self::Set | Self::Prepared | Self::Stopped | Self::Released, Step::Prepare) => Some(Self::Prepared),
            (Self::Prepared | Self::Stopped, Step::Start) => Some(Self::Running),
            (Self::Running, Step::Stop) => Some(Self::Stopped),
            (Self::Prepared | Self::Stopped, Step::Release) => Some(Self::Released),
            _ => None,
        }
    }

    /// True if messages with samples (or room for them) are taken.
    pub fn takes_messages(self) -> bool {
        matches!(self, Self::Prepared | Self::Running | Self::Stopped)
    }
}
