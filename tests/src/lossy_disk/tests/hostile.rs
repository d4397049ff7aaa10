//! Clients that break the protocol: refused or cut off, with nothing allocated by the lengths that they name, and others served
//! as before.

use std::io::Write;
use std::os::unix::net::UnixStream;

use proptest::prelude::*;

use super::client::{Client, NO_NAME, PATIENCE};
use super::{BYTES, Rig, firsts, sectors};
use crate::lossy_disk::protocol::{
    Header, MAX_OPTION, MAX_PAYLOAD, MAX_REFUSED, NBD_CMD_FLAG_FUA, NBD_CMD_FLAG_NO_HOLE, NBD_CMD_FLUSH, NBD_CMD_READ,
    NBD_CMD_TRIM, NBD_CMD_WRITE, NBD_CMD_WRITE_ZEROES, NBD_EINVAL, NBD_ENOSPC, NBD_FLAG_HAS_FLAGS, NBD_FLAG_SEND_FLUSH,
    NBD_FLAG_SEND_FUA, NBD_FLAG_SEND_TRIM, NBD_FLAG_SEND_WRITE_ZEROES, NBD_OPT_ABORT, NBD_OPT_EXPORT_NAME, NBD_OPT_GO,
    NBD_OPT_INFO, NBD_OPT_LIST, NBD_REP_ACK, NBD_REP_ERR_INVALID, NBD_REP_ERR_UNKNOWN, NBD_REP_ERR_UNSUP, NBD_REP_INFO,
    NBD_REP_SERVER,
};

/// `NBD_OPT_STRUCTURED_REPLY`, which is not served.
const STRUCTURED_REPLY: u32 = 8;

/// Other clients are served.
fn is_well(rig: &Rig) {
    rig.client().read(0, 512).unwrap();
    assert_eq!(rig.disk.state().host_errors, 0);
}

/// A client behind the greeting, with its flags sent.
fn haggling(rig: &Rig, flags: u32) -> Client {
    let mut client = Client::greeted(&rig.disk);
    client.send(&flags.to_be_bytes());
    client
}

#[test]
fn the_export_is_as_specified() {
    let features = NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_FUA | NBD_FLAG_SEND_TRIM | NBD_FLAG_SEND_WRITE_ZEROES;
    let flags = NBD_FLAG_HAS_FLAGS | features;
    let rig = Rig::new();
    assert_eq!(rig.client().export, (BYTES, flags));
    // The old way to choose it, with and without 124 bytes of padding; requests follow.
    for (client_flags, padding) in [(1, 124), (3, 0)] {
        let mut client = haggling(&rig, client_flags);
        client.option(NBD_OPT_EXPORT_NAME, b"");
        assert_eq!(u64::from_be_bytes(client.take().unwrap()), BYTES);
        assert_eq!(u16::from_be_bytes(client.take().unwrap()), flags);
        for _ in 0..padding {
            assert_eq!(client.take().unwrap(), [0]);
        }
        client.write(0, &sectors(1, 5)).unwrap();
        assert_eq!(firsts(&client.read(0, 512).unwrap()), [5]);
    }
}

#[test]
fn options_are_answered_as_specified() {
    let rig = Rig::new();
    let mut client = haggling(&rig, 1);
    client.option(NBD_OPT_LIST, b"");
    assert_eq!(client.option_reply().unwrap(), (NBD_REP_SERVER, vec![0; 4]));
    assert_eq!(client.option_reply().unwrap(), (NBD_REP_ACK, vec![]));
    for (option, data, reply) in [
        (NBD_OPT_LIST, &b"x"[..], NBD_REP_ERR_INVALID),
        (STRUCTURED_REPLY, b"", NBD_REP_ERR_UNSUP),
        (u32::MAX, b"unknown", NBD_REP_ERR_UNSUP),
        (NBD_OPT_GO, b"", NBD_REP_ERR_INVALID),
        (NBD_OPT_GO, b"\xff\xff\xff\xff\0\0", NBD_REP_ERR_INVALID),
        (NBD_OPT_INFO, b"\0\0\0\x01x\0\0", NBD_REP_ERR_UNKNOWN),
    ] {
        client.option(option, data);
        assert_eq!(client.option_reply().unwrap(), (reply, vec![]), "{option} {data:?}");
    }
    client.option(NBD_OPT_INFO, &NO_NAME);
    let infos = [client.option_reply().unwrap(), client.option_reply().unwrap()];
    assert!(infos.iter().all(|(kind, _)| *kind == NBD_REP_INFO));
    assert_eq!(infos[0].1.len(), 12);
    assert_eq!(infos[1].1, *b"\0\x03\0\0\x02\0\0\0\x10\0\0\x40\0\0");
    assert_eq!(client.option_reply().unwrap(), (NBD_REP_ACK, vec![]));
    client.option(NBD_OPT_ABORT, b"ignored");
    assert_eq!(client.option_reply().unwrap(), (NBD_REP_ACK, vec![]));
    assert!(client.is_cut_off());
}

