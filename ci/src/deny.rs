//! What we depend on: licences, sources and bans, by the lists of `deny.toml`.
//!
//! Invariant: `deny.toml` is the one list and is cargo-deny's own format, so that cargo-deny reads
//! it as well; this check is here because building cargo-deny takes longer than all of CI's build.
//! It does not look at advisories, which need a database from the network.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::paths;

const CRATES_IO: &str = "registry+https://github.com/rust-lang/crates.io-index";

#[derive(Debug, Deserialize)]
struct Deny {
    licenses: Licenses,
    bans: Bans,
}

#[derive(Debug, Deserialize)]
struct Licenses {
    allow: BTreeSet<String>,
}

#[derive(Debug, Deserialize)]
struct Bans {
    deny: Vec<Ban>,
}

#[derive(Debug, Deserialize)]
struct Ban {
    #[serde(rename = "crate")]
    name: String,
}

#[derive(Debug, Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Debug, Deserialize)]
struct Package {
    name: String,
    version: String,
    license: Option<String>,
    source: Option<String>,
}

/// Checks every package of the lock file; gives the closing line.
pub fn run() -> Result<String> {
    let path = paths::root().join("deny.toml");
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let deny: Deny = toml::from_str(&text).context("read deny.toml")?;
    let metadata = paths::cargo().args(["metadata", "--format-version", "1", "--locked"]);
    let linux = ["--filter-platform", "x86_64-unknown-linux-gnu", "--quiet"];
    let metadata: Metadata = serde_json::from_str(&metadata.args(linux).run()?)?;
    let broken = check(&deny, &metadata);
    for line in &broken {
        eprintln!("deny: {line}");
    }
    if !broken.is_empty() {
        bail!("deny: {} packages are not as deny.toml allows", broken.len());
    }
    Ok(format!("{} packages: licences, sources and bans are fine", metadata.packages.len()))
}

fn check(deny: &Deny, metadata: &Metadata) -> Vec<String> {
    let mut broken = Vec::new();
    for package in &metadata.packages {
        let name = format!("{} {}", package.name, package.version);
        let license = package.license.as_deref().unwrap_or("");
        if !allowed(license, &deny.licenses.allow) {
            broken.push(format!("{name}: licence `{license}` is not allowed"));
        }
        // Ours have no source.
        if package.source.as_deref().is_some_and(|source| source != CRATES_IO) {
            broken.push(format!("{name}: comes from {:?}", package.source));
        }
        if deny.bans.deny.iter().any(|ban| ban.name == package.name) {
            broken.push(format!("{name}: is banned"));
        }
    }
    broken
}

/// Whether an SPDX expression of AND, OR and brackets can be met with allowed licences. `/` is what
/// old manifests write for OR.
fn allowed(expression: &str, allow: &BTreeSet<String>) -> bool {
    let spaced = expression.replace('(', " ( ").replace(')', " ) ").replace('/', " OR ");
    let tokens: Vec<&str> = spaced.split_whitespace().collect();
    let mut at = 0;
    let met = any_of(&tokens, &mut at, allow);
    met == Some(true) && at == tokens.len()
}

fn any_of(tokens: &[&str], at: &mut usize, allow: &BTreeSet<String>) -> Option<bool> {
    let mut met = all_of(tokens, at, allow)?;
    while tokens.get(*at) == Some(&"OR") {
        *at += 1;
        met |= all_of(tokens, at, allow)?;
    }
    Some(met)
}

fn all_of(tokens: &[&str], at: &mut usize, allow: &BTreeSet<String>) -> Option<bool> {
    let mut met = one(tokens, at, allow)?;
    while tokens.get(*at) == Some(&"AND") {
        *at += 1;
        met &= one(tokens, at, allow)?;
    }
    Some(met)
}

fn one(tokens: &[&str], at: &mut usize, allow: &BTreeSet<String>) -> Option<bool> {
    let token = tokens.get(*at)?;
    *at += 1;
    if *token == "(" {
        let met = any_of(tokens, at, allow)?;
        (tokens.get(*at) == Some(&")")).then(|| *at += 1)?;
        return Some(met);
    }
    let mut name = (*token).to_string();
    if tokens.get(*at) == Some(&"WITH") {
        name = format!("{name} WITH {}", tokens.get(*at + 1)?);
        *at += 2;
    }
    Some(allow.contains(&name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions_are_met_as_spdx_says() {
        let allow = ["MIT", "Apache-2.0", "X WITH e"].map(String::from).into();
        let check = |expression: &str, met: bool| {
            assert_eq!(allowed(expression, &allow), met, "{expression}");
        };
        check("MIT", true);
        check("MIT/GPL-3.0", true);
        check("GPL-3.0 OR Apache-2.0", true);
        check("GPL-3.0 AND Apache-2.0", false);
        check("(MIT OR GPL-3.0) AND Apache-2.0", true);
        check("X WITH e", true);
        check("MIT WITH e", false);
        check("", false);
        check("MIT OR", false);
        check("(MIT", false);
    }
}
