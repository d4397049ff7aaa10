//! A process that says what a VM's process would say. What it is to do wrong is in its kernel command line.

use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};
use umbra_driver_vm::protocol::{CrashKind, FromAgent, Mac, RxMode, ToAgent};
use umbra_shadow::{DeviceId, Generation, LinkId};
use umbra_vmm::base::time::Time;
use umbra_vmm::config::Console;
use umbra_vmm::vm::group::Entering;
use umbra_vmm::wire::channel::{Channel, Incoming};
use umbra_vmm::wire::messages::{
    DeviceStatus, Disconnect, FromVm, LinkEnd, MaskedCounts, NetWork, OutageCounts, PortEnd, ShadowMode, ToVm, VmEnd,
    VmSpec,
};
use umbra_vmm::wire::spawn::CONFINED;

use crate::{fake_disk, fake_snapshot, fake_talk};

/// The guest's only device.
const NET: DeviceId = DeviceId { class: umbra_shadow::Class::Net, index: 0 };

pub fn main(args: &[String]) -> ExitCode {
    let fd = args.iter().skip_while(|word| *word != "--control").nth(1).unwrap().parse().unwrap();
    if let Some(number) = args.iter().skip_while(|word| *word != "--cgroup").nth(1) {
        // SAFETY: the supervisor opened it for this process.
        let entrance = unsafe { OwnedFd::from_raw_fd(number.parse().unwrap()) };
        Entering::begin(entrance).unwrap().finish();
    }
    // SAFETY: the supervisor opened it for this process.
    let channel = Channel::from_fd(unsafe { OwnedFd::from_raw_fd(fd) });
    let Incoming::Message(ToVm::Start(spec), files) = channel.receive().unwrap() else { return ExitCode::FAILURE };
    assert_eq!(files.len(), 3 * spec.passthrough.len(), "container, group, device");
    drop(files);
    let image = spec.kernel.parent().and_then(|dir| dir.file_name()).unwrap_or_default();
    if !spec.kernel.exists() {
        channel.send(&FromVm::Failed { what: "its kernel is gone".into(), configuration: false }, &[]).unwrap();
        return ExitCode::SUCCESS;
    }
    if spec.cmdline.contains("fake=no-start") || image == "image-that-does-not-boot" {
        let configuration = spec.cmdline.contains("fake=no-start-ever");
        channel.send(&FromVm::Failed { what: "it has no engine".into(), configuration }, &[]).unwrap();
        return ExitCode::SUCCESS;
    }
    channel.send(&FromVm::Running { at: Time::now().0 }, &[]).unwrap();
    if spec.passthrough.is_empty() && !spec.awaits_device {
        match &fake_disk::disks_of(&spec)[..] {
            [] => guest(&spec, &channel),
            disks => fake_disk::guest(&spec, &channel, disks),
        }
    } else {
        driver(&spec, channel)
    }
    ExitCode::SUCCESS
}

/// Descriptors that this process has open, apart from the one that counts them.
fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count() - 1
}

