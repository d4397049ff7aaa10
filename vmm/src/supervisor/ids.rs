//! The numbers of a machine's guests and driver VMs, and of a driver VM's ends, and the tables that they lead into.
//!
//! Invariant: a number is a place in its table for the whole run: rows are added, none is removed. The kinds cannot be mixed up, and
//! there is none for "nobody".

use std::marker::PhantomData;
use std::ops::{Index, IndexMut};

use crate::lifecycle::Endpoint;

/// A place in a table of its own kind.
pub(super) trait Id: Copy {
    fn at(place: usize) -> Self;

    fn place(self) -> usize;
}

/// A guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct GuestId(usize);

/// A driver VM, over all its lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct DriverId(usize);

impl Id for GuestId {
    fn at(place: usize) -> Self {
        Self(place)
    }

    fn place(self) -> usize {
        self.0
    }
}

impl Id for Endpoint {
    fn at(place: usize) -> Self {
        Self::at(place)
    }

    fn place(self) -> usize {
        self.place()
    }
}

impl Id for DriverId {
    fn at(place: usize) -> Self {
        Self(place)
    }

    fn place(self) -> usize {
        self.0
    }
}

/// The guests or the driver VMs of a machine, or the ends of a driver VM, in the order of the machine file; what was added later comes
/// behind.
#[derive(Clone, Debug)]
pub(super) struct Table<I, T> {
    rows: Vec<T>,
    id: PhantomData<I>,
}

impl<I: Id, T> Table<I, T> {
    pub(super) fn len(&self) -> usize {
        self.rows.len()
    }

    /// Adds a row; its number.
    pub(super) fn push(&mut self, row: T) -> I {
        self.rows.push(row);
        I::at(self.rows.len() - 1)
    }

    /// All numbers, without a hold on the table.
    pub(super) fn ids(&self) -> impl Iterator<Item = I> + use<I, T> {
        (0..self.rows.len()).map(I::at)
    }

    /// Copies of all rows, without a hold on the table.
    pub(super) fn rows(&self) -> Vec<T>
    where
        T: Copy,
    {
        self.rows.clone()
    }

    pub(super) fn iter(&self) -> std::slice::Iter<'_, T> {
        self.rows.iter()
    }

    pub(super) fn iter_mut(&mut self) -> std::slice::IterMut<'_, T> {
        self.rows.iter_mut()
    }

    /// Each row with its number.
    pub(super) fn numbered(&self) -> impl Iterator<Item = (I, &T)> {
        self.rows.iter().enumerate().map(|(place, row)| (I::at(place), row))
    }

    /// The row with number `id`, if it has one.
    pub(super) fn get(&self, id: I) -> Option<&T> {
        self.rows.get(id.place())
    }

    pub(super) fn get_mut(&mut self, id: I) -> Option<&mut T> {
        self.rows.get_mut(id.place())
    }

    pub(super) fn position(&self, wanted: impl Fn(&T) -> bool) -> Option<I> {
        self.rows.iter().position(wanted).map(I::at)
    }
}

impl<I, T> Default for Table<I, T> {
    fn default() -> Self {
        Self { rows: Vec::new(), id: PhantomData }
    }
}

impl<I, T> FromIterator<T> for Table<I, T> {
    fn from_iter<R: IntoIterator<Item = T>>(rows: R) -> Self {
        Self { rows: rows.into_iter().collect(), id: PhantomData }
    }
}

impl<I: Id, T> Index<I> for Table<I, T> {
    type Output = T;

    fn index(&self, id: I) -> &T {
        &self.rows[id.place()]
    }
}

impl<I: Id, T> IndexMut<I> for Table<I, T> {
    fn index_mut(&mut self, id: I) -> &mut T {
        &mut self.rows[id.place()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_leads_to_its_row_and_back() {
        let mut guests: Table<GuestId, &str> = ["web", "db"].into_iter().collect();
        let db = guests.position(|name| *name == "db");
        assert_eq!(db, guests.ids().nth(1));
        for id in guests.ids() {
            guests[id] = "other";
        }
        assert!(guests.numbered().all(|(id, name)| guests[id] == *name && *name == "other"));
        assert_eq!((guests.len(), guests.position(|name| *name == "db")), (2, None));
    }
}
