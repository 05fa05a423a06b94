//! Values that are one word of text, the same in the file, on the command line and to the worker.

use super::{CpuList, FileMode, IoPriority, MetricsAddress};
use crate::address::Address;
use crate::idmap::Rule;
use crate::xattrmap::XattrMap;
use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt::{self, Display, Formatter};
use std::path::PathBuf;
use std::str::FromStr;

macro_rules! written {
    ($($type:ty),*) => {$(
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<$type, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
            }
        }
    )*};
}

written!(Address, CpuList, FileMode, IoPriority, MetricsAddress, Place, Rule, XattrMap);

/// Where something of the daemon's is: the control socket, the state directory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Place {
    /// Below /run, if that can be made.
    #[default]
    Default,
    /// Nowhere: there is to be none.
    None,
    /// There.
    At(PathBuf),
}

impl FromStr for Place {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Place, &'static str> {
        match text {
            "" => Err("a path, or none"),
            "none" => Ok(Place::None),
            path => Ok(Place::At(path.into())),
        }
    }
}

impl Display for Place {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Place::Default => Ok(()),
            Place::None => f.write_str("none"),
            Place::At(path) => path.display().fmt(f),
        }
    }
}