#[test]
fn a_handshake_that_breaks_a_rule_is_cut_off() {
    let rig = Rig::new();
    assert!(haggling(&rig, 1 << 2).is_cut_off());
    let mut wrong_magic = haggling(&rig, 3);
    wrong_magic.send(b"IHAVEOPX\0\0\0\x07\0\0\0\0");
    assert!(wrong_magic.is_cut_off());
    let mut unknown_export = haggling(&rig, 3);
    unknown_export.option(NBD_OPT_EXPORT_NAME, b"other");
    assert!(unknown_export.is_cut_off());
    // Without waiting for the data.
    for length in [MAX_OPTION + 1, u32::MAX] {
        let mut too_long = haggling(&rig, 3);
        too_long.send(b"IHAVEOPT\0\0\0\x07");
        too_long.send(&length.to_be_bytes());
        assert!(too_long.is_cut_off());
    }
    is_well(&rig);
}

#[test]
fn requests_that_break_a_rule_are_refused_and_the_next_is_served() {
    let rig = Rig::new();
    let mut client = rig.client();
    let (end, unknown_flag) = (BYTES, 1 << 4);
    for (command, flags, offset, length, error) in [
        (NBD_CMD_READ, 0, end, 512, NBD_EINVAL),
        (NBD_CMD_READ, 0, end - 512, 1024, NBD_EINVAL),
        (NBD_CMD_READ, 0, u64::MAX - 511, 512, NBD_EINVAL),
        (NBD_CMD_READ, 0, 0, u32::MAX - 511, NBD_EINVAL),
        (NBD_CMD_READ, 0, 0, MAX_PAYLOAD + 512, NBD_EINVAL),
        (NBD_CMD_READ, 0, 1, 512, NBD_EINVAL),
        (NBD_CMD_READ, 0, 0, 513, NBD_EINVAL),
        (NBD_CMD_READ, unknown_flag, 0, 512, NBD_EINVAL),
        (NBD_CMD_READ, NBD_CMD_FLAG_NO_HOLE, 0, 512, NBD_EINVAL),
        (NBD_CMD_TRIM, 0, end - 512, 1024, NBD_EINVAL),
        (NBD_CMD_TRIM, 0, u64::MAX - 511, u32::MAX - 511, NBD_EINVAL),
        (NBD_CMD_WRITE_ZEROES, 0, end, 512, NBD_ENOSPC),
        (NBD_CMD_WRITE_ZEROES, 0, 0, u32::MAX - 511, NBD_ENOSPC),
        (NBD_CMD_WRITE_ZEROES, unknown_flag, 0, 512, NBD_EINVAL),
        (NBD_CMD_FLUSH, 0, 512, 0, NBD_EINVAL),
        (NBD_CMD_FLUSH, 0, 0, 512, NBD_EINVAL),
        (5, 0, 0, 512, NBD_EINVAL),
        (7, 0, 0, 512, NBD_EINVAL),
        (u16::MAX, 0, 0, 0, NBD_EINVAL),
    ] {
        assert_eq!(client.ask(command, flags, offset, length, &[]), Err(error), "{command} {flags} {offset} {length}");
    }
    assert_eq!(client.write(end - 512, &sectors(2, 1)), Err(NBD_ENOSPC));
    assert_eq!(client.write(1, &sectors(1, 1)), Err(NBD_EINVAL));
    assert_eq!(client.write(0, &[1; 100]), Err(NBD_EINVAL));
    assert_eq!(client.write(0, &vec![1; MAX_PAYLOAD as usize + 512]), Err(NBD_EINVAL));
    assert_eq!(client.ask(NBD_CMD_WRITE, unknown_flag, 0, 512, &sectors(1, 1)), Err(NBD_EINVAL));
    assert_eq!(rig.disk.state().unflushed, 0);
    // What the specification leaves open, or has servers accept.
    assert_eq!(client.write(0, &[]), Ok(()));
    assert_eq!(client.read(0, 0), Ok(vec![]));
    assert_eq!(client.ask(NBD_CMD_READ, NBD_CMD_FLAG_FUA, 0, 512, &[]), Ok(sectors(1, 0)));
    assert_eq!(client.ask(NBD_CMD_FLUSH, NBD_CMD_FLAG_FUA, 0, 0, &[]), Ok(vec![]));
    assert_eq!(
        client.ask(NBD_CMD_WRITE_ZEROES, NBD_CMD_FLAG_NO_HOLE, 0, u32::try_from(BYTES).unwrap(), &[]),
        Ok(vec![])
    );
}

