//! A guest whose session another daemon had.

use super::*;
use ringfs_wire::restore::{End as Totals, Restore, push_restore};

/// A guest that says that another daemon gave it these nodes (id, recipe) and handles.
pub fn rebuilt(
    daemon: &Daemon,
    of: &Hello,
    nodes: &[(u64, Vec<u8>)],
    handles: &[(u64, u64, i32)],
) -> Guest {
    let asked = abi::InitIn {
        major: 7,
        minor: 45,
        flags: abi::init::INIT_EXT as u32,
        ..Default::default()
    };
    let features = feature::PAYLOAD_CRC | feature::RESTORE;
    let mut first = Guest::greet(daemon.connect(), &Hello { features, ..of.clone() });
    let first = first.as_mut().expect("welcome");
    let init = first.call(Opcode::Init, 0, asked.as_bytes()).expect("INIT");
    let init = Some(abi::InitOut::read_from_bytes(&init).expect("an INIT answer"));
    let hello = Hello { features, init, ..of.clone() };
    let mut guest = Guest::greet(daemon.connect(), &hello).expect("welcome");
    assert_eq!(guest.welcome.flags, welcome_flag::REBUILD);
    guest.recipes = Some(Default::default());
    let end = Restore::End(Totals {
        nodes: nodes.len() as u64,
        handles: handles.len() as u64,
        node_id_max: nodes.iter().map(|node| node.0).max().unwrap_or(0),
        fh_max: handles.iter().map(|handle| handle.0).max().unwrap_or(0),
    });
    let nodes = nodes.iter().map(|(id, recipe)| Restore::Node { id: *id, count: 1, recipe });
    let handles = handles.iter().map(|&(fh, node, flags)| Restore::Handle {
        fh,
        node,
        flags: flags as u32,
        directory: false,
    });
    let mut body = Vec::new();
    for entry in nodes.chain(handles).chain([end]) {
        if !push_restore(&mut body, &entry) {
            assert!(guest.add(Kind::Restore as u8, SlotUse { slot: 0, seq: 0 }, 0, &body));
            guest.flush();
            body.clear();
            assert!(push_restore(&mut body, &entry));
        }
    }
    assert!(guest.add(Kind::Restore as u8, SlotUse { slot: 0, seq: 0 }, 0, &body));
    guest.flush();
    guest
}