/// A guest: masks when a link is lost, goes live when told, notes all that it is told in its console's file.
fn guest(spec: &VmSpec, channel: &Channel) {
    let Console::File(path) = &spec.console else { return };
    let mut log = OpenOptions::new().create(true).append(true).open(path).unwrap();
    if spec.cmdline.contains("speaks ") {
        speak(spec.console_socket.as_ref().unwrap());
    }
    // The one that serves, and those that wait behind it.
    let mut links: Vec<(LinkId, OwnedFd)> = Vec::new();
    let (mut armed, mut live, mut pressed) = (None, None, false);
    // What it has not said yet, and by which life it was served last: it may be so before it sees that the one before has gone.
    let (mut held_back, mut served) = (None, None);
    loop {
        let mut fds = vec![PollFd::new(channel.as_fd(), PollFlags::POLLIN)];
        fds.extend(links.iter().map(|(_, fd)| PollFd::new(fd.as_fd(), PollFlags::POLLIN)));
        poll(&mut fds, 10_000_u16).unwrap();
        if let Some(lost) = fds[1..].iter().position(|fd| fd.any().unwrap()) {
            let (link, _) = links.remove(lost);
            let at = Time::now().0;
            let loss = FromVm::Lost { device: NET, link, at, cause: LinkEnd::Closed };
            if spec.cmdline.contains("says-late ") && served.is_none_or(|served| served <= link.generation) {
                held_back = held_back.or(Some(loss));
                continue;
            }
            channel.send(&loss, &[]).unwrap();
            if lost > 0 {
                continue;
            }
            if let Some((link, _)) = links.first().filter(|(next, _)| armed == Some(next.generation)) {
                live = armed.take();
                send_live(channel, link.generation, MaskedCounts::default());
            }
            continue;
        }
        if !fds[0].any().unwrap() {
            continue;
        }
        let Incoming::Message(message, mut fds) = channel.receive::<ToVm>().unwrap() else { return };
        writeln!(log, "{message:?}").unwrap();
        let at = Time::now().0;
        match message {
            ToVm::Attach { link, .. } => {
                links.retain(|(known, _)| known.generation != link.generation);
                links.push((link, fds.remove(0)));
                links.sort_by_key(|(link, _)| *link);
            }
            ToVm::Arm { generation, armed: on, .. } => {
                armed = on.then_some(generation);
                if on && !spec.cmdline.contains("other-network") {
                    channel.send(&FromVm::SameNetwork { device: NET, generation }, &[]).unwrap();
                }
            }
            ToVm::GoLive { generation, .. } if live == Some(generation) => {}
            ToVm::GoLive { generation, .. } if spec.cmdline.contains(&format!("hold={generation} ")) => {}
            ToVm::GoLive { generation, .. } => {
                served = Some(generation);
                send_live(channel, generation, MaskedCounts { logged: 3, replayed: 2, dropped: 1, unknown: 0 });
                if let Some(loss) = held_back.take() {
                    channel.send(&loss, &[]).unwrap();
                }
                if spec.cmdline.contains(&format!("asks-in={generation} ")) {
                    let mode = RxMode { all_multicast: true, ..RxMode::default() };
                    channel.send(&FromVm::RxMode { device: NET, mode }, &[]).unwrap();
                }
                if spec.cmdline.contains("descriptors ") {
                    send_descriptors(channel);
                }
                if spec.cmdline.contains("cries ") {
                    for n in 0..200 {
                        channel
                            .send(&FromVm::ForeignAddress { device: NET, mac: Mac([2, 0, 0, 0, 0, n]) }, &[])
                            .unwrap();
                    }
                }
                if spec.cmdline.contains("lose-links ") {
                    lose_links(channel, generation);
                }
                let link = links.iter().map(|(link, _)| *link).find(|link| link.generation == generation);
                let times = std::fs::read_to_string(path).unwrap().matches("GoLive").count();
                if fake_talk::guest((&spec.cmdline, times), channel, (NET, generation, link)) {
                    return;
                }
                let accused = links.iter().find(|(link, _)| link.generation == generation);
                if let Some((link, fd)) = accused.filter(|_| spec.cmdline.contains("accuse ")) {
                    let (link, cause) = (*link, LinkEnd::Broken("a rule".into()));
                    let _ = nix::sys::socket::shutdown(fd.as_raw_fd(), nix::sys::socket::Shutdown::Both);
                    links.retain(|(known, _)| *known != link);
                    channel.send(&FromVm::Lost { device: NET, link, at, cause }, &[]).unwrap();
                }
                if spec.cmdline.contains("flood ") {
                    flood(channel);
                }
                if spec.cmdline.contains("resets-slowly ") {
                    send_end(channel, VmEnd::Reset);
                    while !matches!(channel.receive().unwrap(), Incoming::Message(ToVm::PowerButton, _)) {}
                    return;
                }
                if spec.cmdline.contains(&format!("reset-in={generation} ")) {
                    thread::sleep(Duration::from_millis(300));
                    return send_end(channel, VmEnd::Reset);
                }
                if spec.cmdline.contains("breaks-out ") {
                    channel.send(&FromVm::Confined { thread: "vcpu0".into(), call: 59 }, &[]).unwrap();
                    std::process::exit(CONFINED);
                }
                if spec.cmdline.contains("triple-fault ") {
                    return send_end(channel, VmEnd::TripleFault);
                }
                if spec.cmdline.contains("panic ") {
                    channel.send(&FromVm::Panicked { at }, &[]).unwrap();
                    channel.send(&FromVm::Panicked { at }, &[]).unwrap();
                }
            }
            ToVm::QueryStatus => {
                let (masked, work) = (MaskedCounts::default(), NetWork::default());
                let mode = if links.is_empty() { ShadowMode::Masking } else { ShadowMode::Passive };
                let status = DeviceStatus::Net {
                    mode,
                    frames_out: 7,
                    frames_in: 0,
                    foreign_source: 0,
                    logged_now: 0,
                    masked,
                    work,
                };
                channel.send(&FromVm::Status { device: NET, status }, &[]).unwrap();
            }
            // Only in its first life.
            ToVm::Quarantine { .. }
                if spec.cmdline.contains("reset-at-quarantine ")
                    && std::fs::read_to_string(path).unwrap().matches("Quarantine").count() == 1 =>
            {
                return send_end(channel, VmEnd::Reset);
            }
            ToVm::PowerButton if spec.cmdline.contains("no-power-button ") => {}
            ToVm::PowerButton
                if spec.cmdline.contains("boots-at-first-press ") && !std::mem::replace(&mut pressed, true) => {}
            ToVm::PowerButton => return send_end(channel, VmEnd::PowerOff),
            _ => {}
        }
    }
}

