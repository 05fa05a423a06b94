//! What is counted and timed, as Prometheus, people and the log are told.

mod common;

use common::*;
use ringfs_wire::abi::{self, Opcode};
use std::collections::BTreeMap;
use std::io::{Read, Seek, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::process::Command;
use zerocopy::IntoBytes;

/// One HTTP request; the status line, and the body.
fn http(mut stream: impl Read + Write, request: &str) -> (String, String) {
    stream.write_all(request.as_bytes()).expect("ask");
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("an answer");
    let (head, body) = text.split_once("\r\n\r\n").expect("a head and a body");
    let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: "));
    assert_eq!(length.and_then(|length| length.parse().ok()), Some(body.len()));
    (head.lines().next().unwrap_or_default().into(), body.into())
}

/// Reads the text as strictly as it is defined: each family has HELP and TYPE before its lines,
/// no line comes twice, buckets add up.
fn parse(text: &str) -> BTreeMap<String, f64> {
    let mut values = BTreeMap::new();
    let mut family = String::new();
    for line in text.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            family = help.split(' ').next().expect("a name").into();
        } else if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) = kind.split_once(' ').expect("a name and a kind");
            assert_eq!(name, family, "{line}");
            assert!(["gauge", "counter", "histogram"].contains(&kind), "{line}");
            assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
        } else {
            let (name, value) = line.rsplit_once(' ').expect("a name and a value");
            assert!(name.starts_with(&family), "{line} is not of {family}");
            let value = value.parse().unwrap_or_else(|_| panic!("{line}"));
            assert!(values.insert(name.to_owned(), value).is_none(), "twice: {line}");
        }
    }
    values
}

const GET: &str = "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n";

#[test]
fn metrics_are_prometheus_text_over_http() {
    for engine in ["uring", "threads"] {
        let daemon = Daemon::start_as(engine, |program, share| {
            let mut command = Command::new(program);
            let at = share.parent().expect("a directory").join("m");
            command.arg(format!("--metrics=unix:{}", at.display()));
            command
        });
        let scrape = || {
            let stream = UnixStream::connect(daemon.path("m")).expect("the metrics socket");
            http(stream, GET)
        };
        // It has its mode before it listens, and listens after the control socket does.
        until("the metrics socket", || UnixStream::connect(daemon.path("m")).ok());
        let mode = std::fs::metadata(daemon.path("m")).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let mut guest = daemon.guest();
        let (node, fh) = guest.create("file").expect("create");
        for _ in 0..5 {
            assert_eq!(guest.write(node, fh, 0, &[7; 3000]), Ok(3000));
        }
        assert_eq!(guest.read(node, fh, 0, 1000).map(|data| data.len()), Ok(1000));
        assert_eq!(guest.lookup(1, "none"), Err(libc::ENOENT as u32));
        let (line, text) = scrape();
        assert_eq!(line, "HTTP/1.1 200 OK");
        let values = parse(&text);
        let share = "share=\"share\"";
        let operation = |name: &str, suffix: &str| {
            let name = format!("{{{share},operation=\"{name}\"}}");
            values[&format!("ringfsd_operation_duration_seconds_{suffix}{name}")]
        };
        assert_eq!(operation("write", "count"), 5.0);
        assert_eq!(operation("read", "count"), 1.0);
        assert!(operation("write", "sum") > 0.0 && operation("write", "sum") < 20.0);
        let check =
            |name: &str, expected: f64| assert_eq!(values.get(name), Some(&expected), "{name}");
        check(&format!("ringfsd_written_bytes_total{{{share}}}"), 15000.0);
        check(&format!("ringfsd_read_bytes_total{{{share}}}"), 1000.0);
        check(&format!("ringfsd_errors_total{{{share},errno=\"ENOENT\"}}"), 1.0);
        check(&format!("ringfsd_sessions{{{share}}}"), 1.0);
        check("ringfsd_sessions{share=\"ro\"}", 0.0);
        check(&format!("ringfsd_handles{{{share}}}"), 1.0);
        check(&format!("ringfsd_operations_in_flight{{{share}}}"), 0.0);
        check("ringfsd_connections", 1.0);
        check("ringfsd_resumes_total", 0.0);
        for name in ["ringfsd_open_fds", "ringfsd_max_fds", "ringfsd_pool_waiting"] {
            assert!(values.contains_key(name), "{name}");
        }
        let mut last = (String::new(), 0.0);
        for line in text.lines().filter(|line| line.contains("_bucket{")) {
            let (name, value) = line.rsplit_once(' ').expect("a value");
            let of = name.split(",le=").next().expect("labels").to_owned();
            let value: f64 = value.parse().expect("a number");
            assert!(of != last.0 || value >= last.1, "buckets add up: {line}");
            last = (of, value);
        }
        // Lines are bounded by the shares, whatever guests do.
        let others: Vec<_> = (0..10).map(|_| daemon.guest()).collect();
        assert_eq!(parse(&scrape().1).len(), values.len());
        drop((guest, others));
        daemon.stop_well();
    }
}

