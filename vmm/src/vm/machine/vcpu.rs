//! The vCPU threads: each runs its vCPU and hands what exits to the bus until the VM ends. An exit takes no
//! lock but the target device's, and where writes have been collected, that of their ring.

use std::fmt::Write as _;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_RUNNABLE, KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET,
    KVM_SYSTEM_EVENT_SHUTDOWN, kvm_mp_state, kvm_run,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use thiserror::Error;
use umbra_splitter::threads::{self, Purpose};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::bus::Bus;
use super::coalesced::CoalescedWrites;
use super::end::End;
use super::panic_watch::PanicWatch;
use super::state::{self, VcpuState};
use crate::base::lock::lock;
use crate::wire::messages::VmEnd;

/// How long to wait before a vCPU that was between its check and `KVM_RUN` is kicked again.
const KICK_AGAIN: Duration = Duration::from_millis(1);
/// Bytes of code shown in a register dump.
const CODE_BYTES: usize = 16;

/// `jmp` to itself.
const SPIN: [u8; 2] = [0xeb, 0xfe];
/// The interrupt flag in `rflags`.
const INTERRUPTS: u64 = 1 << 9;

/// Errors of starting vCPUs.
#[derive(Debug, Error)]
pub enum Error {
    /// No signal handler.
    #[error("install the handler of the signal that stops vCPUs")]
    Signal(#[source] vmm_sys_util::errno::Error),
    /// No thread.
    #[error("start the thread of vCPU {id}")]
    Thread {
        /// Which.
        id: usize,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// What vCPUs share.
#[derive(Clone)]
pub struct Shared {
    /// Where exits go.
    pub bus: Arc<Bus>,
    /// The VM's end.
    pub end: Arc<End>,
    /// For the code in register dumps.
    pub memory: GuestMemoryMmap,
    lock_up: Arc<LockUp>,
    nmi: Arc<Nmi>,
    pause: Arc<Pause>,
    panic_watch: Arc<PanicWatch>,
    /// The MSRs that belong to the state of a vCPU.
    msrs: Arc<[u32]>,
    /// Writes that made no exit.
    coalesced: Option<Arc<CoalescedWrites>>,
}

impl Shared {
    /// vCPUs with these.
    pub fn new(
        bus: &Arc<Bus>,
        end: &Arc<End>,
        memory: &GuestMemoryMmap,
        msrs: Arc<[u32]>,
        panic_watch: &Arc<PanicWatch>,
    ) -> Self {
        let (bus, end, memory) = (Arc::clone(bus), Arc::clone(end), memory.clone());
        Self {
            bus,
            end,
            memory,
            lock_up: Arc::default(),
            nmi: Arc::default(),
            pause: Arc::default(),
            panic_watch: Arc::clone(panic_watch),
            msrs,
            coalesced: None,
        }
    }

    /// Serves what KVM has collected: before anything else that comes of `KVM_RUN`.
    fn serve_coalesced(&self) {
        if let Some(coalesced) = &self.coalesced {
            coalesced.serve(|port, data| self.bus.port_write(port, data));
        }
    }

    /// Has what KVM collects in `coalesced` served before each exit.
    pub fn with_coalesced(self, coalesced: Option<CoalescedWrites>) -> Self {
        Self { coalesced: coalesced.map(Arc::new), ..self }
    }
}

/// Where the threads of vCPUs wait until all of them are there and may run.
#[derive(Debug, Default)]
struct Gate {
    /// Threads that are there, and whether they may run.
    state: Mutex<(usize, bool)>,
    changed: Condvar,
}

impl Gate {
    /// Waits for leave to run.
    fn pass(&self) {
        let mut state = lock(&self.state);
        state.0 += 1;
        self.changed.notify_all();
        while !state.1 {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits until `threads` of them are there.
    fn wait_for(&self, threads: usize) {
        let mut state = lock(&self.state);
        while state.0 < threads {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn open(&self) {
        lock(&self.state).1 = true;
        self.changed.notify_all();
    }
}

/// Whether vCPUs are to spin with interrupts off, and how many have been told.
#[derive(Debug, Default)]
struct LockUp {
    wanted: AtomicBool,
    done: AtomicUsize,
}

/// Non-maskable interrupts: how many each vCPU is to have had, and how many vCPUs have had the last.
#[derive(Debug, Default)]
struct Nmi {
    wanted: AtomicU32,
    done: AtomicUsize,
}

/// Whether vCPUs are to stand still, and what those that do have for a state.
#[derive(Debug, Default)]
struct Pause {
    /// As in the mutex, for the vCPUs' loop.
    wanted: AtomicBool,
    state: Mutex<PauseState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct PauseState {
    wanted: bool,
    /// Of the vCPUs that stand still, by number.
    taken: Vec<(usize, Result<VcpuState, state::Error>)>,
    /// vCPUs that wait to go on.
    waiting: usize,
}

/// vCPUs that stand still; dropping it lets them go on.
#[derive(Debug)]
pub struct Paused<'a> {
    pause: &'a Pause,
    /// Their state, by number.
    pub vcpus: Vec<VcpuState>,
}

impl Drop for Paused<'_> {
    fn drop(&mut self) {
        self.pause.go_on();
    }
}

impl Pause {
    fn go_on(&self) {
        let mut state = lock(&self.state);
        state.wanted = false;
        self.wanted.store(false, Ordering::Release);
        self.changed.notify_all();
        // A vCPU that still waits must not take the next pause for this one.
        while state.waiting > 0 {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Called by vCPU `id`, which stands still until the pause is over.
    fn stand_still(&self, id: usize, taken: Result<VcpuState, state::Error>) {
        let mut state = lock(&self.state);
        if !state.wanted {
            return;
        }
        state.taken.push((id, taken));
        state.waiting += 1;
        self.changed.notify_all();
        while state.wanted {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.waiting -= 1;
        self.changed.notify_all();
    }
}

/// What a turn of a vCPU came to.
enum Turn {
    /// An exit was served.
    Served,
    /// It was kicked, or waits for its start-up message: nothing of an exit is left to be completed.
    Kicked,
    /// The VM has ended.
    Ended(VmEnd, String),
}

/// Running vCPUs. [`Self::stop`] must be called at the end; dropping it stops them too.
#[derive(Debug)]
pub struct Vcpus {
    threads: Vec<JoinHandle<String>>,
    end: Arc<End>,
    lock_up: Arc<LockUp>,
    nmi: Arc<Nmi>,
    pause: Arc<Pause>,
    panic_watch: Arc<PanicWatch>,
}

extern "C" fn kicked(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Installs the handler of the signal that has vCPUs leave their guest.
///
/// # Errors
/// There is no such signal.
pub fn expect_kicks() -> Result<(), Error> {
    register_signal_handler(SIGRTMIN(), kicked).map_err(Error::Signal)
}

impl Vcpus {
    /// Starts a thread for each of `vcpus`, does `first` once all threads are there, and lets them run.
    ///
    /// # Errors
    /// That of `first`, or a thread cannot be started; then none has run.
    pub fn start<E: From<Error>>(
        vcpus: Vec<VcpuFd>,
        shared: &Shared,
        first: impl FnOnce() -> Result<(), E>,
    ) -> Result<Self, E> {
        let gate = Arc::new(Gate::default());
        let (end, lock_up) = (Arc::clone(&shared.end), Arc::clone(&shared.lock_up));
        let (nmi, pause) = (Arc::clone(&shared.nmi), Arc::clone(&shared.pause));
        let panic_watch = Arc::clone(&shared.panic_watch);
        let mut started = Self { threads: Vec::new(), end, lock_up, nmi, pause, panic_watch };
        let mut failed = None;
        for (id, vcpu) in vcpus.into_iter().enumerate() {
            let (shared, gate) = (shared.clone(), Arc::clone(&gate));
            let body = move || {
                gate.pass();
                let guard = EndOnPanic(Arc::clone(&shared.end));
                let report = Runner { id, vcpu, shared, locked_up: false, nmis: 0, watch: 0 }.run();
                drop(guard);
                report
            };
            let thread = threads::spawn(Purpose::Vcpu, format!("vcpu{id}"), body);
            match thread {
                Ok(thread) => started.threads.push(thread),
                Err(source) => {
                    failed = Some(Error::Thread { id, source }.into());
                    break;
                }
            }
        }
        gate.wait_for(started.threads.len());
        let done = failed.map_or_else(first, Err);
        if done.is_err() {
            started.end.set(VmEnd::Killed);
        }
        gate.open();
        done.map(|()| started)
    }

    /// Has every vCPU spin where it is with interrupts off, until the VM ends. Returns when all have been told;
    /// one that could not be goes on, which is logged.
    pub fn lock_up(&self) {
        self.lock_up.wanted.store(true, Ordering::Release);
        self.kick_until_done(&self.lock_up.done);
    }

    /// Injects a non-maskable interrupt into every vCPU. Returns when all have it.
    pub fn inject_nmi(&self) {
        self.nmi.done.store(0, Ordering::Release);
        self.nmi.wanted.fetch_add(1, Ordering::Release);
        self.kick_until_done(&self.nmi.done);
    }

    /// Has every vCPU stop where it is about to run an instruction at one of `entries`, of which [`MAX_PANIC_ENTRIES`] can be had:
    /// once, which is told by [`Vm::panicking`]. Returns when all do.
    ///
    /// [`MAX_PANIC_ENTRIES`]: umbra_driver_vm::protocol::MAX_PANIC_ENTRIES
    /// [`Vm::panicking`]: super::vm::Vm::panicking
    pub fn watch_for_panic(&self, entries: &[u64]) {
        self.panic_watch.set(entries);
        self.kick_until_done(&self.panic_watch.done);
    }

    /// Kicks all vCPUs out of `KVM_RUN` until each has counted itself in `done`, or the VM has ended.
    fn kick_until_done(&self, done: &AtomicUsize) {
        while done.load(Ordering::Acquire) < self.threads.len() && !self.end.is_set() {
            for thread in &self.threads {
                // Fails only if the thread has just ended.
                let _ = thread.kill(SIGRTMIN());
            }
            thread::sleep(KICK_AGAIN);
        }
    }

    /// Has every vCPU stand still between two instructions, and takes their state. They go on when the result is dropped.
    ///
    /// # Errors
    /// KVM does not give the state of one, or the VM has ended; then they go on.
    pub fn pause(&self) -> Result<Paused<'_>, state::Error> {
        let mut state = lock(&self.pause.state);
        state.wanted = true;
        state.taken.clear();
        self.pause.wanted.store(true, Ordering::Release);
        while state.taken.len() < self.threads.len() && !self.end.is_set() {
            for thread in &self.threads {
                // Fails only if the thread has just ended.
                let _ = thread.kill(SIGRTMIN());
            }
            let waited = self.pause.changed.wait_timeout(state, KICK_AGAIN);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        let mut taken = std::mem::take(&mut state.taken);
        drop(state);
        let mut paused = Paused { pause: &self.pause, vcpus: Vec::new() };
        taken.sort_by_key(|(id, _)| *id);
        for (_, vcpu) in taken {
            paused.vcpus.push(vcpu?);
        }
        if paused.vcpus.len() < self.threads.len() {
            return Err(state::Error::VcpuCount { have: paused.vcpus.len(), should: self.threads.len() });
        }
        Ok(paused)
    }

    /// Stops all vCPUs and returns their registers as text.
    pub fn stop(mut self) -> String {
        self.join()
    }

    fn join(&mut self) -> String {
        self.end.set(VmEnd::Killed);
        self.panic_watch.let_go();
        let mut report = String::new();
        for thread in self.threads.drain(..) {
            while !thread.is_finished() {
                // Fails only if the thread has just ended.
                let _ = thread.kill(SIGRTMIN());
                thread::sleep(KICK_AGAIN);
            }
            report += &thread.join().unwrap_or_else(|_| "a vCPU thread panicked\n".into());
        }
        report
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.join();
    }
}

/// A vCPU thread that panics must not leave a VM that never ends.
struct EndOnPanic(Arc<End>);

impl Drop for EndOnPanic {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.set(VmEnd::Error);
        }
    }
}

struct Runner {
    id: usize,
    vcpu: VcpuFd,
    shared: Shared,
    locked_up: bool,
    /// Non-maskable interrupts that it has had.
    nmis: u32,
    /// The breakpoints that it has had.
    watch: u32,
}

impl Runner {
    /// Runs until the VM ends; returns a report on this vCPU's end.
    fn run(mut self) -> String {
        let mut why = String::from("stopped");
        while !self.shared.end.is_set() {
            if !self.locked_up && self.shared.lock_up.wanted.load(Ordering::Acquire) {
                self.locked_up = true;
                if let Err(error) = self.spin_without_interrupts() {
                    tracing::warn!(id = self.id, %error, "cannot lock the vCPU up");
                }
                self.shared.lock_up.done.fetch_add(1, Ordering::Release);
            }
            if self.nmis != self.shared.nmi.wanted.load(Ordering::Acquire) {
                self.nmis += 1;
                if let Err(error) = self.vcpu.nmi() {
                    tracing::warn!(id = self.id, %error, "inject a non-maskable interrupt (KVM_NMI)");
                }
                self.shared.nmi.done.fetch_add(1, Ordering::Release);
            }
            self.shared.panic_watch.arm(&self.vcpu, &mut self.watch);
            let turn = if self.shared.pause.wanted.load(Ordering::Acquire) { self.pause() } else { self.step() };
            if let Turn::Ended(how, reason) = turn {
                self.shared.end.set(how);
                why = reason;
            }
        }
        self.report(&why)
    }

    /// Completes what the last exit began, and stands still; unless that begins another exit, which is served first.
    fn pause(&mut self) -> Turn {
        self.vcpu.set_kvm_immediate_exit(1);
        let turn = self.step();
        self.vcpu.set_kvm_immediate_exit(0);
        if matches!(turn, Turn::Kicked) {
            let taken = VcpuState::take(&self.vcpu, &self.shared.msrs);
            self.shared.pause.stand_still(self.id, taken);
            // Tells the guest's watchdogs that it was paused, where the guest has KVM's clock.
            let _ = self.vcpu.kvmclock_ctrl();
        }
        turn
    }

    fn step(&mut self) -> Turn {
        let run: *const kvm_run = self.vcpu.get_kvm_run();
        let bus = &self.shared.bus;
        let ended = |how, why: &str| Turn::Ended(how, why.to_owned());
        let exit = self.vcpu.run();
        self.shared.serve_coalesced();
        match exit {
            Ok(VcpuExit::IoOut(port, data)) => {
                data.chunks(io_size(run)).for_each(|piece| bus.port_write(port, piece));
                Turn::Served
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                data.chunks_mut(io_size(run)).for_each(|piece| bus.port_read(port, piece));
                Turn::Served
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                bus.memory_write(address, data);
                Turn::Served
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                bus.memory_read(address, data);
                Turn::Served
            }
            Ok(VcpuExit::Debug(_)) => match self.shared.panic_watch.on_hit(&self.vcpu) {
                Ok(()) => Turn::Served,
                Err(error) => {
                    Turn::Ended(VmEnd::Error, format!("take a breakpoint away (KVM_SET_GUEST_DEBUG): {error}"))
                }
            },
            Ok(VcpuExit::Intr) => Turn::Kicked,
            Ok(VcpuExit::Shutdown) => ended(VmEnd::TripleFault, "triple fault (KVM_EXIT_SHUTDOWN)"),
            Ok(VcpuExit::SystemEvent(kind, _)) => match kind {
                KVM_SYSTEM_EVENT_SHUTDOWN => ended(VmEnd::PowerOff, "system event: shutdown"),
                KVM_SYSTEM_EVENT_RESET => ended(VmEnd::Reset, "system event: reset"),
                KVM_SYSTEM_EVENT_CRASH => ended(VmEnd::Error, "system event: crash"),
                other => Turn::Ended(VmEnd::Error, format!("system event {other}")),
            },
            Ok(VcpuExit::FailEntry(reason, cpu)) => {
                Turn::Ended(VmEnd::Error, format!("KVM_EXIT_FAIL_ENTRY, reason {reason:#x} on CPU {cpu}"))
            }
            Ok(VcpuExit::InternalError) => Turn::Ended(VmEnd::Error, internal_error(run)),
            Ok(other) => Turn::Ended(VmEnd::Error, format!("unexpected exit {other:?}")),
            // A kick; or a vCPU that waits for its start-up message.
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => Turn::Kicked,
            Err(error) => Turn::Ended(VmEnd::Error, format!("KVM_RUN failed: {error}")),
        }
    }

    /// Puts a jump to itself in the place of the next instruction, and takes interrupts away.
    fn spin_without_interrupts(&mut self) -> Result<(), kvm_ioctls::Error> {
        // What the last exit began is ended by entering once more (KVM API, KVM_RUN). Where that begins another exit, the rest of the
        // instruction is lost with the VM.
        self.vcpu.set_kvm_immediate_exit(1);
        let _ = self.vcpu.run();
        self.shared.serve_coalesced();
        self.vcpu.set_kvm_immediate_exit(0);
        if self.vcpu.get_mp_state()?.mp_state == KVM_MP_STATE_HALTED {
            self.vcpu.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE })?;
        }
        let mut events = self.vcpu.get_vcpu_events()?;
        events.interrupt.injected = 0;
        self.vcpu.set_vcpu_events(&events)?;
        let mut registers = self.vcpu.get_regs()?;
        registers.rflags &= !INTERRUPTS;
        self.vcpu.set_regs(&registers)?;
        let code = self.vcpu.get_sregs()?.cs.base.wrapping_add(registers.rip);
        for (address, byte) in (code..).zip(SPIN) {
            let place = GuestAddress(self.vcpu.translate_gva(address)?.physical_address);
            // Not in memory: it spins on what it finds there, or faults; either is a failure.
            let _ = self.shared.memory.write_obj(byte, place);
        }
        Ok(())
    }

    fn report(&self, why: &str) -> String {
        let mut text = format!("vcpu{}: {why}\n", self.id);
        // Writing to a String cannot fail.
        let _ = self.write_registers(&mut text);
        text
    }

    fn write_registers(&self, text: &mut String) -> std::fmt::Result {
        let (Ok(r), Ok(s)) = (self.vcpu.get_regs(), self.vcpu.get_sregs()) else {
            return writeln!(text, "  registers cannot be read");
        };
        writeln!(
            text,
            "  rip {:016x}  rflags {:08x}  cs {:04x}  ss {:04x}",
            r.rip, r.rflags, s.cs.selector, s.ss.selector
        )?;
        writeln!(text, "  rax {:016x}  rbx {:016x}  rcx {:016x}  rdx {:016x}", r.rax, r.rbx, r.rcx, r.rdx)?;
        writeln!(text, "  rsi {:016x}  rdi {:016x}  rbp {:016x}  rsp {:016x}", r.rsi, r.rdi, r.rbp, r.rsp)?;
        writeln!(text, "  r8  {:016x}  r9  {:016x}  r10 {:016x}  r11 {:016x}", r.r8, r.r9, r.r10, r.r11)?;
        writeln!(text, "  r12 {:016x}  r13 {:016x}  r14 {:016x}  r15 {:016x}", r.r12, r.r13, r.r14, r.r15)?;
        writeln!(
            text,
            "  cr0 {:08x}  cr2 {:016x}  cr3 {:016x}  cr4 {:08x}  efer {:x}",
            s.cr0, s.cr2, s.cr3, s.cr4, s.efer
        )?;
        writeln!(text, "  gs base {:016x}  gdt {:016x}  idt {:016x}", s.gs.base, s.gdt.base, s.idt.base)?;
        match self.code(s.cs.base.wrapping_add(r.rip)) {
            Some(code) => writeln!(text, "  code {}", code.map(|byte| format!("{byte:02x}")).join(" ")),
            None => writeln!(text, "  code cannot be read"),
        }
    }

    fn code(&self, address: u64) -> Option<[u8; CODE_BYTES]> {
        let translated = self.vcpu.translate_gva(address).ok().filter(|t| t.valid != 0)?;
        let mut code = [0; CODE_BYTES];
        self.shared.memory.read_slice(&mut code, GuestAddress(translated.physical_address)).ok()?;
        Some(code)
    }
}

/// Width in bytes of each access of a string of port accesses.
fn io_size(run: *const kvm_run) -> usize {
    // SAFETY: `run` points to the vCPU's mapped `kvm_run`, which lives as long as the vCPU, and after
    // KVM_EXIT_IO the kernel has filled this arm of the union. Only the data behind the structure is
    // borrowed at this time, not the structure.
    let size = unsafe { (*run).__bindgen_anon_1.io.size };
    usize::from(size).max(1)
}

fn internal_error(run: *const kvm_run) -> String {
    // SAFETY: as in `io_size`, after KVM_EXIT_INTERNAL_ERROR.
    let internal = unsafe { (*run).__bindgen_anon_1.internal };
    let kind = match internal.suberror {
        1 => "instruction emulation failed",
        2 => "simultaneous exceptions",
        3 => "exit while an event was delivered",
        4 => "unexpected exit reason of the CPU",
        _ => "unknown",
    };
    format!("KVM_EXIT_INTERNAL_ERROR {} ({kind})", internal.suberror)
}
