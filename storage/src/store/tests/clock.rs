//! A machine whose clock is not set when it comes up, is set later, and is set back or leaps: events
//! keep their order and are found, their times are put right, and nothing expires for it.

use super::*;
use crate::{Clock, DeadLetter, Place, TimeQuality};

const HOUR_US: u64 = 3_600_000_000;

/// A machine that is up for so long, since a moment that it may not know.
#[derive(Clone, Copy)]
struct Machine {
    boot: u64,
    up_us: u64,
    /// What its clock says the time was when it came up.
    offset_us: u64,
    synchronised: bool,
}

impl Machine {
    fn new(boot: u64, offset_us: u64) -> Self {
        Self { boot, up_us: 1, offset_us, synchronised: false }
    }

    fn now_us(&self) -> u64 {
        self.offset_us + self.up_us
    }

    /// Tells the store of its clock, and stores what that gives.
    fn tell(&self, writer: &mut Writer) {
        let Self { boot, offset_us, synchronised, .. } = *self;
        let clock = Clock { boot, offset_us: offset_us.cast_signed(), synchronised };
        let known = writer.set_clock(clock);
        if !known.is_empty() {
            writer.commit(&[], &known, self.now_us()).unwrap();
        }
    }

    fn set(&mut self, offset_us: u64, writer: &mut Writer) {
        (self.offset_us, self.synchronised) = (offset_us, true);
        self.tell(writer);
    }

    /// An event a second, for so many seconds.
    fn receive(&mut self, seconds: u64, writer: &mut Writer) {
        for _ in 0..seconds {
            self.up_us += 1_000_000;
            let text = format!("boot {} up {}", self.boot, self.up_us);
            let event = Event { received_us: self.now_us(), ..event(self.boot as u16 % 4, &text) };
            writer.commit(&[event], &[], self.now_us()).unwrap();
        }
    }
}

/// Time and what is said of it, of each event; and that the stored order stands.
fn told(store: &Store) -> Vec<(u64, TimeQuality)> {
    let events = read_all(store, 0);
    assert!(events.is_sorted_by_key(|stored| stored.event.received_us), "receive times go back");
    events.iter().map(|stored| stored.stamp.map(|s| (s.received_us, s.quality)).unwrap()).collect()
}

/// `count` seconds after a moment, one after the other.
fn seconds(of: u64, count: u64, quality: TimeQuality) -> Vec<(u64, TimeQuality)> {
    (1..=count).map(|second| (of + 1 + second * 1_000_000, quality)).collect()
}

use TimeQuality::{Corrected, Synchronised, Unsynchronised};

#[test]
fn times_of_before_the_clock_was_set_are_corrected_once_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let options = StoreOptions { compression: Compression::Zstd, ..small(dir.path()) };
    let (store, mut writer) = Store::open(options.clone(), 0).unwrap();
    // It comes up without a clock, and the gateway is started again before it gets one.
    let mut machine = Machine::new(1, 0);
    machine.tell(&mut writer);
    machine.receive(3, &mut writer);
    assert_eq!(told(&store), seconds(0, 3, Unsynchronised));
    let refused = read_all(&store, 0)[0].clone();
    let letter = DeadLetter {
        sink: "cloud".into(),
        event: refused.clone(),
        reason: "400".into(),
        attempts: 1,
        first_us: 2,
        last_us: 3,
    };
    store.put_dead_letters(&[letter]).unwrap();
    writer.close().unwrap();
    drop(store);
    let (store, mut writer) = Store::open(options.clone(), 0).unwrap();
    machine.tell(&mut writer);
    machine.receive(2, &mut writer);
    machine.set(NOW_US, &mut writer);
    machine.receive(2, &mut writer);
    let mut expected = seconds(NOW_US, 5, Corrected);
    expected.extend(&seconds(NOW_US, 7, Synchronised)[5..]);
    assert_eq!(told(&store), expected);
    assert_eq!(store.received_us(0), Some(expected[0].0));
    let [kept] = &store.dead_letters("cloud", 0, 9).unwrap()[..] else { panic!("one letter") };
    assert_eq!(kept.letter.event.received_us(), expected[0].0);
    // What was told once stands, whatever the clock does afterwards.
    machine.set(NOW_US + HOUR_US, &mut writer);
    assert_eq!(told(&store), expected);

    // Another boot that never gets a clock, then one that does; and a crash in between.
    for (boot, offset_us) in [(2, None), (3, Some(NOW_US + 9 * HOUR_US))] {
        let mut machine = Machine::new(boot, 12);
        machine.tell(&mut writer);
        machine.receive(2, &mut writer);
        let quality = offset_us.map_or(Unsynchronised, |_| Corrected);
        if let Some(offset_us) = offset_us {
            machine.set(offset_us, &mut writer);
        }
        expected.extend(seconds(offset_us.unwrap_or(12), 2, quality));
    }
    assert_eq!(told(&store), expected);
    drop((store, writer));
    let (store, mut writer) = Store::open(options, 0).unwrap();
    assert_eq!(told(&store), expected, "after a crash");

    // What is found by its time is found by the time as it is known now.
    for (place, &(us, _)) in expected.iter().enumerate().take(7) {
        assert_eq!(store.seek(Place::Received(us)).unwrap(), place as u64);
    }
    // And packing a file anew takes nothing of it away.
    fill(&store, &mut writer, 2);
    writer.checkpoint(&[]).unwrap();
    assert!(store.packer().step(&|| true).unwrap(), "there is a file to pack");
    let events = store.read(0, expected.len(), 1 << 20).unwrap().events;
    let stamps = events.iter().map(|stored| stored.stamp.map(|s| (s.received_us, s.quality)));
    assert_eq!(stamps.collect::<Option<Vec<_>>>(), Some(expected));
    assert_eq!(
        events.iter().map(|stored| &stored.event.payload[..]).next().unwrap(),
        &refused.event.payload[..]
    );
}

