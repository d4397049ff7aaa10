//! Network devices: behind the splitter ([`split`], a guest's), on a TAP interface of the host ([`tap`]), and served by another
//! process over vhost-user ([`vhost_user`], a driver VM's).

pub mod config;
pub mod split;
pub mod tap;
pub mod vhost_user;
