//! Devices whose later events are held back behind one that was refused for good, where a sink is
//! told to (`on_reject = "park_device"`). Pure.
//!
//! Owns: which devices are parked, and behind which event.
//!
//! - A device is parked from the moment that an event of it is refused for good. What comes of it from
//!   then on is not offered: it goes to the dead letters as well, as *held back*, which is a letter
//!   with no attempt. So cursor and retention go on, and what bounds it is what bounds dead letters.
//! - It ends with the letters. Once none is left that was offered (it was requeued and taken, or
//!   dropped), what is held back behind it is requeued by itself, in offset order; until all of it is
//!   taken nothing else of the sink begins, so that nothing of the device overtakes it.
//! - The dead letters are the truth, also over a restart: they are looked through before the sink
//!   begins, and again whenever others may have changed them.
//!
//! What was in flight beside the refused event may still arrive: a sink that sends many requests at a
//! time, or that is answered event by event, cannot call it back.
//! Deliberately absent: the looking (`forwarder`), and taking events out of requests (`delivery`).

use std::collections::{BTreeMap, HashMap};

use bytestring::ByteString;
use storage::{DeadLetter, KeptLetter, StoredEvent};

/// What the dead letters hold of each device, as of a look through them.
#[derive(Debug, Default)]
pub(crate) struct Found(BTreeMap<ByteString, OfDevice>);

#[derive(Debug)]
struct OfDevice {
    /// The oldest that was offered and refused.
    refused: Option<u64>,
    /// Some of what is held back is not to be delivered again.
    waits: bool,
}

impl Found {
    /// Goes on with the next letters, in offset order.
    pub(crate) fn add(&mut self, letters: &[KeptLetter]) {
        for KeptLetter { letter, requeued_us } in letters {
            let device = letter.event.event.device_key.clone();
            let of = self.0.entry(device).or_insert(OfDevice { refused: None, waits: false });
            if is_held_back(letter) {
                of.waits |= requeued_us.is_none();
            } else {
                of.refused.get_or_insert(letter.event.offset);
            }
        }
    }

    /// Whether there is anything that [`Found::frees`].
    pub(crate) fn frees_some(&self) -> bool {
        self.0.values().any(|of| of.refused.is_none() && of.waits)
    }

    /// Whether a letter is held back behind nothing any more, and so is to be delivered.
    pub(crate) fn frees(&self, letter: &DeadLetter) -> bool {
        let of = self.0.get(&letter.event.event.device_key);
        is_held_back(letter) && of.is_some_and(|of| of.refused.is_none())
    }
}

/// Whether it was never offered.
fn is_held_back(letter: &DeadLetter) -> bool {
    letter.attempts == 0
}

#[derive(Debug)]
struct Device {
    /// Offset of the refused event.
    behind: u64,
    /// Nothing of it that was refused is left: the rest is on its way.
    is_released: bool,
    /// It got a letter after the last look began.
    is_fresh: bool,
}

/// The parked devices of one sink.
#[derive(Debug, Default)]
pub(crate) struct Parked {
    devices: HashMap<ByteString, Device>,
    /// The letters were looked through once.
    is_known: bool,
}

impl Parked {
    /// Whether requests may begin: not before it is known who is parked, nor while what was held back
    /// is on its way.
    pub(crate) fn lets_begin(&self) -> bool {
        self.is_known && !self.is_releasing()
    }

    /// Whether what was held back of some device is on its way.
    pub(crate) fn is_releasing(&self) -> bool {
        self.devices.values().any(|device| device.is_released)
    }

    /// How many.
    pub(crate) fn len(&self) -> usize {
        self.devices.len()
    }

    /// An event was refused for good, or held back.
    pub(crate) fn park(&mut self, stored: &StoredEvent) {
        let new = Device { behind: stored.offset, is_released: false, is_fresh: true };
        let device = self.devices.entry(stored.event.device_key.clone()).or_insert(new);
        device.is_fresh = true;
    }

    /// The refused event that this one has to wait behind, if there is one.
    pub(crate) fn behind(&self, stored: &StoredEvent) -> Option<u64> {
        if self.devices.is_empty() {
            return None;
        }
        let device = self.devices.get(&stored.event.device_key)?;
        (device.behind < stored.offset).then_some(device.behind)
    }

