//! The command line of mount(8)'s helpers:
//! `mount.ringfs SOURCE DIR [-sfnv] [-N NS] [-o OPTS] [-t TYPE]`.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// What mount(8) wants.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HelperArgs {
    /// The share.
    pub source: OsString,
    /// Where.
    pub dir: OsString,
    /// The option lists.
    pub options: Vec<String>,
    /// Unknown options are ignored.
    pub sloppy: bool,
    /// Everything but the mount.
    pub fake: bool,
    /// Say what is done.
    pub verbose: bool,
    /// The mount namespace that is meant, as a file of /proc.
    pub namespace: Option<PathBuf>,
}

/// Why a command line is none of a mount helper.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{what}; usage: mount.ringfs SOURCE DIR [-sfnv] [-o OPTIONS] [-t TYPE]")]
pub struct HelperError {
    what: String,
}

fn error(what: impl Into<String>) -> HelperError {
    HelperError { what: what.into() }
}

/// Whether the program was called as a mount helper.
pub fn is_helper_name(argv0: &OsStr) -> bool {
    let name = argv0.as_bytes().rsplit(|&byte| byte == b'/').next().unwrap_or_default();
    name.starts_with(b"mount.")
}

/// Reads what follows the program's name.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<HelperArgs, HelperError> {
    let mut parsed = HelperArgs::default();
    let mut places = Vec::new();
    let mut args = args.into_iter();
    while let Some(arg) = args.next() {
        let Some(letters) = arg.as_bytes().strip_prefix(b"-").filter(|l| !l.is_empty()) else {
            places.push(arg);
            continue;
        };
        for (at, letter) in letters.iter().enumerate() {
            match letter {
                b's' => parsed.sloppy = true,
                b'f' => parsed.fake = true,
                b'v' => parsed.verbose = true,
                b'n' => {}
                b'o' | b't' | b'N' => {
                    let inline = &letters[at + 1..];
                    let value = match inline {
                        [] => args.next(),
                        _ => Some(OsStr::from_bytes(inline).to_owned()),
                    };
                    let value = value
                        .ok_or_else(|| error(format!("-{} needs a value", char::from(*letter))))?;
                    match letter {
                        b'o' => {
                            let list = value.into_string();
                            parsed.options.push(list.map_err(|_| error("-o is not UTF-8"))?);
                        }
                        b'N' => parsed.namespace = Some(value.into()),
                        // The type: we have one alone.
                        _ => {}
                    }
                    break;
                }
                letter => {
                    return Err(error(format!("unknown switch -{}", letter.escape_ascii())));
                }
            }
        }
    }
    match <[OsString; 2]>::try_from(places) {
        Ok([source, dir]) => Ok(HelperArgs { source, dir, ..parsed }),
        Err(places) => Err(error(format!("expected 2 places, found {}", places.len()))),
    }
}

/// mount(8) with `-N` calls us in the namespace that it was called in. The mount would come about
/// there, so another one is refused.
pub fn check_namespace(named: &Path) -> Result<(), HelperError> {
    let identity = |path: &Path| path.metadata().map(|meta| (meta.dev(), meta.ino()));
    match (identity(named), identity(Path::new("/proc/self/ns/mnt"))) {
        (Ok(named), Ok(ours)) if named == ours => Ok(()),
        _ => Err(error(
            "-N names another mount namespace: run mount in it (`nsenter --target PID --mount \
             mount ..`)",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_words(line: &str) -> Result<HelperArgs, HelperError> {
        parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn lines_of_mount() {
        let expected = HelperArgs {
            source: "d@unix:/s".into(),
            dir: "/m".into(),
            options: vec!["rw,lanes=2".into()],
            ..HelperArgs::default()
        };
        for line in [
            "d@unix:/s /m -o rw,lanes=2",
            "d@unix:/s /m -n -orw,lanes=2 -t ringfs",
            "-no rw,lanes=2 d@unix:/s /m",
        ] {
            assert_eq!(parse_words(line).as_ref(), Ok(&expected), "{line}");
        }
        let flags = parse_words("a b -sfv").expect("flags");
        assert!(flags.sloppy && flags.fake && flags.verbose);
        let other = parse_words("a b -N /proc/self/ns/mnt").expect("a namespace").namespace;
        assert!(check_namespace(&other.expect("named")).is_ok());
        let error = check_namespace(Path::new("/proc/self/ns/net")).expect_err("another");
        assert!(error.to_string().contains("nsenter"), "{error}");
    }

    #[test]
    fn lines_of_nobody() {
        for (line, expected) in [
            ("", "found 0"),
            ("a", "found 1"),
            ("a b c", "found 3"),
            ("a b -o", "-o needs a value"),
            ("a b -z", "unknown switch -z"),
        ] {
            let error = parse_words(line).expect_err(line).to_string();
            assert!(error.contains(expected) && error.contains("usage"), "{error}");
        }
    }

    #[test]
    fn names() {
        for (name, expected) in
            [("/sbin/mount.ringfs", true), ("mount.ringfs", true), ("/mount./ringfs", false)]
        {
            assert_eq!(is_helper_name(OsStr::new(name)), expected, "{name}");
        }
    }
}
