//! Asks the linker for a build id, which snapshots know the program by (`src/base/build_id.rs`).

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-link-arg=-Wl,--build-id");
}
