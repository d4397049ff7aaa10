//! Whether the host's kernel filters system calls (seccomp(2)).

/// The kernel runs filters, and can have a call that one refuses raise a signal.
pub fn filters_system_calls() -> bool {
    /// `SECCOMP_GET_ACTION_AVAIL`, and its flags.
    const ASK: [libc::c_ulong; 2] = [2, 0];
    let trap = libc::SECCOMP_RET_TRAP;
    // SAFETY: the kernel reads a number of 32 bits, which lives through the call.
    unsafe { libc::syscall(libc::SYS_seccomp, ASK[0], ASK[1], &raw const trap) == 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_says_it_as_it_says_it_in_proc() {
        let actions = std::fs::read_to_string("/proc/sys/kernel/seccomp/actions_avail").unwrap_or_default();
        assert_eq!(filters_system_calls(), actions.split_whitespace().any(|action| action == "trap"));
    }
}
