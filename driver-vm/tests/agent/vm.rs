//! A driver VM under plain QEMU (emulated: neither KVM nor Umbra is needed): the agent's control port, the wire at the
//! NIC and the guests' ends are sockets that the test holds.

use std::cell::{Cell, RefCell};
use std::io::{Read, Write};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use umbra_driver_vm::lines::{LineReader, to_line};
use umbra_driver_vm::protocol::{
    DevicePlace, ENTROPY_BYTES, Entropy, FromAgent, Mac, NetEnd, NetPlan, Offloads, RxMode, ToAgent,
};
use umbra_guest_images::cache::Cache;
use umbra_guest_images::image::{Image, Recipe};
use umbra_guest_images::kernel::Kernel;

/// Names the kernel package to boot.
const KERNEL: &str = "UMBRA_TEST_KERNEL_DEB";
/// For a whole boot on a busy machine.
const PATIENCE: Duration = Duration::from_secs(90);
/// How long a frame that must not pass is waited for.
const SILENCE: Duration = Duration::from_millis(400);

/// The guest's address, which the NIC has as well.
pub const GUEST: Mac = Mac([0x52, 0x54, 0, 0x12, 0x34, 0x56]);
/// A station on the wire.
pub const STATION: Mac = Mac([0x52, 0x54, 0, 0xaa, 0, 1]);

/// A running driver VM.
pub struct DriverVm {
    qemu: Child,
    dir: TempDir,
    control: UnixStream,
    reader: LineReader,
    monitor: UnixStream,
    /// The wire at the NIC, where there is one.
    wire: Option<UnixDatagram>,
    guests: Vec<UnixDatagram>,
    /// Frames that came while others were waited for.
    others: RefCell<Vec<Vec<u8>>>,
}

/// An Ethernet frame of the local experimental type.
pub fn frame(to: Mac, from: Mac, vlan: Option<u16>) -> Vec<u8> {
    let mut frame = [to.0, from.0].concat();
    if let Some(vlan) = vlan {
        frame.extend_from_slice(&0x8100u16.to_be_bytes());
        frame.extend_from_slice(&vlan.to_be_bytes());
    }
    frame.extend_from_slice(&0x88b5u16.to_be_bytes());
    frame.extend_from_slice(&[0x5a; 1000]);
    frame
}

/// What a guest with this address asks for.
pub fn mode_of(address: Mac) -> RxMode {
    RxMode { unicast: vec![address], vlans: Some(vec![]), ..RxMode::default() }
}