#[test]
fn a_clock_that_is_set_back_disorders_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (store, mut writer) = Store::open(small(dir.path()), 0).unwrap();
    let mut machine = Machine::new(1, NOW_US + HOUR_US);
    machine.synchronised = true;
    machine.tell(&mut writer);
    machine.receive(3, &mut writer);
    machine.set(NOW_US, &mut writer);
    machine.receive(3, &mut writer);
    let mut expected = seconds(NOW_US + HOUR_US, 3, Synchronised);
    expected.extend(&seconds(NOW_US, 6, Synchronised)[3..]);
    assert_eq!(told(&store), expected);
    let uptimes: Vec<u64> =
        read_all(&store, 0).iter().map(|stored| stored.stamp.unwrap().uptime_us).collect();
    assert_eq!(uptimes, (1..=6).map(|second| 1 + second * 1_000_000).collect::<Vec<_>>());
    // Rather too much than too little: the first three say that they are later than these.
    for from in [NOW_US + 4_000_001, NOW_US + HOUR_US] {
        assert_eq!(store.seek(Place::Received(from)).unwrap(), 0);
    }
    assert_eq!(store.seek(Place::Received(NOW_US + 2 * HOUR_US)).unwrap(), 6);
}

#[test]
fn nothing_expires_because_the_clock_leaps() {
    const FIFTY_YEARS_US: u64 = 50 * 365 * 24 * HOUR_US;
    let dir = tempfile::tempdir().unwrap();
    let local = StoreOptions { sinks: vec![], retain_age_us: HOUR_US, ..small(dir.path()) };
    let (store, mut writer) = Store::open(local.clone(), 0).unwrap();
    let fill = |machine: &mut Machine, store: &Store, writer: &mut Writer| {
        let files = store.stats().files + 2;
        while store.stats().files < files {
            machine.up_us += 1_000_000;
            let received_us = machine.now_us();
            let event = |i: u16| Event { received_us, ..event(i % 4, &"x".repeat(1000)) };
            let events: Vec<Event> = (0..16).map(event).collect();
            writer.commit(&events, &[], received_us).unwrap();
        }
    };
    // Without a clock, then with one, then fifty years later at once.
    let mut machine = Machine::new(1, 0);
    machine.tell(&mut writer);
    fill(&mut machine, &store, &mut writer);
    machine.set(NOW_US, &mut writer);
    assert_eq!(writer.retain(machine.now_us()).unwrap().files, 0, "it was set");
    fill(&mut machine, &store, &mut writer);
    machine.set(NOW_US + FIFTY_YEARS_US, &mut writer);
    assert_eq!(writer.retain(machine.now_us()).unwrap().files, 0, "it leapt");
    drop((store, writer));

    // The next boot has no clock at first: that they are as old as it is up is certain, no more.
    let (store, mut writer) = Store::open(local, 0).unwrap();
    let mut machine = Machine::new(2, NOW_US + FIFTY_YEARS_US);
    machine.tell(&mut writer);
    fill(&mut machine, &store, &mut writer);
    assert_eq!(writer.retain(machine.now_us()).unwrap().files, 0);
    let files = store.stats().files;
    machine.up_us += HOUR_US - 1_000;
    assert!(writer.retain(machine.now_us()).unwrap().files > 0, "an hour is an hour");
    while writer.retain(machine.now_us()).unwrap().more {}
    assert!(store.stats().files < files);
    // The times of the rest come to be known: what is two hours old goes.
    let left = store.stats().files;
    machine.set(NOW_US + 2 * HOUR_US, &mut writer);
    fill(&mut machine, &store, &mut writer);
    machine.up_us += 2 * HOUR_US;
    while writer.retain(machine.now_us()).unwrap().more {}
    assert_eq!(store.stats().files, 1, "{left}");
    assert!(store.losses().unwrap().iter().all(|loss| loss.reason == LossReason::Expired));
}
