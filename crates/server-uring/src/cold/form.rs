//! A cold node as bytes: all that its recipe says, in fewer than a recipe takes on the wire
//! (`import/packed.rs`), as it is read by nobody but the daemon that wrote it.
//!
//! ```text
//! 0    8       10      12      14     15
//! | id | bytes | flags | noted        | mount | given | ino | parent ..
//! |    |       |       | life | conns |     .. [birth] [generation] [handle] [other] name
//!
//! birth:       8 bytes: seconds << 30 | nanoseconds; or 12, where these do not fit
//! generation:  4 bytes
//! handle:      type | length | bytes
//! other:       the same, by another name
//! ```
//! `mount` is a byte, a place in [`Mounts`]; [`ALONE`]: the file system follows, 16 bytes. `given`,
//! `ino`, types and lengths are varints, of 7 bits a byte; `parent` is one too, of how far its id
//! lies from the node's. `given` keeps its width when it becomes less.

use std::ffi::CString;

use super::FileKey;
use crate::import::{Handle, HandleKind, MountIdentity, Recipe};

/// Before the mount.
const HEAD_BYTES: usize = 15;
/// The mount is one of many, or nobody else's.
const ALONE: u8 = u8::MAX;
/// File systems that are written once; a guest may tell of any number.
const MOUNTS_MAX: usize = 16;
/// The longest: all numbers, two handles, a name of 255 bytes.
pub(super) const BYTES_MAX: usize = HEAD_BYTES + 17 + 30 + 12 + 4 + 2 * (15 + 128) + 255;

const OURS: u16 = 1;
/// There is a recipe.
const FOUND: u16 = 1 << 1;
const BIRTH_SHORT: u16 = 1 << 2;
const BIRTH_LONG: u16 = 1 << 3;
const GENERATION: u16 = 1 << 4;
const OTHER: u16 = 1 << 5;
const HANDLE_SHIFT: u16 = 6;
/// `S_IFMT` bits as they are.
const KIND: u16 = 0o170_000;

/// File systems that nodes of this session lie on.
#[derive(Default)]
pub(super) struct Mounts(Vec<MountIdentity>);

impl Mounts {
    fn place_of(&mut self, mount: MountIdentity) -> u8 {
        let known = self.0.iter().position(|&known| known == mount);
        let place = known.or_else(|| {
            let free = self.0.len();
            (free < MOUNTS_MAX).then(|| {
                self.0.push(mount);
                free
            })
        });
        place.map_or(ALONE, |place| place as u8)
    }

    /// Nothing names any.
    pub(super) fn clear(&mut self) {
        self.0 = Vec::new();
    }
}

/// Whether all of this recipe can be written.
pub(super) fn fits(recipe: &Recipe) -> bool {
    recipe.kind & !KIND == 0
}

/// Writes a node, `noted` as `Node` has it. `recipe`: what finds it, and [`fits`].
pub(super) fn write(
    id: u64,
    given: u64,
    noted: u64,
    recipe: Option<&Recipe>,
    ours: bool,
    mounts: &mut Mounts,
) -> Vec<u8> {
    let mut out = Vec::with_capacity(128);
    out.extend_from_slice(&id.to_le_bytes());
    out.extend_from_slice(&[0; HEAD_BYTES - 8]);
    let mut flags = if ours { OURS } else { 0 };
    match recipe {
        None => push_number(&mut out, given),
        Some(recipe) => flags |= FOUND | write_recipe(&mut out, id, given, recipe, mounts),
    }
    let bytes = out.len() as u16;
    out[8..10].copy_from_slice(&bytes.to_le_bytes());
    out[10..12].copy_from_slice(&flags.to_le_bytes());
    // In a later life it is noted once more.
    if let Ok(life) = u16::try_from(noted >> 32) {
        out[12..14].copy_from_slice(&life.to_le_bytes());
        out[14] = noted as u8;
    }
    out
}

