//! From tables to programs of the kernel's packet filter (seccomp(2)), and into the thread that they are for.
//!
//! A thread has two, of which the kernel obeys the stricter: one refuses what libraries can do without, the other ends the process for
//! all that is not allowed.

use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use super::tables::{Row, When};
use super::{Category, Mode};

/// Filters of a thread, in the order in which they are installed.
pub fn programs(category: Category, mode: Mode) -> Result<Vec<BpfProgram>, BackendError> {
    let enosys = SeccompAction::Errno(u32::try_from(libc::ENOSYS).unwrap_or_default());
    let otherwise = match mode {
        Mode::Off => return Ok(Vec::new()),
        Mode::Log => SeccompAction::Log,
        Mode::On => SeccompAction::Trap,
    };
    // What is refused gets past the one that ends the process; it is no news for the log either.
    let strict = program(category.rows().chain(category.refused()).collect(), SeccompAction::Allow, otherwise)?;
    if mode == Mode::Log {
        return Ok(vec![strict]);
    }
    Ok(vec![program(category.refused().collect(), enosys, SeccompAction::Allow)?, strict])
}

/// A program with the decision `then` for what a row describes, and `otherwise` for all else.
fn program(rows: Vec<&Row>, then: SeccompAction, otherwise: SeccompAction) -> Result<BpfProgram, BackendError> {
    let mut rules = BTreeMap::<i64, Vec<SeccompRule>>::new();
    for row in &rows {
        rules.entry(row.call.0).or_default();
    }
    // One without conditions makes those with conditions superfluous.
    let free: Vec<_> = rows.iter().filter(|row| row.when.is_empty()).map(|row| row.call.0).collect();
    for row in rows.into_iter().filter(|row| !free.contains(&row.call.0)) {
        let conditions = row.when.iter().map(condition).collect::<Result<_, _>>()?;
        rules.entry(row.call.0).or_default().push(SeccompRule::new(conditions)?);
    }
    SeccompFilter::new(rules, otherwise, then, TargetArch::x86_64)?.try_into()
}

fn condition(when: &When) -> Result<SeccompCondition, BackendError> {
    use SeccompCmpArgLen::{Dword, Qword};
    use SeccompCmpOp::{Eq, MaskedEq};
    let this = u64::from(std::process::id());
    let (argument, length, operator, value) = match *when {
        When::Is(argument, value, _) => (argument, Dword, Eq, value.into()),
        When::Request(request, _) => (1, Dword, MaskedEq(0xFFFF), request.into()),
        When::Lacks(argument, bits, _) => (argument, Qword, MaskedEq(bits), 0),
        When::Has(argument, bits, _) => (argument, Qword, MaskedEq(bits), bits),
        When::ThisProcess(argument) => (argument, Dword, Eq, this),
    };
    SeccompCondition::new(argument, length, operator, value)
}

/// From here on this thread, and those that it starts, obey `program` besides what they obey already.
///
/// # Errors
/// The kernel has no seccomp, or takes no further program.
pub(super) fn install(program: &BpfProgram) -> io::Result<()> {
    /// The mitigation that some kernels before 5.16 switch on with a filter costs a VM much and gives nothing here: the process
    /// keeps nothing from itself.
    const SPEC_ALLOW: libc::c_ulong = 1 << 2;
    let length = u16::try_from(program.len()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let filter = libc::sock_fprog { len: length, filter: program.as_ptr().cast_mut().cast() };
    // SAFETY: the kernel reads the program, whose instructions have the layout of its own `sock_filter`, and which lives through
    // the call.
    let done = unsafe { libc::syscall(libc::SYS_seccomp, 1, SPEC_ALLOW, &raw const filter) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
