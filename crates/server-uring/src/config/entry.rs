//! The parts of the settings that can be there several times: shares and listeners.
//!
//! Each is a table of the file, and one word of the command line.

use crate::address::Address;
use crate::fds::Fds;
use crate::fs::{FsOptions, Submounts};
use crate::idmap::{IdMap, Ids, Rule};
use crate::quota::{Limits, ShareQuota};
use crate::xattrmap::XattrMap;
use ringfs_wire::limits::SHARE_NAME_BYTES_MAX;
use serde::{Deserialize, Serialize};
use std::fmt::{self, Display, Formatter};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

/// How files and sockets are driven.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Engine {
    /// io_uring.
    #[default]
    Uring,
    /// Blocking threads, where io_uring is forbidden.
    Threads,
}

/// `[[listen]]`: where guests connect, and which.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct ListenConfig {
    /// `unix:PATH`, `vsock:PORT` or `vsock:CID:PORT`; with stars in its directories a PATH stands
    /// for one socket in each of them, as they come and go.
    pub address: Address,
    /// The socket's permissions, such as `"0660"`; see [`ListenConfig::socket_mode`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<FileMode>,
    /// The socket's user, by name or number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    /// The socket's group, by name or number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// Users whose processes may connect; none: all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allow_uid: Vec<u32>,
    /// Groups, by the effective one of the process.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allow_gid: Vec<u32>,
    /// Processes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allow_pid: Vec<u32>,
    /// VMs that may connect by vsock.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allow_cid: Vec<u32>,
    /// What is offered; none: all shares.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shares: Vec<String>,
}

impl ListenConfig {
    /// The mode of a Unix socket's file: who may write to that may connect. Without `mode` it is
    /// the owner alone, or what the other options say of who may.
    pub fn socket_mode(&self) -> FileMode {
        let lists = [&self.allow_uid, &self.allow_gid, &self.allow_pid];
        match self.mode {
            Some(mode) => mode,
            // The parent asks the kernel who comes, and lets nobody else in.
            None if lists.iter().any(|list| !list.is_empty()) => FileMode(0o666),
            None if self.group.is_some() => FileMode(0o660),
            None => FileMode(0o600),
        }
    }
}

/// Permission bits, written in octal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileMode(pub u32);

impl FromStr for FileMode {
    type Err = String;

    fn from_str(text: &str) -> Result<FileMode, String> {
        match u32::from_str_radix(text, 8) {
            Ok(mode) if mode <= 0o777 => Ok(FileMode(mode)),
            _ => Err(format!("{text:?} is no mode such as 0660")),
        }
    }
}

impl Display for FileMode {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{:04o}", self.0)
    }
}

/// `[share.NAME]`: a directory that guests may mount.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct ShareConfig {
    /// What guests call it.
    #[serde(skip)]
    pub name: String,
    /// The directory.
    pub path: PathBuf,
    /// Guests may not change it.
    #[serde(default)]
    pub ro: bool,
    /// How far a guest's O_DIRECT goes.
    #[serde(default)]
    pub direct_io: DirectIo,
    /// What is mounted below the directory.
    #[serde(default)]
    pub submounts: Submounts,
    /// Guests may make device nodes.
    #[serde(default)]
    pub dev: bool,
    /// Guests may leave no set-user-id, set-group-id or file capabilities.
    #[serde(default)]
    pub nosuid: bool,
    /// POSIX ACLs, for mounts that ask for them.
    #[serde(default)]
    pub acl: bool,
    /// What guests call users.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub uid_map: Vec<Rule>,
    /// What guests call groups.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gid_map: Vec<Rule>,
    /// What guests call extended attributes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub xattr_map: Option<XattrMap>,
    /// What it and each of its sessions may use.
    #[serde(default, skip_serializing_if = "Limits::is_none")]
    pub limits: Limits,
}

/// How far a guest's O_DIRECT goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum DirectIo {
    /// Past the guest's cache.
    #[default]
    Buffered,
    /// To the host's disk.
    Pass,
}

