//! The guest's side of a lane's session table, after NFSv4.1's: it bounds what is in flight and
//! leads replies back to their requests. The host's side is `table.rs`.
//!
//! A request occupies a slot until its reply. Each use of a slot has the next `slot_seq`, so a
//! record of an earlier use can never be taken for the current one.

use thiserror::Error;

/// Names one use of one slot of a lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SlotUse {
    /// Index into the lane's table.
    pub slot: u16,
    /// How often the slot was used before.
    pub seq: u32,
}

/// A slot number or sequence that cannot be. Ends the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum SlotError {
    #[error("slot {slot} is beyond the {granted} that were granted")]
    Range { slot: u16, granted: u16 },
    #[error("slot {slot} has sequence {seq}, expected {expected}")]
    Sequence { slot: u16, seq: u32, expected: u32 },
    #[error("slot {slot} is not in use")]
    Idle { slot: u16 },
    #[error("slot {slot} is still in use")]
    Busy { slot: u16 },
}

/// The guest's side: what it keeps of each request until the reply.
#[derive(Clone, Debug)]
pub struct ClientSlots<T> {
    slots: Vec<(u32, Option<T>)>,
    free: Vec<u16>,
}

impl<T> ClientSlots<T> {
    /// `granted` free slots.
    pub fn new(granted: u16) -> ClientSlots<T> {
        ClientSlots {
            slots: (0..granted).map(|_| (0, None)).collect(),
            free: (0..granted).rev().collect(),
        }
    }

    /// As another process has left them: the seq of each slot's next use, or of the use that it
    /// is in.
    pub fn restored(slots: Vec<(u32, Option<T>)>) -> ClientSlots<T> {
        let is_free = |slot: &u16| slots[usize::from(*slot)].1.is_none();
        let free = (0..slots.len() as u16).rev().filter(is_free).collect();
        ClientSlots { slots, free }
    }

    /// Takes a slot for `request`; gives it back when none is free.
    pub fn claim(&mut self, request: T) -> Result<SlotUse, T> {
        let Some(slot) = self.free.pop() else { return Err(request) };
        let entry = &mut self.slots[slot as usize];
        entry.1 = Some(request);
        Ok(SlotUse { slot, seq: entry.0 })
    }

    /// The reply is here: frees the slot and gives back what was kept.
    pub fn complete(&mut self, at: SlotUse) -> Result<T, SlotError> {
        let request = self.unclaim(at)?;
        self.slots[usize::from(at.slot)].0 = at.seq.wrapping_add(1);
        Ok(request)
    }

    /// The request was not sent after all: frees the slot, for the same use again. The host has
    /// not seen this one, so it waits for no other.
    pub fn unclaim(&mut self, at: SlotUse) -> Result<T, SlotError> {
        let SlotUse { slot, seq } = at;
        let granted = self.slots.len() as u16;
        let entry = self.slots.get_mut(slot as usize).ok_or(SlotError::Range { slot, granted })?;
        if entry.0 != seq {
            return Err(SlotError::Sequence { slot, seq, expected: entry.0 });
        }
        let request = entry.1.take().ok_or(SlotError::Idle { slot })?;
        self.free.push(slot);
        Ok(request)
    }

    /// What that use of a slot is for, while it is in flight.
    pub fn get(&self, at: SlotUse) -> Option<&T> {
        let (seq, request) = self.slots.get(usize::from(at.slot))?;
        request.as_ref().filter(|_| *seq == at.seq)
    }

    /// What is in flight, with its slot.
    pub fn in_flight(&self) -> impl Iterator<Item = (SlotUse, &T)> {
        self.slots.iter().enumerate().filter_map(|(slot, (seq, request))| {
            Some((SlotUse { slot: slot as u16, seq: *seq }, request.as_ref()?))
        })
    }

    /// The same, to change what is kept.
    pub fn in_flight_mut(&mut self) -> impl Iterator<Item = (SlotUse, &mut T)> {
        self.slots.iter_mut().enumerate().filter_map(|(slot, (seq, request))| {
            Some((SlotUse { slot: slot as u16, seq: *seq }, request.as_mut()?))
        })
    }

    /// Slots in use.
    pub fn in_use(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Whether [`ClientSlots::claim`] would succeed.
    pub fn has_free(&self) -> bool {
        !self.free.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_bound_what_is_in_flight() {
        let mut client = ClientSlots::new(2);
        let a = client.claim("a").expect("free");
        let b = client.claim("b").expect("free");
        assert_ne!(a.slot, b.slot);
        assert_eq!(client.claim("c"), Err("c"));
        assert_eq!(client.complete(a), Ok("a"));
        assert_eq!(
            client.complete(a),
            Err(SlotError::Sequence { slot: a.slot, seq: 0, expected: 1 })
        );
        assert_eq!(client.claim("c"), Ok(SlotUse { slot: a.slot, seq: 1 }));
        assert_eq!(client.in_use(), 2);
    }

    #[test]
    fn a_request_that_was_not_sent_uses_no_sequence() {
        let mut client = ClientSlots::new(1);
        let unsent = client.claim("a").expect("free");
        assert_eq!(client.unclaim(unsent), Ok("a"));
        assert_eq!(client.unclaim(unsent), Err(SlotError::Idle { slot: 0 }));
        for seq in 0..2 {
            let at = client.claim("b").expect("freed");
            assert_eq!(at, SlotUse { slot: 0, seq });
            assert_eq!(client.complete(at), Ok("b"));
        }
        assert_eq!(
            client.unclaim(unsent),
            Err(SlotError::Sequence { slot: 0, seq: 0, expected: 2 })
        );
        assert_eq!(client.in_use(), 0);
    }

    #[test]
    fn a_reply_that_a_peer_invents_is_refused() {
        let mut client = ClientSlots::<()>::new(1);
        let at = |slot| SlotUse { slot, seq: 0 };
        assert_eq!(client.complete(at(0)), Err(SlotError::Idle { slot: 0 }));
        assert_eq!(client.complete(at(1)), Err(SlotError::Range { slot: 1, granted: 1 }));
    }
}
