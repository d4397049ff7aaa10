//! Refuses a static build: it would link, if at all, to a program that finds no plug-in of alsa-lib.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let features = std::env::var("CARGO_CFG_TARGET_FEATURE").unwrap_or_default();
    if features.split(',').any(|feature| feature == "crt-static") {
        println!("cargo::error=umbra-sound is linked dynamically: build it with `make sound`");
    }
}
