//! The agent: the first process of a driver VM. Mounts, starts loading modules, greets the host, and then does as the
//! host says until something fails; then it says so and resets the VM.

mod agent;
mod block;
mod due;
mod ethtool;
mod filter;
mod forward;
mod huge_pages;
mod interface;
mod kernel_log;
mod modules;
mod netlink;
mod network;
mod network_thread;
mod orders;
mod pci;
mod port;
mod queue;
mod receive;
mod self_test;
mod sound;
mod symbols;
mod system;
mod transmit;
mod unused;

use std::process::ExitCode;

fn main() -> ExitCode {
    if std::process::id() != 1 {
        if std::env::args().nth(1).as_deref() == Some("--version") {
            println!("umbra-agent {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        eprintln!(
            "umbra-agent is the first process of a driver VM; `umbra image` puts it there, `umbra run` starts it"
        );
        return ExitCode::FAILURE;
    }
    let error = match start() {
        Ok(agent) => agent.run(),
        Err(error) => error,
    };
    kernel_log::fatal(&format!("{error:#}"));
    system::restart()
}

fn start() -> anyhow::Result<agent::Agent> {
    system::mount_all()?;
    kernel_log::follow()?;
    system::set_all();
    system::go_first(system::BEAT_PRIORITY);
    if system::awaits_device() {
        pci::hold_all();
    }
    // Before anything else takes memory apart, and before this VM may be saved.
    let pool = block::pool::Pool::of_command_line();
    agent::Agent::start(modules::Loading::start()?, pool)
}
