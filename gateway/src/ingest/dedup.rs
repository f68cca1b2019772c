//! Which events are resends of what is stored already. Pure.
//!
//! Owns: [`Dedup`], the last ids of each device with the offsets of their events, and the rows in which
//! they are kept. MQTT's DUP flag proves nothing: a client may set it on a first attempt that never
//! arrived, and a device that came back with a clean session sends its event again without it.
//!
//! Invariants:
//! - an event is called a duplicate only if one of the same device with the same id stands before it in
//!   the log: what a failed commit took along is forgotten with it (`Dedup::void`), and a row is
//!   never durable before the events whose ids it has;
//! - what was stored is known after a restart: the rows tell what came before an offset, and the log
//!   itself the rest, which is read again.
//!
//! Bound: devices, and ids for each, 32 bytes an id. A device beyond it takes the place of one that was
//! not heard of for long, as the clock algorithm sees it; of a device the oldest id goes. Then a resend
//! is stored as a new event, as without all of this.
//!
//! Rows are written when eight times as many event bytes have come, so that they add an eighth to what
//! is written at most.

use std::collections::{HashMap, VecDeque};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use bytestring::ByteString;
use storage::{Control, StateError, Store};

use super::event_id::EventIdFrom;
use crate::config::DedupConfig;

/// Namespace of the projection. No key: [`Head`]; else the device's row.
const NAMESPACE: u16 = 8;

/// Longer device keys have no window: what they take counts against nobody's bound.
const KEY_BYTES_MAX: usize = 512;

const ID_BYTES: usize = size_of::<u128>() + size_of::<u64>() + size_of::<u32>();

/// Rows are not written for less.
const SAVE_BYTES_MIN: usize = 1 << 20;
const SAVE_FACTOR: usize = 8;
/// Nor for less than this while there is nothing else to do: what is not in a row holds files back.
const IDLE_SAVE_BYTES_MIN: usize = 1 << 16;

/// The last ids of each device.
#[derive(Debug)]
pub struct Dedup {
    devices_max: usize,
    window_events_max: usize,
    /// 0: however old.
    window_s_max: u32,
    by_key: HashMap<ByteString, usize>,
    slots: Vec<Slot>,
    /// Where the clock algorithm stands.
    hand: usize,
    /// Devices that have a row, and no window any more.
    gone: Vec<ByteString>,
    /// What the rows say, as of the last commit.
    head: Head,
    /// As of the last durable one.
    durable: Head,
    /// What commits say that are not durable yet; bounded as they are.
    ahead: VecDeque<(u64, Head)>,
    /// There is no row at all yet.
    is_new: bool,
    /// Event bytes committed since the rows were written.
    unsaved_bytes: usize,
    /// Bytes of rows that are behind.
    dirty_bytes: usize,
}

#[derive(Debug)]
struct Slot {
    key: ByteString,
    ids: VecDeque<u128>,
    /// Of the id at the same place.
    seen: VecDeque<Seen>,
    /// Heard of since the hand was here.
    used: bool,
    /// Its row is behind.
    is_dirty: bool,
    has_row: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    offset: u64,
    /// Seconds since the Unix epoch.
    at_s: u32,
}

/// The row without a key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Head {
    /// The rows have the ids of all events below.
    covered: u64,
    /// Duplicates recognised in the store's life.
    duplicates: u64,
}

impl Dedup {
    /// None seen, in a log that ends at `watermark`.
    pub fn new(config: &DedupConfig, watermark: u64) -> Self {
        let head = Head { covered: watermark, duplicates: 0 };
        Self {
            devices_max: config.devices_max,
            window_events_max: config.window_events_max,
            window_s_max: u32::try_from(config.window_max.as_secs()).unwrap_or(u32::MAX),
            by_key: HashMap::new(),
            slots: Vec::new(),
            hand: 0,
            gone: Vec::new(),
            head,
            durable: head,
            ahead: VecDeque::new(),
            is_new: true,
            unsaved_bytes: 0,
            dirty_bytes: 0,
        }
    }

