//! A VM process with a tiny guest: a few instructions in an ELF file, run by `umbra vm` as the supervisor does.
//! Entered at Linux's 64-bit entry: long mode, 4 GiB mapped one to one, no interrupt table.
#![allow(clippy::unwrap_used, dead_code)]

use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use umbra_vmm::base::pid_namespace::PidNamespaces;
use umbra_vmm::base::users::User;
use umbra_vmm::config::{Console, Disk, MemorySize, OnFull};
use umbra_vmm::vm::confine::OfRoot;
use umbra_vmm::wire::channel::{Channel, Incoming};
use umbra_vmm::wire::messages::{FromVm, ToVm, VmEnd, VmSpec};

/// Where tiny guests are loaded and start.
pub const ENTRY: u64 = 0x10_0000;

/// Nothing that a tiny guest does takes this long, even where KVM is emulated in software.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Set to 1 to leave out what needs `/dev/kvm`.
const SKIP: &str = "UMBRA_SKIP_KVM";

/// False where the user leaves out what needs KVM; without that wish a test fails where there is none.
pub fn kvm() -> bool {
    if std::env::var(SKIP).is_ok_and(|value| value == "1") {
        eprintln!("skipped: {SKIP}=1");
        return false;
    }
    let there = std::fs::File::options().read(true).write(true).open("/dev/kvm");
    assert!(there.is_ok(), "this test needs /dev/kvm ({there:?}); {SKIP}=1 leaves it out");
    true
}

/// An ELF file with `code` at [`ENTRY`].
pub fn elf(code: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 0x1000];
    image[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    image[24..32].copy_from_slice(&ENTRY.to_le_bytes());
    image[32..40].copy_from_slice(&64u64.to_le_bytes());
    image[54..58].copy_from_slice(&[56, 0, 1, 0]);
    image[64..68].copy_from_slice(&1u32.to_le_bytes());
    image[72..80].copy_from_slice(&0x1000u64.to_le_bytes());
    image[88..96].copy_from_slice(&ENTRY.to_le_bytes());
    for size in [96, 104] {
        image[size..size + 8].copy_from_slice(&(code.len() as u64).to_le_bytes());
    }
    image.extend_from_slice(code);
    image
}

/// Files of one guest.
pub struct Files {
    pub dir: tempfile::TempDir,
}

impl Files {
    pub fn new(kernel: &[u8]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::File::create(dir.path().join("kernel")).unwrap().write_all(kernel).unwrap();
        Self { dir }
    }

    pub fn console(&self) -> PathBuf {
        self.dir.path().join("console")
    }

    pub fn printed(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.console()).unwrap_or_default()).into_owned()
    }

    /// A disk on a file of so many bytes.
    pub fn disk(&self, bytes: u64, read_only: bool) -> Disk {
        let path = self.dir.path().join("disk");
        std::fs::File::create(&path).unwrap().set_len(bytes).unwrap();
        Disk { path, read_only, on_full: OnFull::default() }
    }

    pub fn spec(&self) -> VmSpec {
        VmSpec {
            name: "tiny".into(),
            kernel: self.dir.path().join("kernel"),
            initrd: vec![],
            cmdline: String::new(),
            cpus: 1,
            memory: MemorySize(16 << 20),
            console: Console::File(self.console()),
            console_socket: None,
            polls_console: false,
            hvc: false,
            disks: vec![],
            nets: vec![],
            sounds: Vec::new(),
            ports: vec![],
            passthrough: vec![],
            awaits_device: false,
            has_time: false,
            snapshot_of: None,
            only_saves: false,
            awaited: None,
            interrupt_limit: None,
        }
    }
}

/// A VM process and our end of its control channel.
pub struct Process {
    pub child: Child,
    pub channel: Option<Channel>,
    pub files: Files,
}

/// Whom root hands the processes of its VMs to here; nobody has these numbers.
pub fn user() -> Option<User> {
    nix::unistd::geteuid().is_root().then_some(User { uid: 64_987, gid: 64_986 })
}

/// Whether who runs these tests may raise limits of that user's processes.
pub fn raises_limits() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
    user().is_none() || u64::from_str_radix(effective.trim(), 16).unwrap() & 1 << 24 != 0
}

/// What the processes of VMs lose that root starts, as these tests do.
pub fn of_root() -> OfRoot {
    OfRoot { user: user(), namespaces: user().is_some() }
}

/// Starts `command` as a supervisor does: root, in a PID namespace of its own.
pub fn spawn(command: &mut Command) -> Child {
    match user() {
        Some(_) => PidNamespaces::find().unwrap().spawn(command).unwrap(),
        None => command.spawn().unwrap(),
    }
}

/// A channel whose other end `command` has as descriptor 3, for as long as it lives.
pub fn channel_of(command: &mut Command) -> Channel {
    let (ours, theirs) = Channel::pair().unwrap();
    // SAFETY: dup2 is async-signal-safe; `theirs` is the closure's, and open.
    unsafe {
        command.pre_exec(move || match libc::dup2(theirs.as_raw_fd(), 3) {
            -1 => Err(std::io::Error::last_os_error()),
            _ => Ok(()),
        });
    }
    ours
}

impl Process {
    /// Starts a guest with `code`.
    pub fn start(code: &[u8]) -> Self {
        let files = Files::new(&elf(code));
        let spec = files.spec();
        Self::with(files, spec)
    }

    /// Starts a guest of `spec`.
    pub fn with(files: Files, spec: VmSpec) -> Self {
        Self::with_snapshots(files, spec, None)
    }

