//! Passes on what the host and the agent say on the control stream, finds out by it which life this is and how far it has come, and has it
//! attack when its moment has come.
//!
//! One thread a direction. The third one, the attack, ends the life: it is stopped by the host, or after [`GIVES_UP`] resets this VM
//! itself, which tells that nothing has stopped it.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use serde_json::Value;
use umbra_driver_vm::protocol::HEARTBEAT_MS;

use super::lies::{self, Filter};
use super::{GIVES_UP, on_devices, restart, say};
use crate::hostile::plan::{Attack, Moment, Plan};

/// Between the end of an attack and the reset: the host may still be at it.
const AFTERWARDS: Duration = Duration::from_secs(1);
/// The same where the host has to find something out.
const FOUND_OUT: Duration = Duration::from_secs(30);
const BEAT: Duration = Duration::from_millis(HEARTBEAT_MS);
/// Between two looks for a host that has closed its end.
const AWAY: Duration = Duration::from_millis(20);

/// What both directions know.
pub(super) struct Shared {
    seed: u64,
    port: File,
    plan: Mutex<Option<Plan>>,
    /// What becomes of the agent's words.
    filter: Mutex<Filter>,
    attacks: AtomicBool,
}

/// Starts both directions between the real `port` and the `agent`'s terminal.
pub(super) fn start(seed: u64, port: File, agent: File) -> io::Result<Arc<Shared>> {
    let shared = Shared {
        seed,
        port: port.try_clone()?,
        plan: Mutex::new(None),
        filter: Mutex::default(),
        attacks: AtomicBool::new(false),
    };
    let shared = Arc::new(shared);
    let (to_agent, from_agent) = (agent.try_clone()?, agent);
    let (down, up) = (Arc::clone(&shared), Arc::clone(&shared));
    thread::Builder::new().name("to-agent".into()).spawn(move || down.pass_on_orders(port, to_agent))?;
    thread::Builder::new().name("from-agent".into()).spawn(move || up.pass_on_words(from_agent))?;
    Ok(shared)
}

impl Shared {
    fn pass_on_orders(self: &Arc<Self>, mut port: File, mut agent: File) {
        let (mut chunk, mut line) = (vec![0; 4096], Vec::new());
        loop {
            let Ok(length) = port.read(&mut chunk) else { return say("the control port cannot be read") };
            if length == 0 {
                thread::sleep(AWAY);
                continue;
            }
            if agent.write_all(&chunk[..length]).is_err() {
                return;
            }
            for &byte in &chunk[..length] {
                if byte != b'\n' {
                    line.push(byte);
                    continue;
                }
                if let Ok(message) = serde_json::from_slice::<Value>(&line) {
                    self.ordered(&message);
                }
                line.clear();
            }
        }
    }

    fn ordered(self: &Arc<Self>, message: &Value) {
        match message["type"].as_str() {
            Some("begin") => {
                let generation = message["generation"].as_u64().and_then(|n| u32::try_from(n).ok()).unwrap_or(0);
                let plan = Plan::of(self.seed, generation);
                say(&format!("generation {generation}: {:?} from {:?} on", plan.attack, plan.moment));
                *self.plan.lock().unwrap_or_else(PoisonError::into_inner) = Some(plan);
                self.reached(Moment::Begun);
            }
            Some("configure-net") => self.reached(Moment::Configured),
            _ => {}
        }
    }

    fn pass_on_words(self: &Arc<Self>, agent: File) {
        let mut lines = BufReader::new(agent).split(b'\n');
        while let Some(Ok(line)) = lines.next() {
            let message = serde_json::from_slice::<Value>(&line).unwrap_or_default();
            let said = self.filter.lock().unwrap_or_else(PoisonError::into_inner).take(line, &message);
            if !said.is_empty() && self.write(&said).is_err() {
                return;
            }
            match message["type"].as_str() {
                Some("nic") => self.reached(Moment::Nic),
                Some("forwarding") => self.reached(Moment::Forwarding),
                _ => {}
            }
        }
    }

    /// An attack has begun.
    pub(super) fn attacks(&self) -> bool {
        self.attacks.load(Ordering::SeqCst)
    }

    /// Says this to the host.
    pub(super) fn write(&self, bytes: &[u8]) -> io::Result<()> {
        (&self.port).write_all(bytes)
    }

    /// Attacks by the devices of this VM. Its agent may end of that, and is not heard: heartbeats go on without it.
    fn attack_devices(self: &Arc<Self>, plan: Plan) {
        let shared = Arc::clone(self);
        let beats = move || {
            for sequence in 1_000_000.. {
                if shared.write(&lies::line_of(&lies::heartbeat(sequence))).is_err() {
                    return;
                }
                thread::sleep(BEAT);
            }
        };
        let _ = thread::Builder::new().name("beats".into()).spawn(beats);
        let Plan { attack, mut random, .. } = plan;
        on_devices(attack, &mut random);
    }

    fn reached(self: &Arc<Self>, moment: Moment) {
        let plan = self.plan.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let Some(plan) = plan.filter(|plan| plan.attack != Attack::Honest && moment >= plan.moment) else { return };
        if self.attacks.swap(true, Ordering::SeqCst) {
            return;
        }
        *self.filter.lock().unwrap_or_else(PoisonError::into_inner) = Filter::of(&plan);
        let shared = Arc::clone(self);
        let attack = move || {
            let what = plan.attack;
            if what.is_on_devices() {
                shared.attack_devices(plan);
            } else {
                lies::attack(plan, &shared);
                thread::sleep(GIVES_UP);
            }
            thread::sleep(AFTERWARDS);
            if what.has_to_be_stopped() {
                thread::sleep(FOUND_OUT);
            }
            say(&format!("nothing has stopped {what:?}"));
            restart()
        };
        if thread::Builder::new().name("attack".into()).spawn(attack).is_err() {
            restart();
        }
    }
}