    /// What a store knows. `id_from` says where an event's id stands. Reads the disk.
    ///
    /// # Errors
    /// [`StateError`]; a log that cannot be read is one, too.
    pub fn load<'a>(
        config: &DedupConfig,
        store: &Store,
        id_from: impl Fn(&storage::Event) -> Option<&'a EventIdFrom>,
    ) -> Result<Self, StateError> {
        let watermark = store.mark().watermark;
        let mut dedup = Self::new(config, watermark);
        let rows = store.states(NAMESPACE)?;
        let Some(head) = rows.first().and_then(|(key, row)| Head::of(key, row)) else {
            // It is there for the first time: what came before had no ids that anybody looked at.
            return Ok(dedup);
        };
        for (key, row) in &rows[1..] {
            dedup.restore(key, row.clone());
        }
        // It may have been off for long; no more than this can be in the windows.
        let known = (dedup.devices_max * dedup.window_events_max) as u64;
        let mut from = head.covered.max(watermark.saturating_sub(known));
        dedup.begin(Head { covered: from, ..head });
        while from < watermark {
            let read = store.read(from, 4_096, 4 << 20).map_err(|error| StateError {
                disk_full: false,
                reason: format!("the ids of the last events cannot be read: {error}"),
            })?;
            for stored in &read.events {
                let id = id_from(&stored.event).and_then(|from| from.of(&stored.event));
                if let Some(id) = id {
                    let at_s = seconds(stored.received_us());
                    dedup.is_duplicate(&stored.event.device_key, id, stored.offset, at_s);
                }
            }
            from = read.next;
        }
        Ok(dedup)
    }

    fn begin(&mut self, head: Head) {
        (self.head, self.durable, self.is_new) = (head, head, false);
    }

    fn restore(&mut self, key: &[u8], mut row: Bytes) {
        let Ok(key) = std::str::from_utf8(key).map(ByteString::from) else {
            return;
        };
        if self.slots.len() >= self.devices_max {
            self.gone.push(key);
            return;
        }
        let mut slot = Slot::new(key);
        slot.has_row = true;
        let surplus = (row.len() / ID_BYTES).saturating_sub(self.window_events_max);
        row.advance(surplus * ID_BYTES);
        while row.len() >= ID_BYTES {
            let id = row.get_u128_le();
            slot.push(id, Seen { offset: row.get_u64_le(), at_s: row.get_u32_le() });
        }
        self.by_key.insert(slot.key.clone(), self.slots.len());
        self.slots.push(slot);
    }

    /// Whether an event of this device with this id is in the window; if not, it is from here on, with
    /// the offset that it is about to get, and the time.
    pub(super) fn is_duplicate(
        &mut self,
        device_key: &ByteString,
        id: u128,
        offset: u64,
        at_s: u32,
    ) -> bool {
        if device_key.len() > KEY_BYTES_MAX {
            return false;
        }
        let at = self.slot_of(device_key);
        let slot = &mut self.slots[at];
        slot.used = true;
        let found = slot.ids.iter().rposition(|seen| *seen == id);
        if let Some(found) = found {
            let age_s = at_s.saturating_sub(slot.seen[found].at_s);
            if self.window_s_max == 0 || age_s <= self.window_s_max {
                return true;
            }
        }
        if slot.ids.len() == self.window_events_max {
            slot.ids.pop_front();
            slot.seen.pop_front();
        } else if slot.is_dirty {
            self.dirty_bytes += ID_BYTES;
        }
        slot.push(id, Seen { offset, at_s });
        self.touch(at);
        false
    }

    fn touch(&mut self, at: usize) {
        let slot = &mut self.slots[at];
        if !std::mem::replace(&mut slot.is_dirty, true) {
            self.dirty_bytes += slot.key.len() + slot.ids.len() * ID_BYTES;
        }
    }

    fn slot_of(&mut self, device_key: &ByteString) -> usize {
        if let Some(&at) = self.by_key.get(device_key) {
            return at;
        }
        // A copy: a slice of a topic would keep all of it.
        let key = ByteString::from(&**device_key);
        let at = if self.slots.len() < self.devices_max {
            self.slots.push(Slot::new(key.clone()));
            self.slots.len() - 1
        } else {
            while std::mem::take(&mut self.slots[self.hand].used) {
                self.hand = (self.hand + 1) % self.slots.len();
            }
            let at = self.hand;
            self.hand = (self.hand + 1) % self.slots.len();
            let before = std::mem::replace(&mut self.slots[at], Slot::new(key.clone()));
            if before.is_dirty {
                let row_bytes = before.key.len() + before.ids.len() * ID_BYTES;
                self.dirty_bytes = self.dirty_bytes.saturating_sub(row_bytes);
            }
            self.by_key.remove(&before.key);
            if before.has_row {
                self.gone.push(before.key);
            }
            at
        };
        // A row that is to go would take this device's next one along.
        if let Some(place) = self.gone.iter().position(|gone| *gone == key) {
            self.gone.swap_remove(place);
            self.slots[at].has_row = true;
        }
        self.by_key.insert(key, at);
        at
    }

    /// Commits up to this one are durable.
    pub(super) fn durable(&mut self, commit: u64) {
        while let Some((_, head)) = self.ahead.pop_front_if(|(number, _)| *number <= commit) {
            self.durable = head;
        }
    }

    /// Forgets events from this offset on: the commits that are not durable are void.
    pub(super) fn void(&mut self, from: u64) {
        self.forget(from);
        self.head = self.durable;
        self.ahead.clear();
        // The first row may have been among them; it says the same once more.
        self.is_new = true;
    }

    /// Forgets events from this offset on: they are not to be stored.
    pub(super) fn forget(&mut self, from: u64) {
        for at in 0..self.slots.len() {
            let slot = &mut self.slots[at];
            while slot.seen.pop_back_if(|seen| seen.offset >= from).is_some() {
                slot.ids.pop_back();
            }
            // A row may have been void, too.
            self.touch(at);
        }
    }

    /// Whether rows are worth writing, of which a good many are behind.
    pub(super) fn is_save_due(&self) -> bool {
        self.unsaved_bytes >= SAVE_BYTES_MIN.max(SAVE_FACTOR * self.dirty_bytes)
    }

    /// As [`Dedup::is_save_due`], when there is nothing else to do.
    pub(super) fn is_idle_save_due(&self) -> bool {
        self.unsaved_bytes >= IDLE_SAVE_BYTES_MIN
    }

    /// Whether rows are behind the log, which ends at this offset.
    pub(super) fn is_behind(&self, end: u64) -> bool {
        self.head.covered < end
    }

    /// What is durable no later than a commit that ends at `end`: the number of duplicates with those in
    /// it, and if asked to `save` the rows with what comes before its end.
    pub(super) fn controls(&self, duplicates: u64, save: Option<u64>, out: &mut Vec<Control>) {
        let mut head = self.head;
        head.duplicates += duplicates;
        if let Some(end) = save {
            head.covered = end;
            out.extend(self.gone.iter().map(|key| Control::Delete {
                namespace: NAMESPACE,
                key: key.clone().into_bytes(),
            }));
            out.extend(self.slots.iter().filter(|slot| slot.is_dirty).map(|slot| Control::Put {
                namespace: NAMESPACE,
                key: slot.key.clone().into_bytes(),
                value: slot.row(end),
            }));
        }
        if duplicates > 0 || save.is_some() || self.is_new {
            out.push(head.control());
        }
    }

    /// What [`Dedup::controls`] gave is in the log with this commit, which has so many event bytes.
    pub(super) fn committed(
        &mut self,
        commit: u64,
        duplicates: u64,
        save: Option<u64>,
        size_bytes: usize,
    ) {
        self.is_new = false;
        self.head.duplicates += duplicates;
        self.unsaved_bytes += size_bytes;
        if let Some(end) = save {
            self.head.covered = end;
            self.gone.clear();
            (self.unsaved_bytes, self.dirty_bytes) = (0, 0);
            for slot in &mut self.slots {
                slot.has_row |= std::mem::take(&mut slot.is_dirty);
            }
        }
        self.ahead.push_back((commit, self.head));
    }

    /// Offset from which on the log is needed, to know the rest again.
    pub(super) fn needs_from(&self) -> u64 {
        self.durable.covered
    }
}

