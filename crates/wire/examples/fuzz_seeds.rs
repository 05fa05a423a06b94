//! Writes the good streams that fuzzing starts from into a directory, one a file. Streams of a
//! megabyte are left out: they would only slow it down.

#[path = "../fuzz/bodies.rs"]
mod bodies;

const SEED_BYTES_MAX: usize = 80_000;

fn main() -> std::io::Result<()> {
    let dir = std::env::args_os().nth(1).map(std::path::PathBuf::from);
    let dir = dir.ok_or_else(|| std::io::Error::other("usage: fuzz_seeds DIRECTORY"))?;
    for (index, sample) in bodies::samples().iter().enumerate() {
        if sample.len() <= SEED_BYTES_MAX {
            std::fs::write(dir.join(format!("sample{index}")), sample)?;
        }
    }
    Ok(())
}
