//! A small daemon for tests: the wire over real Unix sockets, a tree in memory, faults on demand.
//!
//! Files of the root: `hello` (text), `big` (a pattern), `hang` (a READ or UNLINK is answered only
//! when it is cancelled), and, not listed, `n0` and so on. It checks what a daemon may rely on:
//! slots and their sequence, whole batches, tickets, the order of a rebuild, counts of lookups.
//! Its table of slots outlives connections, with every reply; a request runs once.

use ringfs_wire::abi::*;
use ringfs_wire::batch::{BatchBuilder, Cursor, Kind, RecordHeader, cancel};
use ringfs_wire::deframe::Deframer;
use ringfs_wire::hello::{Hello, Reason, Ticket, Welcome, feature, welcome_flag};
use ringfs_wire::limits::{BATCH_BYTES_MAX, RECORD_HEADER_BYTES};
use ringfs_wire::restore::{End, Restore, Restores, push_node};
use ringfs_wire::session::{LinkRx, LinkTx};
use ringfs_wire::slot::SlotUse;
use std::collections::{HashMap, HashSet};
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};
use zerocopy::{FromBytes, IntoBytes};

mod requests;
mod session;
mod tree;

use session::serve;
pub use tree::big_byte;

pub const HELLO_TEXT: &[u8] = b"hello from the host\n";
pub const BIG_BYTES: usize = 5 << 20;
const EACH_FILE: [(&str, u64); 3] = [("hello", 2), ("big", 3), ("hang", 4)];
/// The node of `n0`.
const NUMBERED: u64 = 1000;

/// What the host grants and how it misbehaves.
#[derive(Clone, Debug)]
pub struct Terms {
    pub lanes: u16,
    pub conns: u16,
    pub slots: u16,
    pub features: u64,
    pub init_errno: u32,
    /// Offered beside what all hosts offer.
    pub init_flags: u64,
    /// What a GETATTR of the root is answered with; 0: it.
    pub root_errno: u32,
    /// Of files: what the kernel may keep of them.
    pub open_flags: u32,
    /// Seconds that the kernel may go on with a name.
    pub names_valid: u64,
    /// To a HELLO that resumes: `Some` refuses.
    pub refuses: Option<Reason>,
}

impl Default for Terms {
    fn default() -> Terms {
        let (lanes, conns, slots) = (8, 8, 1024);
        let (init_errno, init_flags, root_errno, names_valid, refuses) = (0, 0, 0, 0, None);
        let (features, open_flags) = (u64::MAX, fopen::DIRECT_IO);
        Terms {
            lanes,
            conns,
            slots,
            features,
            init_errno,
            init_flags,
            root_errno,
            open_flags,
            names_valid,
            refuses,
        }
    }
}

/// What the host has seen.
#[derive(Debug, Default)]
pub struct Seen {
    pub hellos: Vec<Hello>,
    /// HELLOs that resumed, and those that were refused.
    pub resumes: u64,
    pub refusals: u64,
    /// Requests executed, and those that came again: running, and with a kept reply.
    pub requests: u64,
    pub writes: u64,
    pub repeats_running: u64,
    pub repeats_ended: u64,
    pub hanging: Vec<(u8, SlotUse)>,
    pub cancels: u64,
    pub abandons: u64,
    pub forgets: Vec<ForgetOne>,
    /// The lanes whose records they were.
    pub forget_lanes: Vec<u8>,
    /// Replies that were lost by order.
    pub lost: u64,
    /// Bytes that came in while the host was told to be silent.
    pub unheard: u64,
    pub pings: u64,
    pub pongs: u64,
    /// Requests that were said to have been sent before.
    pub unsure: u64,
    pub goodbyes: u64,
    pub written: u64,
    pub faults: Vec<String>,
    pub closed: u64,
    /// Rebuilds begun, the last one still under way or not.
    pub rebuilds: Vec<Rebuild>,
    /// Lookups that the guest has of each node.
    pub lookups: HashMap<u64, i64>,
}

/// What a guest told of its session.
#[derive(Clone, Debug, Default)]
pub struct Rebuild {
    /// Node ids, with lookups and recipe.
    pub nodes: Vec<(u64, u64, Vec<u8>)>,
    /// Handles, with node, flags, and whether of a directory.
    pub handles: Vec<(u64, u64, u32, bool)>,
    pub records: u64,
    pub end: Option<End>,
}

/// The recipe of a node.
pub fn recipe(nodeid: u64) -> Vec<u8> {
    format!("where {nodeid} is").into_bytes()
}