impl Slot {
    fn new(key: ByteString) -> Self {
        Self {
            key,
            ids: VecDeque::new(),
            seen: VecDeque::new(),
            used: true,
            is_dirty: false,
            has_row: false,
        }
    }

    fn push(&mut self, id: u128, seen: Seen) {
        self.ids.push_back(id);
        self.seen.push_back(seen);
    }

    /// What came before an offset.
    fn row(&self, end: u64) -> Bytes {
        let mut row = BytesMut::with_capacity(self.ids.len() * ID_BYTES);
        let before = self.ids.iter().zip(&self.seen).take_while(|(_, seen)| seen.offset < end);
        for (id, seen) in before {
            row.put_u128_le(*id);
            row.put_u64_le(seen.offset);
            row.put_u32_le(seen.at_s);
        }
        row.freeze()
    }
}

impl Head {
    fn control(self) -> Control {
        let mut value = BytesMut::with_capacity(16);
        value.put_u64_le(self.covered);
        value.put_u64_le(self.duplicates);
        Control::Put { namespace: NAMESPACE, key: Bytes::new(), value: value.freeze() }
    }

    fn of(key: &[u8], row: &Bytes) -> Option<Self> {
        let mut row = row.clone();
        let is_head = key.is_empty() && row.len() == 16;
        is_head.then(|| Self { covered: row.get_u64_le(), duplicates: row.get_u64_le() })
    }
}

