//! Small messages that are sent back, over Unix sockets: received one by one, as the shard does it,
//! against one multishot receive a connection into buffers that the ring was given.
//!
//! Both ways asleep, and with looks before a sleep: recv(2) on each connection there, a look at the
//! ring's memory here, and an enter where that says that something has come.

#![allow(unsafe_code, reason = "receives carry pointers into buffers that the function owns")]

use super::{Measured, RUN, abort, rate, ring, rounds};
use anyhow::{Context, Result};
use io_uring::{IoUring, cqueue, opcode, types};
use rustix::net::RecvFlags;
use std::io::{Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

const MESSAGE: usize = 136;
const BUFFER: usize = 64 << 10;
const CONNECTIONS: [usize; 3] = [1, 4, 16];
const LOOKS: u32 = 100;
/// Given to the ring: more than there are messages in flight.
const GIVEN: u16 = 32;
const GROUP: u16 = 0;

/// One by one and multishot, asleep and with looks.
pub fn compare() -> Result<()> {
    println!("\n{MESSAGE} bytes sent back, k/s one by one, and multishot : that");
    println!("{:>11} {:>7}   {:<18} {:>7}", "connections", "asleep", "", "looks");
    for count in CONNECTIONS {
        let measured: Measured<4> = rounds(|who| {
            let looks = if who & 2 == 0 { 0 } else { LOOKS };
            echo(count, if who & 1 == 0 { one_by_one } else { multishot }, looks)
        })?;
        let ([asleep, _, looks, _], ratio) = (measured.rates, measured.ratio(1, 0));
        let with_looks = measured.ratio(3, 2);
        println!("{count:>11} {asleep:>7.0}   {ratio:<18} {looks:>7.0}   {with_looks}");
    }
    Ok(())
}

type Server = fn(&[UnixStream], u32) -> Result<()>;

/// One message in flight on each connection, all sent before the first is received.
fn echo(count: usize, server: Server, looks: u32) -> Result<f64> {
    let mut ours = Vec::new();
    let mut theirs = Vec::new();
    for _ in 0..count {
        let (one, other) = UnixStream::pair()?;
        ours.push(one);
        theirs.push(other);
    }
    std::thread::scope(|scope| {
        let serving = scope.spawn(move || server(&theirs, looks));
        let (start, mut echoed, mut message) = (Instant::now(), 0, [7; MESSAGE]);
        while start.elapsed() < RUN {
            for socket in &mut ours {
                socket.write_all(&message)?;
            }
            for socket in &mut ours {
                socket.read_exact(&mut message)?;
                echoed += 1;
            }
        }
        drop(ours);
        let rate = rate(echoed, start)?;
        serving.join().map_err(|_| anyhow::anyhow!("the server panicked"))??;
        Ok(rate)
    })
}

fn one_by_one(sockets: &[UnixStream], looks: u32) -> Result<()> {
    let mut buffers = vec![vec![0; BUFFER]; sockets.len()];
    let mut uring = ring()?;
    let mut waiting: Vec<usize> = (0..sockets.len()).collect();
    let (mut open, mut done) = (sockets.len(), Vec::new());
    while open > 0 {
        for look in 0..looks {
            waiting.retain(|&key| {
                let flags = RecvFlags::DONTWAIT;
                let received = rustix::net::recv(&sockets[key], &mut buffers[key][..], flags);
                received.map(|(n, _)| done.push((key, n))).is_err()
            });
            if peek(&mut uring) || !done.is_empty() {
                break;
            }
            if look + 1 < looks {
                std::thread::yield_now();
            }
        }
        if done.is_empty() && uring.completion().is_empty() {
            for key in waiting.drain(..) {
                let fd = types::Fd(sockets[key].as_raw_fd());
                let (to, len) = (buffers[key].as_mut_ptr(), BUFFER as u32);
                let receive = opcode::Recv::new(fd, to, len).build().user_data(key as u64);
                // SAFETY: socket and buffer outlive the receive: each key has one, and the function
                // returns when all have ended or aborts the process.
                unsafe { uring.submission().push(&receive) }
                    .unwrap_or_else(|_| abort("the ring is full"));
            }
            uring.submit_and_wait(1).unwrap_or_else(|_| abort("the ring cannot be entered"));
        }
        done.extend(uring.completion().map(|cqe| (cqe.user_data() as usize, length(&cqe))));
        for (key, n) in done.drain(..) {
            if n == 0 {
                open -= 1;
                continue;
            }
            send_back(&sockets[key], &buffers[key][..n]);
            waiting.push(key);
        }
    }
    Ok(())
}

fn multishot(sockets: &[UnixStream], looks: u32) -> Result<()> {
    let mut given = Given::new();
    let mut uring = ring()?;
    given.register(&uring)?;
    (0..sockets.len()).for_each(|key| receive_on(&mut uring, sockets, key));
    let (mut open, mut done) = (sockets.len(), Vec::new());
    while open > 0 {
        let mut found = false;
        for look in 0..looks {
            found = peek(&mut uring);
            if found {
                break;
            }
            if look + 1 < looks {
                std::thread::yield_now();
            }
        }
        if !found {
            uring.submit_and_wait(1).unwrap_or_else(|_| abort("the ring cannot be entered"));
        }
        done.extend(uring.completion());
        for cqe in done.drain(..) {
            let (key, n) = (cqe.user_data() as usize, length(&cqe));
            if let Some(id) = cqueue::buffer_select(cqe.flags()) {
                send_back(&sockets[key], &given.memory[usize::from(id)][..n]);
                given.give_back(id);
            }
            match n {
                0 => open -= 1,
                _ if !cqueue::more(cqe.flags()) => receive_on(&mut uring, sockets, key),
                _ => {}
            }
        }
    }
    Ok(())
}

fn receive_on(uring: &mut IoUring, sockets: &[UnixStream], key: usize) {
    let fd = types::Fd(sockets[key].as_raw_fd());
    let receive = opcode::RecvMulti::new(fd, GROUP).build().user_data(key as u64);
    // SAFETY: it points nowhere: what it writes to are the buffers of the group.
    unsafe { uring.submission().push(&receive) }.unwrap_or_else(|_| abort("the ring is full"));
}

/// Whether something has completed, as the shard's ring finds it out.
fn peek(uring: &mut IoUring) -> bool {
    let queue = uring.submission();
    let is_due = !queue.is_empty() || queue.taskrun() || queue.cq_overflow();
    drop(queue);
    if is_due {
        let zero = types::Timespec::from(Duration::ZERO);
        let _ = uring.submitter().submit_with_args(1, &types::SubmitArgs::new().timespec(&zero));
    }
    !uring.completion().is_empty()
}

fn length(cqe: &cqueue::Entry) -> usize {
    usize::try_from(cqe.result()).unwrap_or_else(|_| abort("a receive failed"))
}

fn send_back(mut socket: &UnixStream, message: &[u8]) {
    socket.write_all(message).unwrap_or_else(|_| abort("a send failed"));
}

#[repr(C, align(4096))]
struct Entries([MaybeUninit<types::BufRingEntry>; GIVEN as usize]);

/// Buffers that the ring receives into, and the queue that gives them to it.
struct Given {
    entries: Box<Entries>,
    memory: Vec<Vec<u8>>,
    tail: u16,
}

impl Given {
    fn new() -> Given {
        let entries = Box::new(Entries([const { MaybeUninit::zeroed() }; GIVEN as usize]));
        Given { entries, memory: vec![vec![0; BUFFER]; GIVEN.into()], tail: 0 }
    }

    /// Before the first use; what is given must be dropped after the ring.
    fn register(&mut self, uring: &IoUring) -> Result<()> {
        let at = self.entries.0.as_ptr() as u64;
        // SAFETY: entries and memory lie still, and are dropped after the ring.
        unsafe { uring.submitter().register_buf_ring_with_flags(at, GIVEN, GROUP, 0) }
            .context("a ring of buffers (Linux 5.19)")?;
        (0..GIVEN).for_each(|id| self.give_back(id));
        Ok(())
    }

    fn give_back(&mut self, id: u16) {
        let buffer = &mut self.memory[usize::from(id)];
        // SAFETY: all zero is a value of an entry.
        let entry = unsafe { self.entries.0[usize::from(self.tail % GIVEN)].assume_init_mut() };
        entry.set_addr(buffer.as_mut_ptr() as u64);
        entry.set_len(BUFFER as u32);
        entry.set_bid(id);
        self.tail = self.tail.wrapping_add(1);
        let first = self.entries.0.as_mut_ptr().cast();
        // SAFETY: the queue's tail lies in its first entry; the kernel only reads it.
        let tail = unsafe { AtomicU16::from_ptr(types::BufRingEntry::tail(first).cast_mut()) };
        tail.store(self.tail, Ordering::Release);
    }
}