/// Greets each viewer of its console, and sends back what one types.
fn speak(socket: &Path) {
    let _ = std::fs::remove_file(socket);
    let listener = UnixListener::bind(socket).unwrap();
    thread::spawn(move || {
        for mut viewer in listener.incoming().flatten() {
            viewer.write_all(b"login: ").unwrap();
            let _ = std::io::copy(&mut viewer.try_clone().unwrap(), &mut viewer);
            // It goes with the process.
            std::mem::forget(viewer);
        }
    });
}

fn send_end(channel: &Channel, how: VmEnd) {
    channel.send(&FromVm::Ended { at: Time::now().0, how, registers: String::new() }, &[]).unwrap();
}

/// What a terminal would obey: a colour, a title, a cleared screen (C1), the other direction.
pub const ESCAPES: &str = "\u{1b}[31mRED\u{1b}]0;OWNED\u{7}\u{9b}2J\u{202e}";

/// Says again and again, at length, that the link is lost.
fn lose_links(channel: &Channel, generation: Generation) {
    for at in 0..600 {
        let cause = format!("{ESCAPES}{}", "x".repeat(50_000));
        let (link, at, cause) = (LinkId::first(generation), Time::now().0 + at, LinkEnd::Broken(cause));
        let _ = channel.send(&FromVm::Lost { device: NET, link, at, cause }, &[]);
    }
}

/// Sends more descriptors than any message takes, with one that takes none.
fn send_descriptors(channel: &Channel) {
    let stdin = std::io::stdin();
    channel.send(&FromVm::Running { at: Time::now().0 }, &[stdin.as_fd(); 20]).unwrap();
}

fn send_live(channel: &Channel, generation: Generation, masked: MaskedCounts) {
    let at = Time::now().0;
    channel.send(&FromVm::Live { device: NET, generation, at, outage: OutageCounts::Net(masked) }, &[]).unwrap();
}

/// Asks for another receive mode, each as long as can be, again and again.
fn flood(channel: &Channel) {
    for n in 0..600_u16 {
        let mode = RxMode { vlans: Some((0..4096).collect()), promiscuous: n % 2 == 0, ..RxMode::default() };
        channel.send(&FromVm::RxMode { device: NET, mode }, &[]).unwrap();
    }
}

