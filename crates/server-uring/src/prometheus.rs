//! Metrics as Prometheus reads them: text over HTTP, on a Unix socket or a local TCP port.
//!
//! Invariant: the number of lines is bounded by the shares, not by guests: no label names a
//! session, a peer or a path. Who asks is bounded in bytes and time, as on the control socket.

use crate::metrics::{ShareTotals, bound_ns};
use crate::status::{LimitStatus, OperationStatus, Status};
use crate::worker::Counters;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// A request has at most so many bytes before its body, which is not read.
const REQUEST_BYTES_MAX: usize = 8 << 10;
/// And takes at most so long.
const REQUEST_LIMIT: Duration = Duration::from_secs(2);

/// Answers one HTTP request on a stream of any kind.
pub fn serve(socket: OwnedFd, counters: &Counters) {
    let until = Instant::now() + REQUEST_LIMIT;
    // Reading and writing wait, and not for ever.
    let left = Some(REQUEST_LIMIT);
    let _ = rustix::io::ioctl_fionbio(&socket, false);
    let _ = rustix::net::sockopt::set_socket_timeout(&socket, RECV, left);
    let _ = rustix::net::sockopt::set_socket_timeout(&socket, SEND, left);
    let mut stream = File::from(socket);
    if let Err(error) = answer(&mut stream, counters, until) {
        tracing::debug!(%error, "cannot answer on the metrics socket");
    }
}

const RECV: rustix::net::sockopt::Timeout = rustix::net::sockopt::Timeout::Recv;
const SEND: rustix::net::sockopt::Timeout = rustix::net::sockopt::Timeout::Send;

fn answer(stream: &mut File, counters: &Counters, until: Instant) -> io::Result<()> {
    let mut head = Vec::new();
    while !head.windows(4).any(|end| end == b"\r\n\r\n") {
        let mut chunk = [0; 1024];
        let n = stream.read(&mut chunk)?;
        head.extend_from_slice(&chunk[..n]);
        if n == 0 || head.len() > REQUEST_BYTES_MAX || Instant::now() > until {
            return Ok(());
        }
    }
    let line = head.split(|&byte| byte == b'\r').next().unwrap_or_default();
    let (status, kind, body) = match line {
        line if line.starts_with(b"GET /metrics ") || line.starts_with(b"GET / ") => {
            ("200 OK", "text/plain; version=0.0.4; charset=utf-8", text(counters))
        }
        line if line.starts_with(b"GET ") => {
            ("404 Not Found", "text/plain", "metrics are at /metrics\n".into())
        }
        _ => ("405 Method Not Allowed", "text/plain", "GET /metrics\n".into()),
    };
    let len = body.len();
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len}\r\n\
         Connection: close\r\n\r\n{body}"
    )
}

/// All metrics now.
pub fn text(counters: &Counters) -> String {
    let status = counters.status();
    let mut out = Text(String::new());
    daemon(&mut out, &status);
    for (name, value) in counters.totals().numbers {
        if let Some((_, kind, help)) = NUMBERS.iter().find(|(known, ..)| *known == name) {
            let suffix = if *kind == "counter" { "_total" } else { "" };
            out.family(&format!("ringfsd_{name}{suffix}"), kind, help);
            out.line(&format!("ringfsd_{name}{suffix}"), &[], value);
        }
    }
    shares(&mut out, &status, counters);
    out.0
}

