//! Names of extended attributes: what a guest calls them, and what the host does.
//!
//! Rules as virtiofsd's `--xattrmap` has them, tried in their order; the first that fits decides.
//! Each is `:TYPE:SCOPE:KEY:PREPEND:` with any separator, or `:map:KEY:PREPEND:` as the last one.
//! `client` rules fit names that the guest says and that start with KEY, `server` rules names that
//! the host has and that start with PREPEND, `all` both. Types: `prefix` puts PREPEND before the
//! guest's name and takes it from the host's; `ok` leaves names as they are; `bad` answers EPERM
//! and hides; `unsupported` answers EOPNOTSUPP and hides. For each name some rule must fit.
//!
//! A map must not let a guest's user name what it makes of names that only root may use: have a
//! `bad` rule for the guest's use of each PREPEND, or map everything (docs/security.md).

use std::fmt;
use std::str::FromStr;

use rustix::io::Errno;

/// The longest name that the kernel knows (XATTR_NAME_MAX).
const NAME_BYTES_MAX: usize = 255;
/// Rules of one map.
const RULES_MAX: usize = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Type {
    Prefix,
    Ok,
    Bad,
    Unsupported,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Rule {
    type_: Type,
    client: bool,
    server: bool,
    key: Vec<u8>,
    prepend: Vec<u8>,
}

/// All rules of a share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct XattrMap {
    text: String,
    rules: Vec<Rule>,
}

impl XattrMap {
    /// What a name that the guest says is on the host.
    ///
    /// # Errors
    /// `EPERM`, `EOPNOTSUPP`: it may not say this one. `ERANGE`: it would be too long.
    pub fn to_host(&self, name: &[u8]) -> Result<Vec<u8>, Errno> {
        let fits = |rule: &&Rule| rule.client && name.starts_with(&rule.key);
        let rule = self.rules.iter().find(fits).ok_or(Errno::OPNOTSUPP)?;
        match rule.type_ {
            Type::Ok => Ok(name.to_vec()),
            Type::Prefix => {
                let whole = [&rule.prepend, name].concat();
                if whole.len() <= NAME_BYTES_MAX { Ok(whole) } else { Err(Errno::RANGE) }
            }
            Type::Bad => Err(Errno::PERM),
            Type::Unsupported => Err(Errno::OPNOTSUPP),
        }
    }

    /// What the guest is shown of a name that the host has; `None`: nothing.
    pub fn to_guest<'a>(&self, name: &'a [u8]) -> Option<&'a [u8]> {
        let fits = |rule: &&Rule| rule.server && name.starts_with(&rule.prepend);
        let rule = self.rules.iter().find(fits)?;
        match rule.type_ {
            Type::Ok => Some(name),
            // The kernel knows no empty name.
            Type::Prefix => Some(&name[rule.prepend.len()..]).filter(|rest| !rest.is_empty()),
            Type::Bad | Type::Unsupported => None,
        }
    }
}

impl FromStr for XattrMap {
    type Err = String;

    fn from_str(text: &str) -> Result<XattrMap, String> {
        let mut rules = Vec::new();
        let mut rest = text.trim();
        let mut mapped = false;
        while let Some(separator) = rest.chars().next() {
            let mut parts = rest[separator.len_utf8()..].split(separator);
            let mut part = || parts.next().ok_or(format!("an xattr rule is cut off in {text:?}"));
            if mapped {
                return Err(format!("a map rule is the last one, in {text:?}"));
            }
            let name = part()?;
            let (scope, key, prepend) = match name {
                "map" => ("all", part()?, part()?),
                _ => (part()?, part()?, part()?),
            };
            let used = [name, key, prepend].map(str::len).iter().sum::<usize>()
                + if name == "map" { 0 } else { scope.len() + separator.len_utf8() }
                + 3 * separator.len_utf8();
            let end = &rest[used..];
            rest = end
                .strip_prefix(separator)
                .ok_or(format!("an xattr rule does not end with {separator:?} in {text:?}"))?
                .trim_start();
            let (client, server) = match scope {
                "all" => (true, true),
                "client" => (true, false),
                "server" => (false, true),
                _ => return Err(format!("{scope:?} is no scope: all, client or server")),
            };
            let (key, prepend) = (key.as_bytes().to_vec(), prepend.as_bytes().to_vec());
            let rule = |type_, client, server, key: &[u8], prepend: &[u8]| Rule {
                type_,
                client,
                server,
                key: key.to_vec(),
                prepend: prepend.to_vec(),
            };
            let type_ = match name {
                "prefix" => Type::Prefix,
                "ok" => Type::Ok,
                "bad" => Type::Bad,
                "unsupported" => Type::Unsupported,
                "map" => {
                    if prepend.is_empty() {
                        return Err(format!("a map rule has a prefix to put before, in {text:?}"));
                    }
                    mapped = true;
                    rules.push(rule(Type::Prefix, true, true, &key, &prepend));
                    if key.is_empty() {
                        rules.push(rule(Type::Bad, true, true, b"", b""));
                    } else {
                        // Neither side may reach the other's names by another way.
                        rules.push(rule(Type::Bad, true, false, &prepend, b""));
                        rules.push(rule(Type::Bad, false, true, b"", &key));
                        rules.push(rule(Type::Ok, true, true, b"", b""));
                    }
                    continue;
                }
                _ => {
                    return Err(format!(
                        "{name:?} is no type of an xattr rule: prefix, ok, bad, unsupported, map"
                    ));
                }
            };
            rules.push(rule(type_, client, server, &key, &prepend));
        }
        let ends = |side: fn(&Rule) -> bool, word: fn(&Rule) -> &[u8]| {
            rules.iter().any(|rule| side(rule) && word(rule).is_empty())
        };
        if !ends(|rule| rule.client, |rule| &rule.key)
            || !ends(|rule| rule.server, |rule| &rule.prepend)
        {
            return Err(format!("no rule of {text:?} fits all other names: end with :bad:all:::"));
        }
        if rules.len() > RULES_MAX {
            return Err(format!("more than {RULES_MAX} xattr rules"));
        }
        Ok(XattrMap { text: text.to_owned(), rules })
    }
}

