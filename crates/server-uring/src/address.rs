//! Addresses, as they are written: `unix:PATH`, `vsock:PORT`, `vsock:CID:PORT`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

/// Where guests come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A Unix socket; for Firecracker and its kind, `<uds_path>_<port>`.
    Unix(PathBuf),
    /// AF_VSOCK; `cid` limits it to one peer, `u32::MAX` is any.
    Vsock {
        /// The guest that may connect.
        cid: u32,
        /// The port to listen on.
        port: u32,
    },
    /// TCP: for metrics alone, guests cannot come so.
    Tcp(SocketAddr),
}

impl Default for Address {
    fn default() -> Address {
        Address::Unix(PathBuf::new())
    }
}

/// Any CID.
pub const CID_ANY: u32 = u32::MAX;

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Address, String> {
        let bad = || {
            format!(
                "cannot read the address {text:?}: it is unix:PATH, vsock:PORT or vsock:CID:PORT"
            )
        };
        match text.split_once(':').ok_or_else(bad)? {
            ("unix", path) if !path.is_empty() => Ok(Address::Unix(path.into())),
            ("vsock", rest) => {
                let (cid, port) = match rest.split_once(':') {
                    Some((cid, port)) => (cid.parse().map_err(|_| bad())?, port),
                    None => (CID_ANY, rest),
                };
                Ok(Address::Vsock { cid, port: port.parse().map_err(|_| bad())? })
            }
            _ => Err(bad()),
        }
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
            Address::Vsock { cid: CID_ANY, port } => write!(f, "vsock:{port}"),
            Address::Vsock { cid, port } => write!(f, "vsock:{cid}:{port}"),
            Address::Tcp(address) => write!(f, "tcp:{address}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        let check = |text: &str, expected: Option<Address>| {
            assert_eq!(text.parse::<Address>().ok(), expected, "{text}");
        };
        check("unix:/run/x", Some(Address::Unix("/run/x".into())));
        check("vsock:5640", Some(Address::Vsock { cid: CID_ANY, port: 5640 }));
        check("vsock:3:5640", Some(Address::Vsock { cid: 3, port: 5640 }));
        for bad in ["", "unix:", "vsock:", "vsock:x", "vsock:1:2:3", "tcp:1", "/run/x", "vsock:-1"]
        {
            check(bad, None);
        }
    }
}
