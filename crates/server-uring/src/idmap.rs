//! Users and groups: what a guest calls them, and what the host does.
//!
//! Rules as virtiofsd's `--translate-uid` has them. Each holds for a range of ids and for one
//! direction, but for `map`, which holds for both; ranges of one direction do not overlap, so that
//! their order does not matter; an id that no rule names stays as it is. Requests go from guest to
//! host (callers, chown, groups, ids in ACLs), attributes and ACLs of replies from host to guest.

use std::fmt;
use std::str::FromStr;

use rustix::io::Errno;

/// One rule, as it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule {
    kind: Kind,
    /// The first id of the range, on the side that the rule translates from.
    from: u32,
    /// What it becomes.
    to: u32,
    count: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// A guest's range to a host's and back.
    Map,
    /// A guest's range to a host's.
    Guest,
    /// A host's range to a guest's.
    Host,
    /// All of a guest's range to one id of the host.
    SquashGuest,
    /// All of a host's range to one id of the guest.
    SquashHost,
    /// A guest's range that is an error.
    ForbidGuest,
}

const KINDS: [(&str, Kind); 6] = [
    ("map", Kind::Map),
    ("guest", Kind::Guest),
    ("host", Kind::Host),
    ("squash-guest", Kind::SquashGuest),
    ("squash-host", Kind::SquashHost),
    ("forbid-guest", Kind::ForbidGuest),
];

/// Why a rule is none.
fn bad(text: &str) -> String {
    format!(
        "{text:?} is no id rule: map:GUEST:HOST:COUNT, guest:GUEST:HOST:COUNT, \
         host:HOST:GUEST:COUNT, squash-guest:GUEST:HOST:COUNT, squash-host:HOST:GUEST:COUNT or \
         forbid-guest:GUEST:COUNT"
    )
}

impl FromStr for Rule {
    type Err = String;

    fn from_str(text: &str) -> Result<Rule, String> {
        let (name, numbers) = text.split_once(':').ok_or_else(|| bad(text))?;
        let kind = KINDS.iter().find(|(known, _)| *known == name).ok_or_else(|| bad(text))?.1;
        let numbers: Result<Vec<u32>, _> = numbers.split(':').map(str::parse).collect();
        let (from, to, count) = match (kind, numbers.as_deref()) {
            (Kind::ForbidGuest, Ok(&[from, count])) => (from, 0, count),
            (Kind::ForbidGuest, _) => return Err(bad(text)),
            (_, Ok(&[from, to, count])) => (from, to, count),
            _ => return Err(bad(text)),
        };
        // 4294967295 is no id: to the system calls it means "leave it".
        let fits = |first: u32| count > 0 && first.checked_add(count - 1).is_some_and(is_id);
        let squashed = matches!(kind, Kind::SquashGuest | Kind::SquashHost);
        let to_fits = if squashed { is_id(to) } else { kind == Kind::ForbidGuest || fits(to) };
        if !fits(from) || !to_fits {
            return Err(format!("{text:?}: ids are 0 to 4294967294, and a range has at least one"));
        }
        Ok(Rule { kind, from, to, count })
    }
}

fn is_id(id: u32) -> bool {
    id != u32::MAX
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Rule { kind, from, to, count } = self;
        let name = KINDS.iter().find(|(_, known)| known == kind).map_or("", |(name, _)| name);
        match kind {
            Kind::ForbidGuest => write!(f, "{name}:{from}:{count}"),
            _ => write!(f, "{name}:{from}:{to}:{count}"),
        }
    }
}

/// What becomes of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Becomes {
    RangeFrom(u32),
    One(u32),
    Forbidden,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range {
    first: u32,
    last: u32,
    becomes: Becomes,
}

/// One direction, sorted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Direction(Vec<Range>);

impl Direction {
    fn add(&mut self, first: u32, count: u32, becomes: Becomes) -> Result<(), String> {
        let last = first + (count - 1);
        if let Some(other) = self.0.iter().find(|other| first <= other.last && other.first <= last)
        {
            return Err(format!(
                "{first} to {last} and {} to {} overlap: each id can become one",
                other.first, other.last
            ));
        }
        self.0.push(Range { first, last, becomes });
        self.0.sort_by_key(|range| range.first);
        Ok(())
    }

