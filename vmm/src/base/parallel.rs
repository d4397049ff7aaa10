//! Work that is done by several threads for a moment.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

/// Does `work` for each of `items`, by this thread and up to `threads - 1` others, not more than there are processors; each has what
/// `tools` makes for itself. An error ends all of them, each behind the item that it is at; the first that was seen is returned.
///
/// # Errors
/// The first of `work`.
pub fn in_parallel<T: Sync, W, E: Send>(
    threads: usize,
    items: &[T],
    tools: impl Fn() -> W + Sync,
    work: impl Fn(&mut W, &T) -> Result<(), E> + Sync,
) -> Result<(), E> {
    let threads = thread::available_parallelism().map_or(1, usize::from).min(threads).min(items.len());
    let next = AtomicUsize::new(0);
    let run = || {
        let mut own = tools();
        while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
            if let Err(error) = work(&mut own, item) {
                next.store(items.len(), Ordering::Relaxed);
                return Err(error);
            }
        }
        Ok(())
    };
    thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(run)).collect();
        let mut result = run();
        for other in others {
            // A thread that panics passes its panic on, as this one would.
            result = result.and(other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        }
        result
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[test]
    fn each_item_is_worked_on_once() {
        let items: Vec<_> = (0..1000).collect();
        let seen = Mutex::new(Vec::new());
        let done: Result<(), ()> = in_parallel(
            4,
            &items,
            || (),
            |(), item| {
                seen.lock().map_err(|_| ())?.push(*item);
                Ok(())
            },
        );
        let mut seen = seen.into_inner().unwrap_or_default();
        seen.sort_unstable();
        assert_eq!((done, seen), (Ok(()), items));
        assert_eq!(in_parallel(4, &[], || (), |(), (): &()| Err(())), Ok(()));
    }

    #[test]
    fn an_error_ends_the_work() {
        let items: Vec<_> = (0..1_000_000).collect();
        let worked = AtomicUsize::new(0);
        let result = in_parallel(
            4,
            &items,
            || (),
            |(), item| {
                worked.fetch_add(1, Ordering::Relaxed);
                if *item == 10 { Err("ten") } else { Ok(()) }
            },
        );
        assert_eq!(result, Err("ten"));
        assert!(worked.into_inner() < items.len());
    }
}
