//! The bulk transfer ends: a sink that says what arrived and a source that sends for a while.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use super::ports;
use crate::probe::net::drain;

pub(super) fn serve() -> io::Result<()> {
    listen(ports::SINK, |mut stream| {
        let bulk = drain(&mut stream)?;
        serde_json::to_writer(&stream, &bulk).map_err(io::Error::other)
    })?;
    listen(ports::SOURCE, |mut stream| {
        let mut ms = [0; 4];
        stream.read_exact(&mut ms)?;
        let length = Duration::from_millis(u32::from_le_bytes(ms).into());
        let chunk = vec![0xa5; 128 << 10];
        let start = Instant::now();
        while start.elapsed() < length {
            stream.write_all(&chunk)?;
        }
        stream.shutdown(Shutdown::Write)
    })
}

fn listen(port: u16, each: fn(TcpStream) -> io::Result<()>) -> io::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))?;
    thread::Builder::new().name(format!("tcp-{port}")).spawn(move || {
        for stream in listener.incoming().flatten() {
            // The client sees the error of its own end; there is nobody else to tell.
            thread::spawn(move || each(stream));
        }
    })?;
    Ok(())
}
