//! Port 0 as the VM's console, with a driver that knows ports and with one that does not.

use vmm_sys_util::eventfd::EFD_CLOEXEC;

use super::*;
use crate::config::Console as Place;
use crate::vm::machine::legacy::Backlog;

/// A line with what it has printed.
pub(in crate::vm::virtio) fn line() -> (Arc<Mutex<SerialLine>>, Arc<Backlog>) {
    let backlog = Arc::new(Backlog::new().unwrap());
    let interrupt = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).unwrap();
    let line = SerialLine::new(&Place::Off, Some(Arc::clone(&backlog)), interrupt).unwrap();
    (Arc::new(Mutex::new(line)), backlog)
}

fn printed(backlog: &Backlog) -> String {
    String::from_utf8(backlog.part(0, usize::MAX).bytes).unwrap()
}

fn with_console(ports: &[PortBackend]) -> (Console, Arc<Mutex<SerialLine>>, Arc<Backlog>) {
    let (line, backlog) = line();
    let outbox: Outbox = Arc::new(|message| panic!("{message:?}"));
    (Console::new(ports, Some(Arc::clone(&line)), &outbox).unwrap(), line, backlog)
}

#[test]
fn a_console_is_announced_as_one_prints_and_is_typed_at() {
    let (mut host, backend) = inherited();
    let (console, line, backlog) = with_console(&[backend]);
    let count = 6;
    let mut guest = Guest::with(console, &memory(count as u64), count);
    assert_eq!(guest.messages(), [(0, 1, 1, String::new()), (1, 1, 1, String::new())]);
    guest.control(0, 3, 1);
    assert_eq!(guest.messages(), [(0, 4, 1, String::new()), (0, 6, 1, String::new())]);
    guest.control(0, 6, 1);
    let mut ports = [0; 4];
    guest.device.lock().unwrap().config_read(4, &mut ports);
    assert_eq!(u32::from_le_bytes(ports), 2);

    line.lock().unwrap().input(b"typed bef");
    guest.events.run();
    guest.room(0, 4);
    line.lock().unwrap().input(b"ore");
    guest.room(0, 64);
    guest.room(0, 64);
    assert_eq!(guest.read(0), b"typed before");
    guest.write(1, b"hello ");
    line.lock().unwrap().write(0, b'+');
    guest.write(1, b"there");
    assert_eq!(printed(&backlog), "hello +there", "both devices print to the same console");

    // The port beside it is as without a console.
    guest.control(1, 3, 1);
    guest.control(1, 6, 1);
    guest.write(5, b"by the port");
    assert_eq!(read_now(&mut host), b"by the port");
}

#[test]
fn more_is_typed_when_the_guest_has_read_what_there_was() {
    let (console, line, _) = with_console(&[]);
    let mut guest = Guest::with(console, &memory(4), 4);
    guest.control(0, 3, 1);
    let mut line_now = line.lock().unwrap();
    let room = line_now.room();
    line_now.input(&vec![b'x'; room + 5]);
    assert_eq!(line_now.room(), 0);
    assert!(line_now.drained().read().is_err() && line_now.read(5) & 1 == 0, "nothing goes to the serial line");
    drop(line_now);
    guest.room(0, 64);
    assert_eq!(guest.read(0), b"", "nobody has it open");
    guest.control(0, 6, 1);
    guest.room(0, 8192);
    assert_eq!(guest.read(0).len(), room);
    let line = line.lock().unwrap();
    assert_eq!(
        (line.room(), line.drained().read().is_ok(), line.drained_for_viewers().read().is_ok()),
        (room, true, true)
    );
}

#[test]
fn a_driver_without_ports_has_the_console_at_once() {
    let (mut console, line, backlog) = with_console(&[]);
    console.set_features(F_VERSION_1);
    let device = Arc::new(Mutex::new(console));
    let (memory, mut events) = (memory(2), Loop::new(&device));
    let mut queues = [0, 1].map(|index| {
        let queue = DriverQueue::new(&memory, index, QUEUE_SIZE);
        device.lock().unwrap().start_queue(index as u16, queue.resources(), None).unwrap();
        queue
    });
    // More than is handled in one turn.
    for _ in 0..QUEUE_SIZE {
        queues[1].add(&[b"lines "], &[]);
    }
    queues[1].kick();
    queues[0].add(&[], &[16]);
    queues[0].kick();
    line.lock().unwrap().input(b"keys");
    events.run();
    assert_eq!(printed(&backlog), "lines ".repeat(QUEUE_SIZE.into()));
    let used = queues[0].used();
    assert_eq!(used.into_iter().flat_map(|(head, n)| queues[0].buffer(head, n)).collect::<Vec<_>>(), b"keys");
    device.lock().unwrap().reset();
    device.lock().unwrap().set_features(F_VERSION_1 | F_MULTIPORT);
    assert!(!device.lock().unwrap().ports[0].open, "a driver that knows ports opens it itself");
}
