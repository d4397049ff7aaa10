//! What a driver VM's agent and sound service say to the host, and what clients say to a machine: no input panics, and
//! what is understood means the same when it is written and read again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use umbra_driver_vm::protocol::{FromAgent, ToAgent};
use umbra_driver_vm::sound_protocol::{decode, decode_service, encode, encode_service};
use umbra_shadow::Generation;
use umbra_vmm::supervisor::front::protocol::Request;

fuzz_target!(|data: &[u8]| {
    if let Ok(line) = std::str::from_utf8(data) {
        if let Ok(message) = serde_json::from_str::<FromAgent>(line) {
            let again = serde_json::to_string(&message).expect("a message is written");
            assert_eq!(serde_json::from_str::<FromAgent>(&again).expect("and read"), message);
        }
        let _ = serde_json::from_str::<ToAgent>(line);
        let _ = serde_json::from_str::<Request>(line);
    }
    let Some(generation) = Generation::new(1) else { return };
    if let Ok(Some((message, length))) = decode_service(data, generation) {
        assert!(length <= data.len());
        let mut again = Vec::new();
        encode_service(&message, generation, &mut again);
        assert!(
            matches!(decode_service(&again, generation), Ok(Some((same, n))) if same == message && n == again.len())
        );
    }
    if let Ok(Some((message, length))) = decode(data, generation) {
        assert!(length <= data.len());
        let mut again = Vec::new();
        encode(&message, generation, &mut again);
        assert!(matches!(decode(&again, generation), Ok(Some((same, n))) if same == message && n == again.len()));
    }
});
