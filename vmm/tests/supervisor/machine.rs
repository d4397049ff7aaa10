//! A machine under test: a made-up host, a spec, the supervisor in a thread, and the control socket to look at it.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::symlink;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde_json::Value;
use umbra_driver_vm::protocol::CrashKind;
use umbra_guest_images::image::FORMAT;
use umbra_vmm::config::Machine;
use umbra_vmm::host::{self, DeviceFiles, HostDevice};
use umbra_vmm::lifecycle::{StandbyStage, StateName};
use umbra_vmm::record::events::Verbosity;
use umbra_vmm::record::status::{DriverStatus, GuestStatus, Status};
use umbra_vmm::supervisor::front::notify::Notify;
use umbra_vmm::supervisor::front::protocol::{Request, Response, StopHow};
use umbra_vmm::supervisor::start::rundir;
use umbra_vmm::supervisor::{self, Host, MachineFile, Options, RunError, Until};

/// The device of the driver VM.
pub const DEVICE: &str = "0000:03:00.0";

/// Its spare.
pub const SPARE: &str = "0000:04:00.0";

/// How long anything may take to come about.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A running machine with one guest `web` and one driver VM `nic0`.
pub struct TestMachine {
    pub dir: tempfile::TempDir,
    /// The service manager's ear.
    pub manager: UnixDatagram,
    run: Option<JoinHandle<Result<(), RunError>>>,
    /// The supervisor, where it is a process of its own.
    child: Option<Child>,
}

/// Starts a machine: `guest` and `driver` are the kernel command lines of the two, `restart` is the policy's TOML.
pub fn start(guest: &str, driver: &str, restart: &str) -> TestMachine {
    let mut machine = make(guest, driver, &format!("restart = {{ {restart} }}"));
    machine.start_again();
    machine
}

/// Starts a machine whose driver VM has a spare.
pub fn start_with_spare(driver: &str) -> TestMachine {
    let mut machine = make_with_spare(driver);
    machine.start_again();
    machine
}

/// Makes a machine whose driver VM has a spare, and starts nothing.
pub fn make_with_spare(driver: &str) -> TestMachine {
    make("", driver, &format!("spare = \"{SPARE}\"\n"))
}

/// Starts a machine whose supervisor is a process of its own; `driver` is the kernel command line of its driver VM.
pub fn start_elsewhere(driver: &str) -> TestMachine {
    run_elsewhere(make("", driver, ""))
}

/// Runs `machine` under a supervisor that is a process of its own.
pub fn run_elsewhere(mut machine: TestMachine) -> TestMachine {
    let mut command = Command::new("/proc/self/exe");
    let child = command.arg("supervise").arg(machine.dir.path()).stdin(Stdio::null()).spawn().unwrap();
    machine.child = Some(child);
    machine
}

/// Starts a machine whose driver VM is shared by the guests `web`, with this kernel command line, and `db`; it runs on when
/// both are off.
pub fn start_shared(web: &str, driver: &str) -> TestMachine {
    let mut machine = make(web, driver, "");
    share_with_db(&machine);
    machine.start_again();
    machine
}

/// The driver VM of `machine`, which is not started yet, serves the guest `db` as well; the machine runs on when both are off.
pub fn share_with_db(machine: &TestMachine) {
    let path = machine.dir.path().join("m.toml");
    let db = "[guest.db]\nkernel = \"kernel\"\nconsole = { file = \"db.log\" }\nnet = [{ driver = \"nic0\" }]\n";
    fs::write(&path, fs::read_to_string(&path).unwrap() + db).unwrap();
    fs::write(machine.dir.path().join("keep"), "").unwrap();
}

/// Starts a machine of the guests `web` and `db` without any driver VM.
pub fn start_without_drivers() -> TestMachine {
    let mut machine = make("", "", "");
    let guest = |name: &str| {
        let kernel = machine.dir.path().join(format!("kernel-of-{name}"));
        fs::write(&kernel, "a kernel").unwrap();
        format!("[guest.{name}]\nkernel = \"{}\"\nconsole = {{ file = \"{name}.log\" }}\n", kernel.display())
    };
    let text = guest("web") + &guest("db");
    fs::write(machine.dir.path().join("m.toml"), text).unwrap();
    machine.start_again();
    machine
}

