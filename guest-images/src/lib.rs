//! Image recipes: from a distribution's kernel package (or the running system's kernel) to what a VM boots.
//!
//! [`vmlinux`] unpacks a bzImage, [`deb`] opens Debian packages, [`modules`] finds what a device needs in a kernel's
//! module tree, [`initramfs`] collects files into an archive ([`cpio`]), and [`image`] puts it all together into a
//! driver VM image. [`cache`] keeps what is slow to make, by content. Nothing here starts a VM.

pub mod cache;
pub mod cpio;
pub mod deb;
pub mod decompress;
pub mod elf;
pub mod files;
pub mod image;
pub mod initramfs;
pub mod kernel;
pub mod modinfo;
pub mod modules;
pub mod pattern;
pub mod vmlinux;
