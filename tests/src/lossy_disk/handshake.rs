//! The handshake: fixed newstyle negotiation, until the client chooses the one export, which has no name, or leaves.
//!
//! A client that breaks a rule of the specification is cut off: the error ends its connection. Structured replies, TLS and
//! the rest are answered with `NBD_REP_ERR_UNSUP`.

use std::io::{self, Read, Write};

use super::protocol::{
    MAX_OPTION, NBD_FLAG_FIXED_NEWSTYLE, NBD_FLAG_NO_ZEROES, NBD_OPT_ABORT, NBD_OPT_EXPORT_NAME, NBD_OPT_GO,
    NBD_OPT_INFO, NBD_OPT_LIST, NBD_REP_ACK, NBD_REP_ERR_INVALID, NBD_REP_ERR_UNKNOWN, NBD_REP_ERR_UNSUP, NBD_REP_INFO,
    NBD_REP_SERVER, OptionHeader, export, export_of_info, greeting, info_block_size, info_export, option_reply,
};

/// Zeroes after the reply to `NBD_OPT_EXPORT_NAME`, unless both sides have agreed to leave them out.
const PADDING: usize = 124;

/// What a client is offered: bytes and transmission flags.
pub(super) type Export = (u64, u16);

/// How a handshake ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Chosen {
    /// Requests follow.
    Export,
    /// The client has left.
    Nothing,
}

/// A client broke a rule: its connection ends.
pub(super) fn violation(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// Negotiates. `offer` is asked at each option: the medium may be another one meanwhile.
pub(super) fn negotiate(mut stream: impl Read + Write, offer: impl Fn() -> Export) -> io::Result<Chosen> {
    stream.write_all(&greeting())?;
    let flags = u32::from_be_bytes(read_array(&mut stream)?);
    if flags & !u32::from(NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES) != 0 {
        return Err(violation("unknown client flags"));
    }
    loop {
        let header = OptionHeader::parse(&read_array(&mut stream)?).ok_or_else(|| violation("no option"))?;
        if header.length > MAX_OPTION {
            return Err(violation("an option too long"));
        }
        let mut data = vec![0; usize::try_from(header.length).map_err(io::Error::other)?];
        stream.read_exact(&mut data)?;
        match header.option {
            NBD_OPT_EXPORT_NAME if data.is_empty() => {
                let (bytes, transmission) = offer();
                let padding = if flags & u32::from(NBD_FLAG_NO_ZEROES) == 0 { PADDING } else { 0 };
                stream.write_all(&[export(bytes, transmission), vec![0; padding]].concat())?;
                return Ok(Chosen::Export);
            }
            NBD_OPT_EXPORT_NAME => return Err(violation("an unknown export")),
            option => {
                let replies = replies(option, &data, &offer);
                for (kind, data) in &replies {
                    stream.write_all(&option_reply(option, *kind, data))?;
                }
                match option {
                    NBD_OPT_ABORT => return Ok(Chosen::Nothing),
                    NBD_OPT_GO if replies.last().is_some_and(|(kind, _)| *kind == NBD_REP_ACK) => {
                        return Ok(Chosen::Export);
                    }
                    _ => {}
                }
            }
        }
    }
}

/// The replies to an option, each with its data.
fn replies(option: u32, data: &[u8], offer: &impl Fn() -> Export) -> Vec<(u32, Vec<u8>)> {
    let only = |kind| vec![(kind, Vec::new())];
    match option {
        NBD_OPT_ABORT => only(NBD_REP_ACK),
        NBD_OPT_LIST if data.is_empty() => {
            let name_without_bytes = 0u32.to_be_bytes().to_vec();
            vec![(NBD_REP_SERVER, name_without_bytes), (NBD_REP_ACK, Vec::new())]
        }
        NBD_OPT_LIST => only(NBD_REP_ERR_INVALID),
        NBD_OPT_INFO | NBD_OPT_GO => match export_of_info(data) {
            None => only(NBD_REP_ERR_INVALID),
            Some(b"") => {
                let (bytes, flags) = offer();
                let infos = [info_export(bytes, flags), info_block_size()].map(|info| (NBD_REP_INFO, info));
                infos.into_iter().chain(only(NBD_REP_ACK)).collect()
            }
            Some(_) => only(NBD_REP_ERR_UNKNOWN),
        },
        _ => only(NBD_REP_ERR_UNSUP),
    }
}

fn read_array<const N: usize>(stream: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}