/// Duplicates that a store has recognised in its life: acked, and not stored again.
///
/// # Errors
/// [`StateError`].
pub fn duplicates_of(store: &Store) -> Result<u64, StateError> {
    let row = store.state(NAMESPACE, b"")?;
    Ok(row.and_then(|row| Head::of(b"", &row)).map_or(0, |head| head.duplicates))
}

/// Of a time in microseconds.
pub(super) fn seconds(us: u64) -> u32 {
    u32::try_from(us / 1_000_000).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn config(devices_max: usize, window_events_max: usize, window_s_max: u64) -> DedupConfig {
        let window_max = Duration::from_secs(window_s_max);
        DedupConfig { devices_max, window_events_max, window_max }
    }

    fn dedup(devices_max: usize, window_events_max: usize, window_s_max: u64) -> Dedup {
        Dedup::new(&config(devices_max, window_events_max, window_s_max), 0)
    }

    fn key(device: u8) -> ByteString {
        format!("d{device}").into()
    }

    #[test]
    fn a_window_is_one_device_s_and_holds_its_last_ids() {
        let mut dedup = dedup(9, 2, 0);
        let mut is = |device, id| dedup.is_duplicate(&key(device), id, 0, 0);
        assert_eq!([is(0, 1), is(1, 1), is(0, 1)], [false, false, true]);
        assert_eq!([is(0, 2), is(0, 3), is(0, 2)], [false, false, true]);
        assert!(!is(0, 1), "it is out of the window");
        let long = ByteString::from("d".repeat(KEY_BYTES_MAX + 1));
        assert!(!dedup.is_duplicate(&long, 1, 0, 0) && !dedup.is_duplicate(&long, 1, 0, 0));
        assert_eq!(dedup.slots.len(), 2);
    }

    #[test]
    fn an_id_that_is_too_old_is_new_again() {
        let mut dedup = dedup(9, 4, 10);
        let mut is = |at_s| dedup.is_duplicate(&key(0), 1, 0, at_s);
        assert_eq!([is(100), is(110), is(111), is(121)], [false, true, false, true]);
        assert!(is(5), "a clock that was set back makes nothing old");
    }

    #[test]
    fn the_device_that_was_not_heard_of_makes_room() {
        let mut dedup = dedup(3, 4, 0);
        for device in 0..3 {
            dedup.is_duplicate(&key(device), 1, 0, 0);
        }
        dedup.is_duplicate(&key(3), 1, 0, 0);
        assert!(!dedup.by_key.contains_key("d0"), "all were heard of: the first goes");
        assert!(dedup.is_duplicate(&key(1), 1, 0, 0));
        dedup.is_duplicate(&key(4), 1, 0, 0);
        assert!(!dedup.by_key.contains_key("d2") && dedup.by_key.contains_key("d1"));
        assert_eq!((dedup.slots.len(), dedup.by_key.len()), (3, 3));
    }

    /// What a row says is durable before what it says it of, if nothing keeps it from that.
    #[test]
    fn a_row_has_nothing_of_what_comes_after_it() {
        let mut dedup = dedup(9, 4, 0);
        for offset in 0..3 {
            dedup.is_duplicate(&key(0), offset.into(), offset, 0);
        }
        let mut controls = Vec::new();
        dedup.controls(0, Some(2), &mut controls);
        let [Control::Put { value, .. }, _] = &controls[..] else { panic!("{controls:?}") };
        assert_eq!(value.len(), 2 * ID_BYTES);
    }

    /// A log beside the window, with commits that are ahead of it.
    #[derive(Default)]
    struct World {
        commit: u64,
        /// Device and id of each event.
        log: Vec<(u8, u128)>,
        rows: HashMap<Bytes, Bytes>,
        /// Rows and end of the log as of the durable commit.
        durable: (HashMap<Bytes, Bytes>, usize),
    }

    impl World {
        fn commit(&mut self, dedup: &mut Dedup, save: bool) {
            let end = self.log.len() as u64;
            let save = save.then_some(end);
            let mut controls = Vec::new();
            dedup.controls(0, save, &mut controls);
            for control in controls {
                match control {
                    Control::Put { key, value, .. } => drop(self.rows.insert(key, value)),
                    Control::Delete { key, .. } => drop(self.rows.remove(&key)),
                    Control::Cursor { .. } => panic!("no cursor"),
                }
            }
            self.commit += 1;
            dedup.committed(self.commit, 0, save, 1);
        }

        fn sync(&mut self, dedup: &mut Dedup) {
            self.durable = (self.rows.clone(), self.log.len());
            dedup.durable(self.commit);
            let head = self.rows.get(&b""[..]).and_then(|row| Head::of(b"", row));
            assert_eq!(head, Some(dedup.durable));
        }

        fn lose(&mut self) {
            self.rows.clone_from(&self.durable.0);
            self.log.truncate(self.durable.1);
        }

        fn reopen(&self, config: &DedupConfig) -> Dedup {
            let mut dedup = Dedup::new(config, self.log.len() as u64);
            let Some(head) = self.rows.get(&b""[..]).and_then(|row| Head::of(b"", row)) else {
                dedup.begin(Head::default());
                dedup.is_new = true;
                return self.replay(dedup);
            };
            dedup.begin(head);
            let mut keys: Vec<_> = self.rows.keys().filter(|key| !key.is_empty()).collect();
            keys.sort();
            for key in keys {
                dedup.restore(key, self.rows[key].clone());
            }
            self.replay(dedup)
        }

        fn replay(&self, mut dedup: Dedup) -> Dedup {
            for offset in dedup.head.covered as usize..self.log.len() {
                let (device, id) = self.log[offset];
                dedup.is_duplicate(&key(device), id, offset as u64, 0);
            }
            dedup
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Event(u8, u8),
        Commit {
            save: bool,
        },
        Sync,
        /// A failed sync: what is not durable is void, and the process goes on.
        Fail,
        Crash,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            12 => (0..4_u8, 0..12_u8).prop_map(|(device, id)| Step::Event(device, id)),
            4 => any::<bool>().prop_map(|save| Step::Commit { save }),
            3 => Just(Step::Sync),
            1 => Just(Step::Fail),
            1 => Just(Step::Crash),
        ];
        prop::collection::vec(step, 1..120)
    }

    proptest! {
        /// Whatever fails and when: what is called a duplicate is in the log, and what is among the last
        /// of its device there is called one.
        #[test]
        fn a_duplicate_is_in_the_log_and_a_recent_one_is_recognised(
            steps in steps(), devices_max in 2..5_usize, window in 1..5_usize,
        ) {
            let config = config(devices_max, window, 0);
            let mut dedup = Dedup::new(&config, 0);
            let mut world = World::default();
            // Ids that made room for one that became void do not come back.
            let mut is_whole = devices_max == 4;
            for step in steps {
                match step {
                    Step::Event(device, id) => {
                        let id = u128::from(id);
                        let offset = world.log.len() as u64;
                        let is = dedup.is_duplicate(&key(device), id, offset, 0);
                        let of_device = || world.log.iter().filter(|(of, _)| *of == device);
                        prop_assert!(!is || of_device().any(|(_, of)| *of == id), "a loss");
                        // With room for every device no window is ever given up.
                        if is_whole && of_device().rev().take(window).any(|(_, of)| *of == id) {
                            prop_assert!(is, "stored twice");
                        }
                        if !is {
                            world.log.push((device, id));
                        }
                    }
                    Step::Commit { save } => world.commit(&mut dedup, save),
                    Step::Sync => {
                        world.commit(&mut dedup, false);
                        world.sync(&mut dedup);
                    }
                    Step::Fail => {
                        world.lose();
                        dedup.void(world.log.len() as u64);
                        is_whole = false;
                    }
                    Step::Crash => {
                        world.lose();
                        dedup = world.reopen(&config);
                    }
                }
                prop_assert!(dedup.slots.len() <= devices_max && dedup.by_key.len() == dedup.slots.len());
                prop_assert!(dedup.gone.len() <= devices_max.max(world.rows.len()));
            }
        }
    }
}