impl ShareConfig {
    /// How the share is served, whatever guests ask for.
    pub fn options(&self, fds: &Arc<Fds>) -> FsOptions {
        FsOptions {
            read_only: self.ro,
            direct_io: self.direct_io == DirectIo::Pass,
            submounts: self.submounts,
            device_nodes: self.dev,
            nosuid: self.nosuid,
            acl: self.acl,
            ids: Arc::new(self.ids().unwrap_or_default()),
            xattr_map: self.xattr_map.clone().map(Arc::new),
            fds: fds.clone(),
            quota: ShareQuota::new(&self.limits),
            ..FsOptions::default()
        }
    }

    /// An option with a value; `None` where there is no such option.
    fn say(&mut self, name: &str, value: &str) -> Option<Result<(), String>> {
        Some(match name {
            "uid-map" => value.parse().map(|rule| self.uid_map.push(rule)),
            "gid-map" => value.parse().map(|rule| self.gid_map.push(rule)),
            "xattr-map" => value.parse().map(|map| self.xattr_map = Some(map)),
            _ => return self.limits.say(name, value),
        })
    }

    /// Users and groups.
    ///
    /// # Errors
    /// Which rules overlap.
    pub(super) fn ids(&self) -> Result<Ids, String> {
        Ok(Ids { users: IdMap::new(&self.uid_map)?, groups: IdMap::new(&self.gid_map)? })
    }

    /// Where the directory is not there: the last word of the command line may be no part of it.
    pub(super) fn unknown_option(&self) -> String {
        let path = self.path.to_string_lossy();
        path.rsplit_once(',').map_or(String::new(), |(_, word)| {
            let known = OPTIONS.join(", ");
            format!("; if {word:?} was to be an option, there is none of that name: {known}")
        })
    }

    /// Why guests cannot name it so.
    pub(super) fn check_name(&self) -> Result<(), String> {
        let name = &self.name;
        if name.is_empty() || name.len() > SHARE_NAME_BYTES_MAX || name.contains(['/', '@']) {
            return Err(format!("must have 1 to {SHARE_NAME_BYTES_MAX} bytes, and no / or @"));
        }
        Ok(())
    }
}

/// What may follow a share's directory on the command line, for people.
const OPTIONS: [&str; 11] = [
    "ro",
    "direct_io=pass",
    "submounts=merge",
    "nosuid",
    "acl",
    "dev",
    "uid-map=",
    "gid-map=",
    "xattr-map=",
    "limits (ops= bytes= in-flight= open-files= nodes=)",
    "limits of all sessions (total-..=)",
];

impl FromStr for ShareConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<ShareConfig, String> {
        let (name, rest) =
            text.split_once('=').ok_or("a share is NAME=DIR or NAME=DIR,OPTION...")?;
        let mut share = ShareConfig { name: name.to_owned(), ..Default::default() };
        let mut dir = rest;
        // From the right, so that only the last parts can be options and a directory may have
        // commas.
        while let Some((before, word)) = dir.rsplit_once(',') {
            match word {
                "ro" => share.ro = true,
                "rw" => share.ro = false,
                "direct_io=pass" => share.direct_io = DirectIo::Pass,
                "direct_io=buffered" => share.direct_io = DirectIo::Buffered,
                "submounts=merge" => share.submounts = Submounts::Merge,
                "submounts=hide" => share.submounts = Submounts::Hide,
                "suid" => share.nosuid = false,
                "nosuid" => share.nosuid = true,
                "acl" => share.acl = true,
                "noacl" => share.acl = false,
                "dev" => share.dev = true,
                "nodev" => share.dev = false,
                word => match word.split_once('=').map(|(key, value)| share.say(key, value)) {
                    None | Some(None) => break,
                    Some(Some(said)) => said?,
                },
            }
            dir = before;
        }
        share.check_name().map_err(|why| format!("the share name {name:?} {why}"))?;
        if dir.is_empty() {
            return Err(format!("the share {name:?} has no directory"));
        }
        share.ids()?;
        share.path = dir.into();
        Ok(share)
    }
}

