//! What tests of several modules share.

/// Runs `test`, which needs root, in a thread, whose namespaces it may change; or says that the user has it left out.
pub(crate) fn as_root(test: impl FnOnce() + Send + 'static) {
    if std::env::var("UMBRA_SKIP_ROOT").is_ok_and(|value| value == "1") {
        eprintln!("skipped: UMBRA_SKIP_ROOT=1");
        return;
    }
    std::thread::spawn(test).join().expect("a test that needs root failed; UMBRA_SKIP_ROOT=1 leaves it out");
}