/// Makes a machine and starts nothing.
pub fn make(guest: &str, driver: &str, more: &str) -> TestMachine {
    let dir = tempfile::tempdir().unwrap();
    make_host(dir.path());
    fs::write(dir.path().join("kernel"), "a kernel").unwrap();
    // A test that is about snapshots asks for them.
    let snapshots = if more.contains("snapshots") { "" } else { "snapshots = false\n" };
    let text = format!(
        "metrics = \"./metrics.sock\"\n[guest.web]\nkernel = \"kernel\"\ncmdline = \"{guest} \"\nconsole = {{ file = \"web.log\" }}\n\
         net = [{{ driver = \"nic0\" }}]\n\
         [driver.nic0]\ndevice = \"{DEVICE}\"\nimage = \"image\"\ncmdline = \"{driver} \"\n{snapshots}{more}\n"
    );
    fs::write(dir.path().join("m.toml"), text).unwrap();
    symlink(std::env::current_exe().unwrap(), dir.path().join("program")).unwrap();
    // Messages wait in it until a test reads them.
    let manager = UnixDatagram::bind(dir.path().join("notify")).unwrap();
    TestMachine { dir, manager, run: None, child: None }
}

/// Makes a machine whose guest `web` has a disk on a file and one of the driver VM `nic0`, and starts nothing. With `parts`, further keys
/// of that disk, `db` has the same, each guest with one of them.
pub fn make_with_disks(guest: &str, driver: &str, parts: &[&str]) -> TestMachine {
    let machine = make(guest, driver, "");
    let path = machine.dir.path().join("m.toml");
    fs::write(machine.dir.path().join("root.raw"), [0; 4096]).unwrap();
    let (head, tail) = {
        let text = fs::read_to_string(&path).unwrap().replace("net = [{ driver = \"nic0\" }]\n", "");
        let at = text.find("[driver").unwrap();
        (text[..at].to_owned(), text[at..].to_owned())
    };
    let disks = |guest: &str, keys: &str| {
        format!(
            "[[guest.{guest}.disk]]\npath = \"root.raw\"\nread_only = true\n[[guest.{guest}.disk]]\ndriver = \"nic0\"\n{keys}\n"
        )
    };
    let mut text = head + &disks("web", parts.first().unwrap_or(&""));
    if let Some(keys) = parts.get(1) {
        text += "[guest.db]\nkernel = \"kernel\"\nconsole = { file = \"db.log\" }\n";
        text += &disks("db", keys);
    }
    fs::write(&path, text + &tail).unwrap();
    machine
}

/// Runs the machine in `dir` to its end.
pub fn supervise(dir: &Path) -> Result<(), RunError> {
    let machine = Machine::read(&dir.join("m.toml")).unwrap();
    let options = Options {
        state: Some(dir.join("state")),
        name: "m".into(),
        base: dir.join("run"),
        verbosity: Verbosity::Quiet,
        events: Some(fs::File::create(dir.join("events")).unwrap()),
        program: dir.join("program"),
        host: Host { kvm: dir.join("kvm"), pci: dir.join("pci"), root: dir.into(), open, ..Host::default() },
        notify: Notify::new(Some(dir.join("notify").into()), Some(Duration::from_millis(400))),
        until: until(dir),
        file: Some(MachineFile { path: dir.join("m.toml"), metrics: None }),
    };
    supervisor::run(&machine, options)
}

/// Until when a machine runs: there is a file in its folder that is called so.
fn until(dir: &Path) -> Until {
    if dir.join("prepare").exists() {
        return Until::Prepared;
    }
    if dir.join("keep").exists() { Until::Stopped } else { Until::GuestsEnd }
}

/// Files that know no request of VFIO. A device whose `unbound` is there cannot be opened.
fn open(device: &HostDevice) -> Result<DeviceFiles, host::Error> {
    if device.directory().join("unbound").exists() {
        return Err(host::Error::NoDriver { bdf: device.bdf() });
    }
    let null = || fs::File::open("/dev/null").unwrap().into();
    Ok(DeviceFiles::received(device.bdf(), vec![null(), null(), null()]).unwrap())
}

