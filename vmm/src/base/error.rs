//! Errors for people.

/// An error and its causes in one line, each after a colon; a cause that the text ends with already is left out.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.ends_with(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    text
}

/// Whether `error` comes of something that the host has too little of now, and may have again: descriptors, memory.
pub fn is_shortage(error: &(dyn std::error::Error + 'static)) -> bool {
    std::iter::successors(Some(error), |error| error.source()).any(|error| {
        let code = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::raw_os_error);
        matches!(code, Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM))
    })
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{what}")]
    struct Outer {
        what: &'static str,
        #[source]
        source: io::Error,
    }

    #[test]
    fn causes_follow_and_none_is_said_twice() {
        let outer = |what| Outer { what, source: io::Error::other("no room") };
        assert_eq!(chain(&outer("write the report")), "write the report: no room");
        assert_eq!(chain(&outer("it failed: no room")), "it failed: no room");
    }
}