fn write_recipe(
    out: &mut Vec<u8>,
    id: u64,
    given: u64,
    recipe: &Recipe,
    mounts: &mut Mounts,
) -> u16 {
    let mut flags = recipe.kind & KIND;
    let place = mounts.place_of(recipe.mount);
    out.push(place);
    if place == ALONE {
        out.extend_from_slice(&recipe.mount.fs_id.to_le_bytes());
        out.extend_from_slice(&recipe.mount.device.0.to_le_bytes());
        out.extend_from_slice(&recipe.mount.device.1.to_le_bytes());
    }
    push_number(out, given);
    push_number(out, recipe.ino);
    push_number(out, zigzag(recipe.parent.wrapping_sub(id)));
    if let Some((sec, nsec)) = recipe.btime {
        if (0..1 << 34).contains(&sec) && nsec < 1 << 30 {
            flags |= BIRTH_SHORT;
            out.extend_from_slice(&((sec as u64) << 30 | u64::from(nsec)).to_le_bytes());
        } else {
            flags |= BIRTH_LONG;
            out.extend_from_slice(&sec.to_le_bytes());
            out.extend_from_slice(&nsec.to_le_bytes());
        }
    }
    if let Some(generation) = recipe.generation {
        flags |= GENERATION;
        out.extend_from_slice(&generation.to_le_bytes());
    }
    if let Some(handle) = &recipe.handle {
        let kind = match handle.kind() {
            HandleKind::Connectable => 1,
            HandleKind::Plain => 2,
            HandleKind::IdentityOnly => 3,
        };
        flags |= kind << HANDLE_SHIFT;
        push_handle(out, handle);
    }
    if let Some(other) = &recipe.other {
        flags |= OTHER;
        push_handle(out, other);
    }
    out.extend_from_slice(recipe.name.as_bytes());
    flags
}

fn push_handle(out: &mut Vec<u8>, handle: &Handle) {
    push_number(out, u64::from(handle.raw_type() as u32));
    push_number(out, handle.bytes().len() as u64);
    out.extend_from_slice(handle.bytes());
}

fn push_number(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

fn zigzag(distance: u64) -> u64 {
    distance << 1 ^ ((distance as i64) >> 63) as u64
}

fn unzigzag(number: u64) -> u64 {
    number >> 1 ^ (number & 1).wrapping_neg()
}

/// A node that was written by [`write`], perhaps with room behind it.
#[derive(Clone, Copy)]
pub(super) struct Form<'a>(&'a [u8]);

/// What is not read yet.
struct Rest<'a>(&'a [u8]);

impl<'a> Rest<'a> {
    fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let (bytes, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(bytes)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.bytes(N)?.try_into().ok()
    }

    fn number(&mut self) -> Option<u64> {
        let mut number = 0;
        for shift in (0..64).step_by(7) {
            let [byte] = self.array()?;
            number |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(number);
            }
        }
        None
    }

    fn mount(&mut self, mounts: &Mounts) -> Option<MountIdentity> {
        let [place] = self.array()?;
        if place != ALONE {
            return mounts.0.get(usize::from(place)).copied();
        }
        let fs_id = u64::from_le_bytes(self.array()?);
        let device = (u32::from_le_bytes(self.array()?), u32::from_le_bytes(self.array()?));
        Some(MountIdentity { fs_id, device })
    }

    fn handle(&mut self) -> Option<(i32, &'a [u8])> {
        let raw_type = self.number()? as u32 as i32;
        let bytes = self.number()?;
        Some((raw_type, self.bytes(bytes as usize)?))
    }

    fn birth(&mut self, flags: u16) -> Option<Option<(i64, u32)>> {
        Some(match (flags & BIRTH_SHORT != 0, flags & BIRTH_LONG != 0) {
            (true, _) => {
                let both = u64::from_le_bytes(self.array()?);
                Some(((both >> 30) as i64, (both & ((1 << 30) - 1)) as u32))
            }
            (_, true) => {
                Some((i64::from_le_bytes(self.array()?), u32::from_le_bytes(self.array()?)))
            }
            _ => None,
        })
    }

    fn generation(&mut self, flags: u16) -> Option<Option<u32>> {
        let has = flags & GENERATION != 0;
        Some(if has { Some(u32::from_le_bytes(self.array()?)) } else { None })
    }
}

