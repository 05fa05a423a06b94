//! The lines that the guest sends on its second serial port, one message a line.
//!
//! ```text
//! VM-BOOT release uptime          the kernel runs our init
//! VM-BEGIN step                   a step starts
//! VM-STEP step ok|failed|skipped why
//! VM-NOTE text                    for the reader of the output
//! VM-FACT key value               a measured value, printed in the summary
//! VM-ASK request                  the host answers with one line, `ok ...` or `failed ...`
//! VM-DONE                         all stages ran; the machine powers off
//! VM-FATAL why                    the guest gave up
//! ```
//! Pure parsing: no I/O, and any line may be garbage.

/// How a step ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All that it checks held.
    Ok(String),
    /// Something did not hold; why.
    Failed(String),
    /// It could not run here; why.
    Skipped(String),
}

/// One line of the guest.
#[derive(Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// The kernel's release, and seconds since its start.
    Boot { release: &'a str, uptime: &'a str },
    /// This step starts.
    Begin(&'a str),
    /// This step ended.
    Step(&'a str, Outcome),
    /// Shown to the reader.
    Note(&'a str),
    /// Key and value.
    Fact(&'a str, &'a str),
    /// The host has to answer.
    Ask(&'a str),
    /// The plan is through.
    Done,
    /// The guest cannot go on.
    Fatal(&'a str),
}

/// Reads a line; anything that is no message of ours is None.
pub fn parse(line: &str) -> Option<Event<'_>> {
    let (word, rest) = split(line.trim_end());
    Some(match word {
        "VM-BOOT" => {
            let (release, uptime) = split(rest);
            Event::Boot { release, uptime }
        }
        "VM-BEGIN" => Event::Begin(rest),
        "VM-STEP" => {
            let (name, rest) = split(rest);
            let (how, why) = split(rest);
            let why = why.to_owned();
            let outcome = match how {
                "ok" => Outcome::Ok(why),
                "failed" => Outcome::Failed(why),
                "skipped" => Outcome::Skipped(why),
                _ => return None,
            };
            Event::Step(name, outcome)
        }
        "VM-NOTE" => Event::Note(rest),
        "VM-FACT" => {
            let (key, value) = split(rest);
            Event::Fact(key, value)
        }
        "VM-ASK" => Event::Ask(rest),
        "VM-DONE" => Event::Done,
        "VM-FATAL" => Event::Fatal(rest),
        _ => return None,
    })
}

fn split(text: &str) -> (&str, &str) {
    text.split_once(' ').unwrap_or((text, ""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_become_events() {
        fn check(line: &str, expected: Option<Event<'_>>) {
            assert_eq!(parse(line), expected, "{line:?}");
        }
        check("VM-BOOT 6.12.1 1.5\r\n", Some(Event::Boot { release: "6.12.1", uptime: "1.5" }));
        check("VM-BEGIN mount", Some(Event::Begin("mount")));
        check("VM-STEP mount ok", Some(Event::Step("mount", Outcome::Ok(String::new()))));
        check(
            "VM-STEP mount failed exit 1: no route",
            Some(Event::Step("mount", Outcome::Failed("exit 1: no route".into()))),
        );
        check("VM-STEP a skipped b", Some(Event::Step("a", Outcome::Skipped("b".into()))));
        check("VM-STEP mount perhaps", None);
        check("VM-NOTE   indented text", Some(Event::Note("  indented text")));
        check("VM-FACT rate 15 MiB/s", Some(Event::Fact("rate", "15 MiB/s")));
        check("VM-ASK checksum dd 00ff", Some(Event::Ask("checksum dd 00ff")));
        check("VM-DONE", Some(Event::Done));
        check("VM-FATAL no 9p", Some(Event::Fatal("no 9p")));
        check("[    1.2] random: crng init done", None);
        check("", None);
    }
}