    fn of(&self, id: u32) -> Result<u32, Errno> {
        let after = self.0.partition_point(|range| range.first <= id);
        match after.checked_sub(1).and_then(|at| self.0.get(at)) {
            Some(range) if id <= range.last => match range.becomes {
                Becomes::RangeFrom(first) => Ok(first + (id - range.first)),
                Becomes::One(one) => Ok(one),
                Becomes::Forbidden => Err(Errno::PERM),
            },
            _ => Ok(id),
        }
    }
}

/// The rules for users, or those for groups.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IdMap {
    to_host: Direction,
    to_guest: Direction,
}

impl IdMap {
    /// # Errors
    /// Which ranges overlap.
    pub fn new(rules: &[Rule]) -> Result<IdMap, String> {
        let mut map = IdMap::default();
        for &Rule { kind, from, to, count } in rules {
            let IdMap { to_host, to_guest } = &mut map;
            match kind {
                Kind::Map => {
                    to_host.add(from, count, Becomes::RangeFrom(to))?;
                    to_guest.add(to, count, Becomes::RangeFrom(from))?;
                }
                Kind::Guest => to_host.add(from, count, Becomes::RangeFrom(to))?,
                Kind::Host => to_guest.add(from, count, Becomes::RangeFrom(to))?,
                Kind::SquashGuest => to_host.add(from, count, Becomes::One(to))?,
                Kind::SquashHost => to_guest.add(from, count, Becomes::One(to))?,
                Kind::ForbidGuest => to_host.add(from, count, Becomes::Forbidden)?,
            }
        }
        Ok(map)
    }

    /// Nothing is changed either way.
    pub fn is_identity(&self) -> bool {
        self.to_host.0.is_empty() && self.to_guest.0.is_empty()
    }

    /// # Errors
    /// `EPERM`: a guest may not use this one.
    pub fn to_host(&self, id: u32) -> Result<u32, Errno> {
        self.to_host.of(id)
    }

    /// What the guest is shown.
    pub fn to_guest(&self, id: u32) -> u32 {
        self.to_guest.of(id).unwrap_or(id)
    }
}

/// Users and groups of a share.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ids {
    /// Users.
    pub users: IdMap,
    /// Groups.
    pub groups: IdMap,
}

impl Ids {
    /// Nothing is changed either way.
    pub fn is_identity(&self) -> bool {
        self.users.is_identity() && self.groups.is_identity()
    }

