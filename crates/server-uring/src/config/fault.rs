//! What is wrong with a configuration, where, and what was meant.

use crate::address::Address;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Something that is wrong, and where.
#[derive(Debug)]
pub struct Fault {
    /// The file, unless it was the command line.
    pub file: Option<PathBuf>,
    /// From 1; 0 where it is no line's fault.
    pub line: usize,
    /// What.
    pub what: What,
}

/// What can be wrong.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum What {
    #[error("cannot be read: {0}")]
    Read(#[source] std::io::Error),
    #[error("{message}{hint}")]
    Text { message: String, hint: String },
    #[error("nothing to share: give at least one --share NAME=DIR, or [share.NAME] with its path")]
    NoShare,
    #[error(
        "nowhere to listen: give at least one --listen unix:PATH or vsock:PORT, or [[listen]] with \
         its address"
    )]
    NoListener,
    #[error("{log:?} says not what to log: {why}")]
    Log { log: String, why: String },
    #[error("the share name {name:?} {why}")]
    ShareName { name: String, why: String },
    #[error("the share {name:?}: ids {why}")]
    ShareIds { name: String, why: String },
    #[error("the share name {0:?} is given twice")]
    ShareTwice(String),
    #[error("the share {name:?} cannot be served: {path:?}: {source}{hint}")]
    Share { name: String, path: PathBuf, source: std::io::Error, hint: String },
    #[error("the address {0} is given twice")]
    ListenTwice(Address),
    #[error("{address} offers the share {share:?}, which there is not")]
    ListenShare { address: Address, share: String },
}

impl Fault {
    pub(super) fn of(file: &Path, line: usize, what: What) -> Fault {
        Fault { file: Some(file.to_owned()), line, what }
    }
}

impl std::error::Error for Fault {}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (&self.file, self.line) {
            (Some(file), 0) => write!(f, "{}: {}", file.display(), self.what),
            (Some(file), line) => write!(f, "{}:{line}: {}", file.display(), self.what),
            (None, _) => write!(f, "{}", self.what),
        }
    }
}

impl What {
    /// The place of what is wrong in the file, if it came from there.
    pub(super) fn find_in(self, file: &Option<(&Path, String)>) -> Fault {
        let Some((path, text)) = file else { return Fault { file: None, line: 0, what: self } };
        let table = toml::de::DeTable::parse(text).ok();
        let at = table.as_ref().and_then(|table| {
            let table = table.get_ref();
            match &self {
                What::ShareName { name, .. }
                | What::ShareIds { name, .. }
                | What::Share { name, .. } => {
                    let shares = table.get("share")?.get_ref().as_table()?;
                    Some(shares.get_key_value(name.as_str())?.0.span().start)
                }
                What::ListenTwice(address) | What::ListenShare { address, .. } => {
                    let address = address.to_string();
                    let same = |one: &&toml::Spanned<toml::de::DeValue<'_>>| {
                        let found = one.get_ref().as_table().and_then(|t| t.get("address"));
                        found.and_then(|a| a.get_ref().as_str()) == Some(address.as_str())
                    };
                    let all = table.get("listen")?.get_ref().as_array()?;
                    Some(all.iter().rfind(same)?.span().start)
                }
                What::Log { .. } => Some(table.get_key_value("log")?.0.span().start),
                What::Read(_) | What::Text { .. } | What::ShareTwice(_) => None,
                What::NoShare | What::NoListener => None,
            }
        });
        // What the file does not have the command line has, unless it is missing altogether.
        let missing = matches!(self, What::NoShare | What::NoListener);
        let file = (missing || at.is_some()).then(|| path.to_path_buf());
        Fault { file, line: at.map_or(0, |at| line_of(text, at)), what: self }
    }
}

/// What toml says, with the line and what was probably meant.
pub(super) fn of_toml(path: &Path, text: &str, error: &toml::de::Error) -> Fault {
    let line = error.span().map_or(0, |span| line_of(text, span.start));
    let message = error.message();
    // serde says: unknown field `x`, expected one of `a`, `b`
    let mut quoted = message.split('`').skip(1).step_by(2);
    let (message, hint) = match (message.split_once(", expected"), quoted.next()) {
        (Some((unknown, _)), Some(word)) if unknown.starts_with("unknown ") => {
            let known: Vec<&str> = quoted.collect();
            let near = known.iter().min_by_key(|known| distance(word, known));
            let hint = match near.filter(|near| distance(word, near) <= 1 + near.len() / 4) {
                Some(near) => format!("; did you mean `{near}`?"),
                None => format!("; known here: `{}`", known.join("`, `")),
            };
            (unknown, hint)
        }
        _ => (message, String::new()),
    };
    Fault::of(path, line, What::Text { message: message.trim().replace('\n', ": "), hint })
}

fn line_of(text: &str, at: usize) -> usize {
    text.bytes().take(at).filter(|&byte| byte == b'\n').count() + 1
}

/// How many letters must be put in, taken out or changed.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, &y) in b.iter().enumerate() {
            let changed = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}