/// Which of the daemon's counters have a place here; those of shares are more exact.
const NUMBERS: &[(&str, &str, &str)] = &[
    ("sessions_detached", "gauge", "Sessions without any connection, in their grace time."),
    ("connections", "gauge", "Connections of guests."),
    ("buffers_in_use", "gauge", "Buffers that are out."),
    ("ring_in_flight", "gauge", "Operations that the rings have in flight."),
    ("replies_put_off", "gauge", "Large replies that wait until the peer has room."),
    ("starved", "gauge", "Connections that wait for a large buffer."),
    ("pool_threads", "gauge", "Threads for calls that may block."),
    ("pool_running", "gauge", "Jobs that run on them."),
    ("pool_waiting", "gauge", "Jobs that wait for them."),
    ("nodes_with_fd", "gauge", "Inodes known to guests that hold a file descriptor."),
    ("batches_in", "counter", "Batches received."),
    ("batches_out", "counter", "Batches sent."),
    ("records_out", "counter", "Records sent."),
    ("protocol_errors", "counter", "Damaged batches and violations of the protocol."),
    ("resumes", "counter", "Connections that went on where another one was cut."),
    ("rebuilds", "counter", "Sessions rebuilt as their guests told."),
    ("replayed", "counter", "Requests that came again and were answered by the kept reply."),
    ("reruns", "counter", "Requests that came again and ran again."),
    ("abandoned", "counter", "Requests whose reply nobody takes."),
    ("recovered", "counter", "Requests that a dead daemon had begun."),
    ("ambiguous", "counter", "Those of them of which nobody could tell what became."),
    ("wanted_back", "counter", "Nodes that guests were asked to give back."),
    ("clones_refused", "counter", "Connections refused because the one that they name lives."),
];

fn daemon(out: &mut Text, status: &Status) {
    out.family("ringfsd_build_info", "gauge", "The daemon's version, as a label.");
    out.line("ringfsd_build_info", &[("version", &status.version)], 1);
    out.family("ringfsd_uptime_seconds", "gauge", "Since the daemon's start.");
    out.line("ringfsd_uptime_seconds", &[], status.up_s);
    out.family("ringfsd_open_fds", "gauge", "Open file descriptors.");
    out.line("ringfsd_open_fds", &[], status.fds);
    out.family("ringfsd_max_fds", "gauge", "File descriptors that the daemon may open.");
    out.line("ringfsd_max_fds", &[], status.fds_max);
    let name = "ringfsd_config_last_reload_successful";
    out.family(name, "gauge", "Whether the last reload was taken (1 before the first).");
    out.line(name, &[], u64::from(status.config.failed_unix_s.is_none()));
    let name = "ringfsd_config_last_reload_success_timestamp_seconds";
    out.family(name, "gauge", "When the configuration in force was loaded.");
    out.line(name, &[], status.config.loaded_unix_s);
}

fn shares(out: &mut Text, status: &Status, counters: &Counters) {
    let shares: Vec<(&str, ShareTotals)> = status
        .shares
        .iter()
        .map(|share| (&*share.name, counters.share(&share.name).unwrap_or_default()))
        .collect();
    let of = |name: &str, pick: fn(&crate::status::SessionStatus) -> u64| {
        status.sessions.iter().filter(|one| one.share == name).map(pick).sum::<u64>()
    };
    let mut gauge = |name: &str, help: &str, pick: fn(&crate::status::SessionStatus) -> u64| {
        out.family(name, "gauge", help);
        for (share, _) in &shares {
            out.line(name, &[("share", share)], of(share, pick));
        }
    };
    gauge("ringfsd_sessions", "Sessions.", |_| 1);
    gauge("ringfsd_operations_in_flight", "Requests being executed.", |one| one.in_flight);
    gauge("ringfsd_nodes", "Inodes known to guests.", |one| one.nodes);
    gauge("ringfsd_handles", "Files and directories that guests have open.", |one| one.handles);
    let mut counter = |name: &str, help: &str, pick: fn(&ShareTotals) -> u64| {
        out.family(name, "counter", help);
        for (share, totals) in &shares {
            out.line(name, &[("share", share)], pick(totals));
        }
    };
    counter("ringfsd_read_bytes_total", "Bytes of files given to guests.", |t| t.bytes_read);
    counter("ringfsd_written_bytes_total", "Bytes that guests wrote.", |t| t.bytes_written);
    let name = "ringfsd_slow_operations_total";
    counter(name, "Requests that took longer than --slow-op.", |t| t.slow);
    limits(out, status);
    out.family("ringfsd_errors_total", "counter", "Requests answered with an errno.");
    for (share, totals) in &shares {
        for (errno, times) in &totals.errors {
            let labels = [("share", *share), ("errno", &*errno_name(*errno))];
            out.line("ringfsd_errors_total", &labels, *times);
        }
    }
    let help = "Time from when a request is taken up until its reply is made.";
    out.family("ringfsd_operation_duration_seconds", "histogram", help);
    for (share, totals) in &shares {
        for operation in &totals.operations {
            histogram(out, share, operation);
        }
    }
}

