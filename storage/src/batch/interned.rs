//! What a batch writes out once and refers to by number after that. Pure.

use std::hash::{BuildHasher, Hasher};
use std::ops::Range;

use foldhash::fast::RandomState;
use hashbrown::HashTable;

use super::DEFINE;
use crate::row::{put_bytes, put_number};

/// Values that occurred in the batch, numbered from 1. They are not copied: a value is found by
/// where it was written out.
#[derive(Default)]
pub(super) struct Interned {
    values: HashTable<Defined>,
    /// The one that was put last: a run of the same costs no search.
    last: Option<Defined>,
    defined: u64,
    /// Seeded, because devices choose what is hashed.
    hasher: RandomState,
}

/// A value that is written out in the body.
#[derive(Clone)]
struct Defined {
    hash: u64,
    number: u64,
    group: Option<u16>,
    place: Range<usize>,
}

impl Defined {
    fn is(&self, body: &[u8], value: &[u8], group: Option<u16>) -> bool {
        self.group == group && &body[self.place.clone()] == value
    }
}

impl Interned {
    /// Appends the number of a value that occurred, with the same group; else the value itself.
    pub(super) fn put(&mut self, body: &mut Vec<u8>, value: &[u8], group: Option<u16>) {
        if let Some(last) = &self.last
            && last.is(body, value, group)
        {
            return put_number(body, last.number);
        }
        let mut hasher = self.hasher.build_hasher();
        hasher.write(value);
        let hash = hasher.finish();
        if let Some(known) = self.values.find(hash, |known| known.is(body, value, group)) {
            self.last = Some(known.clone());
            return put_number(body, known.number);
        }
        self.defined += 1;
        put_number(body, DEFINE);
        if let Some(group) = group {
            put_number(body, u64::from(group));
        }
        put_bytes(body, value);
        let place = body.len() - value.len()..body.len();
        let defined = Defined { hash, number: self.defined, group, place };
        self.last = Some(defined.clone());
        self.values.insert_unique(hash, defined, |known| known.hash);
    }

    pub(super) fn clear(&mut self) {
        self.values.clear();
        self.last = None;
        self.defined = 0;
    }
}