    /// The letters are being looked through: what is written from here on may not be found.
    pub(crate) fn looking(&mut self) {
        self.devices.values_mut().for_each(|device| device.is_fresh = false);
    }

    /// What the look has found. `unwritten` are letters that are not durable yet.
    pub(crate) fn looked<'a>(
        &mut self,
        found: &Found,
        unwritten: impl Iterator<Item = &'a DeadLetter>,
    ) {
        self.is_known = true;
        let unwritten: Vec<_> = unwritten.collect();
        for letter in &unwritten {
            self.park(&letter.event);
        }
        self.devices.retain(|key, device| device.is_fresh || found.0.contains_key(key));
        for (key, of) in &found.0 {
            let behind = of.refused.unwrap_or_default();
            let new = Device { behind, is_released: false, is_fresh: false };
            let device = self.devices.entry(key.clone()).or_insert(new);
            let refused =
                unwritten.iter().any(|l| !is_held_back(l) && l.event.event.device_key == *key);
            device.is_released = of.refused.is_none() && !refused;
            device.behind = behind;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake;

    fn letter(offset: u64, device: &str, attempts: u32, requeued: bool) -> KeptLetter {
        let letter = DeadLetter {
            sink: "s".into(),
            event: fake::stored(offset, device, "x"),
            reason: "bad".into(),
            attempts,
            first_us: 1,
            last_us: 2,
        };
        KeptLetter { letter, requeued_us: requeued.then_some(3) }
    }

    fn look(parked: &mut Parked, letters: &[KeptLetter]) -> Vec<u64> {
        parked.looking();
        let mut found = Found::default();
        found.add(letters);
        parked.looked(&found, std::iter::empty());
        let freed = letters.iter().filter(|kept| found.frees(&kept.letter));
        let freed: Vec<u64> = freed.map(|kept| kept.letter.event.offset).collect();
        let waits = letters.iter().any(|l| l.requeued_us.is_none() && found.frees(&l.letter));
        assert_eq!(found.frees_some(), waits);
        freed
    }

    #[test]
    fn a_device_waits_behind_what_was_refused_of_it_and_then_behind_what_was_held_back() {
        let mut parked = Parked::default();
        assert!(!parked.lets_begin(), "nobody knows yet");
        assert!(look(&mut parked, &[]).is_empty());
        assert!(parked.lets_begin());
        parked.park(&fake::stored(5, "a", "x"));
        parked.park(&fake::stored(9, "a", "x"));
        let behind =
            |parked: &Parked, offset, device| parked.behind(&fake::stored(offset, device, "x"));
        assert_eq!(behind(&parked, 7, "a"), Some(5));
        assert_eq!(behind(&parked, 4, "a"), None, "it comes before it");
        assert_eq!(behind(&parked, 7, "b"), None);
        // Requeued, it is still there.
        let (refused, held) = (letter(5, "a", 1, true), letter(9, "a", 0, false));
        assert!(look(&mut parked, &[refused, held.clone()]).is_empty());
        assert!(parked.lets_begin());
        // Gone: what is behind it goes, and nothing else until it has.
        assert_eq!(look(&mut parked, &[held]), [9]);
        assert!(!parked.lets_begin());
        assert_eq!(behind(&parked, 10, "a"), Some(0));
        assert!(look(&mut parked, &[]).is_empty());
        assert!(parked.lets_begin());
        assert_eq!((parked.len(), behind(&parked, 11, "a")), (0, None));
    }

    #[test]
    fn what_a_look_could_not_see_stays_parked() {
        let mut parked = Parked::default();
        look(&mut parked, &[]);
        parked.looking();
        parked.park(&fake::stored(5, "written meanwhile", "x"));
        let unwritten = letter(6, "not written yet", 1, false).letter;
        parked.looked(&Found::default(), std::iter::once(&unwritten));
        for device in ["written meanwhile", "not written yet"] {
            assert!(parked.behind(&fake::stored(9, device, "x")).is_some(), "{device}");
        }
    }
}
