//! What parent and worker tell each other: whole messages over one socket, with fds beside them.
//!
//! The parent is outside of the sandbox and believes nothing that the worker says: of the worker it
//! takes only that it is ready, or cannot serve, and before it has had a guest what it lacks, in
//! bounded bytes. The worker trusts its parent.

use crate::config::ShareConfig;
use crate::status::ConfigState;
use rustix::io::{Errno, IoSlice, IoSliceMut, retry_on_intr};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

/// A message has at most so many bytes.
const MESSAGE_BYTES_MAX: usize = 160 << 10;

/// From the parent to the worker.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToWorker {
    /// The worker has its parent, and may begin.
    Begin,
    /// A guest has connected; with the stream.
    Guest {
        /// The peer, for people.
        peer: String,
        /// See [`crate::accept::Accepted::owner`].
        owner: u64,
        /// See [`crate::accept::Accepted::offers`].
        offers: Vec<String>,
    },
    /// Somebody has connected to the control socket; with the stream.
    Control,
    /// Somebody wants metrics; with the stream.
    Metrics,
    /// From which time on a request is slow; 0: none is.
    Slow(Duration),
    /// A share is new, or is to be served in another way from the next mount on.
    Share {
        /// What guests call it.
        name: String,
        /// How it is served.
        config: ShareConfig,
        /// Which directory of the worker's root it is; `None`: its fd is with the message.
        index: Option<usize>,
        /// See [`crate::share::ShareRoot`].
        hidden: bool,
    },
    /// A share is no more.
    ShareGone {
        /// What guests called it.
        name: String,
        /// Those who have it lose it; else nobody new gets it.
        ends_sessions: bool,
    },
    /// What is in force, for whoever asks.
    Config(ConfigState),
    /// Say goodbye to all guests and end.
    Stop,
}

/// What a worker may lack of what it was to have.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Part {
    /// The share of this name.
    Share(String),
    /// The state directory.
    StateDir,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Part::Share(name) => write!(f, "share {name}"),
            Part::StateDir => f.write_str("state-dir"),
        }
    }
}

/// From the worker to the parent.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToParent {
    /// The worker's process, as the one that made it sees it.
    Pid(i32),
    /// It will serve without this; said before [`ToParent::Ready`], and why.
    Lacks(Part, String),
    /// It serves.
    Ready,
    /// It cannot serve, and ends.
    Failed(String),
}

/// One end.
#[derive(Debug)]
pub struct Channel(OwnedFd);

impl Channel {
    /// Both ends.
    ///
    /// # Errors
    /// What socketpair says.
    pub fn pair() -> Result<(Channel, Channel), Errno> {
        let kind = (AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC);
        let (one, other) = rustix::net::socketpair(kind.0, kind.1, kind.2, None)?;
        Ok((Channel(one), Channel(other)))
    }

    /// Sends one message; `AGAIN`: the other end has not taken what was sent before.
    ///
    /// # Errors
    /// What sendmsg says; `PIPE`: there is no other end.
    pub fn send(&self, message: &impl Serialize, fd: Option<BorrowedFd<'_>>) -> Result<(), Errno> {
        let bytes = serde_json::to_vec(message).map_err(|_| Errno::INVAL)?;
        if bytes.len() > MESSAGE_BYTES_MAX {
            return Err(Errno::MSGSIZE);
        }
        let fds: Vec<_> = fd.into_iter().collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(&fds));
        }
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let bytes = [IoSlice::new(&bytes)];
        retry_on_intr(|| rustix::net::sendmsg(&self.0, &bytes, &mut control, flags)).map(drop)
    }

    /// Waits for a message, and the fd that came with it; `None` when the other end is gone.
    ///
    /// # Errors
    /// What recvmsg says; `BADMSG`: it is no message.
    pub fn receive<M: DeserializeOwned>(&self) -> Result<Option<(M, Option<OwnedFd>)>, Errno> {
        let mut bytes = vec![0; MESSAGE_BYTES_MAX];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            let mut into = [IoSliceMut::new(&mut bytes)];
            let flags = RecvFlags::CMSG_CLOEXEC;
            match rustix::net::recvmsg(&self.0, &mut into, &mut control, flags) {
                Err(Errno::INTR) => {}
                other => break other?,
            }
        };
        let fd = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        if received.bytes == 0 {
            return Ok(None);
        }
        if received.flags.contains(ReturnFlags::TRUNC) {
            return Err(Errno::BADMSG);
        }
        let message = serde_json::from_slice(&bytes[..received.bytes]);
        message.map(|message| Some((message, fd))).map_err(|_| Errno::BADMSG)
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_arrive_whole_with_their_fds() {
        let (parent, worker) = Channel::pair().expect("a pair");
        let (ours, theirs) = rustix::pipe::pipe().expect("a pipe");
        let guest = ToWorker::Guest { peer: "somebody".into(), owner: u64::MAX, offers: vec![] };
        parent.send(&guest, Some(theirs.as_fd())).expect("sent");
        parent.send(&ToWorker::Stop, None).expect("sent");
        drop(theirs);
        let (message, fd) = worker.receive().expect("received").expect("a message");
        assert!(
            matches!(message, ToWorker::Guest { peer, owner: u64::MAX, .. } if peer == "somebody")
        );
        rustix::io::write(fd.expect("an fd"), b"x").expect("the pipe's end");
        assert_eq!(rustix::io::read(&ours, &mut [0; 4]), Ok(1));
        let (message, fd) = worker.receive().expect("received").expect("a message");
        assert!(matches!((message, fd), (ToWorker::Stop, None)));
        worker.send(&"no such message", None).expect("sent");
        assert_eq!(parent.receive::<ToParent>().err(), Some(Errno::BADMSG));
        drop(parent);
        assert!(worker.receive::<ToWorker>().expect("the end").is_none());
        assert_eq!(worker.send(&ToParent::Ready, None), Err(Errno::PIPE));
    }

    #[test]
    fn who_does_not_read_is_not_waited_for() {
        let (parent, _worker) = Channel::pair().expect("a pair");
        let mut sent = 0;
        while parent.send(&ToWorker::Control, None).is_ok() {
            sent += 1;
            assert!(sent < 1 << 20);
        }
        assert_eq!(parent.send(&ToWorker::Control, None), Err(Errno::AGAIN));
    }
}