    /// Starts a guest of `spec`, whose snapshots are in `folder`.
    pub fn with_snapshots(files: Files, spec: VmSpec, folder: Option<&Path>) -> Self {
        Self::of(user(), files, spec, folder)
    }

    /// Starts a guest of `spec` that is handed to `user`.
    pub fn of(user: Option<User>, files: Files, spec: VmSpec, folder: Option<&Path>) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_umbra"));
        command.args(["vm", "--control", "3"]);
        command.args(user.iter().flat_map(|user| ["--user".into(), user.to_string(), "--namespaces".into()]));
        // As a guest's; the log is never a file, whatever the tests' own is.
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        command.envs(folder.map(|folder| ("UMBRA_SNAPSHOT_DIR", folder)));
        let channel = channel_of(&mut command);
        let mut child = spawn(&mut command);
        let mut log = child.stderr.take().unwrap();
        std::thread::spawn(move || std::io::copy(&mut log, &mut std::io::stderr()));
        channel.send(&ToVm::Start(Box::new(spec)), &[]).unwrap();
        Self { child, channel: Some(channel), files }
    }

    pub fn send(&self, message: &ToVm) {
        self.channel.as_ref().unwrap().send(message, &[]).unwrap();
    }

    /// The next message that is not `Running`; `None` when the process has closed the channel.
    pub fn next(&self) -> Option<FromVm> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.channel.as_ref().unwrap().try_receive().unwrap() {
                Incoming::Message(FromVm::Running { .. } | FromVm::Vcpus(_), _) => {}
                Incoming::Message(message, _) => return Some(message),
                Incoming::Closed => return None,
                Incoming::Empty => {
                    let printed = self.files.printed();
                    assert!(Instant::now() < deadline, "nothing heard of the VM; it printed {printed:?}");
                    std::thread::sleep(Duration::from_millis(2));
                }
            }
        }
    }

    /// Waits until the guest runs.
    pub fn wait_running(&self) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.channel.as_ref().unwrap().try_receive().unwrap() {
                Incoming::Message(FromVm::Running { .. }, _) => return,
                Incoming::Empty => std::thread::sleep(Duration::from_millis(2)),
                other => panic!("{other:?}"),
            }
            assert!(Instant::now() < deadline, "the VM does not run");
        }
    }

    /// Waits until the guest has printed `text`.
    pub fn wait_for(&self, text: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.files.printed().contains(text) {
            assert!(Instant::now() < deadline, "the VM printed {:?}, not {text:?}", self.files.printed());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits for the end; how, and the registers.
    pub fn end(&mut self) -> (VmEnd, String) {
        match self.next() {
            Some(FromVm::Ended { how, registers, .. }) => {
                assert!(self.wait().success());
                (how, registers)
            }
            other => panic!("expected the VM's end, not {other:?}"),
        }
    }

    /// Has the VM end, and waits for that; the registers.
    pub fn kill(&mut self) -> String {
        self.send(&ToVm::Kill);
        let (how, registers) = self.end();
        assert_eq!(how, VmEnd::Killed);
        registers
    }

    /// Waits for the process.
    pub fn wait(&mut self) -> std::process::ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "the VM process does not end");
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Machine code by its pieces.
#[derive(Default)]
pub struct Code(pub Vec<u8>);

impl Code {
    pub fn new() -> Self {
        Self::default()
    }

    fn add(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    pub fn raw(self, bytes: &[u8]) -> Self {
        self.add(bytes)
    }

    /// `mov edx, port; mov al, value; out dx, al`
    pub fn out8(self, port: u16, value: u8) -> Self {
        self.port(port).add(&[0xb0, value, 0xee])
    }

    /// `mov edx, port; mov eax, value; out dx, ax`
    pub fn out16(self, port: u16, value: u16) -> Self {
        self.port(port).add(&[0xb8]).add(&u32::from(value).to_le_bytes()).add(&[0x66, 0xef])
    }

    /// `mov edx, port; mov eax, value; out dx, eax`
    pub fn out32(self, port: u16, value: u32) -> Self {
        self.port(port).add(&[0xb8]).add(&value.to_le_bytes()).add(&[0xef])
    }

    fn port(self, port: u16) -> Self {
        self.add(&[0xba]).add(&u32::from(port).to_le_bytes())
    }

    pub fn print(self, text: &str) -> Self {
        text.bytes().fold(self, |code, byte| code.out8(0x3f8, byte))
    }

    /// Prints the four bytes of `eax`, lowest first.
    pub fn print_eax(mut self) -> Self {
        // mov ecx, eax; then four times: mov eax, ecx; mov edx, 0x3f8; out dx, al; shr ecx, 8
        self = self.add(&[0x89, 0xc1]);
        for _ in 0..4 {
            self = self.add(&[0x89, 0xc8]).port(0x3f8).add(&[0xee, 0xc1, 0xe9, 8]);
        }
        self
    }

    /// `jmp $`
    pub fn spin(self) -> Self {
        self.add(&[0xeb, 0xfe])
    }
}

/// Prints `>`, then echoes each byte that it receives with one added.
pub fn echo_plus_one() -> Code {
    // poll: mov edx, 0x3fd; in al, dx; test al, 1; jz poll
    let poll = [0xba, 0xfd, 0x03, 0, 0, 0xec, 0xa8, 1, 0x74, 0xf6];
    // mov edx, 0x3f8; in al, dx; inc al; out dx, al; jmp poll
    let echo = [0xba, 0xf8, 0x03, 0, 0, 0xec, 0xfe, 0xc0, 0xee, 0xeb, 0xeb];
    Code::new().print(">").raw(&poll).raw(&echo)
}