/// How the host treats what comes and goes, from now on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mood {
    #[default]
    Fair,
    /// It executes, and its replies are lost.
    LosesReplies,
    /// The same, but to what comes again it replies.
    LosesFirstReplies,
    /// The same for replies that give a node alone: LOOKUP's.
    LosesEntries,
    /// The same for those to FORGETs.
    LosesForgets,
    /// The same for those to UNLINKs.
    LosesRemovals,
    /// The same for those to WRITEs that append, but not at the end of `big`.
    LosesLateAppends,
    /// Half of the next reply leaves, then its connection is cut.
    CutsReply,
    /// So many bytes of the next large reply leave, then its connection is cut.
    CutsLarge(usize),
    /// Large replies leave in pieces of so many bytes.
    Crumbles(usize),
    /// The next connection that brings something is cut before that is looked at, most likely in
    /// the middle of a large batch.
    CutsRequest,
    /// The next RESTORE is not taken, and its connection is cut.
    CutsRestore,
    /// The next RESTORE is refused.
    RefusesRestore,
    /// All connections are cut when the next WELCOME of one that resumes is due, which is lost.
    LosesWelcome,
    /// The next HELLO is refused for now.
    RefusesHello,
}

#[derive(Clone, Debug, Default)]
struct Slot {
    /// After a rebuild: whatever comes is the next one.
    is_new: bool,
    /// It only counts (LOOKUP, FORGET): what it did went with the daemon that did it.
    counts: bool,
    /// And so its last one does.
    runs_again: bool,
    next: u32,
    busy: bool,
    reply: Option<(u32, Vec<u8>)>,
    /// By which connection its request last came: the reply leaves by no other.
    came_by: u64,
}

struct Shared {
    terms: Mutex<Terms>,
    mood: Mutex<Mood>,
    seen: Mutex<Seen>,
    changed: Condvar,
    slots: Mutex<Vec<Vec<Slot>>>,
    /// The newest connection of each lane.
    conns: Mutex<HashMap<u8, Arc<Conn>>>,
    /// The number in the newest ticket.
    ticket: Mutex<u8>,
    /// The connection that the newest ticket was for: the one that the guest has shown last is good
    /// for it still.
    ticket_for: AtomicU64,
    ticket_shown: AtomicU64,
    epoch: AtomicU64,
    /// Of the next connection.
    serial: AtomicU64,
    /// The session has to be rebuilt: the slots that the next daemon knows.
    unknown: Mutex<Option<Vec<Vec<Slot>>>>,
    /// A rebuild is under way: what came on other connections than the first.
    held: Mutex<Option<Vec<Held>>>,
    /// Nodes whose recipes were sent.
    noted: Mutex<HashSet<u64>>,
    next_fh: AtomicU64,
    /// Slots whose next request was said to have been sent before.
    unsure: Mutex<HashSet<(u8, u16)>>,
    /// Names that were unlinked.
    removed: Mutex<HashSet<Vec<u8>>>,
}

type Held = (Arc<Conn>, RecordHeader, Vec<u8>);

struct Conn {
    tx: Mutex<(LinkTx, u64)>,
    stream: UnixStream,
    serial: u64,
    is_silent: AtomicBool,
    /// Another one has taken its place: what it brings counts no more.
    is_old: AtomicBool,
    /// Its number, once it has said HELLO.
    number: AtomicU64,
}

pub struct Host {
    pub path: PathBuf,
    shared: Arc<Shared>,
}

