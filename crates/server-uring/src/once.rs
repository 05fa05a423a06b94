//! Each request once: what becomes of one that comes again, that nobody waits for, or that nobody
//! will take the reply of.
//!
//! Part of [`Shard`]. Invariant: what a reply gives (lookups, a handle) the guest has been sent, or
//! can be sent, or it is taken back.

use super::*;
use ringfs_wire::abi::Opcode;
use ringfs_wire::slot::SlotError;
use ringfs_wire::table::Given;

impl<R: Ring> Shard<R> {
    /// A request that came before, or cannot be; whether it is to be executed. A FORGET has no
    /// `request`.
    pub(super) fn come_again(
        &mut self,
        key: usize,
        header: &RecordHeader,
        request: Option<&Request<'_>>,
        begun: Result<Begin, SlotError>,
    ) -> Result<bool, Reason> {
        match begun {
            // What a dead daemon had begun is looked for by whoever runs it: see decide.rs.
            Ok(Begin::Execute | Begin::Decide) => Ok(true),
            Ok(Begin::Unsure) => self.begin_unsure(key, header, request),
            // The answer comes when it ends.
            Ok(Begin::Running) => Ok(false),
            Ok(Begin::Replay) => {
                self.conns[key].replay(header, request, &self.notes, &mut self.buffers);
                add(&self.shared.stats.replayed, 1);
                add(&self.shared.stats.records_out, 1);
                Ok(false)
            }
            Ok(Begin::Rerun(given)) => {
                add(&self.shared.stats.reruns, 1);
                self.give_back(key, &given);
                Ok(true)
            }
            Err(error) => Err(self.protocol(key, error)),
        }
    }

    /// A request that may have run for a daemon of which nothing is known.
    fn begin_unsure(
        &mut self,
        key: usize,
        header: &RecordHeader,
        request: Option<&Request<'_>>,
    ) -> Result<bool, Reason> {
        let conn = &mut self.conns[key];
        let runs_once = request.is_some_and(|request| conn.session.fs.runs_once(request));
        let opcode = if request.is_some() { header.code } else { Opcode::Forget as u32 };
        if runs_once {
            let opcode = Opcode::from_u32(opcode);
            let (session, node) = (conn.session.id, request.map(|request| request.nodeid));
            add(&self.shared.stats.ambiguous, 1);
            tracing::warn!(
                session,
                ?opcode,
                node,
                "nobody can tell whether a daemon that is gone had done this: answered EIO"
            );
        }
        let begun = conn.begin_unsure(header, opcode, runs_once);
        self.come_again(key, header, request, begun)
    }

    /// The guest had sent the request that comes next before its session was rebuilt. One that is
    /// another guest's by now - a clone's - is asked for by nobody else.
    pub(super) fn doubt(&mut self, key: usize, header: RecordHeader) -> Result<Step, Reason> {
        let conn = &mut self.conns[key];
        if conn.session.is_heir {
            conn.doubt(&header).map_err(|error| self.protocol(key, error))?;
        }
        Ok(Step::Taken)
    }

    /// Takes back what a reply gave and nobody has taken.
    pub(super) fn give_back(&mut self, key: usize, given: &Given) {
        let session = &self.conns[key].session;
        if !given.is_empty() {
            let (fs, most) = (&session.fs, session.fs.blocks_freed_at_once());
            self.shared.pool.give_back(session.terms.owner, fs.give_back(given), most);
        }
    }

    /// Writes the end of a request into the table; whether its reply is to be sent.
    pub(super) fn settle(&mut self, tag: &RequestTag, errno: u32, body: &[u8]) -> bool {
        let fate = self.conns[tag.conn].settle(tag, errno, body);
        self.op_ends(tag, errno, fate == Fate::Send);
        match fate {
            Fate::Send => true,
            Fate::Keep => false,
            Fate::GiveBack { given, send } => {
                self.give_back(tag.conn, &given);
                if send {
                    self.answer_abandoned(tag);
                }
                false
            }
        }
    }

    pub(super) fn answer_abandoned(&mut self, tag: &RequestTag) {
        let header = reply_header(tag, Errno::INTR.raw_os_error() as u32, 0);
        self.conns[tag.conn].link.reply(header, &[], &mut self.buffers);
        add(&self.shared.stats.records_out, 1);
    }

    /// Nobody waits for a request any more: it need not begin.
    pub(super) fn cancel(&mut self, key: usize, header: RecordHeader) {
        let conn = &mut self.conns[key];
        if !conn.is_running(&header) {
            return;
        }
        let named = RequestTag::of(key, &header);
        let (owner, session) = (conn.session.terms.owner, conn.session.id);
        if let Some(job) = self.shared.pool.cancel(owner, session, named) {
            job.body.into_batch().into_iter().for_each(|batch| self.buffers.give_shared(batch));
            job.own.into_iter().for_each(|buf| self.buffers.give(buf));
            self.finish(job.tag, Err(Errno::INTR));
        }
    }

    /// Nobody will take the reply to a request, whatever became of it.
    pub(super) fn abandon(&mut self, key: usize, header: RecordHeader) -> Result<Step, Reason> {
        let conn = &mut self.conns[key];
        // Each costs an answer, and its slot is free before the guest has read it.
        if !conn.reserve(0) {
            return Ok(Step::PeerFull);
        }
        let abandon = conn.abandon(&header).map_err(|error| self.protocol(key, error))?;
        add(&self.shared.stats.abandoned, usize::from(abandon != Abandon::Void));
        match abandon {
            Abandon::Over(given) => {
                self.give_back(key, &given);
                self.answer_abandoned(&RequestTag::of(key, &header));
            }
            Abandon::Running => {
                self.drop_bulk_of(&RequestTag::of(key, &header));
                self.cancel(key, header);
            }
            Abandon::Void => {}
        }
        Ok(Step::Taken)
    }
}
