//! Lies on the control stream and on the console.

use std::fs::OpenOptions;
use std::io::Write;
use std::time::Instant;

use serde_json::{Value, json};
use umbra_driver_vm::protocol::MAX_LINE;

use super::GIVES_UP;
use super::relay::Shared;
use crate::hostile::plan::{Attack, Plan, index};
use crate::random::Random;

/// Messages of a flood: more than any allowance.
const FLOOD: u32 = 100_000;
/// Of the other kinds.
const SOME: u32 = 200;
/// Bytes of a line without end, and of noise.
const MUCH: usize = 4 << 20;
/// Words that are held back before the oldest is said.
const LATE_BY: usize = 4;

/// Generations that no attacking life has: none, the first one, which is honest, and one far away.
const STRANGERS: [u32; 3] = [0, 1, u32::MAX];

/// What becomes of the agent's words while an attack is on.
#[derive(Debug, Default)]
pub(super) enum Filter {
    /// They are passed on.
    #[default]
    Honest,
    /// They are not.
    Silent,
    /// They are changed.
    Changed(Box<Random>),
    /// All but heartbeats come late.
    Late(Vec<Vec<u8>>),
}

impl Filter {
    pub(super) fn of(plan: &Plan) -> Self {
        match plan.attack {
            Attack::Mute => Self::Silent,
            attack if attack.is_on_devices() => Self::Silent,
            Attack::Mutations => Self::Changed(Box::new(plan.random.clone())),
            Attack::Late => Self::Late(Vec::new()),
            _ => Self::Honest,
        }
    }

    /// What is said in the place of `line`, which is `message`.
    pub(super) fn take(&mut self, mut line: Vec<u8>, message: &Value) -> Vec<u8> {
        line.push(b'\n');
        match self {
            Self::Honest => line,
            Self::Silent => Vec::new(),
            Self::Changed(random) => line_of(&changed(message, random)),
            Self::Late(_) if message["type"] == "heartbeat" => line,
            Self::Late(held) => {
                held.push(line);
                if held.len() > LATE_BY { held.remove(0) } else { Vec::new() }
            }
        }
    }
}

pub(super) fn line_of(message: &Value) -> Vec<u8> {
    let mut line = message.to_string().into_bytes();
    line.push(b'\n');
    line
}

/// `message` with another value somewhere in it, and sometimes with another type of message.
fn changed(message: &Value, random: &mut Random) -> Value {
    let mut message = message.clone();
    if let Some(fields) = message.as_object_mut() {
        let names: Vec<_> = fields.keys().filter(|name| *name != "type" || random.chance(0.2)).cloned().collect();
        if !names.is_empty() {
            let name = names[index(random, names.len())].clone();
            fields.insert(name, anything(random));
        }
    }
    message
}

/// A value of any type.
fn anything(random: &mut Random) -> Value {
    match random.below(10) {
        0 => Value::Null,
        1 => json!(u64::MAX),
        2 => json!(i64::MIN),
        3 => json!(1e308),
        4 => json!(random.next()),
        5 => json!(vec![random.next(); 500]),
        6 => json!(text(random, 200)),
        7 => json!(text(random, 20_000)),
        8 => json!({ "up": [] }),
        _ => json!(random.chance(0.5)),
    }
}

/// A text of what may do harm where it is shown.
fn text(random: &mut Random, length: usize) -> String {
    const BAD: [&str; 10] =
        ["\u{1b}[2J", "\n", "\r", "\0", "\u{9b}31m", "\u{202e}", "\"", "{\"type\":\"", "\u{1b}]0;", "../../etc/passwd"];
    (0..length / 4).map(|_| BAD[index(random, BAD.len())]).collect()
}

/// Says what the plan has it say.
pub(super) fn attack(plan: Plan, host: &Shared) {
    let Plan { attack, mut random, .. } = plan;
    let random = &mut random;
    match attack {
        Attack::CarrierFlood => repeat(host, FLOOD, |n| line_of(&carrier(n.is_multiple_of(2)))),
        Attack::HeartbeatFlood => repeat(host, FLOOD, |n| line_of(&heartbeat(u64::from(n)))),
        Attack::WrongGeneration => repeat(host, 1, |_| line_of(&hello(STRANGERS[index(random, STRANGERS.len())]))),
        Attack::Unasked => repeat(host, SOME, |_| line_of(&unasked(random))),
        Attack::EndlessLine => repeat(host, 1, |_| vec![b'x'; MUCH]),
        Attack::ControlCharacters => repeat(host, SOME, |_| {
            let length = 1 << (4 + random.below(7));
            let name = text(random, length);
            let (mac, mtu) = ("52:54:00:00:00:01", 1500);
            line_of(&json!({"type": "nic", "driver": name, "interface": name, "mac": mac, "mtu": mtu, "uptime_ms": 1}))
        }),
        Attack::Garbage => repeat(host, 1, |_| noise(random, MUCH / 16)),
        Attack::Nesting => {
            repeat(host, 1, |_| [vec![b'['; MAX_LINE / 2], vec![b']'; MAX_LINE / 2 - 1], b"\n".to_vec()].concat());
        }
        Attack::Console => console(random),
        // The filter's, and those on devices.
        _ => {}
    }
}

