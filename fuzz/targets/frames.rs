//! virtio-net headers and commands of the control queue, as a guest or a driver VM may write them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use umbra_shadow::net::rx_mode::RxFilter;
use umbra_splitter::control::Command;
use umbra_splitter::header::{HEADER_LEN, Header, Offloads};

fuzz_target!(|data: &[u8]| {
    if let Some((bytes, rest)) = data.split_first_chunk::<HEADER_LEN>()
        && let [offloads, a, b, ..] = rest
    {
        let negotiated = Offloads::from_bits_truncate(*offloads);
        let len = usize::from(u16::from_le_bytes([*a, *b]));
        if let Ok(header) = Header::check(*bytes, len, negotiated) {
            assert!(negotiated.contains(header.needs()), "an offload that nobody agreed on");
            let again = header.to_bytes(1);
            let again = again.first_chunk::<HEADER_LEN>().expect("a whole header");
            let same = Header::check(*again, len, negotiated).expect("a checked header is good");
            assert_eq!(same.needs(), header.needs());
        }
    }
    let mut filter = RxFilter::new([2, 0, 0, 0, 0, 1]);
    for command in data.chunks(48) {
        if let Some(command) = Command::parse(command) {
            command.apply(&mut filter);
        }
    }
});