impl<'a> Form<'a> {
    pub(super) fn of(slot: &'a [u8]) -> Form<'a> {
        let bytes = slot.get(8..10).map_or(0, |two| u16::from_le_bytes([two[0], two[1]]));
        Form(slot.get(..bytes.into()).unwrap_or_default())
    }

    pub(super) fn id(self) -> u64 {
        self.0.first_chunk().map_or(0, |&bytes| u64::from_le_bytes(bytes))
    }

    fn flags(self) -> u16 {
        self.0.get(10..12).map_or(0, |two| u16::from_le_bytes([two[0], two[1]]))
    }

    /// As it was written.
    pub(super) fn noted(self) -> u64 {
        match self.0.get(12..HEAD_BYTES) {
            Some(&[low, high, conns]) => {
                u64::from(u16::from_le_bytes([low, high])) << 32 | u64::from(conns)
            }
            _ => 0,
        }
    }

    pub(super) fn is_ours(self) -> bool {
        self.flags() & OURS != 0
    }

    pub(super) fn len(self) -> usize {
        self.0.len()
    }

    fn rest(self) -> Rest<'a> {
        Rest(self.0.get(HEAD_BYTES..).unwrap_or_default())
    }

    /// Where `given` stands.
    fn given_at(self) -> usize {
        let is_found = self.flags() & FOUND != 0;
        HEAD_BYTES
            + match (is_found, self.0.get(HEAD_BYTES)) {
                (false, _) => 0,
                (true, Some(&ALONE)) => 17,
                (true, _) => 1,
            }
    }

    pub(super) fn given(self) -> u64 {
        let mut rest = Rest(self.0.get(self.given_at()..).unwrap_or_default());
        rest.number().unwrap_or_default()
    }

    /// Of what file it is.
    pub(super) fn file(self, mounts: &Mounts) -> Option<FileKey> {
        if self.flags() & FOUND == 0 {
            return None;
        }
        let mut rest = self.rest();
        let (major, minor) = rest.mount(mounts)?.device;
        rest.number()?;
        Some((rustix::fs::makedev(major, minor), rest.number()?))
    }

    /// Whether it was made here, of a file of this kind with this handle, which opens it.
    pub(super) fn has_own_handle(self, kind: u16, handle: (i32, &[u8])) -> bool {
        let flags = self.flags();
        let is_plain = flags >> HANDLE_SHIFT & 3 == 2;
        let is_it = flags & OURS != 0 && flags & KIND == kind;
        is_it && is_plain && self.handle() == Some(handle)
    }

    fn handle(self) -> Option<(i32, &'a [u8])> {
        let mut rest = Rest(self.0.get(self.given_at()..)?);
        for _given_ino_parent in 0..3 {
            rest.number()?;
        }
        rest.birth(self.flags())?;
        rest.generation(self.flags())?;
        rest.handle()
    }

    /// `None`: nothing leads to it.
    pub(super) fn recipe(self, mounts: &Mounts) -> Option<Recipe> {
        let flags = self.flags();
        if flags & FOUND == 0 {
            return None;
        }
        let mut rest = self.rest();
        let mount = rest.mount(mounts)?;
        rest.number()?;
        let ino = rest.number()?;
        let parent = self.id().wrapping_add(unzigzag(rest.number()?));
        let btime = rest.birth(flags)?;
        let generation = rest.generation(flags)?;
        let kind = match flags >> HANDLE_SHIFT & 3 {
            1 => Some(HandleKind::Connectable),
            2 => Some(HandleKind::Plain),
            3 => Some(HandleKind::IdentityOnly),
            _ => None,
        };
        let handle = match kind {
            Some(kind) => {
                let (raw_type, bytes) = rest.handle()?;
                Some(Handle::new(kind, raw_type, bytes)?)
            }
            None => None,
        };
        let other = if flags & OTHER != 0 {
            let (raw_type, bytes) = rest.handle()?;
            Some(Handle::new(HandleKind::Connectable, raw_type, bytes)?)
        } else {
            None
        };
        let name = CString::new(rest.0).ok()?;
        let kind = flags & KIND;
        Some(Recipe { handle, other, mount, ino, kind, btime, generation, parent, name })
    }
}