impl fmt::Display for XattrMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_rule_that_fits_decides() {
        let check = |map: &str, to_host: &[(&str, Result<&str, Errno>)], shown: &[(&str, &str)]| {
            let map: XattrMap = map.parse().expect("a map");
            for &(name, expected) in to_host {
                let found = map.to_host(name.as_bytes());
                assert_eq!(found, expected.map(|name| name.as_bytes().to_vec()), "{map}: {name}");
            }
            for &(name, expected) in shown {
                let found = map.to_guest(name.as_bytes()).unwrap_or_default();
                assert_eq!(found, expected.as_bytes(), "{map}: the host's {name}");
            }
        };
        let (perm, unsupported) = (Err(Errno::PERM), Err(Errno::OPNOTSUPP));
        check(
            ":map::user.ringfs.:",
            &[
                ("trusted.x", Ok("user.ringfs.trusted.x")),
                ("user.ringfs.trusted.x", Ok("user.ringfs.user.ringfs.trusted.x")),
            ],
            &[("user.ringfs.trusted.x", "trusted.x"), ("user.other", ""), ("trusted.y", "")],
        );
        check(
            ":map:trusted.:user.ringfs.:",
            &[
                ("trusted.x", Ok("user.ringfs.trusted.x")),
                ("user.x", Ok("user.x")),
                ("user.ringfs.trusted.x", perm),
                ("user.ringfs.", perm),
            ],
            &[
                ("user.ringfs.trusted.x", "trusted.x"),
                ("trusted.host", ""),
                ("user.x", "user.x"),
                ("user.ringfs.", ""),
            ],
        );
        // virtiofsd's second example, with another separator and white space.
        check(
            "/prefix/all/trusted./user.v./ /bad/server//trusted./\n/bad/client/user.v.// \
             /ok/all///",
            &[
                ("trusted.x", Ok("user.v.trusted.x")),
                ("user.v.x", perm),
                ("security.x", Ok("security.x")),
            ],
            &[("user.v.trusted.x", "trusted.x"), ("trusted.x", ""), ("security.x", "security.x")],
        );
        check(
            ":unsupported:client:security.:: :bad:server::security.::ok:all:::",
            &[("security.x", unsupported), ("user.x", Ok("user.x"))],
            &[("security.x", ""), ("user.x", "user.x")],
        );
        let long: XattrMap = ":map::user.ringfs.:".parse().expect("a map");
        assert_eq!(long.to_host(&[b'x'; 250]), Err(Errno::RANGE));
    }

    #[test]
    fn what_is_no_map_is_refused() {
        let bad = [
            "",
            ":",
            ":ok",
            ":ok:all::",
            ":ok:some:::",
            ":no:all:::",
            ":map::user.:ok:all:::",
            ":map:x::",
            ":prefix:all:x:y:",
            ":ok:client:::",
            ":ok:server:::",
            ":ok:all:::x",
        ];
        for text in bad {
            assert!(text.parse::<XattrMap>().is_err(), "{text:?}");
        }
        let many = ":ok:all:::".repeat(RULES_MAX + 1);
        assert!(many.parse::<XattrMap>().is_err());
    }
}