/// Says `count` things, until the host does not listen any more.
fn repeat(host: &Shared, count: u32, mut what: impl FnMut(u32) -> Vec<u8>) {
    for n in 0..count {
        if host.write(&what(n)).is_err() {
            return;
        }
    }
}

fn carrier(up: bool) -> Value {
    json!({"type": "carrier", "up": up, "uptime_ms": 1})
}

pub(super) fn heartbeat(sequence: u64) -> Value {
    json!({"type": "heartbeat", "sequence": sequence, "available_memory": u64::MAX})
}

fn hello(generation: u32) -> Value {
    json!({"type": "hello", "generation": generation, "kernel": "6.12", "uptime_ms": 1})
}

/// What an agent says at some other time, or one of another class.
fn unasked(random: &mut Random) -> Value {
    let ranges: Vec<_> =
        (0..random.below(300)).map(|_| json!({"start": random.next() >> 20 << 21, "length": 2 << 20})).collect();
    match random.below(12) {
        0 => json!({"type": "forwarding", "uptime_ms": 0}),
        1 => carrier(random.chance(0.5)),
        2 => json!({"type": "ready", "loaded": true, "unused": ranges}),
        3 => json!({"type": "ready", "loaded": false}),
        4 => json!({"type": "loaded", "uptime_ms": u64::MAX}),
        5 => json!({"type": "at-rest", "stable": true}),
        6 => json!({"type": "disk-error", "end": 65535, "attempt": u32::MAX, "errno": -1}),
        7 => json!({"type": "disks", "driver": "nvme", "disks": [], "uptime_ms": 1}),
        8 => json!({"type": "nic-found", "uptime_ms": 1}),
        9 => {
            json!({"type": "nic", "driver": "", "interface": "", "mac": "ff:ff:ff:ff:ff:ff", "mtu": 0, "uptime_ms": 0})
        }
        10 => json!({"type": "sound", "driver": "snd", "card": {"streams": []}, "uptime_ms": 1}),
        _ => heartbeat(random.next()),
    }
}

fn noise(random: &mut Random, length: usize) -> Vec<u8> {
    (0..length.div_ceil(8)).flat_map(|_| random.next().to_le_bytes()).collect()
}

/// Panics that are none, escape sequences, noise, and lines without end.
fn console(random: &mut Random) {
    let Ok(mut console) = OpenOptions::new().write(true).open("/dev/console") else { return };
    // A serial line takes its time for each byte.
    let begin = Instant::now();
    while begin.elapsed() < GIVES_UP {
        let what = match random.below(5) {
            0 => text(random, 1000).into_bytes(),
            1 => noise(random, 1024),
            2 => vec![b'#'; 4096],
            3 => b"[    1.000000] Kernel panic - not syncin".to_vec(),
            _ => b"umbra: the guest has failed\nirq 16: nobody care\n".to_vec(),
        };
        if console.write_all(&what).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn late_words_come_in_their_order_and_heartbeats_in_time() {
        let mut filter = Filter::Late(Vec::new());
        let mut say =
            |message: Value| String::from_utf8(filter.take(message.to_string().into_bytes(), &message)).unwrap();
        for n in 0..4 {
            assert_eq!(say(json!({"type": "carrier", "n": n})), "");
        }
        assert!(say(json!({"type": "heartbeat"})).contains("heartbeat"));
        assert!(say(json!({"type": "carrier", "n": 4})).contains("\"n\":0"));
    }

    #[test]
    fn a_changed_message_is_another_one_and_repeats_with_its_seed() {
        let message = carrier(true);
        let change = |seed| changed(&message, &mut Random::new(seed));
        assert_eq!(change(1), change(1));
        assert!((1..20).filter(|&seed| change(seed) != message).count() > 15);
    }
}
