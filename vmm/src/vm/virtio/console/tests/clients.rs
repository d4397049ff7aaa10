//! Clients that shut down one half of their socket, or leave before they are heard.

use std::net::Shutdown;

use super::*;

/// A guest with its port open, and where its clients connect, below a folder.
fn listens() -> (tempfile::TempDir, PathBuf, Guest) {
    let (folder, path, backend) = listening();
    let mut guest = Guest::new(&[backend]);
    guest.control(1, 3, 1);
    guest.control(1, 6, 1);
    (folder, path, guest)
}

#[test]
fn a_client_that_has_said_all_still_listens_until_it_leaves() {
    let (_folder, path, mut guest) = listens();
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(b"question").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    for _ in 0..3 {
        guest.room(4, 64);
    }
    guest.messages();
    assert_eq!(guest.read(4), b"question");
    // That it says no more wakes nobody again and again.
    guest.events.run();
    guest.write(5, b"answer");
    assert_eq!(read_now(&mut client), b"answer");
    assert_eq!(guest.messages(), [], "it is there");
    // It might listen for ever: the next one takes its place.
    let mut next = UnixStream::connect(&path).unwrap();
    guest.events.run();
    guest.write(5, b"hello");
    assert_eq!(read_now(&mut next), b"hello");
    guest.messages();
    drop((client, next));
    guest.events.run();
    assert_eq!(guest.messages(), [(1, 6, 0, String::new())]);
}

#[test]
fn what_a_client_wrote_before_it_left_arrives_though_the_guest_speaks_first() {
    let (_folder, path, mut guest) = listens();
    let mut client = UnixStream::connect(&path).unwrap();
    guest.events.run();
    guest.messages();
    client.write_all(b"order").unwrap();
    drop(client);
    for _ in 0..2 {
        guest.write(5, b"prompt> ");
    }
    assert_eq!(guest.queues[5].used().len(), 2);
    for _ in 0..2 {
        guest.room(4, 64);
    }
    assert_eq!(guest.read(4), b"order");
    assert_eq!(guest.messages(), [(1, 6, 0, String::new())]);
}

#[test]
fn a_port_whose_client_does_not_listen_is_emptied_though_its_driver_writes_on_and_on() {
    let (mut host, backend) = inherited();
    let memory = memory(110);
    let mut guest = Guest::with(console(&[backend]).unwrap(), &memory, 6);
    guest.control(1, 3, 1);
    guest.control(1, 6, 1);
    host.shutdown(Shutdown::Read).unwrap();
    guest.is_emptied_though_its_driver_writes_on_and_on(&memory);
    host.write_all(b"goes on").unwrap();
    guest.room(4, 64);
    assert_eq!(guest.read(4), b"goes on");
}