impl DriverVm {
    /// Boots a VM with this NIC model (`None`: none) and `driver`;
    pub fn boot(nic: Option<&str>, driver: &str, ends: u8) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let bind = |name: &str| UnixDatagram::bind(dir.path().join(format!("{name}.host"))).unwrap();
        let wire = bind("wire");
        let guests = (0..ends).map(|n| bind(&format!("guest{n}"))).collect();
        let place = dir.path().to_owned();
        let mut vm = Self::boot_with(dir, &[driver], nic, "", |command| add_network(command, &place, nic, ends));
        (vm.wire, vm.guests) = (Some(wire), guests);
        Some(vm)
    }

    /// Boots a VM with these drivers, further words for its kernel, and what else `add` gives it; `model` is checked to be one that QEMU
    /// has.
    pub fn boot_with(
        dir: TempDir,
        drivers: &[&str],
        model: Option<&str>,
        words: &str,
        add: impl FnOnce(&mut Command),
    ) -> Self {
        let Some(package) = std::env::var_os(KERNEL) else {
            panic!("{KERNEL} names no kernel package to boot");
        };
        let models = Command::new("qemu-system-x86_64").args(["-device", "help"]).output();
        let models = models.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
        if !model.is_none_or(|model| models.contains(&format!("\"{model}\""))) || models.is_empty() {
            panic!("there is no qemu-system-x86_64 with {model:?}");
        }
        let cache = Cache::of_user();
        let recipe = Recipe {
            kernel: Kernel::from_debs(&[package.into()], &cache).unwrap(),
            drivers: drivers.iter().map(|driver| (*driver).to_owned()).collect(),
            devices: vec![],
            agent: PathBuf::from(env!("CARGO_BIN_EXE_umbra-agent")),
            sound: None,
            firmware: vec![],
        };
        let image = recipe.build(&dir.path().join("image"), &cache).unwrap();
        let listen = |name: &str| UnixListener::bind(dir.path().join(name)).unwrap();
        let (control, monitor) = (listen("control"), listen("monitor"));
        let mut command = command(&image, dir.path(), words);
        add(&mut command);
        let qemu = command.spawn().unwrap();
        let (monitor, _) = monitor.accept().unwrap();
        let (control, _) = control.accept().unwrap();
        let (reader, others) = (LineReader::new(), RefCell::default());
        Self { qemu, dir, control, reader, monitor, wire: None, guests: Vec::new(), others }
    }

    /// Boots and waits until frames are forwarded and the link is up.
    pub fn forwarding(nic: &str, driver: &str, modes: Vec<RxMode>) -> Option<Self> {
        let mut vm = Self::boot(Some(nic), driver, u8::try_from(modes.len()).unwrap())?;
        vm.expect_forwarding(modes);
        Some(vm)
    }

    /// Waits until a VM that boots forwards frames and the link is up.
    pub fn expect_forwarding(&mut self, modes: Vec<RxMode>) {
        self.begin();
        self.send(&ToAgent::ConfigureNet(plan(modes)));
        self.expect(|m| matches!(m, FromAgent::Nic { mac: GUEST, mtu: 1500, .. }));
        self.expect(|m| matches!(m, FromAgent::Forwarding { .. }));
        self.expect(|m| matches!(m, FromAgent::Carrier { up: true, .. }));
    }

    /// Waits for the agent and tells it which life this is.
    pub fn begin(&mut self) {
        self.expect(|m| matches!(m, FromAgent::Ready { loaded: false, .. }));
        self.begin_saved();
    }

    /// The same for an agent that has been waited for.
    pub fn begin_saved(&mut self) {
        let (entropy, unix_ns) = (Entropy([7; ENTROPY_BYTES]), 1_700_000_000_000_000_000);
        self.send(&ToAgent::Begin { generation: 3, entropy, unix_ns });
        self.expect(|m| matches!(m, FromAgent::Hello { generation: 3, .. }));
    }

    /// Sends the agent a message.
    pub fn send(&mut self, message: &ToAgent) {
        self.control.write_all(&to_line(message).unwrap()).unwrap();
    }

    /// Waits for a message that is `wanted` and returns it; others are passed over.
    pub fn expect(&mut self, wanted: impl Fn(&FromAgent) -> bool) -> FromAgent {
        let deadline = Instant::now() + PATIENCE;
        self.control.set_read_timeout(Some(PATIENCE)).unwrap();
        while Instant::now() < deadline {
            while let Some(message) = self.reader.next_message::<FromAgent>().unwrap() {
                if wanted(&message) {
                    return message;
                }
                assert!(!matches!(message, FromAgent::Failed { .. }), "{message:?}\n{}", self.console());
            }
            let mut chunk = [0; 4096];
            let length = self.control.read(&mut chunk).unwrap();
            assert_ne!(length, 0, "the VM has ended:\n{}", self.console());
            self.reader.feed(&chunk[..length]);
        }
        panic!("nothing of what was waited for has come:\n{}", self.console());
    }

    /// Sets what a guest receives; it is so a little later.
    pub fn set_mode(&mut self, end: u16, mode: RxMode) {
        self.send(&ToAgent::SetRxMode { end, mode });
    }

    /// Waits until something is so, while the agent lives.
    pub fn comes_true(&mut self, what: &str, is_so: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !is_so(self) {
            self.expect(|m| matches!(m, FromAgent::Heartbeat { .. }));
            assert!(Instant::now() < deadline, "never true: {what}\n{}", self.console());
        }
    }

    /// Waits for so many heartbeats from now on: time that passes for the VM.
    pub fn beats(&mut self, count: u32) {
        self.forget();
        for _ in 0..count {
            self.expect(|m| matches!(m, FromAgent::Heartbeat { .. }));
        }
    }

    /// Passes over what the agent has said so far.
    fn forget(&mut self) {
        self.control.set_nonblocking(true).unwrap();
        let mut chunk = [0; 4096];
        while let Ok(length) = self.control.read(&mut chunk) {
            assert_ne!(length, 0, "the VM has ended:\n{}", self.console());
            self.reader.feed(&chunk[..length]);
            while self.reader.next_message::<FromAgent>().unwrap().is_some() {}
        }
        self.control.set_nonblocking(false).unwrap();
    }

    /// Heartbeats until something is so.
    pub fn beats_until(&mut self, what: &str, is_so: impl Fn(&Self) -> bool) -> u32 {
        let beats = Cell::new(0);
        self.comes_true(what, |vm| {
            beats.set(beats.get() + 1);
            is_so(vm)
        });
        beats.get() - 1
    }

    /// Writes 16 bits to a register of the rtl8139 behind its driver's back, which begins at this I/O port.
    pub fn write_register(&mut self, base: u16, register: u16, value: u16) {
        self.monitor.write_all(format!("o /h {:#x} {value:#x}\n", base + register).as_bytes()).unwrap();
    }

    /// The first I/O port of the PCI device with these ids (`1234:abcd`).
    pub fn io_base(&mut self, ids: &str) -> u16 {
        self.monitor.write_all(b"info pci\n").unwrap();
        self.monitor.set_read_timeout(Some(PATIENCE)).unwrap();
        let (mut said, mut chunk) = (String::new(), [0; 4096]);
        loop {
            let length = self.monitor.read(&mut chunk).unwrap();
            said.push_str(&String::from_utf8_lossy(&chunk[..length]));
            let device = said.split_once(ids).and_then(|(_, rest)| rest.split_once("I/O at 0x"));
            if let Some((base, _)) = device.and_then(|(_, rest)| rest.split_once(' ')) {
                return u16::from_str_radix(base, 16).unwrap();
            }
        }
    }

    /// Sends a frame on the wire, whatever becomes of it.
    pub fn send_on_wire(&self, frame: &[u8]) {
        self.wire().send_to(frame, self.dir.path().join("wire.vm")).unwrap();
    }

    /// Gives QEMU's monitor a command, and waits until it is carried out.
    pub fn tell_monitor(&mut self, command: &str) {
        self.monitor.write_all(format!("{command}\ninfo status\n").as_bytes()).unwrap();
        self.monitor.set_read_timeout(Some(PATIENCE)).unwrap();
        let (mut said, mut chunk) = (Vec::new(), [0; 4096]);
        while !String::from_utf8_lossy(&said).contains("VM status:") {
            let length = self.monitor.read(&mut chunk).unwrap();
            said.extend_from_slice(&chunk[..length]);
        }
    }

    /// Sets a guest's end's link, as its network device shows it to the driver VM.
    pub fn set_link(&mut self, guest: usize, up: bool) {
        let word = if up { "on" } else { "off" };
        self.monitor.write_all(format!("set_link end{guest} {word}\n").as_bytes()).unwrap();
    }

    /// Whether a frame on the wire reaches a guest.
    pub fn arrives(&self, frame: &[u8], guest: usize) -> bool {
        self.passes(self.wire(), "wire", &self.guests[guest], frame)
    }

    /// Whether a guest's frame reaches the wire.
    pub fn leaves(&self, frame: &[u8], guest: usize) -> bool {
        self.passes(&self.guests[guest], &format!("guest{guest}"), self.wire(), frame)
    }

    /// Whether one guest's frame reaches another.
    pub fn crosses(&self, frame: &[u8], from: usize, to: usize) -> bool {
        self.passes(&self.guests[from], &format!("guest{from}"), &self.guests[to], frame)
    }

    /// Whether a frame came while others were waited for.
    pub fn has_passed(&self, frame: &[u8]) -> bool {
        self.others.borrow().iter().any(|other| other == frame)
    }

    /// Whatever the VM has sent anywhere so far.
    pub fn has_sent_anything(&self) -> bool {
        self.wire.iter().chain(&self.guests).any(|socket| {
            socket.set_nonblocking(true).unwrap();
            let any = socket.recv(&mut [0; 1]).is_ok();
            socket.set_nonblocking(false).unwrap();
            any
        })
    }

    fn wire(&self) -> &UnixDatagram {
        self.wire.as_ref().unwrap()
    }

    /// The serial console so far.
    pub fn console(&self) -> String {
        let bytes = std::fs::read(self.dir.path().join("console")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Waits for the VM's end; how long that took.
    pub fn wait_for_end(&mut self) -> Duration {
        let start = Instant::now();
        while self.qemu.try_wait().unwrap().is_none() {
            assert!(start.elapsed() < PATIENCE, "the VM lives on:\n{}", self.console());
            std::thread::sleep(Duration::from_millis(5));
        }
        start.elapsed()
    }

    fn passes(&self, from: &UnixDatagram, name: &str, to: &UnixDatagram, frame: &[u8]) -> bool {
        from.send_to(frame, self.dir.path().join(format!("{name}.vm"))).unwrap();
        let deadline = Instant::now() + SILENCE;
        let mut received = [0; 2048];
        while let Some(left) = deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
            to.set_read_timeout(Some(left)).unwrap();
            match to.recv(&mut received) {
                Ok(length) if received[..length] == *frame => return true,
                Ok(length) => self.others.borrow_mut().push(received[..length].to_vec()),
                Err(_) => break,
            }
        }
        false
    }
}

