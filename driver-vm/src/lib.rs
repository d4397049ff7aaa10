//! What a driver VM and the host share: the control protocol between the agent (PID 1 in the driver VM) and
//! the supervisor. The agent itself is the binary `umbra-agent`.

pub mod block_protocol;
pub mod calls;
pub mod lines;
pub mod protocol;
pub mod sound_protocol;