/// A driver VM: its agent's side of the protocol, and its ways to die.
fn driver(spec: &VmSpec, channel: Channel) {
    let PortEnd::Fd(agent) = spec.ports[0].end else { return };
    println!("[    0.1] booting {} with {} descriptors", spec.name, open_descriptors());
    // SAFETY: the supervisor opened it for this process.
    let agent = unsafe { UnixStream::from_raw_fd(agent) };
    let serves_disks = fake_disk::is_driver(&spec.ports);
    if spec.nets.is_empty() && !serves_disks {
        // That of a sound card, which never comes.
        return thread::sleep(Duration::from_secs(100));
    }
    let generation: u32 = spec.name.rsplit('.').next().unwrap().parse().unwrap();
    let told = |what: &str| spec.cmdline.contains(&format!("{what}={generation} "));
    if told("hang-at-boot") {
        thread::sleep(Duration::from_secs(100));
    }
    let sender = Arc::new(Mutex::new(agent.try_clone().unwrap()));
    let image = spec.kernel.parent().and_then(|dir| dir.file_name()).unwrap_or_default().to_string_lossy();
    let release = if told("escapes") { ESCAPES.into() } else { format!("6.12-fake of {image}") };
    let say = |message: FromAgent| send(&sender, &message);
    let restored = match &spec.snapshot_of {
        Some(_) if spec.cmdline.contains("kept ") => fake_snapshot::kept_snapshot(spec, &channel, &say),
        Some(_) => fake_snapshot::snapshot(spec, &channel, &say),
        None => false,
    };
    if !restored {
        say(FromAgent::Ready { loaded: false, unused: Vec::new() });
    }
    let mut lines = BufReader::new(agent).lines();
    let begin = lines.next().unwrap().unwrap();
    let Ok(ToAgent::Begin { generation: which, .. }) = serde_json::from_str(&begin) else { panic!("{begin}") };
    assert_eq!(which, generation);
    say(FromAgent::Hello { generation, kernel: release, uptime_ms: 1, panic_entries: Vec::new() });
    let channel = Arc::new(channel);
    let heartbeats = || {
        let heart = Arc::clone(&sender);
        thread::spawn(move || {
            for sequence in 1.. {
                send(&heart, &FromAgent::Heartbeat { sequence, available_memory: 1 << 20 });
                thread::sleep(Duration::from_millis(50));
            }
        });
        let control = Arc::clone(&channel);
        let (stays, unanswered) = (told("stays"), told("unanswered"));
        let hang_up = spec.kernel.parent().unwrap().with_file_name("hang-up");
        thread::spawn(move || obey(&control, stays, unanswered.then_some(&*hang_up)));
    };
    if spec.awaits_device {
        say(FromAgent::Loaded { uptime_ms: 2 });
        heartbeats();
    }
    let plan = lines.next().unwrap().unwrap();
    let disks = match serde_json::from_str(&plan) {
        Ok(ToAgent::ConfigureNet(plan)) if !serves_disks => {
            let Some(end) = plan.ends.first() else { panic!("{plan:?}") };
            assert_eq!(end.mode.promiscuous && !end.offloads.checksum, told("clean"), "{plan:?}");
            None
        }
        Ok(ToAgent::ConfigureBlock(plan)) if serves_disks => Some(plan),
        _ => panic!("{plan}"),
    };
    if spec.awaits_device {
        // Guests come and go meanwhile, and ask for other settings.
        let mut orders = lines.by_ref().map(|line| serde_json::from_str::<ToAgent>(&line.unwrap()).unwrap());
        assert!(orders.any(|order| order == ToAgent::Rescan));
    }
    if told("agent-fails") || spec.kernel.parent().unwrap().ends_with("image-without-the-driver") {
        say(FromAgent::Failed { what: "no module named nic".into() });
        thread::sleep(Duration::from_secs(100));
    }
    match &disks {
        Some(plan) => {
            say(fake_disk::report(spec, plan, told));
            fake_disk::errors(told).for_each(say);
        }
        None => nic_says(&say, told, image != "image-without-carrier"),
    }
    if told("die-after-forwarding") {
        thread::sleep(Duration::from_millis(100));
        std::process::exit(9);
    }
    if told("breaks-out") {
        channel.send(&FromVm::Confined { thread: "vcpu0".into(), call: 59 }, &[]).unwrap();
        std::process::exit(CONFINED);
    }
    if told("garbage") {
        sender.lock().unwrap().write_all(b"{\"type\":\"root-shell\"}\n").unwrap();
    }
    if told("descriptors") {
        send_descriptors(&channel);
    }
    if told("talks") {
        // Ends with the process.
        loop {
            let heartbeat = FromAgent::Heartbeat { sequence: 1, available_memory: 1 << 20 };
            let lines = format!("{}\n", serde_json::to_string(&heartbeat).unwrap()).repeat(1000);
            if sender.lock().unwrap().write_all(lines.as_bytes()).is_err() {
                break;
            }
        }
    }
    if told("descriptors-by-agent") {
        let fds = [channel.as_raw_fd()];
        let (bytes, rights) = ([std::io::IoSlice::new(b"\n")], [ControlMessage::ScmRights(&fds)]);
        let to = sender.lock().unwrap().as_raw_fd();
        sendmsg::<UnixAddr>(to, &bytes, &rights, MsgFlags::empty(), None).unwrap();
    }
    if told("escapes") {
        println!("[    9.9] Kernel panic - not syncing: {ESCAPES}");
    }
    if told("flood") {
        let _ = sender.lock().unwrap().write_all(&vec![b'x'; 1 << 20]);
    }
    if !spec.awaits_device {
        heartbeats();
    }
    fake_talk::driver(told, &channel);
    if told("deaf") {
        thread::sleep(Duration::from_secs(2));
    }
    for line in lines {
        match serde_json::from_str(&line.unwrap()) {
            Ok(ToAgent::Crash { kind }) => crash(kind, &sender, &channel),
            Ok(ToAgent::Rest) if !spec.cmdline.contains("deaf-to-rest ") => {
                println!("[    6.0] {}: flushed", spec.name);
                say(FromAgent::AtRest { stable: true });
            }
            order => println!("[    5.0] {}: {order:?}", spec.name),
        }
    }
}

