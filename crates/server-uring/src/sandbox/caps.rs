//! Capabilities: what serving files of all owners takes, and nothing that reaches beyond.

use rustix::io::Errno;
use rustix::thread::{
    CapabilitySet, CapabilitySets, capability_is_in_bounding_set, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities,
};

/// Files of other owners; ids of creations; file capabilities as an extended
/// attribute; memory that a ring's kernel side may keep.
const KEPT: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETFCAP)
    .union(CapabilitySet::IPC_LOCK);

/// What a worker of root keeps. With `device_nodes` guests' device nodes can be made; with
/// `file_handles` files can be found again by their handles.
pub fn kept(device_nodes: bool, file_handles: bool) -> CapabilitySet {
    let mut kept = KEPT;
    kept.set(CapabilitySet::MKNOD, device_nodes);
    // Any file of a share's file system can be had by it, inside the share or not.
    kept.set(CapabilitySet::DAC_READ_SEARCH, file_handles);
    kept
}

/// Gives up all others, for good.
///
/// # Errors
/// What prctl and capset say.
pub fn cut(kept: CapabilitySet) -> Result<(), Errno> {
    let now = rustix::thread::capabilities(None)?;
    if now.permitted.contains(CapabilitySet::SETPCAP) {
        // Numbers that this kernel does not know are no capabilities.
        for number in 0..u64::BITS {
            let one = CapabilitySet::from_bits_retain(1 << number);
            if !kept.contains(one) && capability_is_in_bounding_set(one) == Ok(true) {
                remove_capability_from_bounding_set(one)?;
            }
        }
    }
    clear_ambient_capability_set()?;
    let kept = kept & now.permitted;
    let none = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: kept, permitted: kept, inheritable: none })
}
