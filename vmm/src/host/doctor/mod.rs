//! What works on this host and what is missing, in plain words, each with the command that fixes it.
//!
//! Looks and changes nothing: `umbra doctor` may be run by anybody at any time. [`host`] looks at the host as a whole,
//! [`device`] at one PCI function, [`list`] at all that a driver VM could have.

pub mod device;
pub mod host;
pub mod list;
pub mod storage;

use std::fmt;
use std::path::PathBuf;

use serde::Serialize;

/// How a thing stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Grade {
    /// As it should be.
    Good,
    /// Works, with something to know or to improve.
    Note,
    /// Umbra does not work this way.
    Missing,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at, in a word or two.
    pub check: &'static str,
    /// How it stands.
    pub grade: Grade,
    /// What was found, as a sentence without its full stop.
    pub what: String,
    /// The command, or the step, that fixes it.
    pub remedy: Option<String>,
}

impl Finding {
    /// As it should be.
    pub fn good(check: &'static str, what: impl Into<String>) -> Self {
        Self { check, grade: Grade::Good, what: what.into(), remedy: None }
    }

    /// It works; this is to be known.
    pub fn note(check: &'static str, what: impl Into<String>) -> Self {
        Self { check, grade: Grade::Note, what: what.into(), remedy: None }
    }

    /// It does not work until `remedy` is done.
    pub fn missing(check: &'static str, what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { check, grade: Grade::Missing, what: what.into(), remedy: Some(remedy.into()) }
    }

    /// With what would better it.
    pub fn with_remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = Some(remedy.into());
        self
    }
}

/// How many of `findings` are missing.
pub fn missing(findings: &[Finding]) -> usize {
    findings.iter().filter(|finding| finding.grade == Grade::Missing).count()
}

/// Findings as a text for people: a mark, the check, what was found, and below it what fixes it.
#[derive(Debug)]
pub struct Text<'a>(pub &'a [Finding]);

impl fmt::Display for Text<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        /// Columns of a line, as a terminal has them.
        const WIDTH: usize = 112;
        let names = self.0.iter().map(|finding| finding.check.chars().count()).max().unwrap_or(0);
        let indent = " ".repeat(names + 11);
        for finding in self.0 {
            let mark = match finding.grade {
                Grade::Good => "ok",
                Grade::Note => "note",
                Grade::Missing => "MISSING",
            };
            let what = wrapped(&finding.what, WIDTH - indent.len()).join(&format!("\n{indent}"));
            writeln!(f, "{mark:<7}  {:<names$}  {what}", finding.check)?;
            if let Some(remedy) = &finding.remedy {
                let remedy = wrapped(remedy, WIDTH - indent.len() - 3).join(&format!("\n{indent}   "));
                writeln!(f, "{indent}-> {remedy}")?;
            }
        }
        Ok(())
    }
}

/// `text` in lines of at most `width` characters, broken at spaces that are not within backquotes.
fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    let (mut word, mut quoted) = (String::new(), false);
    for c in text.chars().chain([' ']) {
        quoted ^= c == '`';
        if c != ' ' || quoted {
            word.push(c);
            continue;
        }
        let line = lines.last().map_or(0, |line| line.chars().count());
        if line > 0 && line + 1 + word.chars().count() > width {
            lines.push(String::new());
        }
        if let Some(line) = lines.last_mut() {
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(&word);
        }
        word.clear();
    }
    if !word.is_empty() {
        // A backquote without its partner.
        lines.push(word);
    }
    lines
}

/// Where the host's files are: `/`, or a made-up tree in tests.
#[derive(Clone, Debug)]
pub struct Root(PathBuf);

impl Default for Root {
    fn default() -> Self {
        Self("/".into())
    }
}

impl Root {
    /// Another tree in the place of `/`.
    pub fn at(path: PathBuf) -> Self {
        Self(path)
    }

    /// The file at `path`, which is relative.
    pub fn join(&self, path: &str) -> PathBuf {
        self.0.join(path)
    }

    fn read(&self, path: &str) -> Option<String> {
        std::fs::read_to_string(self.join(path)).ok()
    }

    fn has(&self, path: &str) -> bool {
        self.join(path).exists()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_has_a_mark_a_name_and_the_mend_below() {
        let findings = [
            Finding::good("KVM", "is there"),
            Finding::missing("vfio-pci", "the kernel has no such driver", "`modprobe vfio-pci`"),
        ];
        let expected = "\
ok       KVM       is there
MISSING  vfio-pci  the kernel has no such driver
                   -> `modprobe vfio-pci`
";
        assert_eq!(Text(&findings).to_string(), expected);
        assert_eq!(missing(&findings), 1);
    }

    #[test]
    fn long_lines_break_at_spaces_but_not_within_a_command() {
        assert_eq!(wrapped("one two three", 7), ["one two", "three"]);
        assert_eq!(wrapped("run `a b c d` now", 6), ["run", "`a b c d`", "now"]);
        assert_eq!(wrapped("an `open end", 40), ["an", "`open end "]);
    }
}