/// Lookups that the guest has left, not more than there were; what it was told is to be told again.
pub(super) fn set_given(slot: &mut [u8], mut given: u64) {
    if let Some(noted) = slot.get_mut(12..HEAD_BYTES) {
        noted.fill(0);
    }
    let at = Form::of(slot).given_at();
    for byte in slot.iter_mut().skip(at) {
        let goes_on = *byte & 0x80;
        *byte = (given as u8 & 0x7f) | goes_on;
        given >>= 7;
        if goes_on == 0 {
            break;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn handle(kind: HandleKind) -> impl Strategy<Value = Handle> {
        let bytes = proptest::collection::vec(any::<u8>(), 0..=128);
        (any::<i32>(), bytes)
            .prop_map(move |(raw_type, bytes)| Handle::new(kind, raw_type, &bytes).expect("short"))
    }

    fn kinds() -> impl Strategy<Value = Handle> {
        use HandleKind::{Connectable, IdentityOnly, Plain};
        prop_oneof![handle(Connectable), handle(Plain), handle(IdentityOnly)]
    }

    prop_compose! {
        fn recipe()(
            handle in proptest::option::of(kinds()),
            other in proptest::option::of(handle(HandleKind::Connectable)),
            (fs_id, device) in (any::<u64>(), (any::<u32>(), any::<u32>())),
            ino in any::<u64>(),
            kind in 0_u16..16,
            btime in proptest::option::of(prop_oneof![
                (any::<i64>(), any::<u32>()),
                (0_i64..1 << 34, 0_u32..1 << 30),
            ]),
            (generation, parent) in (any::<Option<u32>>(), any::<u64>()),
            name in proptest::collection::vec(1_u8.., 0..=255),
        ) -> Recipe {
            let name = CString::new(name).expect("no NUL");
            let mount = MountIdentity { fs_id, device };
            let kind = kind << 12;
            Recipe { handle, other, mount, ino, kind, btime, generation, parent, name }
        }
    }

    proptest! {
        #[test]
        fn all_of_a_recipe_comes_back(
            recipes in proptest::collection::vec(recipe(), 1..40),
            id in any::<u64>(),
            given in any::<u64>(),
            less in any::<u64>(),
            (life, conns) in (0_u64..1 << 17, any::<u8>()),
            ours in any::<bool>(),
        ) {
            let mut mounts = Mounts::default();
            let noted = life << 32 | u64::from(conns);
            for recipe in recipes {
                let mut bytes = write(id, given, noted, Some(&recipe), ours, &mut mounts);
                prop_assert!(bytes.len() <= BYTES_MAX && mounts.0.len() <= MOUNTS_MAX);
                bytes.resize(bytes.len().next_multiple_of(8), 0);
                let form = Form::of(&bytes);
                prop_assert_eq!((form.id(), form.given(), form.is_ours()), (id, given, ours));
                prop_assert_eq!(form.recipe(&mounts), Some(recipe.clone()));
                prop_assert_eq!(form.noted(), if life < 1 << 16 { noted } else { 0 });
                let (major, minor) = recipe.mount.device;
                let file = (rustix::fs::makedev(major, minor), recipe.ino);
                prop_assert_eq!(form.file(&mounts), Some(file));
                if let Some(handle) = &recipe.handle {
                    let is_plain = handle.kind() == HandleKind::Plain;
                    let (kind, raw_type, bytes) = (recipe.kind, handle.raw_type(), handle.bytes());
                    prop_assert_eq!(form.has_own_handle(kind, (raw_type, bytes)), ours && is_plain);
                    prop_assert!(!form.has_own_handle(kind, (raw_type ^ 1, bytes)));
                    prop_assert!(!form.has_own_handle(kind ^ 0o020_000, (raw_type, bytes)));
                }
                set_given(&mut bytes, less.min(given));
                let form = Form::of(&bytes);
                prop_assert_eq!((form.given(), form.noted()), (less.min(given), 0));
                prop_assert_eq!(form.recipe(&mounts), Some(recipe));
            }
        }
    }

    #[test]
    fn an_ordinary_one_is_short() {
        let mount = MountIdentity { fs_id: 7, device: (0, 31) };
        let recipe = Recipe {
            handle: Handle::new(HandleKind::Plain, 1, &[1; 12]),
            other: None,
            mount,
            ino: 1 << 20,
            kind: 0o100_000,
            btime: Some((1_800_000_000, 999_999_999)),
            generation: None,
            parent: 1_800_000_000_000_000_000,
            name: c"interesting.rs".into(),
        };
        let id = recipe.parent + 100_000;
        assert_eq!(write(id, 1, 0, Some(&recipe), true, &mut Mounts::default()).len(), 59);
        assert_eq!(write(id, 1, 0, None, false, &mut Mounts::default()).len(), 16);
    }
}