/// A sysfs with two functions bound to `vfio-pci`, and an image.
fn make_host(dir: &Path) {
    let pci = dir.join("pci");
    fs::create_dir_all(pci.join("drivers/vfio-pci")).unwrap();
    for (name, group) in [(DEVICE, "groups/7"), (SPARE, "groups/8")] {
        let device = pci.join("devices").join(name);
        let group = dir.join(group);
        fs::create_dir_all(&device).unwrap();
        fs::create_dir_all(group.join("devices").join(name)).unwrap();
        symlink(&group, device.join("iommu_group")).unwrap();
        symlink(pci.join("drivers/vfio-pci"), device.join("driver")).unwrap();
        for (name, text) in [("vendor", "0x8086"), ("device", "0x10d3"), ("reset", ""), ("reset_method", "flr bus")] {
            fs::write(device.join(name), text).unwrap();
        }
        // A command register with bus mastering on.
        fs::write(device.join("config"), [0x86, 0x80, 0xd3, 0x10, 0x06, 0x00, 0, 0]).unwrap();
    }
    for name in ["image", "image-new", "image-that-does-not-boot", "image-without-carrier", "image-without-the-driver"]
    {
        make_image(&dir.join(name));
    }
    fs::write(dir.join("kvm"), "").unwrap();
}

fn make_image(image: &Path) {
    fs::create_dir_all(image).unwrap();
    fs::write(image.join("vmlinux"), "elf").unwrap();
    fs::write(image.join("initramfs.cpio"), "cpio").unwrap();
    let manifest = r#"{"format":FORMAT,"recipe":"","kernel":"6.12","drivers":[],"devices":[],"modules":[],"firmware":[],
        "firmware_missing":[],"vmlinux":{"size":3,"sha256":"NAME"},"initramfs":{"size":4,"sha256":"NAME"}}"#;
    // Each image is another one, though they may be of one moment.
    let name = image.file_name().unwrap().to_str().unwrap();
    let manifest = manifest.replace("FORMAT", &FORMAT.to_string()).replace("NAME", name);
    fs::write(image.join("manifest.json"), manifest).unwrap();
}

impl TestMachine {
    /// Sends a request; `None` if the machine is not there (yet, or any more).
    pub fn ask(&self, request: &Request) -> Option<Response> {
        let (_, stream) = rundir::connect(&self.dir.path().join("run"), Some("m")).ok()?;
        exchange(&stream, request)
    }

    pub fn status(&self) -> Option<Status> {
        match self.ask(&Request::Status)? {
            Response::Status(status) => Some(*status),
            other => panic!("{other:?}"),
        }
    }

    /// Waits until the driver VM is as `wanted` has it.
    pub fn wait_for(&self, what: &str, wanted: impl Fn(&DriverStatus) -> bool) -> DriverStatus {
        let until = Instant::now() + PATIENCE;
        let mut last = None;
        while Instant::now() < until {
            if let Some(status) = self.status() {
                let driver = status.drivers.into_iter().next().unwrap();
                if wanted(&driver) {
                    return driver;
                }
                last = Some(driver);
            }
            thread::sleep(Duration::from_millis(20));
        }
        panic!("waited in vain for {what}: {last:#?}\n{}", self.events_text());
    }

    pub fn wait_live(&self, generation: u32) -> DriverStatus {
        let what = format!("generation {generation} live");
        self.wait_for(&what, |driver| driver.state == StateName::Live && driver.generation == Some(generation))
    }

    /// Waits until `generation` serves and a standby behind it is ready.
    pub fn wait_live_with_standby(&self, generation: u32) -> DriverStatus {
        self.wait_for("a standby", |driver| {
            let standby = driver.standby.as_ref();
            let waits = standby.is_some_and(|standby| standby.state == StandbyStage::Ready);
            driver.state == StateName::Live && driver.generation == Some(generation) && waits
        })
    }

    pub fn crash(&self, kind: CrashKind) {
        let response = self.ask(&Request::Crash { name: "nic0".into(), kind });
        assert!(matches!(response, Some(Response::Crashing { .. })), "{response:?}");
    }

    /// Waits until nothing of the driver VM's process beside the serving one is left, and there is a snapshot.
    pub fn wait_saved(&self) -> DriverStatus {
        self.wait_for("a snapshot", |driver| {
            driver.standby.as_ref().is_some_and(|standby| standby.state == StandbyStage::Snapshot)
        })
    }

