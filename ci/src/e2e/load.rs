//! Data under load: verified random writes, many threads on one file, mounts that work at once.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Barrier;
use std::thread;
use std::time::Duration;

use anyhow::{Result, anyhow, ensure};

use super::{Case, Rig};
use crate::proc::Cmd;
use crate::rig::{self, Daemon};
use crate::sandbox::{LoopFs, LoopShape};

pub const CASES: &[Case] = &[
    ("fio_randwrite_verify", fio_verify),
    ("fio_verify_with_writeback", fio_writeback),
    ("64_threads_on_one_file", one_file),
    ("first_opens_beside_changes", first_opens),
    ("8_guests_at_once", guests),
    ("shared_mmap_writes", mmap),
    ("direct_on_4096_byte_sectors", large_sectors),
    ("one_cpu", one_cpu),
];

const LIMIT: Duration = Duration::from_secs(150);

/// Random writes below `dir`, verified while and after they are made.
pub fn fio(dir: &Path, name: &str, more: &[&str]) -> Result<()> {
    let fio = Cmd::new("fio").arg(format!("--name={name}")).arg("--directory").arg(dir);
    let fio = fio.args(["--rw=randwrite", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1"]);
    // Without this fio leaves a file in the working directory.
    let fio = fio.arg("--verify_state_save=0");
    fio.args(["--group_reporting", "--size=64m"]).args(more).limit(LIMIT).run().map(drop)
}

/// A small file's content comes with its first OPEN: not over what is changed meanwhile, nor behind
/// the end of a file that is cut off.
fn first_opens(rig: &Rig) -> Result<()> {
    const FILES: usize = 1500;
    let (old, new) = ([b'o'; 5000], [b'n'; 5000]);
    let name = |i: usize| format!("first-{i}");
    (0..FILES).try_for_each(|i| fs::write(rig.backing.join(name(i)), old))?;
    let mount = rig.mount("mnt", "lanes=4")?;
    let change = |i: usize, path: &Path| -> Result<Vec<u8>> {
        let open = || File::options().write(true).open(path);
        match i % 3 {
            0 => open()?.write_all_at(&new, 0)?,
            1 => fs::write(path, b"")?,
            _ => open()?.set_len(100)?,
        }
        Ok(match i % 3 {
            0 => new.to_vec(),
            1 => Vec::new(),
            _ => old[..100].to_vec(),
        })
    };
    for i in 0..FILES {
        let path = mount.dir.join(name(i));
        let begin = Barrier::new(2);
        let (reader, changed) = thread::scope(|scope| {
            let reader = scope.spawn(|| -> Result<File> {
                begin.wait();
                let file = File::open(&path)?;
                let seen = read_to_end(&file)?;
                // Zeros: a page that is cut off while it is read, as on a local disk.
                ensure!(seen.iter().all(|byte| b"on\0".contains(byte)), "{path:?}: other bytes");
                Ok(file)
            });
            begin.wait();
            let changed = change(i, &path);
            (reader.join(), changed)
        });
        let file = reader.map_err(|_| anyhow!("the reader panicked"))??;
        let (expected, seen) = (changed?, read_to_end(&file)?);
        ensure!(seen == expected, "{path:?}: {} bytes, or old ones, after its change", seen.len());
        ensure!(file.metadata()?.len() == expected.len() as u64, "{path:?} has another length");
    }
    let stored = mount.told()?.stored;
    ensure!(stored > 0, "no content came with an OPEN");
    mount.umount()
}

fn read_to_end(file: &File) -> Result<Vec<u8>> {
    let mut bytes = vec![0; 8192];
    let mut len = 0;
    loop {
        match file.read_at(&mut bytes[len..], len as u64)? {
            0 => break,
            n => len += n,
        }
    }
    bytes.truncate(len);
    Ok(bytes)
}

fn fio_verify(rig: &Rig) -> Result<()> {
    let mount = rig.mount("mnt", "")?;
    fio(&mount.dir, "small", &["--bs=4k", "--ioengine=psync", "--numjobs=4", "--size=16m"])?;
    let mixed = ["--bsrange=512-1m", "--ioengine=libaio", "--iodepth=16", "--numjobs=2"];
    fio(&mount.dir, "mixed", &mixed)?;
    let direct = ["--bs=64k", "--direct=1", "--ioengine=libaio", "--iodepth=8", "--size=32m"];
    fio(&mount.dir, "direct", &direct)?;
    mount.umount()
}

fn fio_writeback(rig: &Rig) -> Result<()> {
    let mount = rig.mount("mnt", "cache=always,writeback")?;
    fio(&mount.dir, "back", &["--bsrange=512-256k", "--ioengine=psync", "--numjobs=2"])?;
    fio(&mount.dir, "mapped", &["--bs=4k", "--ioengine=mmap", "--numjobs=2", "--size=16m"])?;
    mount.umount()
}

/// Each thread owns every 64th block, writes it several times and reads it back between.
fn one_file(rig: &Rig) -> Result<()> {
    const THREADS: u64 = 64;
    const BLOCK: usize = 4096;
    const ROUNDS: u64 = 4;
    const BLOCKS_EACH: u64 = 32;
    let mount = rig.mount("mnt", "")?;
    let path = mount.dir.join("one");
    fs::write(&path, "")?;
    let content = |thread: u64, block: u64, round: u64| {
        let word = (thread << 40 | block << 8 | round).to_le_bytes();
        word.repeat(BLOCK / 8)
    };
    let work = |thread: u64| -> Result<()> {
        let file = File::options().read(true).write(true).open(&path)?;
        let mut seen = vec![0; BLOCK];
        for round in 0..ROUNDS {
            for block in 0..BLOCKS_EACH {
                let at = (block * THREADS + thread) * BLOCK as u64;
                let data = content(thread, block, round);
                file.write_all_at(&data, at)?;
                file.read_exact_at(&mut seen, at)?;
                ensure!(seen == data, "thread {thread}, block {block}, round {round} differs");
            }
        }
        file.sync_data()?;
        Ok(())
    };
    in_threads(THREADS, work)?;
    mount.umount()?;
    let host = fs::read(rig.backing.join("one"))?;
    for (n, data) in host.chunks(BLOCK).enumerate() {
        let (thread, block) = (n as u64 % THREADS, n as u64 / THREADS);
        ensure!(data == content(thread, block, ROUNDS - 1), "block {n} differs on the host");
    }
    ensure!(host.len() as u64 == THREADS * BLOCKS_EACH * BLOCK as u64);
    Ok(())
}

fn in_threads(threads: u64, work: impl Fn(u64) -> Result<()> + Sync) -> Result<()> {
    thread::scope(|scope| {
        let work = &work;
        let running: Vec<_> =
            (0..threads).map(|thread| scope.spawn(move || work(thread))).collect();
        for thread in running {
            thread.join().map_err(|_| anyhow!("a thread panicked"))??;
        }
        Ok(())
    })
}

fn guests(rig: &Rig) -> Result<()> {
    let mounts = (0..8).map(|n| rig.mount(&format!("guest{n}"), "")).collect::<Result<Vec<_>>>()?;
    ensure!(rig.daemon.counters()?.sessions == 8);
    in_threads(8, |guest| {
        let dir = mounts[guest as usize].dir.join(format!("of-{guest}"));
        fs::create_dir(&dir)?;
        for n in 0..200u64 {
            let path = dir.join(format!("f{}", n % 20));
            let data = vec![(guest * 16 + n) as u8; 1 + (n as usize * 997) % 200_000];
            fs::write(&path, &data)?;
            ensure!(fs::read(&path)? == data, "guest {guest}, file {n} differs");
        }
        Ok(())
    })?;
    mounts.into_iter().try_for_each(rig::Mount::umount)
}

/// Shared mappings without writeback; fsx mixes them with read and write, in every cache mode.
fn mmap(rig: &Rig) -> Result<()> {
    let mount = rig.mount("mnt", "")?;
    fio(&mount.dir, "mapped", &["--bs=4k", "--ioengine=mmap", "--numjobs=4", "--size=8m"])?;
    mount.umount()
}

/// A backing that takes O_DIRECT in multiples of 4096 bytes alone; the guest writes 512.
fn large_sectors(rig: &Rig) -> Result<()> {
    let shape = LoopShape { sector_bytes: 4096, ..LoopShape::ext4(512 << 20) };
    let disk = LoopFs::new(&rig.sandbox, "large", shape)?;
    let shares = [rig::share("d", &disk.dir)];
    let daemon = Daemon::start(&rig.sandbox, &rig.bins, "large", &shares, &[])?;
    let mount = daemon.mount(&rig.sandbox, "d", "mnt", "")?;
    for bs in ["--bs=512", "--bs=4k"] {
        let direct = ["--direct=1", "--ioengine=libaio", "--iodepth=4", "--size=2m", bs];
        fio(&mount.dir, "direct", &direct)?;
    }
    mount.umount()?;
    daemon.stop()
}

/// A daemon held to one CPU serves as well, on that one.
fn one_cpu(rig: &Rig) -> Result<()> {
    let shares = [rig::share("d", &rig.backing)];
    let cpus = ["--cpus", "0"];
    let daemon = Daemon::start(&rig.sandbox, &rig.bins, "one", &shares, &cpus)?;
    let mount = daemon.mount(&rig.sandbox, "d", "mnt", "")?;
    fio(&mount.dir, "one", &["--bs=16k", "--ioengine=psync", "--numjobs=4", "--size=8m"])?;
    mount.umount()?;
    daemon.stop()
}
