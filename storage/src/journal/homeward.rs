//! What a run of records leaves of a home file: the last write to every place, in file order. Pure.
//!
//! redb writes its header and its roots in every commit, and pages that one commit frees are taken
//! again a few commits later. So the records of a moment, taken together, come to a fraction of
//! their writes.
//!
//! Invariant: writing this is the same as writing the records one after the other.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::record::Record;

/// See the module.
#[derive(Debug)]
pub(super) struct Homeward<'a> {
    /// By offset; no two overlap.
    writes: BTreeMap<u64, &'a [u8]>,
    /// The shortest that the file was meanwhile: what it held beyond is gone.
    pub(super) len_min: u64,
    /// Its length in the end.
    pub(super) len: u64,
}

impl<'a> Homeward<'a> {
    /// Of records of one file, in their order.
    ///
    /// # Panics
    /// If there is none.
    pub(super) fn of(records: &'a [Arc<Record>]) -> Self {
        let len = records.last().expect("a run of records").file_len;
        let mut homeward = Self { writes: BTreeMap::new(), len_min: len, len };
        for record in records {
            homeward.shorten(record.file_len);
            record.writes().for_each(|(offset, data)| homeward.write(offset, data));
        }
        homeward
    }

    /// What is to be written, in the order of the file.
    pub(super) fn writes(&self) -> impl Iterator<Item = (u64, &'a [u8])> {
        self.writes.iter().map(|(&offset, &data)| (offset, data))
    }

    fn shorten(&mut self, len: u64) {
        self.len_min = self.len_min.min(len);
        self.writes.split_off(&len);
        if let Some(mut last) = self.writes.last_entry() {
            let room = usize::try_from(len - last.key()).unwrap_or(usize::MAX);
            let data: &'a [u8] = last.get();
            last.insert(&data[..data.len().min(room)]);
        }
    }

    fn write(&mut self, offset: u64, data: &'a [u8]) {
        let end = offset + data.len() as u64;
        // From the last that begins before the end on: as none overlap, once one ends before the
        // offset the others do as well.
        while let Some((&start, &other)) = self.writes.range(..end).next_back()
            && start + other.len() as u64 > offset
        {
            self.writes.remove(&start);
            if start < offset {
                self.writes.insert(start, &other[..(offset - start) as usize]);
            }
            if start + other.len() as u64 > end {
                self.writes.insert(end, &other[(end - start) as usize..]);
            }
        }
        self.writes.insert(offset, data);
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::journal::record::Draft;

    /// A file as it is after each record in turn.
    fn one_by_one(mut file: Vec<u8>, records: &[Arc<Record>]) -> Vec<u8> {
        for record in records {
            file.resize(record.file_len as usize, 0);
            put(&mut file, record.writes());
        }
        file
    }

    fn put<'a>(file: &mut Vec<u8>, writes: impl Iterator<Item = (u64, &'a [u8])>) {
        for (offset, data) in writes {
            let (start, end) = (offset as usize, offset as usize + data.len());
            file.resize(file.len().max(end), 0);
            file[start..end].copy_from_slice(data);
        }
    }

    proptest! {
        #[test]
        fn it_is_the_same_as_one_by_one(
            before in 0_usize..80,
            transactions in vec((20_u64..80, vec((0_u64..60, 1_usize..30), 0..6)), 1..6),
        ) {
            let mut byte = 0_u8;
            let records: Vec<_> = transactions
                .into_iter()
                .map(|(file_len, writes)| {
                    let mut draft = Draft::new(Vec::new());
                    for (offset, len) in writes {
                        byte = byte.wrapping_add(1);
                        let end = (offset + len as u64).min(file_len);
                        if offset < end {
                            draft.write(offset, &vec![byte; (end - offset) as usize]);
                        }
                    }
                    Arc::new(draft.finish(0, file_len))
                })
                .collect();
            let file = vec![0xff; before];
            let homeward = Homeward::of(&records);
            let mut together = file.clone();
            together.truncate(homeward.len_min as usize);
            together.resize(homeward.len as usize, 0);
            let mut end = 0;
            for (offset, data) in homeward.writes() {
                prop_assert!(offset >= end && !data.is_empty(), "in order, none overlap");
                end = offset + data.len() as u64;
            }
            put(&mut together, homeward.writes());
            prop_assert_eq!(together, one_by_one(file, &records));
        }
    }
}
