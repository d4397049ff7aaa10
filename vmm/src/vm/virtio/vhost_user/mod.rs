//! Queues of a device of this VM that another process serves by vhost-user, whatever the device's class.

mod frontend;
mod set_up;
#[cfg(test)]
pub mod testing;

pub use self::frontend::{FrontEnd, Tags};
