//! Counters. Each shard adds to its own; readers add them up.

use ringfs_wire::abi::Opcode;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// What one shard counts. A reader sees each number a little late, never torn.
#[derive(Debug)]
pub struct ShardStats {
    /// Requests begun, by opcode; unknown ones at index 0.
    ops: [AtomicU64; OPCODES],
    /// Requests answered with an errno.
    pub errors: AtomicU64,
    /// Payload bytes of READ replies.
    pub bytes_read: AtomicU64,
    /// Payload bytes that WRITEs stored.
    pub bytes_written: AtomicU64,
    /// Batches received.
    pub batches_in: AtomicU64,
    /// Batches sent.
    pub batches_out: AtomicU64,
    /// Records sent.
    pub records_out: AtomicU64,
    /// Connections closed for breaking the protocol.
    pub protocol_errors: AtomicU64,
    /// Connections that went on where another one was cut.
    pub resumes: AtomicU64,
    /// Sessions that another daemon had, rebuilt as their guests told.
    pub rebuilds: AtomicU64,
    /// Requests that a dead daemon had begun, and that were found out about.
    pub recovered: AtomicU64,
    /// Those of them of which nobody could tell what became.
    pub ambiguous: AtomicU64,
    /// Requests that came again and were answered by the reply that was kept.
    pub replayed: AtomicU64,
    /// Requests that came again and ran again.
    pub reruns: AtomicU64,
    /// Requests whose reply nobody takes.
    pub abandoned: AtomicU64,
    /// Connections refused because the one that they name is alive.
    pub clones_refused: AtomicU64,
    /// Nodes that guests were asked to give back.
    pub wanted_back: AtomicU64,
    /// Gauge: connections.
    pub connections: AtomicU64,
    /// Gauge: requests being executed.
    pub slots_in_use: AtomicU64,
    /// Gauge: buffers that are out.
    pub buffers_in_use: AtomicU64,
    /// Gauge: operations that the ring has in flight.
    pub ring_in_flight: AtomicU64,
    /// Gauge: large replies that wait until their peer has room.
    pub replies_put_off: AtomicU64,
    /// Gauge: connections that wait for a large buffer.
    pub starved: AtomicU64,
}

const OPCODES: usize = 64;

impl Default for ShardStats {
    fn default() -> Self {
        ShardStats {
            ops: std::array::from_fn(|_| AtomicU64::new(0)),
            errors: AtomicU64::new(0),
            bytes_read: AtomicU64::new(0),
            bytes_written: AtomicU64::new(0),
            batches_in: AtomicU64::new(0),
            batches_out: AtomicU64::new(0),
            records_out: AtomicU64::new(0),
            protocol_errors: AtomicU64::new(0),
            resumes: AtomicU64::new(0),
            rebuilds: AtomicU64::new(0),
            recovered: AtomicU64::new(0),
            ambiguous: AtomicU64::new(0),
            replayed: AtomicU64::new(0),
            reruns: AtomicU64::new(0),
            abandoned: AtomicU64::new(0),
            clones_refused: AtomicU64::new(0),
            wanted_back: AtomicU64::new(0),
            connections: AtomicU64::new(0),
            slots_in_use: AtomicU64::new(0),
            buffers_in_use: AtomicU64::new(0),
            ring_in_flight: AtomicU64::new(0),
            replies_put_off: AtomicU64::new(0),
            starved: AtomicU64::new(0),
        }
    }
}

impl ShardStats {
    /// A request begins.
    pub fn begin_op(&self, opcode: u32) {
        let index = Opcode::from_u32(opcode).map_or(0, |opcode| opcode as usize);
        add(&self.ops[index], 1);
        add(&self.slots_in_use, 1);
    }

    /// It is over; whether its reply goes out.
    pub fn end_op(&self, sent: bool) {
        self.slots_in_use.store(self.slots_in_use.load(Relaxed).wrapping_sub(1), Relaxed);
        add(&self.records_out, usize::from(sent));
    }
}

/// Adds `n` to a counter that this thread alone writes.
pub fn add(counter: &AtomicU64, n: usize) {
    counter.store(counter.load(Relaxed).wrapping_add(n as u64), Relaxed);
}

/// Sums of all shards and sessions, as the control socket gives them.
#[derive(Debug, Default)]
pub struct Totals {
    /// Name and value, in the order of the output.
    pub numbers: Vec<(&'static str, u64)>,
    /// Requests by opcode.
    pub ops: Vec<(String, u64)>,
}

impl Totals {
    /// Adds up what the shards counted.
    pub fn of_shards<'a>(shards: impl Iterator<Item = &'a ShardStats> + Clone) -> Totals {
        let sum = |pick: fn(&ShardStats) -> &AtomicU64| {
            shards.clone().map(|stats| pick(stats).load(Relaxed)).sum::<u64>()
        };
        let numbers = vec![
            ("connections", sum(|s| &s.connections)),
            ("slots_in_use", sum(|s| &s.slots_in_use)),
            ("buffers_in_use", sum(|s| &s.buffers_in_use)),
            ("ring_in_flight", sum(|s| &s.ring_in_flight)),
            ("replies_put_off", sum(|s| &s.replies_put_off)),
            ("starved", sum(|s| &s.starved)),
            ("errors", sum(|s| &s.errors)),
            ("protocol_errors", sum(|s| &s.protocol_errors)),
            ("bytes_read", sum(|s| &s.bytes_read)),
            ("bytes_written", sum(|s| &s.bytes_written)),
            ("batches_in", sum(|s| &s.batches_in)),
            ("batches_out", sum(|s| &s.batches_out)),
            ("records_out", sum(|s| &s.records_out)),
            ("resumes", sum(|s| &s.resumes)),
            ("rebuilds", sum(|s| &s.rebuilds)),
            ("recovered", sum(|s| &s.recovered)),
            ("ambiguous", sum(|s| &s.ambiguous)),
            ("replayed", sum(|s| &s.replayed)),
            ("reruns", sum(|s| &s.reruns)),
            ("abandoned", sum(|s| &s.abandoned)),
            ("clones_refused", sum(|s| &s.clones_refused)),
            ("wanted_back", sum(|s| &s.wanted_back)),
        ];
        let count = |index: usize| shards.clone().map(|s| s.ops[index].load(Relaxed)).sum::<u64>();
        let mut ops = vec![("UNKNOWN".to_owned(), count(0))];
        let names =
            Opcode::ALL.iter().map(|&op| (format!("{op:?}").to_uppercase(), count(op as usize)));
        ops.extend(names);
        ops.retain(|(_, n)| *n > 0);
        Totals { numbers, ops }
    }

    /// One JSON object on one line.
    pub fn to_json(&self) -> String {
        let mut out = String::from("{");
        for (name, value) in &self.numbers {
            out += &format!("\"{name}\":{value},");
        }
        let ops: Vec<String> = self.ops.iter().map(|(name, n)| format!("\"{name}\":{n}")).collect();
        out + &format!("\"ops\":{{{}}}}}\n", ops.join(","))
    }
}
