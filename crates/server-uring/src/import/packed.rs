//! A recipe as bytes: a head, then the handle, perhaps one by another name, then the name, up to
//! the end.
//!
//! A cold node is kept as such, and a NODE carries one to the guest, which keeps it for a daemon
//! that comes later.
//! ```text
//! 0     8       16       24          32           36           40       48
//! | ino | fs_id | device | btime_sec | btime_nsec | generation | parent | handle_type ..
//!       52     54            55    56             57     58
//!    .. | kind | handle_kind | has | handle_bytes | form | handle .. [other] name ..
//!
//! other:  0      4       5
//!         | type | bytes | handle ..
//! ```
//! Invariant: bytes of any content and length may be read. They are the guest's word, and prove
//! nothing by themselves.

use std::ffi::{CStr, CString};

use zerocopy::little_endian::{I32, I64, U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::handle::{Handle, HandleKind, OTHER_BYTES_MAX};
use super::recipe::{MountIdentity, Recipe};
use super::sys::HANDLE_BYTES_MAX;
use crate::fdops;

/// Which layout of [`Packed`] this is: recipes outlive the daemon that made them.
const FORM: u8 = 1;

/// The head of a packed recipe, before the handle and the name; see [`Recipe`] for the fields.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Packed {
    ino: U64,
    fs_id: U64,
    device: [U32; 2],
    btime_sec: I64,
    btime_nsec: U32,
    generation: U32,
    parent: U64,
    handle_type: I32,
    kind: U16,
    /// 0: there is none.
    handle_kind: u8,
    /// Bit 0: a birth time; bit 1: a generation; bit 2: a handle by another name.
    has: u8,
    handle_bytes: u8,
    /// [`FORM`].
    form: u8,
}

const _: () = assert!(size_of::<Packed>() == 58);

/// Type and length of a handle by another name.
pub(crate) const OTHER_HEAD_BYTES: usize = 5;

/// The longest that [`Packed::write`] makes fits a NODE.
const _: () = assert!(
    size_of::<Packed>()
        + HANDLE_BYTES_MAX
        + OTHER_HEAD_BYTES
        + OTHER_BYTES_MAX
        + fdops::NAME_BYTES_MAX
        <= ringfs_wire::limits::RECIPE_BYTES_MAX
);

impl Packed {
    pub(crate) fn new(mount: MountIdentity, ino: u64, kind: u16, parent: u64) -> Packed {
        Packed {
            ino: ino.into(),
            fs_id: mount.fs_id.into(),
            device: [mount.device.0.into(), mount.device.1.into()],
            parent: parent.into(),
            kind: kind.into(),
            form: FORM,
            ..Packed::new_zeroed()
        }
    }

    pub(crate) fn born(self, btime: Option<(i64, u32)>) -> Packed {
        let Some((sec, nsec)) = btime else { return self };
        Packed { btime_sec: sec.into(), btime_nsec: nsec.into(), has: self.has | 1, ..self }
    }

    fn generation(self, generation: Option<u32>) -> Packed {
        let Some(generation) = generation else { return self };
        Packed { generation: generation.into(), has: self.has | 2, ..self }
    }

    pub(crate) fn write(
        mut self,
        handle: Option<(HandleKind, i32, &[u8])>,
        other: Option<&Handle>,
        name: &CStr,
        out: &mut Vec<u8>,
    ) {
        let mut bytes = &[][..];
        if let Some((kind, raw_type, handle)) = handle {
            self.handle_type = raw_type.into();
            self.handle_bytes = handle.len() as u8;
            self.handle_kind = match kind {
                HandleKind::Connectable => 1,
                HandleKind::Plain => 2,
                HandleKind::IdentityOnly => 3,
            };
            bytes = handle;
        }
        self.has |= if other.is_some() { 4 } else { 0 };
        out.extend_from_slice(self.as_bytes());
        out.extend_from_slice(bytes);
        if let Some(other) = other {
            out.extend_from_slice(&other.raw_type().to_le_bytes());
            out.push(other.bytes().len() as u8);
            out.extend_from_slice(other.bytes());
        }
        out.extend_from_slice(name.to_bytes());
    }
}

impl Recipe {
    /// In few bytes: [`Packed`], the handle, the name.
    pub fn pack(&self) -> Box<[u8]> {
        let handle = self.handle.as_ref();
        let handle = handle.map(|handle| (handle.kind(), handle.raw_type(), handle.bytes()));
        let mut packed = Vec::with_capacity(size_of::<Packed>() + 32 + self.name.count_bytes());
        Packed::new(self.mount, self.ino, self.kind, self.parent)
            .born(self.btime)
            .generation(self.generation)
            .write(handle, self.other.as_ref(), &self.name, &mut packed);
        packed.into()
    }

    /// The opposite of [`Recipe::pack`]; `None` for what it did not make.
    pub fn unpack(bytes: &[u8]) -> Option<Recipe> {
        let (head, rest) = Packed::read_from_prefix(bytes).ok()?;
        if head.form != FORM {
            return None;
        }
        let (handle, name) = rest.split_at_checked(head.handle_bytes.into())?;
        let (other, name) = if head.has & 4 != 0 { unpack_other(name)? } else { (None, name) };
        if name.len() > fdops::NAME_BYTES_MAX {
            return None;
        }
        let handle_kind = match head.handle_kind {
            1 => Some(HandleKind::Connectable),
            2 => Some(HandleKind::Plain),
            3 => Some(HandleKind::IdentityOnly),
            _ => None,
        };
        let handle = handle_kind.map(|kind| Handle::new(kind, head.handle_type.get(), handle));
        Some(Recipe {
            handle: handle.flatten(),
            other,
            mount: MountIdentity {
                fs_id: head.fs_id.get(),
                device: (head.device[0].get(), head.device[1].get()),
            },
            ino: head.ino.get(),
            kind: head.kind.get(),
            btime: (head.has & 1 != 0).then_some((head.btime_sec.get(), head.btime_nsec.get())),
            generation: (head.has & 2 != 0).then_some(head.generation.get()),
            parent: head.parent.get(),
            name: CString::new(name).ok()?,
        })
    }
}

/// A handle by another name, and the rest.
fn unpack_other(bytes: &[u8]) -> Option<(Option<Handle>, &[u8])> {
    let (head, rest) = bytes.split_first_chunk::<OTHER_HEAD_BYTES>()?;
    let [raw_type @ .., len] = *head;
    let (handle, rest) = rest.split_at_checked(len.into())?;
    let is_kept = handle.len() <= OTHER_BYTES_MAX;
    let handle = Handle::new(HandleKind::Connectable, i32::from_le_bytes(raw_type), handle);
    Some((handle.filter(|_| is_kept), rest))
}
