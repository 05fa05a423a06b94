//! The hostile guest: what it can say on the wire, and how each attempt ends: in an errno, or in a
//! closed connection or session. Never in a panic, in something outside of the share, in another
//! guest that is not served, or in anything that is left behind in the daemon.
//!
//! docs/security.md names what is tried. How fast others are served meanwhile is measured by
//! `cargo xtask hostile --rate` (benches/hostile_rate.rs).

#[path = "../common/mod.rs"]
mod common;
mod escapes;
mod exhaustion;
mod protocol;
mod rights;

use common::*;

const MIB: u32 = 1 << 20;

/// A daemon, and a guest that must be served all the time.
struct Scene {
    daemon: Daemon,
    friend: Guest,
    node: u64,
    fh: u64,
    before: Vec<(&'static str, u64)>,
}

impl Scene {
    fn new(engine: &str) -> Scene {
        Scene::of(Daemon::start(engine))
    }

    fn in_memory(engine: &str) -> Scene {
        Scene::of(Daemon::start_in_memory(engine))
    }

    fn of(daemon: Daemon) -> Scene {
        let mut friend = daemon.guest();
        let (node, fh) = friend.create("friend").expect("create");
        let before = daemon.gauges_at_rest();
        Scene { daemon, friend, node, fh, before }
    }

    fn friend_is_served(&mut self, seed: u64) {
        for len in [10, 200_000, 1 << 20] {
            let data = pattern(seed, len);
            assert_eq!(self.friend.write(self.node, self.fh, 0, &data), Ok(len as u32));
            assert!(self.friend.read(self.node, self.fh, 0, len as u32) == Ok(data));
        }
    }

    /// The foes are gone: nothing of them is left, and others are served, old ones and new ones.
    fn check(&mut self) {
        self.friend_is_served(3);
        self.daemon.settles_at(&self.before);
        assert!(self.daemon.guest().lookup(1, "friend").is_ok());
        self.daemon.settles_at(&self.before);
    }
}

fn on_both(check: impl Fn(&mut Scene)) {
    on_each(Scene::new, check);
}

fn on_each(start: fn(&str) -> Scene, check: impl Fn(&mut Scene)) {
    for engine in ["uring", "threads"] {
        undisturbed(|| {
            let mut scene = start(engine);
            check(&mut scene);
            scene.check();
            drop(scene.friend);
            scene.daemon.stop_well();
        });
    }
}
