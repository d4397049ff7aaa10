//! A small NBD client: the other side of every test here.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::lossy_disk::LossyDisk;
use crate::lossy_disk::protocol::{
    Header, IHAVEOPT, NBD_CMD_FLUSH, NBD_CMD_READ, NBD_CMD_WRITE, NBD_OPT_GO, NBD_REP_ACK, NBD_REQUEST_MAGIC,
    NBD_SIMPLE_REPLY_MAGIC, OPTION_REPLY_MAGIC,
};

/// Far more than any answer takes on any machine: a test that hangs fails.
pub(super) const PATIENCE: Duration = Duration::from_secs(300);

/// The data of `NBD_OPT_GO` for the export without a name.
pub(super) const NO_NAME: [u8; 6] = [0; 6];

pub(super) struct Client {
    pub(super) stream: UnixStream,
    /// Size and flags of the export.
    pub(super) export: (u64, u16),
    next_cookie: u64,
    /// Lengths of the reads that have no answer yet.
    reads: HashMap<u64, usize>,
}

/// An answer: its request's cookie, error, and data.
pub(super) type Answer = (u64, u32, Vec<u8>);

impl Client {
    /// Connects and reads the greeting.
    pub(super) fn greeted(disk: &LossyDisk) -> Self {
        let stream = UnixStream::connect(disk.socket()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut client = Self { stream, export: (0, 0), next_cookie: 1, reads: HashMap::new() };
        client.take::<18>().unwrap();
        client
    }

    /// Connects and chooses the export.
    pub(super) fn new(disk: &LossyDisk) -> Self {
        let mut client = Self::greeted(disk);
        client.send(&3u32.to_be_bytes());
        client.option(NBD_OPT_GO, &NO_NAME);
        loop {
            let (kind, data) = client.option_reply().unwrap();
            if kind == NBD_REP_ACK {
                return client;
            }
            if data.starts_with(&[0, 0]) {
                let (bytes, flags) = data[2..].split_first_chunk().unwrap();
                client.export = (u64::from_be_bytes(*bytes), u16::from_be_bytes(flags.try_into().unwrap()));
            }
        }
    }

    pub(super) fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    pub(super) fn take<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    pub(super) fn option(&mut self, option: u32, data: &[u8]) {
        let numbers = [option, u32::try_from(data.len()).unwrap()].map(u32::to_be_bytes);
        self.send(&[&IHAVEOPT.to_be_bytes()[..], numbers.as_flattened(), data].concat());
    }

    /// Kind and data of the next reply to an option.
    pub(super) fn option_reply(&mut self) -> io::Result<(u32, Vec<u8>)> {
        assert_eq!(u64::from_be_bytes(self.take()?), OPTION_REPLY_MAGIC);
        let _option = self.take::<4>()?;
        let (kind, length) = (u32::from_be_bytes(self.take()?), u32::from_be_bytes(self.take()?));
        let mut data = vec![0; length as usize];
        self.stream.read_exact(&mut data)?;
        Ok((kind, data))
    }

    /// Nothing comes any more: the server has closed the connection.
    pub(super) fn is_cut_off(&mut self) -> bool {
        matches!(self.stream.read(&mut [0; 4096]), Ok(0))
            || self.take::<1>().is_err_and(|e| e.kind() == io::ErrorKind::ConnectionReset)
    }

    pub(super) fn header(&mut self, header: &Header) {
        let mut bytes = NBD_REQUEST_MAGIC.to_be_bytes().to_vec();
        bytes.extend([header.flags, header.command].map(u16::to_be_bytes).as_flattened());
        bytes.extend([header.cookie, header.offset].map(u64::to_be_bytes).as_flattened());
        bytes.extend(header.length.to_be_bytes());
        self.send(&bytes);
    }

    /// Sends a request; returns its cookie.
    pub(super) fn start(&mut self, command: u16, flags: u16, offset: u64, length: u32, data: &[u8]) -> u64 {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        if command == NBD_CMD_READ {
            self.reads.insert(cookie, length as usize);
        }
        self.header(&Header { flags, command, cookie, offset, length });
        self.send(data);
        cookie
    }

    pub(super) fn start_write(&mut self, offset: u64, data: &[u8]) -> u64 {
        self.start(NBD_CMD_WRITE, 0, offset, u32::try_from(data.len()).unwrap(), data)
    }

    pub(super) fn start_flush(&mut self) -> u64 {
        self.start(NBD_CMD_FLUSH, 0, 0, 0, &[])
    }

    /// The next answer.
    pub(super) fn answer(&mut self) -> io::Result<Answer> {
        assert_eq!(u32::from_be_bytes(self.take()?), NBD_SIMPLE_REPLY_MAGIC);
        let (error, cookie) = (u32::from_be_bytes(self.take()?), u64::from_be_bytes(self.take()?));
        let mut data = vec![0; self.reads.remove(&cookie).filter(|_| error == 0).unwrap_or(0)];
        self.stream.read_exact(&mut data)?;
        Ok((cookie, error, data))
    }

    /// Sends a request and waits for its answer, the only one that is due.
    pub(super) fn ask(
        &mut self,
        command: u16,
        flags: u16,
        offset: u64,
        length: u32,
        data: &[u8],
    ) -> Result<Vec<u8>, u32> {
        let cookie = self.start(command, flags, offset, length, data);
        let (answered, error, data) = self.answer().unwrap();
        assert_eq!(answered, cookie);
        if error == 0 { Ok(data) } else { Err(error) }
    }

    pub(super) fn read(&mut self, offset: u64, length: u32) -> Result<Vec<u8>, u32> {
        self.ask(NBD_CMD_READ, 0, offset, length, &[])
    }

    pub(super) fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), u32> {
        self.ask(NBD_CMD_WRITE, 0, offset, u32::try_from(data.len()).unwrap(), data).map(drop)
    }

    pub(super) fn flush(&mut self) -> Result<(), u32> {
        self.ask(NBD_CMD_FLUSH, 0, 0, 0, &[]).map(drop)
    }
}
