//! How a mount begins: from nothing, or from what a client has left that died.
//!
//! Invariant: nothing is mounted before the daemon has granted the share; what fails from then on
//! drops the mount, which unmounts.

use crate::conn::{Conn, ConnRx};
use crate::connector::Terms;
use crate::handshake::{self, join};
use crate::keep::{Keep, LaneKeep, Places};
use crate::known::Known;
use crate::lane::Lane;
use crate::life::Parts;
use crate::mount_cmd::{Failure, Request, system};
use crate::options::{Options, cache_word};
use crate::resume::Resume;
use crate::rings::{Rings, with_causes};
use crate::service::{HandedOver, Service};
use crate::session::{End, Session, kernel_stores};
use crate::status::{self, Facts, Granted, unix_now_s};
use crate::takeover::{self, Taken, TakeoverError};
use crate::transport::{Address, Socket};
use fuser_fork::device::{DEVICE_PATH, Device};
use fuser_fork::init::Limits;
use fuser_fork::mount::{Mount, mount};
use fuser_fork::reader::Clones;
use ringfs_wire::abi;
use ringfs_wire::hello::{
    Hello, Reason, Ticket, VERSION_MAX, VERSION_MIN, Welcome, feature, mount_flag,
};
use rustix::io::Errno;
use std::io;
use std::sync::Arc;

/// From nothing: the session, the mount, the lanes' clones and connections.
pub fn start(request: &Request, service: Service) -> Result<Parts, Failure> {
    let rings = Rings::wished(&request.options);
    let hello = hello(request, rings.extra_lanes(request.options.lanes()));
    let address = &request.target.address;
    let ((first, first_rx, welcome), name) = connect(address, &hello)?;
    let mut conns = Joined(vec![(first, first_rx)]);
    let (device, mount) = mount(&request.mountpoint, &request.options.mount)?;
    // If we die, the keeper unmounts.
    service.tell_mounted(mount.identity(), mount.mountpoint().as_os_str())?;
    // A lane has a clone and a connection of its own.
    let wanted = welcome.lanes.min(welcome.conns);
    let clones = Clones::open(device, usize::from(wanted));
    let newest = join_others(&mut conns, address, &hello, welcome, clones.devices().len())?;
    let mut facts = facts(request, &mount, &welcome, &clones);
    let has_restore = welcome.features & feature::RESTORE != 0;
    let alone_why = match (request.options.keep, rings.are_planned(), has_restore) {
        (false, _, _) => Some("nokeep"),
        (_, true, _) => Some("frames come by rings"),
        (_, _, false) => Some("the daemon cannot have it rebuilt"),
        (true, false, true) => None,
    };
    let (keep, places, known) = make_keep(alone_why.is_none(), has_restore);
    facts.alone_why = alone_why.or(Some("no memory file")).map(str::to_owned);
    let lanes = make_lanes(&clones, welcome.slots, places).map_err(system("set up the lanes"))?;
    lanes.iter().for_each(|lane| lane.is_of(name));
    if let Some(why) = &facts.lanes.why {
        let (got, asked) = (facts.lanes.got, facts.lanes.asked);
        tracing::warn!(got, asked, why, "fewer lanes than asked for");
    }
    let resume = Resume::new(std::mem::take(&mut conns.0), request.options.soft);
    let hello_lanes = hello.lanes;
    let mut terms = Terms::new(address, hello, newest, request.options.strict);
    if let Some(keep) = &keep {
        keep.change(|kept| {
            (kept.lanes, kept.slots) = (lanes.len() as u32, welcome.slots.into());
            kept.asked_lanes = hello_lanes.into();
            (kept.mount_id, kept.dev_minor) = mount.identity().unwrap_or_default();
            kept.since_unix_s = facts.connected_since_unix_s;
        });
        terms = terms.keeping(Arc::clone(keep));
    }
    let session = Session::new(lanes, resume, known, limits(&request.options))
        .map_err(system("set up the session"))?;
    Ok(Parts { session, service, keep, terms, rings, facts, mount })
}