impl FromStr for ListenConfig {
    type Err = String;

    /// `ADDRESS[,OPTION=VALUE...]`; several values have a `+` between them.
    fn from_str(text: &str) -> Result<ListenConfig, String> {
        let mut listen = ListenConfig::default();
        let mut address = text;
        // From the right, so that a path may have commas.
        while let Some((before, option)) = address.rsplit_once(',') {
            let Some((name, value)) = option.split_once('=') else { break };
            let ids = || -> Result<Vec<u32>, String> {
                let bad = |_| format!("{option:?}: {name} wants numbers such as 1000+1001");
                value.split('+').map(|id| id.parse().map_err(bad)).collect()
            };
            match name {
                "mode" => listen.mode = Some(value.parse()?),
                "owner" => listen.owner = Some(value.to_owned()),
                "group" => listen.group = Some(value.to_owned()),
                "allow-uid" => listen.allow_uid = ids()?,
                "allow-gid" => listen.allow_gid = ids()?,
                "allow-pid" => listen.allow_pid = ids()?,
                "allow-cid" => listen.allow_cid = ids()?,
                "shares" => listen.shares = value.split('+').map(ToOwned::to_owned).collect(),
                _ => break,
            }
            address = before;
        }
        listen.address = address.parse()?;
        Ok(listen)
    }
}

/// Where metrics are told: `unix:PATH` or `tcp:ADDRESS:PORT`, an address of this machine alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetricsAddress(pub Address);

impl FromStr for MetricsAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<MetricsAddress, String> {
        let bad = || format!("{text:?} is not unix:PATH or tcp:127.0.0.1:PORT");
        match text.split_once(':').ok_or_else(bad)? {
            ("unix", path) if !path.is_empty() => Ok(MetricsAddress(Address::Unix(path.into()))),
            ("tcp", address) => {
                let address: SocketAddr = address.parse().map_err(|_| bad())?;
                if !address.ip().is_loopback() {
                    return Err(format!(
                        "{address} can be reached by others: metrics have no password; use \
                         127.0.0.1, and a proxy where they are read elsewhere"
                    ));
                }
                Ok(MetricsAddress(Address::Tcp(address)))
            }
            _ => Err(bad()),
        }
    }
}

impl Display for MetricsAddress {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// `idle`, `be:0` to `be:7` or `rt:0` to `rt:7`, as ionice(1) has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoPriority {
    class: u8,
    level: u8,
}

impl IoPriority {
    /// As ioprio_set(2) takes it.
    pub fn value(self) -> u16 {
        u16::from(self.class) << 13 | u16::from(self.level)
    }
}

const IO_CLASSES: [&str; 4] = ["none", "rt", "be", "idle"];

impl FromStr for IoPriority {
    type Err = String;

    fn from_str(text: &str) -> Result<IoPriority, String> {
        let (class, level) = text.split_once(':').unwrap_or((text, "0"));
        let class = IO_CLASSES.iter().position(|name| *name == class).filter(|&class| class > 0);
        match (class, level.parse()) {
            (Some(class), Ok(level @ 0..8)) if class < 3 || !text.contains(':') => {
                Ok(IoPriority { class: class as u8, level })
            }
            _ => Err(format!("{text:?} is not idle, be:0 to be:7 or rt:0 to rt:7")),
        }
    }
}

impl Display for IoPriority {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match IO_CLASSES[usize::from(self.class)] {
            "idle" => f.write_str("idle"),
            class => write!(f, "{class}:{}", self.level),
        }
    }
}

/// How the log is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogFormat {
    /// Lines for people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Shares as tables by their names, in the order of the file.
pub(super) mod by_name {
    use super::ShareConfig;
    use serde::de::{MapAccess, Visitor};
    use serde::ser::SerializeMap;
    use serde::{Deserializer, Serializer};