#[test]
fn a_refused_flush_is_none() {
    let rig = Rig::new();
    let mut client = rig.client();
    client.write(0, &sectors(1, 1)).unwrap();
    assert_eq!(client.ask(NBD_CMD_FLUSH, 0, 0, 512, &[]), Err(NBD_EINVAL));
    // What it would have covered is not kept for it.
    client.write(0, &sectors(1, 2)).unwrap();
    assert_eq!((rig.disk.state().written_back, rig.disk.state().flushed), (0, 0));
}

#[test]
fn a_request_without_magic_and_a_write_too_long_are_cut_off() {
    let rig = Rig::new();
    let mut client = rig.client();
    client.send(&[0x25; Header::LEN]);
    assert!(client.is_cut_off());
    let mut client = rig.client();
    client.start(NBD_CMD_WRITE, 0, 0, MAX_REFUSED + 512, &[]);
    assert!(client.is_cut_off());
    // The longest that is refused politely, cut off by its sender in the middle.
    let mut client = rig.client();
    client.start(NBD_CMD_WRITE, 0, 0, MAX_REFUSED, &[0; 4096]);
    drop(client);
    let mut client = rig.client();
    client.start(NBD_CMD_WRITE, 0, 0, 1024, &[1; 1000]);
    drop(client);
    is_well(&rig);
    assert_eq!(rig.disk.state().unflushed, 0);
}

#[test]
fn a_client_that_does_not_read_its_answers_keeps_nobody_waiting() {
    let rig = Rig::new();
    let large = rig.other("large", 8 << 20, 1);
    rig.disk.swap(&large, crate::lossy_disk::Access::ReadWrite).unwrap();
    let mut greedy = rig.client();
    greedy.stream.set_write_timeout(Some(std::time::Duration::from_millis(100))).unwrap();
    // More than its queue holds: in the end its own writes block.
    let request = |cookie: u64| {
        let head = [&b"\x25\x60\x95\x13\0\0\0\0"[..], &cookie.to_be_bytes(), &0u64.to_be_bytes()].concat();
        [head, MAX_PAYLOAD.to_be_bytes().to_vec()].concat()
    };
    let sent = (0..100_000).take_while(|&cookie| greedy.stream.write_all(&request(cookie)).is_ok()).count();
    assert!(sent < 100_000, "a queue without bound");
    is_well(&rig);
    assert!(rig.disk.state().waiting <= 128);
    drop(greedy);
    rig.wait(|state| state.waiting == 0);
}

#[test]
fn silent_clients_are_bounded_and_make_room_when_they_go() {
    let rig = Rig::new();
    let silent: Vec<_> = (0..8).map(|_| Client::greeted(&rig.disk)).collect();
    let mut refused = UnixStream::connect(rig.disk.socket()).unwrap();
    refused.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(std::io::Read::read(&mut refused, &mut [0; 1]).unwrap(), 0);
    drop(silent);
    // Their threads end in their own time.
    let start = std::time::Instant::now();
    let has_room = || {
        let mut stream = UnixStream::connect(rig.disk.socket()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        std::io::Read::read(&mut stream, &mut [0; 18]).is_ok_and(|n| n == 18)
    };
    while !has_room() {
        assert!(start.elapsed() < PATIENCE);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever a client sends, as an option or as a request, others are served and the base stays as it is.
    #[test]
    fn rubbish_harms_nobody(rubbish in prop::collection::vec(any::<u8>(), 0..600), headers: Vec<(u16, u16, u64, u32)>) {
        let rig = Rig::new();
        let before = rig.disk.base_sha256().unwrap();
        let _ = Client::greeted(&rig.disk).stream.write_all(&rubbish);
        let mut client = rig.client();
        for (flags, command, offset, length) in headers {
            let header = Header { flags: flags & !NBD_CMD_FLAG_FUA, command: command % 8, cookie: 0, offset, length };
            let mut bytes = b"\x25\x60\x95\x13".to_vec();
            bytes.extend([header.flags, header.command].map(u16::to_be_bytes).as_flattened());
            bytes.extend([0, header.offset].map(u64::to_be_bytes).as_flattened());
            bytes.extend(header.length.to_be_bytes());
            if client.stream.write_all(&bytes).and_then(|()| client.stream.write_all(&rubbish)).is_err() {
                break;
            }
        }
        drop(client);
        is_well(&rig);
        prop_assert_eq!(rig.disk.base_sha256().unwrap(), before);
    }
}
