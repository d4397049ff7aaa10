//! `umbra confine`: the tables of system calls of a VM's process.

use std::fmt::Write;

use crate::vm::confine::tables::{Row, When};
use crate::vm::confine::{Category, WITHOUT};

/// Arguments of `umbra confine`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The kind of thread; all if not given.
    #[arg(long, value_enum, value_name = "CATEGORY")]
    show: Option<Category>,
}

/// Prints the tables.
///
/// # Errors
/// Standard output takes nothing.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let tables: Vec<_> =
        Category::ALL.into_iter().filter(|category| args.show.is_none_or(|show| show == *category)).collect();
    super::print(&[without()].into_iter().chain(tables.into_iter().map(table)).collect::<Vec<_>>().join("\n"))
}

/// What all are without, as text.
fn without() -> String {
    let line = |(what, by): &(&str, &str)| format!("  {what:<64} {by}\n");
    format!("every thread is without:\n{}", WITHOUT.iter().map(line).collect::<String>())
}

/// The table of `category` as text.
fn table(category: Category) -> String {
    let mut text = String::new();
    let name = clap::ValueEnum::to_possible_value(&category).map_or_else(String::new, |value| value.get_name().into());
    let (allowed, refused): (Vec<_>, Vec<_>) = (category.rows().collect(), category.refused().collect());
    for (title, rows) in [("may", allowed), ("is refused, and goes on (ENOSYS)", refused)] {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{name} {title}:");
        for row in rows {
            let _ = writeln!(text, "  {:<18} {:<32} {}", name_of(row), conditions(row), row.why);
        }
    }
    text + "  Anything else ends the process.\n"
}

fn name_of(row: &Row) -> &'static str {
    row.call.1.strip_prefix("SYS_").unwrap_or(row.call.1)
}

fn conditions(row: &Row) -> String {
    let condition = |when: &When| match when {
        When::Is(_, _, name) | When::Request(_, name) | When::Has(_, _, name) => (*name).to_owned(),
        When::Lacks(_, _, name) => format!("without {name}"),
        When::ThisProcess(_) => "this process".into(),
    };
    row.when.iter().map(condition).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_names_calls_conditions_and_reasons() {
        let text = table(Category::Vcpu);
        assert!(text.starts_with("vcpu may:\n"), "{text}");
        for part in ["KVM_RUN", "mmap", "without PROT_EXEC", "this process", "vcpu is refused", "clone3"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(text.lines().all(|line| !line.contains("execve") && line.len() <= 140), "{text}");
        let text = without();
        assert!(text.contains("other processes, if root starts it") && text.contains("a PID namespace"), "{text}");
        assert!(text.lines().all(|line| line.len() <= 140), "{text}");
    }
}
