//! The tree of the small daemon, in memory: what each request is answered with.

use super::*;

fn attr(nodeid: u64) -> Option<Attr> {
    let size = match nodeid {
        1 => 0,
        2 => HELLO_TEXT.len(),
        3 => BIG_BYTES,
        4 => 4096,
        NUMBERED.. => 0,
        _ => return None,
    };
    let mode = if nodeid == 1 { 0o40755 } else { 0o100666 };
    Some(Attr { ino: nodeid, size: size as u64, mode, nlink: 1, blksize: 4096, ..Attr::default() })
}

pub fn big_byte(offset: usize) -> u8 {
    ((offset / 7) ^ (offset >> 13)) as u8
}

pub(super) fn answer(
    shared: &Shared,
    opcode: u32,
    nodeid: u64,
    args: &[u8],
) -> Result<Vec<u8>, u32> {
    match Opcode::from_u32(opcode).ok_or(ENOSYS)? {
        Opcode::Init => {
            let terms = shared.terms.lock().expect("terms").clone();
            init(terms.init_errno, terms.init_flags)
        }
        Opcode::Lookup => {
            let name = args.strip_suffix(b"\0").ok_or(22u32)?;
            let found = EACH_FILE.iter().find(|(file, _)| file.as_bytes() == name);
            let found = found.map(|&(_, nodeid)| nodeid).or_else(|| {
                let digits = std::str::from_utf8(name.strip_prefix(b"n")?).ok()?;
                Some(NUMBERED + digits.parse::<u64>().ok()?)
            });
            let is_removed = shared.removed.lock().expect("removed").contains(name);
            let nodeid = found.filter(|_| !is_removed).ok_or(ENOENT)?;
            let attr = attr(nodeid).ok_or(ENOENT)?;
            let entry_valid = shared.terms.lock().expect("terms").names_valid;
            Ok(EntryOut { nodeid, attr, entry_valid, ..EntryOut::default() }.as_bytes().to_vec())
        }
        Opcode::Getattr => {
            let errno = shared.terms.lock().expect("terms").root_errno;
            if nodeid == 1 && errno != 0 {
                return Err(errno);
            }
            let attr = attr(nodeid).ok_or(ENOENT)?;
            Ok(AttrOut { attr, ..AttrOut::default() }.as_bytes().to_vec())
        }
        Opcode::Open | Opcode::Opendir => {
            let open_flags = shared.terms.lock().expect("terms").open_flags;
            let fh = shared.next_fh.fetch_add(1, Ordering::SeqCst);
            Ok(OpenOut { fh, open_flags, backing_id: 0 }.as_bytes().to_vec())
        }
        Opcode::Read => read(nodeid, args),
        Opcode::Write => {
            let (write, data) = WriteIn::read_from_prefix(args).map_err(|_| 22u32)?;
            let at = write.offset as usize;
            let is_in_place = at < BIG_BYTES;
            if is_in_place && data.iter().enumerate().any(|(i, &byte)| byte != big_byte(at + i)) {
                return Err(5);
            }
            shared.note(|seen| seen.written += data.len() as u64);
            Ok(WriteOut { size: data.len() as u32, padding: 0 }.as_bytes().to_vec())
        }
        Opcode::Readdir => readdir(args),
        Opcode::Readdirplus => readdirplus(args),
        Opcode::Unlink => {
            let name = args.strip_suffix(b"\0").ok_or(22u32)?;
            // Whoever comes a second time is told what nobody knows of the first.
            match (name, shared.removed.lock().expect("removed").insert(name.to_vec())) {
                (b"hang", _) => Err(HANG),
                (_, true) => Ok(Vec::new()),
                (_, false) => Err(5),
            }
        }
        Opcode::Statfs => Err(HANG),
        Opcode::Release | Opcode::Releasedir | Opcode::Flush => Ok(Vec::new()),
        _ => Err(ENOSYS),
    }
}

pub(super) fn init(errno: u32, extra: u64) -> Result<Vec<u8>, u32> {
    if errno != 0 {
        return Err(errno);
    }
    let flags = init::MAX_PAGES | init::BIG_WRITES | init::ASYNC_DIO | init::PARALLEL_DIROPS;
    let flags = flags | extra;
    Ok(InitOut {
        major: 7,
        minor: 45,
        max_readahead: 1 << 20,
        flags: flags as u32,
        max_background: 64,
        max_write: 1 << 20,
        time_gran: 1,
        max_pages: 256,
        ..InitOut::default()
    }
    .as_bytes()
    .to_vec())
}

pub(super) fn read(nodeid: u64, args: &[u8]) -> Result<Vec<u8>, u32> {
    let (read, _) = ReadIn::read_from_prefix(args).map_err(|_| 22u32)?;
    let (at, end) = (read.offset as usize, read.offset as usize + read.size as usize);
    match nodeid {
        2 => Ok(HELLO_TEXT[at.min(HELLO_TEXT.len())..end.min(HELLO_TEXT.len())].to_vec()),
        3 => Ok((at.min(BIG_BYTES)..end.min(BIG_BYTES)).map(big_byte).collect()),
        4 => Err(HANG),
        _ => Err(21),
    }
}

pub(super) fn readdir(args: &[u8]) -> Result<Vec<u8>, u32> {
    let (read, _) = ReadIn::read_from_prefix(args).map_err(|_| 22u32)?;
    let mut body = Vec::new();
    for (index, (name, ino)) in EACH_FILE.iter().enumerate().skip(read.offset as usize) {
        let (off, namelen) = (index as u64 + 1, name.len() as u32);
        body.extend_from_slice(Dirent { ino: *ino, off, namelen, type_: 8 }.as_bytes());
        body.extend_from_slice(name.as_bytes());
        body.resize(body.len().next_multiple_of(8), 0);
    }
    Ok(body)
}

/// All entries at once, to whoever begins at the start.
pub(super) fn readdirplus(args: &[u8]) -> Result<Vec<u8>, u32> {
    let (read, _) = ReadIn::read_from_prefix(args).map_err(|_| 22u32)?;
    let mut body = Vec::new();
    for (index, (name, ino)) in EACH_FILE.iter().enumerate().skip(read.offset as usize) {
        let (off, namelen) = (index as u64 + 1, name.len() as u32);
        let attr = attr(*ino).ok_or(ENOENT)?;
        let entry_out = EntryOut { nodeid: *ino, attr, ..EntryOut::default() };
        let dirent = Dirent { ino: *ino, off, namelen, type_: 8 };
        body.extend_from_slice(DirentPlus { entry_out, dirent }.as_bytes());
        body.extend_from_slice(name.as_bytes());
        body.resize(body.len().next_multiple_of(8), 0);
    }
    Ok(body)
}
