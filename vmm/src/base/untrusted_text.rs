//! Text that a driver VM, a VM's process or a file of either has said: bounded where it is kept, visible where it is shown.
//!
//! Invariant: what [`line`], [`whole_line`] and [`block`] return moves no cursor, changes no colour or title and reorders
//! nothing: every character that could is shown as its escape, as `\x1b`. Text for programs stays as it was said, with the
//! same characters in the escapes of JSON ([`json`]). Pure: text in, text out.

use std::borrow::Cow;
use std::fmt::Write as _;

/// Longest text of a VM that is kept, in bytes, registers and the end of the console aside: the chain of causes of an
/// error with a few paths fits in.
pub const MAX_TEXT: usize = 2048;

/// Longest line for people, in characters: a sentence with all parts of a recovery has about 300.
const MAX_LINE: usize = 1000;

/// Where a text was cut off.
const CUT: char = '\u{2026}';

/// The start of `text`, at most `most` bytes of it, unchanged; a mark shows where it is cut.
pub fn bounded(text: &str, most: usize) -> String {
    if text.len() <= most {
        return text.to_owned();
    }
    let longest = most.saturating_sub(CUT.len_utf8());
    let end = (0..=longest).rev().find(|at| text.is_char_boundary(*at)).unwrap_or_default();
    format!("{}{CUT}", &text[..end])
}

/// `text` for people, on one line of a terminal, of a bounded length.
pub fn line(text: &str) -> String {
    let shown = whole_line(text);
    if shown.chars().nth(MAX_LINE).is_none() {
        return shown;
    }
    shown.chars().take(MAX_LINE - 1).chain([CUT]).collect()
}

/// `text` for people, on one line, whole.
pub fn whole_line(text: &str) -> String {
    visible(text, |_| false)
}

/// `text` for people, with its line ends and tabs.
pub fn block(text: &str) -> String {
    visible(text, |c| matches!(c, '\n' | '\t'))
}

/// The JSON text `json`, the same for programs, with nothing in it that a terminal obeys. Control characters below a
/// space are line ends and indents between the values, because JSON allows none within a string.
pub fn json(json: &str) -> Cow<'_, str> {
    let obeyed = |c: char| !c.is_ascii_control() && is_obeyed(c) || c == '\x7f';
    if !json.contains(obeyed) {
        return Cow::Borrowed(json);
    }
    let mut out = String::with_capacity(json.len() + 16);
    for c in json.chars() {
        if obeyed(c) {
            for unit in c.encode_utf16(&mut [0; 2]) {
                let _ = write!(out, "\\u{unit:04x}");
            }
        } else {
            out.push(c);
        }
    }
    Cow::Owned(out)
}

/// Control characters become their escapes, but for those that are `kept`.
fn visible(text: &str, kept: impl Fn(char) -> bool) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            c if kept(c) => out.push(c),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            // Writing to a string does not fail.
            c if is_obeyed(c) && u32::from(c) < 0x100 => drop(write!(out, "\\x{:02x}", u32::from(c))),
            c if is_obeyed(c) => drop(write!(out, "\\u{{{:x}}}", u32::from(c))),
            c => out.push(c),
        }
    }
    out
}

/// Whether a terminal or a browser does something other than show `c`: control characters (C0, DEL, C1); marks, embeddings,
/// overrides and isolates of the writing direction (Unicode UAX 9); line and paragraph separators; what has no width.
fn is_obeyed(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
        || matches!(c, '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_a_terminal_would_obey_is_shown_as_an_escape() {
        let said = "panic: \u{1b}[31mRED\u{1b}]0;OWNED\u{7}\r\n\u{9b}2J\u{7f}\u{202e}txt\u{2066}";
        assert_eq!(line(said), "panic: \\x1b[31mRED\\x1b]0;OWNED\\x07\\r\\n\\x9b2J\\x7f\\u{202e}txt\\u{2066}");
        assert_eq!(block("one\n\ttwo\u{1b}[0m\r\n"), "one\n\ttwo\\x1b[0m\\r\n");
        assert_eq!(line("Grüße, ασκί, 漢字"), "Grüße, ασκί, 漢字");
    }

    #[test]
    fn texts_are_cut_at_a_character_and_say_so() {
        assert_eq!(bounded("short", 5), "short");
        assert_eq!(bounded(&"ü".repeat(10), 10), "üüü…");
        let shown = line(&"\u{1b}".repeat(10_000));
        assert_eq!((shown.chars().count(), shown.ends_with('…')), (MAX_LINE, true));
        assert_eq!(whole_line(&"\u{1b}".repeat(10_000)).len(), 40_000);
    }

    #[test]
    fn json_says_the_same_to_programs_and_nothing_to_terminals() {
        let value = serde_json::json!({ "reason": "a\u{1b}[1m\u{9b}2J\u{7f}\u{202e}\u{e0041}\n", "n": 1 });
        let text = serde_json::to_string_pretty(&value).unwrap();
        let safe = json(&text);
        assert!(safe.chars().all(|c| c == '\n' || !is_obeyed(c)), "{safe}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&safe).unwrap(), value);
        assert!(matches!(json("{\"a\":\"b\"}"), Cow::Borrowed(_)));
    }

    proptest! {
        #[test]
        fn nothing_that_is_obeyed_comes_through(said in any::<String>()) {
            prop_assert!(!line(&said).contains(is_obeyed));
            prop_assert!(!block(&said).contains(|c| c != '\n' && c != '\t' && is_obeyed(c)));
            prop_assert!(bounded(&said, 7).len() <= 7);
        }
    }
}