impl Drop for DriverVm {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// A plan with one end for each mode.
pub fn plan(modes: Vec<RxMode>) -> NetPlan {
    let ends = modes.into_iter().zip(1..).map(|(mode, n)| NetEnd {
        device_mac: Mac([2, 0, 0, 0, 0, n]),
        mode,
        offloads: Offloads::default(),
    });
    NetPlan { ends: ends.collect(), mtu: None, device: DevicePlace::Present }
}

fn command(image: &Image, dir: &Path, words: &str) -> Command {
    assert!(std::fs::metadata(dir.join("control")).unwrap().file_type().is_socket());
    let place = dir.display();
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-machine", "q35", "-accel", "tcg", "-cpu", "max", "-m", "112M", "-nodefaults", "-display", "none"])
        .args(["-no-reboot", "-device", "pvpanic", "-device", "virtio-serial-pci"])
        .args(["-append", &format!("console=ttyS0 panic=-1 {words}")])
        .arg("-kernel")
        .arg(&image.vmlinux)
        .arg("-initrd")
        .arg(&image.initramfs)
        .args(["-serial", &format!("file:{place}/console")])
        .args(["-monitor", &format!("unix:{place}/monitor")])
        .args(["-chardev", &format!("socket,id=control,path={place}/control")])
        .args(["-device", "virtserialport,chardev=control,name=org.umbra.control"])
        .stdin(Stdio::null());
    command
}

fn add_network(command: &mut Command, dir: &Path, nic: Option<&str>, ends: u8) {
    let place = dir.display();
    let netdev = |name: &str| {
        format!(
            "dgram,id={name},local.type=unix,local.path={place}/{name}.vm,remote.type=unix,remote.path={place}/{name}.host"
        )
    };
    if let Some(nic) = nic {
        command.args(["-netdev", &netdev("wire"), "-device", &format!("{nic},netdev=wire,mac={GUEST},romfile=")]);
    }
    for n in 0..ends {
        let (name, mac) = (format!("guest{n}"), Mac([2, 0, 0, 0, 0, n + 1]));
        let device = format!("virtio-net-pci,id=end{n},netdev={name},mac={mac},romfile=");
        command.args(["-netdev", &netdev(&name), "-device", &device]);
    }
}