/// The connections of the other lanes; the newest WELCOME.
fn join_others(
    conns: &mut Joined,
    address: &Address,
    hello: &Hello,
    first: Welcome,
    lanes: usize,
) -> Result<Welcome, Failure> {
    let mut newest = first;
    for conn in 1..lanes as u16 {
        let hello =
            Hello { ticket: newest.ticket, epoch_seen: newest.epoch, conn, ..hello.clone() };
        let ((conn, half, welcome), _) = connect(address, &hello)?;
        conns.0.push((conn, half));
        newest = welcome;
    }
    Ok(newest)
}

fn make_lanes(clones: &Clones, slots: u16, places: Vec<LaneKeep>) -> io::Result<Vec<Lane>> {
    let mut places = places.into_iter();
    let lanes = clones.devices().iter().enumerate().map(|(index, device)| {
        device.set_nonblocking(true).map_err(io::Error::other)?;
        let lane = Lane::new(index as u8, Arc::clone(device), slots)?;
        Ok(match places.next() {
            Some(place) => lane.keeping(place),
            None => lane,
        })
    });
    lanes.collect()
}

/// From what another client has left.
pub fn take_over(request: &Request, mut service: Service) -> Result<Parts, Failure> {
    let HandedOver { mountpoint, fds } = service.take_over()?;
    let mut fds = fds.into_iter();
    let file = fds.next();
    let devices: Vec<Device> = fds.map(|fd| Device::from_fd(fd, DEVICE_PATH)).collect();
    let (Some(file), Some(first)) = (file, devices.first()) else {
        return Err(TakeoverError::File(Errno::INVAL).into());
    };
    let identity = Keep::mounted_as(&file);
    let mount = Mount::adopt(mountpoint.into(), first, identity);
    let clones = Clones::adopt(devices);
    let taken = match takeover::take(file, clones.devices()) {
        Err(TakeoverError::Unmounted) => return Err(Failure::Over(Arc::new(End::Unmounted))),
        taken => taken?,
    };
    let Taken { keep, terms: kept, lanes, known } = taken;
    let options = &request.options;
    let mut facts = facts(request, &mount, &kept.welcome, &clones);
    facts.connected_since_unix_s = kept.since_unix_s;
    facts.takeovers = kept.takeovers + 1;
    let unsure = kept.trying.checked_sub(1).map(|port| port as u16);
    let resume = Resume::cut(lanes.len(), options.soft, unsure);
    let session = Session::new(lanes, resume, known, limits(options))
        .map_err(system("set up the session"))?;
    session.inherit_init(kept.init());
    let asked = kept.asked_lanes as u16;
    let hello = Hello { lanes: asked, conns: asked, ..hello(request, 0) };
    let terms = Terms::new(&request.target.address, hello, kept.welcome, options.strict);
    let terms = terms.inherited(Arc::clone(&keep));
    let rings = Rings::wished(options);
    Ok(Parts { session, service, keep: Some(keep), terms, rings, facts, mount })
}

/// What the next client needs, as far as it can be there; and what the kernel knows.
fn make_keep(is_wanted: bool, has_restore: bool) -> (Option<Arc<Keep>>, Vec<LaneKeep>, Known) {
    let made = (is_wanted && has_restore).then(Keep::create);
    match made {
        Some(Ok((keep, Places { lanes, logs }))) => {
            let (known, key) = Known::kept(logs);
            keep.change(|kept| kept.key = key);
            (Some(Arc::new(keep)), lanes, known)
        }
        Some(Err(errno)) => {
            tracing::warn!(%errno, "no memory file: if this client dies nobody takes over");
            (None, Vec::new(), Known::new(has_restore))
        }
        None => (None, Vec::new(), Known::new(has_restore)),
    }
}

/// Connections that no session of ours has yet: if it comes to nothing, the daemon is told.
struct Joined(Vec<(Conn, ConnRx)>);