    /// A request about a guest: what went wrong, if anything did.
    pub fn ask_about(&self, request: &Request) -> Result<(), String> {
        match self.ask(request) {
            Some(Response::Done { .. }) => Ok(()),
            Some(Response::Error { what }) => Err(what),
            other => panic!("{other:?}"),
        }
    }

    /// Waits until guest `name` is as `wanted` has it.
    pub fn wait_for_guest(&self, name: &str, what: &str, wanted: impl Fn(&GuestStatus) -> bool) -> GuestStatus {
        let until = Instant::now() + PATIENCE;
        loop {
            let guests = self.status().map(|status| status.guests).unwrap_or_default();
            let guest = guests.into_iter().find(|guest| guest.name == name);
            match guest {
                Some(guest) if wanted(&guest) => return guest,
                _ if Instant::now() > until => panic!("waited in vain for {what}: {guest:#?}\n{}", self.events_text()),
                _ => thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    /// Waits until the events contain `text` this many times.
    pub fn wait_for_event(&self, text: &str, times: usize) {
        let until = Instant::now() + PATIENCE;
        while self.events_text().matches(text).count() < times {
            assert!(Instant::now() < until, "waited in vain for {times} of {text}:\n{}", self.events_text());
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// `umbra restart`; waits for the outcome.
    pub fn restart(&self, image: Option<&str>) -> Response {
        let image = image.map(|name| self.dir.path().join(name));
        self.ask(&Request::Restart { name: "nic0".into(), image }).unwrap()
    }

    /// `umbra resume`; waits for the outcome.
    pub fn resume(&self) -> Response {
        self.ask(&Request::Resume { name: "nic0".into() }).unwrap()
    }

    /// Presses the power button (or kills) without waiting for the end.
    pub fn press(&self, how: StopHow) {
        assert!(matches!(self.ask(&Request::Stop { how }), Some(Response::Stopping { .. })));
    }

    /// Starts `umbra` with `words` beside the machine.
    pub fn command_line(&self, words: &[&str]) -> Child {
        self.command_line_with(words, Stdio::null())
    }

    /// As [`Self::command_line`], with this input.
    pub fn command_line_with(&self, words: &[&str], input: Stdio) -> Child {
        let mut umbra = Command::new(env!("CARGO_BIN_EXE_umbra"));
        umbra.args(words).env("UMBRA_RUN_DIR", self.dir.path().join("run"));
        umbra.env("UMBRA_STATE_DIR", self.dir.path().join("state"));
        umbra.stdin(input).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// Runs `umbra` with `words` beside the machine, to its end, as [`ended`].
    pub fn umbra(&self, words: &[&str]) -> (i32, String) {
        ended(self.command_line(words))
    }

    /// Stops the machine, whose supervisor is a process of its own, and expects a good end.
    pub fn stop_elsewhere(mut self) {
        self.press(StopHow::PowerButton);
        assert!(self.child.take().unwrap().wait().unwrap().success());
    }

    /// Waits for the end of the run.
    pub fn wait(&mut self) -> Result<(), RunError> {
        self.run.take().unwrap().join().unwrap()
    }

    /// Stops the machine and expects a good end, with nothing left.
    pub fn stop(mut self) {
        let pids = self.pids();
        self.press(StopHow::PowerButton);
        self.wait().unwrap();
        for pid in pids {
            assert!(!Path::new(&format!("/proc/{pid}")).exists(), "process {pid} is left");
        }
        assert!(!self.dir.path().join("run/m/control.sock").exists());
    }

    /// Runs the machine in a thread.
    pub fn start_again(&mut self) {
        let dir = self.dir.path().to_owned();
        self.run = Some(thread::spawn(move || supervise(&dir)));
    }

    /// The number of the supervisor, which is a process of its own.
    pub fn supervisor(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    /// As long as it is `there`, processes of VMs can be started.
    pub fn set_program(&self, there: bool) {
        let [here, away] = ["program", "program-that-was"].map(|name| self.dir.path().join(name));
        let (from, to) = if there { (away, here) } else { (here, away) };
        fs::rename(from, to).unwrap();
    }

    /// Kills the supervisor, which is a process of its own; returns its number.
    pub fn kill_supervisor(&mut self) -> u32 {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        child.id()
    }

    pub fn write_reset_method(&self, methods: &str) {
        fs::write(self.dir.path().join("pci/devices").join(DEVICE).join("reset_method"), methods).unwrap();
    }

    pub fn pids(&self) -> Vec<u32> {
        let status = self.status().unwrap();
        let guests = status.guests.iter().filter_map(|guest| guest.pid);
        guests.chain(status.drivers.iter().filter_map(|driver| driver.pid)).collect()
    }

    pub fn run_dir(&self) -> PathBuf {
        self.dir.path().join("run/m")
    }

    /// The report of a generation, once its process has ended: its last words come after the recovery has begun.
    pub fn report(&self, generation: u32) -> Value {
        self.report_with(generation, "its process's end", |_| true)
    }

    /// As [`Self::report`], and once it has `what` as well: it is written again when more is known.
    pub fn report_with(&self, generation: u32, what: &str, has: impl Fn(&Value) -> bool) -> Value {
        let path = self.run_dir().join(format!("reports/nic0-gen{generation}.json"));
        let until = Instant::now() + PATIENCE;
        loop {
            // It may be written just now.
            let text = fs::read(&path).unwrap_or_default();
            let report: Value = serde_json::from_slice(&text).unwrap_or_default();
            if report["exit"].as_str().is_some_and(|exit| !exit.is_empty()) && has(&report) {
                return report;
            }
            assert!(Instant::now() < until, "the report of generation {generation} stays without {what}: {report}");
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// As [`Self::report`], and once it has these steps in its time line.
    pub fn report_with_steps(&self, generation: u32, steps: &[&str]) -> Value {
        let has = |report: &Value, step: &str| {
            report["timeline"].as_array().is_some_and(|marks| marks.iter().any(|mark| mark["step"] == step))
        };
        self.report_with(generation, &format!("{steps:?}"), |report| steps.iter().all(|step| has(report, step)))
    }

    /// What the guest's process was told.
    pub fn guest_log(&self) -> String {
        self.log_of("web")
    }

    /// What the process of this guest was told; nothing before it has begun.
    pub fn log_of(&self, guest: &str) -> String {
        fs::read_to_string(self.dir.path().join(format!("{guest}.log"))).unwrap_or_default()
    }

    /// Waits until the process of this guest was told so: it reads what it is told a moment after it was sent.
    pub fn wait_for_log(&self, guest: &str, text: &str) {
        let until = Instant::now() + PATIENCE;
        while !self.log_of(guest).contains(text) {
            assert!(Instant::now() < until, "{guest} was not told {text:?}: {}", self.log_of(guest));
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// All events so far, a line each. Of a machine that runs, what it says itself: files are written beside, a moment later.
    pub fn events_text(&self) -> String {
        self.told().unwrap_or_else(|| fs::read_to_string(self.dir.path().join("events")).unwrap_or_default())
    }

    fn told(&self) -> Option<String> {
        let (_, mut stream) = rundir::connect(&self.dir.path().join("run"), Some("m")).ok()?;
        let request = serde_json::to_string(&Request::Events { after: 0, follow: false }).unwrap();
        stream.write_all((request + "\n").as_bytes()).ok()?;
        let mut told = String::new();
        for line in BufReader::new(stream).lines() {
            let line = line.ok()?;
            if line.starts_with("{\"response\"") {
                let whole = matches!(serde_json::from_str(&line), Ok(Response::EventsEnd));
                return whole.then_some(told);
            }
            told += &(line + "\n");
        }
        None
    }

    /// What was written to the device's `reset`.
    pub fn resets(&self) -> String {
        self.resets_of(DEVICE)
    }

    /// What was written to the `reset` of `device`.
    pub fn resets_of(&self, device: &str) -> String {
        fs::read_to_string(self.dir.path().join("pci/devices").join(device).join("reset")).unwrap()
    }

    /// The device's command register.
    pub fn command(&self) -> u8 {
        fs::read(self.dir.path().join("pci/devices").join(DEVICE).join("config")).unwrap()[4]
    }
}

fn exchange(mut stream: &UnixStream, request: &Request) -> Option<Response> {
    stream.write_all((serde_json::to_string(request).unwrap() + "\n").as_bytes()).ok()?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).ok()?;
    serde_json::from_str(&line).ok()
}

/// Waits for the end of a program: its status, and all that it said.
pub fn ended(child: Child) -> (i32, String) {
    let output = child.wait_with_output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.code().unwrap(), String::from_utf8(said).unwrap())
}
