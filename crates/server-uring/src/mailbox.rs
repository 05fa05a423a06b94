//! What other threads tell a shard. The only queue between threads: filled under a lock, announced
//! by an eventfd that the shard's ring waits on.

use crate::greet::Newcomer;
use crate::pool::Done;
use ringfs_wire::hello::Reason;
use rustix::event::{EventfdFlags, eventfd};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

/// A message to a shard.
pub enum Mail {
    /// Somebody said HELLO, whose connection is this shard's or will be.
    Join(Box<Newcomer>),
    /// Something is new for a connection that this shard may have.
    Of {
        /// Of which session.
        session: u64,
        /// Which of its connections.
        conn: u16,
        /// What it is.
        news: News,
    },
    /// A pool job is done.
    Done(Done),
    /// Say goodbye to everybody and end.
    Shutdown,
}

/// What a connection is told by those who see its whole session.
#[derive(Clone, Copy, Debug)]
pub enum News {
    /// The session has ended.
    End(Reason),
    /// Somebody has come in the place of another connection of the session: this one's peer is to
    /// be asked as well whether it lives.
    Ask,
    /// Somebody wants it to be joined anew: the socket goes, the tables stay.
    Cut,
    /// The session is rebuilt: there is all that its requests need.
    Restored,
}

/// One shard's mailbox. Its length is bounded by connections and slots.
pub struct Mailbox {
    mail: Mutex<Vec<Mail>>,
    event: Arc<OwnedFd>,
}

impl Mailbox {
    /// An empty one.
    pub fn new() -> rustix::io::Result<Arc<Mailbox>> {
        let event = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
        Ok(Arc::new(Mailbox { mail: Mutex::default(), event }))
    }

    /// Readable when there is mail.
    pub fn event(&self) -> Arc<OwnedFd> {
        self.event.clone()
    }

    /// Leaves a message.
    pub fn post(&self, mail: Mail) {
        let mut queue = self.mail.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        queue.push(mail);
        if queue.len() == 1 {
            // The counter cannot overflow: it is written once between two calls of `take`.
            let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
        }
    }

    /// Takes all that is there.
    pub fn take(&self) -> Vec<Mail> {
        std::mem::take(&mut *self.mail.lock().unwrap_or_else(|poisoned| poisoned.into_inner()))
    }
}
