//! A mutex that is taken whatever happened to the thread that held it last: the states behind it are whole after each step.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks `mutex`, a poisoned one too.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