impl Host {
    pub fn start(dir: &Path, terms: Terms) -> Host {
        let path = dir.join("host.sock");
        let listener = UnixListener::bind(&path).expect("bind");
        let shared = Arc::new(Shared {
            terms: Mutex::new(terms),
            mood: Mutex::default(),
            ticket: Mutex::new(1),
            ticket_for: AtomicU64::new(u64::MAX),
            ticket_shown: AtomicU64::new(1),
            seen: Mutex::default(),
            changed: Condvar::new(),
            slots: Mutex::default(),
            conns: Mutex::default(),
            epoch: AtomicU64::new(3),
            serial: AtomicU64::new(0),
            unknown: Mutex::default(),
            held: Mutex::default(),
            noted: Mutex::default(),
            next_fh: AtomicU64::new(1),
            unsure: Mutex::default(),
            removed: Mutex::default(),
        });
        let accepting = Arc::clone(&shared);
        // It ends with the test's process.
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (Ok(stream), shared) = (stream, Arc::clone(&accepting)) else { return };
                std::thread::spawn(move || {
                    if let Err(fault) = serve(&shared, stream) {
                        shared.note(|seen| seen.faults.push(fault));
                    }
                    shared.note(|seen| seen.closed += 1);
                });
            }
        });
        Host { path, shared }
    }

    /// Waits until `look` finds something in what was seen.
    pub fn wait_for<T>(&self, what: &str, mut look: impl FnMut(&mut Seen) -> Option<T>) -> T {
        let deadline = Instant::now() + Duration::from_secs(20);
        let mut seen = self.shared.seen.lock().expect("seen");
        loop {
            if let Some(found) = look(&mut seen) {
                return found;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "{what} did not come: {seen:?}");
            seen = self.shared.changed.wait_timeout(seen, left).expect("seen").0;
        }
    }

    pub fn slots_in_use(&self) -> usize {
        self.shared.slots.lock().expect("slots").iter().flatten().filter(|slot| slot.busy).count()
    }

    /// Sends a record of that kind on every connection.
    pub fn say(&self, kind: u8, code: u32, body: &[u8]) {
        for conn in self.shared.conns.lock().expect("conns").values() {
            let header = RecordHeader { kind, code, ..Default::default() };
            conn.send(header, body, false);
        }
    }

    pub fn goodbye(&self, reason: Reason, text: &str) {
        self.say(Kind::Goodbye as u8, reason as u32, text.as_bytes());
    }

    /// Cuts every connection.
    pub fn cut(&self) {
        for conn in self.shared.conns.lock().expect("conns").values() {
            conn.cut();
        }
    }

    /// Cuts that of a lane.
    pub fn cut_lane(&self, lane: u8) {
        self.shared.conns.lock().expect("conns")[&lane].cut();
    }

    /// Another daemon is there, which does not know the session, and the slots only if it is told
    /// to. It is found out by a connection that is cut: that of `lane`, or all.
    pub fn restart(&self, knows_slots: bool, lane: Option<u8>) {
        let mut slots = self.shared.slots.lock().expect("slots").clone();
        if !knows_slots {
            let new = Slot { is_new: true, ..Slot::default() };
            slots.iter_mut().flatten().for_each(|slot| *slot = new.clone());
        }
        for slot in slots.iter_mut().flatten() {
            // Its requests in work died with the old one.
            slot.busy = false;
            slot.runs_again = slot.counts;
        }
        *self.shared.unknown.lock().expect("unknown") = Some(slots);
        self.shared.epoch.fetch_add(1, Ordering::SeqCst);
        let conns = self.shared.conns.lock().expect("conns");
        conns
            .iter()
            .filter(|(its, _)| lane.is_none_or(|lane| lane == **its))
            .for_each(|c| c.1.cut());
    }

    /// The connections that there are look alive and are dead.
    pub fn go_silent(&self) {
        for conn in self.shared.conns.lock().expect("conns").values() {
            conn.is_silent.store(true, Ordering::SeqCst);
        }
    }

    /// The greater part of a batch is lost on every connection, which go on.
    pub fn lose_a_tail(&self) {
        let kind = Kind::Notify as u8;
        for conn in self.shared.conns.lock().expect("conns").values() {
            conn.send_some(RecordHeader { kind, ..Default::default() }, &[0; 65536], 8192);
        }
    }

    /// What is no batch comes from every connection.
    pub fn babble(&self) {
        for conn in self.shared.conns.lock().expect("conns").values() {
            let _ = (&conn.stream).write_all(&[0x55; 64]);
        }
    }

    /// Nobody can connect any more, as long as what this gives lives.
    pub fn hide(&self) -> Hidden {
        let hidden = self.path.with_extension("hidden");
        std::fs::rename(&self.path, &hidden).expect("rename");
        Hidden { hidden, path: self.path.clone() }
    }

    pub fn set_mood(&self, mood: Mood) {
        *self.shared.mood.lock().expect("mood") = mood;
    }

    /// What HELLOs get from now on.
    pub fn grant(&self, terms: Terms) {
        *self.shared.terms.lock().expect("terms") = terms;
    }

    /// Whether HELLOs that resume are refused from now on.
    pub fn refuse(&self, reason: Option<Reason>) {
        self.shared.terms.lock().expect("terms").refuses = reason;
    }

    /// Answers a READ of `hang` with an errno.
    pub fn answer_hanging(&self, lane: u8, at: SlotUse, errno: u32) {
        self.shared.finish(lane, at, (errno, Vec::new()));
    }

    /// Answers it with data.
    pub fn give_hanging(&self, lane: u8, at: SlotUse, data: Vec<u8>) {
        self.shared.finish(lane, at, (0, data));
    }

    /// What no test may end with.
    pub fn assert_no_faults(&self) {
        let faults = self.wait_for("faults", |seen| Some(seen.faults.clone()));
        assert_eq!(faults, [""; 0]);
    }
}

/// A socket that has another name for a while.
pub struct Hidden {
    hidden: PathBuf,
    path: PathBuf,
}

impl Drop for Hidden {
    fn drop(&mut self) {
        let _ = std::fs::rename(&self.hidden, &self.path);
    }
}

/// No answer.
pub const HANG: u32 = u32::MAX;
/// What counts as large.
const LARGE_BYTES: usize = 64 << 10;
const ENOENT: u32 = 2;
const ENOSYS: u32 = 38;
