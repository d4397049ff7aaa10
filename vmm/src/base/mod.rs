//! What every part of the program needs and that knows nothing of Umbra: time, lines of text, sockets, terminals, addresses.

pub mod background_writer;
pub mod build_id;
pub mod cgroup;
pub mod error;
pub mod file_lock;
pub mod held;
pub mod high_duplicate;
pub mod lines;
pub mod lock;
pub mod namespaces;
pub mod parallel;
pub mod pci_address;
pub mod pci_config;
pub mod pid_namespace;
pub mod proc_stat;
pub mod random;
pub mod rotating_file;
pub mod saved_terminal;
pub mod system_calls;
#[cfg(test)]
pub(crate) mod testing;
pub mod time;
pub mod timer;
pub mod unix_socket;
pub mod untrusted_text;
pub mod user_folder;
pub mod users;
pub mod vm_users;
pub mod wall;