    /// The ids in a POSIX ACL's value (linux/posix_acl_xattr.h: a version of 4 bytes, then entries
    /// of tag u16, permissions u16, id u32), translated in place.
    ///
    /// # Errors
    /// `EINVAL` for what is none; what `user` and `group` say.
    pub fn in_acl(
        value: &mut [u8],
        user: impl Fn(u32) -> Result<u32, Errno>,
        group: impl Fn(u32) -> Result<u32, Errno>,
    ) -> Result<(), Errno> {
        const VERSION: [u8; 4] = 2u32.to_le_bytes();
        const USER: [u8; 2] = 0x02u16.to_le_bytes();
        const GROUP: [u8; 2] = 0x08u16.to_le_bytes();
        let (version, entries) = value.split_first_chunk_mut::<4>().ok_or(Errno::INVAL)?;
        if *version != VERSION || !entries.len().is_multiple_of(8) {
            return Err(Errno::INVAL);
        }
        for entry in entries.chunks_exact_mut(8) {
            let id = u32::from_le_bytes([entry[4], entry[5], entry[6], entry[7]]);
            let id = match [entry[0], entry[1]] {
                USER => user(id)?,
                GROUP => group(id)?,
                _ => continue,
            };
            entry[4..].copy_from_slice(&id.to_le_bytes());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(rules: &[&str]) -> Result<IdMap, String> {
        let rules: Result<Vec<Rule>, _> = rules.iter().map(|rule| rule.parse()).collect();
        IdMap::new(&rules?)
    }

    #[test]
    fn rules_translate_their_ranges_and_nothing_else() {
        let check = |rules: &[&str], to_host: &[(u32, Option<u32>)], to_guest: &[(u32, u32)]| {
            let map = map(rules).expect("rules");
            for &(id, expected) in to_host {
                assert_eq!(map.to_host(id).ok(), expected, "{rules:?}: the guest's {id}");
            }
            for &(id, expected) in to_guest {
                assert_eq!(map.to_guest(id), expected, "{rules:?}: the host's {id}");
            }
        };
        check(&[], &[(0, Some(0)), (u32::MAX, Some(u32::MAX))], &[(7, 7)]);
        check(
            &["map:0:100000:65536"],
            &[(0, Some(100_000)), (65_535, Some(165_535)), (65_536, Some(65_536))],
            &[(100_000, 0), (165_535, 65_535), (165_536, 165_536), (5, 5)],
        );
        check(&["guest:5:50:2"], &[(5, Some(50)), (6, Some(51)), (7, Some(7))], &[(50, 50)]);
        check(&["host:50:5:2"], &[(5, Some(5))], &[(50, 5), (51, 6), (52, 52)]);
        check(&["squash-guest:0:1000:4294967295"], &[(0, Some(1000)), (9, Some(1000))], &[(9, 9)]);
        check(&["squash-host:0:1000:500"], &[(3, Some(3))], &[(0, 1000), (499, 1000), (500, 500)]);
        check(&["forbid-guest:0:1", "map:1:1001:9"], &[(0, None), (1, Some(1001))], &[(0, 0)]);
    }

    #[test]
    fn what_is_no_rule_is_refused() {
        let bad = [
            "",
            "map",
            "map:1:2",
            "map:1:2:3:4",
            "mop:1:2:3",
            "map:a:2:3",
            "map:1:2:0",
            "map:-1:2:3",
            "map:4294967295:0:1",
            "map:0:4294967290:6",
            "guest:0:0:4294967296",
            "forbid-guest:1:2:3",
            "squash-guest:0:4294967295:1",
        ];
        bad.iter().for_each(|text| assert!(map(&[text]).is_err(), "{text:?}"));
        for twice in [["map:0:10:5", "guest:4:7:1"], ["host:9:1:2", "map:50:10:5"]] {
            assert!(map(&twice).is_err_and(|error| error.contains("overlap")), "{twice:?}");
        }
        for text in ["map:0:100000:65536", "forbid-guest:3:4"] {
            assert_eq!(text.parse::<Rule>().map(|rule| rule.to_string()), Ok(text.into()));
        }
    }

    #[test]
    fn acls_are_translated_where_they_name_somebody() {
        let entry = |tag: u16, id: u32| {
            [&tag.to_le_bytes()[..], &7u16.to_le_bytes(), &id.to_le_bytes()].concat()
        };
        let acl = |user, group| {
            let entries = [entry(1, u32::MAX), entry(2, user), entry(4, 3), entry(8, group)];
            [2u32.to_le_bytes().to_vec(), entries.concat()].concat()
        };
        let mut value = acl(5, 6);
        let translated = Ids::in_acl(&mut value, |id| Ok(id + 100), |id| Ok(id + 200));
        assert_eq!((translated, value), (Ok(()), acl(105, 206)));
        let refused = |value: &[u8]| Ids::in_acl(&mut value.to_vec(), Ok, Ok);
        assert_eq!(refused(&acl(1, 2)), Ok(()));
        assert_eq!(refused(&2u32.to_le_bytes()), Ok(()), "an empty one");
        for value in [&[][..], &[2, 0, 0], &[1, 0, 0, 0], &acl(1, 2)[..11]] {
            assert_eq!(refused(value), Err(Errno::INVAL));
        }
        let forbidden = Ids::in_acl(&mut acl(1, 2), |_| Err(Errno::PERM), Ok);
        assert_eq!(forbidden, Err(Errno::PERM));
    }
}
