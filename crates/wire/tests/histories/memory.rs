//! The tables of a daemon's slots, in what is left of it when it is dead.

use ringfs_wire::table::{Cell, SlotTable};
use std::cell::RefCell;
use std::rc::Rc;
use zerocopy::{FromZeros, IntoBytes};

pub const SLOTS: u16 = 4;

/// A table's cells, whose bytes stay when the daemon is gone, as in a file that is mapped.
pub struct Memory {
    cells: Box<[Cell]>,
    file: Rc<RefCell<Vec<u8>>>,
}

pub type Table = SlotTable<Memory>;
pub type File = Rc<RefCell<Vec<u8>>>;

impl Memory {
    pub fn new(file: &File) -> Memory {
        let mut cells: Box<[Cell]> = (0..SLOTS).map(|_| Cell::new_zeroed()).collect();
        let bytes = file.borrow();
        if !bytes.is_empty() {
            cells.as_mut_bytes().copy_from_slice(&bytes);
        }
        Memory { cells, file: Rc::clone(file) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let bytes = &mut *self.file.borrow_mut();
        bytes.clear();
        bytes.extend_from_slice(self.cells.as_mut_bytes());
    }
}

impl AsRef<[Cell]> for Memory {
    fn as_ref(&self) -> &[Cell] {
        &self.cells
    }
}

impl AsMut<[Cell]> for Memory {
    fn as_mut(&mut self) -> &mut [Cell] {
        &mut self.cells
    }
}
