//! Shell patterns as `modules.alias` uses them: `*`, `?`, `[abc]`, `[a-z]`, `[!a]` (fnmatch(3) without flags).

/// True when the whole of `text` matches `pattern`.
pub fn matches(pattern: &str, text: &str) -> bool {
    let (pattern, text) = (pattern.as_bytes(), text.as_bytes());
    let (mut p, mut t) = (0, 0);
    // Where to go on when the current try fails: behind the last `*`, one more byte of text swallowed.
    let mut retry: Option<(usize, usize)> = None;
    loop {
        if pattern.get(p) == Some(&b'*') {
            retry = Some((p + 1, t));
            p += 1;
            continue;
        }
        match text.get(t) {
            None if p == pattern.len() => return true,
            None => return false,
            Some(&byte) => {
                if let Some(next) = one(pattern, p, byte) {
                    p = next;
                    t += 1;
                    continue;
                }
            }
        }
        match retry {
            Some((after_star, swallowed)) => {
                retry = Some((after_star, swallowed + 1));
                (p, t) = (after_star, swallowed + 1);
            }
            None => return false,
        }
    }
}

/// Where the pattern goes on when its item at `p` takes `byte`; `None` when it does not take it.
fn one(pattern: &[u8], p: usize, byte: u8) -> Option<usize> {
    match *pattern.get(p)? {
        b'?' => Some(p + 1),
        b'[' => match class(pattern, p + 1, byte) {
            Some((true, next)) => Some(next),
            Some((false, _)) => None,
            None => (byte == b'[').then_some(p + 1), // no closing bracket: a literal
        },
        literal => (literal == byte).then_some(p + 1),
    }
}

/// Whether the class that starts at `p` (behind its `[`) takes `byte`, and where the pattern goes on.
fn class(pattern: &[u8], mut p: usize, byte: u8) -> Option<(bool, usize)> {
    let negated = matches!(pattern.get(p)?, b'!' | b'^');
    if negated {
        p += 1;
    }
    let (start, mut found) = (p, false);
    loop {
        let first = *pattern.get(p)?;
        if first == b']' && p > start {
            return Some((found != negated, p + 1));
        }
        let range = pattern.get(p + 1) == Some(&b'-') && pattern.get(p + 2).is_some_and(|&b| b != b']');
        let last = if range { pattern[p + 2] } else { first };
        found |= (first..=last).contains(&byte);
        p += if range { 3 } else { 1 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn aliases_match_as_fnmatch_does() {
        let modalias = "pci:v00008086d000010D3sv00008086sd0000A01Fbc02sc00i00";
        assert!(matches("pci:v00008086d000010D3sv*sd*bc*sc*i*", modalias));
        assert!(!matches("pci:v00008086d000010D4sv*sd*bc*sc*i*", modalias));
        assert!(matches("acpi*:QEMU0001:*", "acpi:QEMU0001:"));
        assert!(matches("usb:v*d*dc*[0-9a-f]", "usb:v1d2dc3f"));
        assert!(matches("[!a]b", "cb") && !matches("[!a]b", "ab"));
        assert!(matches("a[]]", "a]") && matches("a[b", "a[b"));
        assert!(matches("*", "") && !matches("?", "") && matches("a**b", "ab"));
    }

    proptest! {
        #[test]
        fn star_swallows_anything(prefix in "[a-z]{0,5}", middle in ".{0,20}", suffix in "[a-z]{0,5}") {
            let pattern = format!("{prefix}*{suffix}");
            let text = format!("{prefix}{middle}{suffix}");
            prop_assert!(matches(&pattern, &text));
        }

        #[test]
        fn any_pattern_ends(pattern in "[a*?\\[\\]!-]{0,12}", text in "[a\\[\\]-]{0,24}") {
            let _ = matches(&pattern, &text);
        }
    }
}