/// Of limits that are set or were met.
fn limits(out: &mut Text, status: &Status) {
    let mut family = |name: &str, kind: &str, help: &str, pick: fn(&LimitStatus) -> String| {
        out.family(name, kind, help);
        for share in &status.shares {
            for limit in &share.limits {
                out.line(name, &[("share", &*share.name), ("limit", &*limit.name)], pick(limit));
            }
        }
    };
    let help = "What the limit is (0: not set any more).";
    family("ringfsd_limit", "gauge", help, |limit| limit.amount.to_string());
    let name = "ringfsd_limit_delays_total";
    family(name, "counter", "Requests that waited for it.", |limit| limit.delayed.to_string());
    let name = "ringfsd_limit_delay_seconds_total";
    family(name, "counter", "How long they waited.", |limit| seconds(limit.delayed_us * 1000));
    let name = "ringfsd_limit_refusals_total";
    family(name, "counter", "ENFILE for it.", |limit| limit.refused.to_string());
}

fn histogram(out: &mut Text, share: &str, operation: &OperationStatus) {
    let labels = [("share", share), ("operation", &*operation.name)];
    let mut sum = 0;
    for (bucket, count) in operation.buckets.iter().enumerate() {
        sum += count;
        let le = bound_ns(bucket).map_or("+Inf".into(), seconds);
        let labels = [labels[0], labels[1], ("le", &*le)];
        out.line("ringfsd_operation_duration_seconds_bucket", &labels, sum);
    }
    let total = seconds(operation.sum_ns);
    out.line("ringfsd_operation_duration_seconds_sum", &labels, total);
    out.line("ringfsd_operation_duration_seconds_count", &labels, sum);
}

/// Exactly, without floating point.
fn seconds(ns: u64) -> String {
    format!("{}.{:09}", ns / 1_000_000_000, ns % 1_000_000_000)
}

/// The text, family by family.
struct Text(String);

impl Text {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn line(&mut self, name: &str, labels: &[(&str, &str)], value: impl std::fmt::Display) {
        let labels = labels.iter().map(|(key, value)| {
            let value = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            format!("{key}=\"{value}\"")
        });
        let labels = labels.collect::<Vec<_>>().join(",");
        let _ = match labels.is_empty() {
            true => writeln!(self.0, "{name} {value}"),
            false => writeln!(self.0, "{name}{{{labels}}} {value}"),
        };
    }
}

/// Those that file systems answer with; others by their number.
fn errno_name(errno: u32) -> String {
    const NAMES: &[(u32, &str)] = &[
        (1, "EPERM"),
        (2, "ENOENT"),
        (4, "EINTR"),
        (5, "EIO"),
        (9, "EBADF"),
        (11, "EAGAIN"),
        (12, "ENOMEM"),
        (13, "EACCES"),
        (16, "EBUSY"),
        (17, "EEXIST"),
        (18, "EXDEV"),
        (20, "ENOTDIR"),
        (21, "EISDIR"),
        (22, "EINVAL"),
        (23, "ENFILE"),
        (24, "EMFILE"),
        (25, "ENOTTY"),
        (26, "ETXTBSY"),
        (27, "EFBIG"),
        (28, "ENOSPC"),
        (30, "EROFS"),
        (31, "EMLINK"),
        (34, "ERANGE"),
        (36, "ENAMETOOLONG"),
        (38, "ENOSYS"),
        (39, "ENOTEMPTY"),
        (40, "ELOOP"),
        (61, "ENODATA"),
        (75, "EOVERFLOW"),
        (95, "EOPNOTSUPP"),
        (110, "ETIMEDOUT"),
        (116, "ESTALE"),
        (122, "EDQUOT"),
    ];
    let known = NAMES.iter().find(|(number, _)| *number == errno);
    known.map_or_else(|| errno.to_string(), |(_, name)| (*name).to_owned())
}