impl Drop for Joined {
    fn drop(&mut self) {
        self.0.iter().for_each(|(conn, _)| conn.say_goodbye(Reason::Unmounted));
    }
}

/// Also what the daemon's log calls the session.
fn connect(address: &Address, hello: &Hello) -> Result<((Conn, ConnRx, Welcome), u64), Failure> {
    let socket = Socket::connect(address, handshake::LIMIT)?;
    let joined = join(socket, hello)
        .map_err(|source| Failure::Handshake { address: address.clone(), source })?;
    let (welcome, session) = (joined.welcome, joined.session);
    let (conn, half) = Conn::new(joined);
    Ok(((conn, half, welcome), session))
}

/// Joins and leaves at once: what the daemon would grant.
pub fn probe(request: &Request) -> Result<Welcome, Failure> {
    let ((conn, half, welcome), _) = connect(&request.target.address, &hello(request, 0))?;
    drop(Joined(vec![(conn, half)]));
    Ok(welcome)
}

fn hello(request: &Request, extra: u16) -> Hello {
    let options = &request.options;
    let over_vsock = matches!(request.target.address, Address::Vsock { .. });
    let checksum = options.checksum.unwrap_or(over_vsock);
    let flag = |on: bool, flag: u32| if on { flag } else { 0 };
    Hello {
        versions: (VERSION_MIN, VERSION_MAX),
        features: features(checksum),
        ticket: Ticket::NONE,
        epoch_seen: 0,
        lanes: options.lanes() + extra,
        conn: 0,
        conns: options.lanes() + extra,
        slots: options.slots,
        mount_flags: flag(options.mount.read_only, mount_flag::READ_ONLY)
            | flag(options.writeback, mount_flag::WRITEBACK)
            | flag(options.acl, mount_flag::POSIX_ACL),
        cache: options.cache,
        share: request.target.share.clone(),
        subdir: request.target.subdir.clone(),
        init: None,
        nth: 0,
    }
}

fn features(checksum: bool) -> u64 {
    let flag = |on: bool, flag: u64| if on { flag } else { 0 };
    feature::RESTORE | flag(checksum, feature::PAYLOAD_CRC) | flag(kernel_stores(), feature::STORE)
}

fn limits(options: &Options) -> Limits {
    let writeback = abi::init::WRITEBACK_CACHE;
    Limits {
        page_bytes: rustix::param::page_size() as u32,
        forbidden: if options.writeback { 0 } else { writeback },
        ..Limits::default()
    }
}

fn facts(request: &Request, mount: &Mount, welcome: &Welcome, clones: &Clones) -> Facts {
    let (target, options) = (&request.target, &request.options);
    let lanes_got = clones.devices().len() as u16;
    let lanes_why = match clones.shortfall() {
        Some(shortfall) => Some(with_causes(shortfall)),
        None if lanes_got < options.lanes() => Some("the daemon grants no more".to_owned()),
        None => None,
    };
    Facts {
        pid: std::process::id(),
        source: target.source().to_string_lossy().into_owned(),
        mountpoint: mount.mountpoint().to_owned(),
        dev_minor: mount.dev_minor(),
        share: target.share.clone(),
        subdir: String::from_utf8_lossy(&target.subdir).into_owned(),
        address: target.address.to_string(),
        connected_since_unix_s: unix_now_s(),
        epoch: welcome.epoch,
        lanes: Granted { asked: options.lanes(), got: lanes_got, why: lanes_why },
        spin: options.spin,
        slots_per_lane: welcome.slots,
        rings: status::Rings::default(),
        cache: cache_word(options.cache).to_owned(),
        read_only: options.mount.read_only,
        writeback: options.writeback,
        checksum: welcome.features & feature::PAYLOAD_CRC != 0,
        takeovers: 0,
        alone_why: Some("not ready yet".to_owned()),
        is_stored: false,
        options: request.lists.clone(),
    }
}