    pub fn serialize<S: Serializer>(shares: &[ShareConfig], out: S) -> Result<S::Ok, S::Error> {
        let mut map = out.serialize_map(Some(shares.len()))?;
        for share in shares {
            map.serialize_entry(&share.name, share)?;
        }
        map.end()
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<ShareConfig>, D::Error> {
        struct Tables;
        impl<'de> Visitor<'de> for Tables {
            type Value = Vec<ShareConfig>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("tables [share.NAME]")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut shares = Vec::new();
                while let Some((name, share)) = map.next_entry::<String, ShareConfig>()? {
                    shares.push(ShareConfig { name, ..share });
                }
                Ok(shares)
            }
        }
        from.deserialize_map(Tables)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listeners() {
        let text = "unix:/a,b,mode=0660,owner=root,group=7,allow-uid=1+2,allow-gid=3,allow-pid=4,\
                    allow-cid=5,shares=a+b";
        let listen: ListenConfig = text.parse().expect("a listener");
        assert_eq!(listen.address, Address::Unix("/a,b".into()));
        assert_eq!((listen.mode, &*listen.allow_uid), (Some(FileMode(0o660)), &[1, 2][..]));
        let shares: Vec<&str> = listen.shares.iter().map(String::as_str).collect();
        assert_eq!((listen.owner.as_deref(), listen.group.as_deref()), (Some("root"), Some("7")));
        assert_eq!(shares, ["a", "b"]);
        let printed = toml::to_string(&listen).expect("printed");
        assert_eq!(toml::from_str::<ListenConfig>(&printed).expect("read"), listen, "{printed}");
        for bad in
            ["unix:/a,mode=9", "unix:/a,mode=07777", "unix:/a,allow-uid=x", "unix:,mode=0600"]
        {
            assert!(bad.parse::<ListenConfig>().is_err(), "{bad}");
        }
    }

    #[test]
    fn io_priorities() {
        for text in ["idle", "be:0", "be:7", "rt:3"] {
            let priority: IoPriority = text.parse().expect(text);
            assert_eq!(priority.to_string(), text);
        }
        assert_eq!("be:4".parse::<IoPriority>().map(IoPriority::value), Ok(2 << 13 | 4));
        for bad in ["", "none", "be:8", "idle:1", "x:1", "be:"] {
            assert!(bad.parse::<IoPriority>().is_err(), "{bad}");
        }
    }

    #[test]
    fn shares() {
        let check = |text: &str, expected: Option<(&str, &str, bool, DirectIo, Submounts)>| {
            let parsed = text.parse::<ShareConfig>().ok();
            let found = parsed.as_ref().map(|share| {
                let path = share.path.to_str().unwrap_or_default();
                (share.name.as_str(), path, share.ro, share.direct_io, share.submounts)
            });
            assert_eq!(found, expected, "{text}");
        };
        let (hide, merge) = (Submounts::Hide, Submounts::Merge);
        let (buffered, pass) = (DirectIo::Buffered, DirectIo::Pass);
        check("a=/b", Some(("a", "/b", false, buffered, hide)));
        check("a=/b,ro", Some(("a", "/b", true, buffered, hide)));
        check("a=/b,c,ro,direct_io=pass", Some(("a", "/b,c", true, pass, hide)));
        check("a=/b=c,submounts=merge", Some(("a", "/b=c", false, buffered, merge)));
        check("a=/b,unknown", Some(("a", "/b,unknown", false, buffered, hide)));
        let limited: ShareConfig = "a=/b,ro,ops=5000,bytes=100M".parse().expect("limits");
        assert_eq!(limited.limits.bytes, "100M".parse().ok());
        for bad in
            ["a=/b,ops=0", "a=/b,bytes=1X", "", "a", "=/b", "a=", "a/b=/c", "a@b=/c", "a=,ro"]
        {
            check(bad, None);
        }
    }
}