/// What the agent says of its NIC, which has a carrier if `has_link`.
fn nic_says(say: &dyn Fn(FromAgent), told: impl Fn(&str) -> bool, has_link: bool) {
    say(FromAgent::NicFound { uptime_ms: 2 });
    if told("die-of-settings") {
        thread::sleep(Duration::from_millis(100));
        std::process::exit(9);
    }
    let mac = Mac([2, 0, 0, 0, 0, 1]);
    say(FromAgent::Nic { driver: "fake".into(), interface: "eth0".into(), mac, mtu: 1500, uptime_ms: 2 });
    say(FromAgent::Forwarding { uptime_ms: 3 });
    say(FromAgent::Carrier { up: has_link && !told("no-carrier"), mode: None, uptime_ms: 4 });
    if told("carrier-lost") {
        thread::sleep(Duration::from_millis(200));
        say(FromAgent::Carrier { up: false, mode: None, uptime_ms: 5 });
    }
}

/// The supervisor's messages to the process; one that `stays` says that it has given its device up, and does not end. Where connections
/// are `unanswered`, their guests do not take part in setting them up, as it says, and it hangs up once there is a file of that name.
fn obey(control: &Channel, stays: bool, unanswered: Option<&Path>) {
    let mut connections = Vec::new();
    while let Ok(Incoming::Message(message, files)) = control.receive::<ToVm>() {
        match message {
            ToVm::Kill if stays => {}
            ToVm::Kill => {
                let registers = "rip 0000".into();
                let _ = control.send(&FromVm::Ended { at: Time::now().0, how: VmEnd::Killed, registers }, &[]);
                std::process::exit(0);
            }
            // They end with this process.
            ToVm::Connect { end, link } => {
                let Some(hang_up) = unanswered.map(Path::to_owned) else {
                    connections.extend(files);
                    continue;
                };
                let why = Disconnect::NoAnswer("no reply in 10 s".into());
                control.send(&FromVm::Disconnected { end, link, why }, &[]).unwrap();
                thread::spawn(move || {
                    while !hang_up.exists() {
                        thread::sleep(Duration::from_millis(10));
                    }
                    drop(files);
                });
            }
            ToVm::Release => control.send(&FromVm::Released { at: Time::now().0 }, &[]).unwrap(),
            ToVm::Plug { .. } => {
                assert_eq!(files.len(), 3, "container, group, device");
                control.send(&FromVm::Plugged { at: Time::now().0 }, &[]).unwrap();
            }
            _ => {}
        }
    }
    std::process::exit(1);
}

fn crash(kind: CrashKind, sender: &Mutex<UnixStream>, channel: &Channel) {
    match kind {
        CrashKind::Panic => {
            channel.send(&FromVm::Panicking { at: Time::now().0 }, &[]).unwrap();
            println!("[    9.9] Kernel panic - not syncing: fake crash\n[    9.9] CPU: 0 PID: 1");
            channel.send(&FromVm::Panicked { at: Time::now().0 }, &[]).unwrap();
        }
        CrashKind::AgentHang => {
            let _silence = sender.lock().unwrap();
            thread::sleep(Duration::from_secs(100));
        }
        CrashKind::Reboot => {
            let registers = "rip 1111".into();
            channel.send(&FromVm::Ended { at: Time::now().0, how: VmEnd::Reset, registers }, &[]).unwrap();
            std::process::exit(0);
        }
        CrashKind::Unbind => {
            // In one piece, so that the supervisor reads it in one turn.
            let failed = serde_json::to_string(&FromAgent::Failed { what: "its device is gone".into() }).unwrap();
            let words = format!("{failed}\n{failed}\n{{\"type\":\"root-shell\"}}\n");
            sender.lock().unwrap().write_all(words.as_bytes()).unwrap();
        }
        CrashKind::Spin | CrashKind::LockUp | CrashKind::OutOfMemory | CrashKind::Stall | CrashKind::LockNetwork => {
            unimplemented!("{kind:?} takes a kernel")
        }
    }
}

fn send(sender: &Mutex<UnixStream>, message: &FromAgent) {
    let line = serde_json::to_string(message).unwrap() + "\n";
    if sender.lock().unwrap().write_all(line.as_bytes()).is_err() {
        std::process::exit(1);
    }
}