#[test]
fn limits_tell_what_they_are_and_what_they_did() {
    let daemon = Daemon::start_as("uring", |program, share| {
        let mut command = Command::new(program);
        let dir = share.parent().expect("a directory");
        command.arg(format!("--metrics=unix:{}", dir.join("m").display()));
        let limited = "ops=100,open-files=2,nodes=5";
        command.arg(format!("--share=limited={},{limited}", share.display()));
        command
    });
    let mut guest = daemon.mount("limited").expect("welcome");
    let made = (0..9).filter(|n| guest.create(&format!("file-{n}")).is_ok()).count();
    assert_eq!(made, 2);
    let delays = "ringfsd_limit_delays_total{share=\"limited\",limit=\"ops\"}";
    let mut asked = 9;
    // In one go, as a machine may be slower than the limit, and until it did not stand still.
    let values = until("a delay", || {
        (0..30).for_each(|_| _ = guest.start(Opcode::Lookup, 1, &name("none")));
        guest.flush();
        (0..30).for_each(|_| drop(guest.reply().expect("an answer")));
        asked += 30;
        let stream = UnixStream::connect(daemon.path("m")).ok()?;
        let values = parse(&http(stream, GET).1);
        (values[delays] >= 1.0).then_some(values)
    });
    let of = |name: &str, share: &str, limit: &str| {
        let line = format!("ringfsd_limit{name}{{share=\"{share}\",limit=\"{limit}\"}}");
        values.get(&line).copied()
    };
    assert_eq!(of("", "limited", "ops"), Some(100.0));
    assert_eq!(of("_refusals_total", "limited", "open-files"), Some(7.0));
    assert_eq!(of("_refusals_total", "limited", "nodes"), Some(0.0));
    assert_eq!(of("_refusals_total", "limited", "bytes"), None, "it is not set");
    assert_eq!(of("", "share", "ops"), None, "no limits");
    let delayed = values[delays];
    assert!(delayed <= f64::from(asked), "{delayed} of {asked}");
    assert!(of("_delay_seconds_total", "limited", "ops").expect("set") > 0.0);
    drop(guest);
    daemon.stop_well();
}

#[test]
fn whoever_scrapes_badly_is_answered_or_cut_off() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").expect("bind").local_addr().expect("a");
    let daemon = Daemon::start_as("uring", |program, _| {
        let mut command = Command::new(program);
        command.arg(format!("--metrics=tcp:{port}"));
        command
    });
    // It listens a moment after the control socket does.
    let connect = || until("the metrics port", || TcpStream::connect(port).ok());
    assert_eq!(http(connect(), GET).0, "HTTP/1.1 200 OK");
    let (line, _) = http(connect(), "GET /x HTTP/1.1\r\n\r\n");
    assert_eq!(line, "HTTP/1.1 404 Not Found");
    let (line, _) = http(connect(), "POST /metrics HTTP/1.1\r\n\r\n");
    assert_eq!(line, "HTTP/1.1 405 Method Not Allowed");
    let silent = connect();
    let mut endless = connect();
    let _ = endless.write_all(&[b'x'; 20_000]);
    drop(endless);
    assert_eq!(http(connect(), GET).0, "HTTP/1.1 200 OK");
    drop(silent);
    daemon.stop_well();
    let mut refused = Command::new(env!("CARGO_BIN_EXE_ringfsd"));
    let refused = refused.arg("--metrics=tcp:0.0.0.0:1").output().expect("it runs");
    assert_eq!(refused.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("can be reached by others"));
}

/// Memory for so many pages is not found in less than a millisecond.
const SLOW_BYTES: u64 = 128 << 20;

#[test]
fn a_slow_operation_is_told_with_where_it_was() {
    let dir = tempfile::tempdir_in("/dev/shm").expect("a directory in /dev/shm");
    let mut log = tempfile::tempfile().expect("a file");
    let daemon = Daemon::start_in(dir, "uring", |program, _| {
        let mut command = Command::new(program);
        command.args(["--slow-op=1", "--log-format=json", "--log=warn"]);
        command.stderr(log.try_clone().expect("dup"));
        command
    });
    let mut guest = daemon.mount("share").expect("a session");
    let (node, fh) = guest.create("big").expect("create");
    let fallocate = abi::FallocateIn { fh, length: SLOW_BYTES, ..Default::default() };
    let at = guest.start(Opcode::Fallocate, node, fallocate.as_bytes());
    guest.flush();
    assert_eq!(guest.reply().expect("a reply"), (at, Ok(Vec::new())));
    // What the guest calls it.
    let told = daemon.status();
    let session = told.sessions.first().expect("the session").id;
    let name = format!("{session}.0.{}.{}", at.slot, at.seq);
    let slow = told.slow.iter().find(|slow| slow.op == name).expect("it is told");
    assert_eq!((&*slow.opcode, &*slow.share, slow.session), ("FALLOCATE", "share", session));
    assert_eq!((slow.node, slow.path.as_deref()), (node, Some("/big")));
    assert!(slow.took_us >= 1000 && slow.waited_us <= slow.took_us, "{slow:?}");
    assert_eq!(slow.place, "pool");
    assert!(told.to_text(None).contains("/big"));
    drop(guest);
    daemon.stop_well();
    let mut text = String::new();
    log.rewind().and_then(|()| log.read_to_string(&mut text)).expect("the log");
    let lines = text.lines().map(|line| {
        serde_json::from_str::<serde_json::Value>(line).unwrap_or_else(|e| panic!("{e}: {line}"))
    });
    let line = lines.into_iter().find(|line| line["op"] == name.as_str()).expect("it is logged");
    assert_eq!((&line["message"], &line["level"]), (&"slow operation".into(), &"WARN".into()));
    assert_eq!((&line["share"], &line["path"]), (&"share".into(), &"/big".into()));
}
