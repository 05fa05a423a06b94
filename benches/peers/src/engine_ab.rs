//! `engine-ab`: one READ loop on tokio-uring, on a plain ring as ringfs's shard drives its own, and
//! on pread, over the same file in interleaved rounds.
fn main() {}
