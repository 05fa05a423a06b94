//! A daemon's life but for its shard: the registry, the pool, and what a greeter does.

use crate::Plan;
use ringfs_server::fs::{Fs, FsOptions};
use ringfs_server::mailbox::Mailbox;
use ringfs_server::pool::Pool;
use ringfs_server::registry::Registry;
use ringfs_server::session::{Session, Terms};
use ringfs_server::state_dir::{StateDir, StateError};
use ringfs_server::stats::ShardStats;
use ringfs_wire::hello::{Reason, Ticket, feature};
use rustix::thread::{CpuSet, sched_getaffinity};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

/// A daemon's life but for its shard.
pub struct Host {
    pub mailbox: Arc<Mailbox>,
    pub stats: Arc<ShardStats>,
    pub registry: Arc<Registry>,
    pub pool: Arc<Pool>,
    pub share: PathBuf,
    pub keeps: bool,
    pub stops: AtomicBool,
}

impl Host {
    pub fn new(share: &Path, plan: &Plan) -> Arc<Host> {
        let mailbox = Mailbox::new().expect("a mailbox");
        let grace = Duration::from_secs(if plan.cuts.is_some() { 600 } else { 0 });
        let keeps = plan.restarts > 0;
        let state = keeps.then(|| {
            loop {
                // The one before lets go of it when the last thread has dropped its session.
                match StateDir::open(&share.with_extension("state"), grace) {
                    Ok(state) => return state,
                    Err(StateError::InUse { .. }) => std::thread::yield_now(),
                    Err(error) => panic!("{error}"),
                }
            }
        });
        let registry = Arc::new(Registry::new(grace, state));
        registry.set_shards(vec![mailbox.clone()]);
        let cpus: CpuSet = sched_getaffinity(None).expect("CPUs");
        let (pool, stats) = (Pool::new(2, cpus), Arc::new(ShardStats::default()));
        Arc::new(Host {
            mailbox,
            stats,
            registry,
            pool,
            share: share.to_owned(),
            keeps,
            stops: AtomicBool::new(false),
        })
    }

    /// What a greeter does: the session of a ticket, or one that is made anew.
    pub fn session(&self, ticket: Ticket, is_new: bool) -> Option<(Arc<Session>, Ticket)> {
        if let Some(session) = self.registry.find(ticket) {
            return Some((session, ticket));
        }
        // What was never used is not kept.
        let presented =
            Some(ticket).filter(|&ticket| ticket != Ticket::NONE && (self.keeps || !is_new));
        assert!(presented.is_none() || self.keeps, "a session is gone");
        let restore = if self.keeps { feature::RESTORE } else { 0 };
        let terms = Terms {
            share: "share".into(),
            peer: "sim".into(),
            owner: 0,
            lanes: 1,
            conns: 1,
            slots: 16,
            features: feature::PAYLOAD_CRC | restore,
            rebuilt: presented.is_some(),
            epoch: 0,
            subdir: Vec::new(),
            presented,
        };
        let options = FsOptions { recipes: self.keeps, ..FsOptions::default() };
        let fs = Fs::new(&self.share, options).expect("a file system");
        let opened = self.registry.open(terms, fs);
        assert!(matches!(opened, Ok(_) | Err(Reason::Timeout)), "no session");
        opened.ok()
    }
}
