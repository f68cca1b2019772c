//! Seeking, held against a plain search through what can be read: over rolls, trims, crashes, files that
//! were packed anew or are just now, and damage.

use proptest::collection::vec;
use proptest::prelude::*;

use super::world::{SINKS, World};
use super::*;
use crate::Place;
use crate::disk::Disk;
use crate::log::Packing;
use crate::sim::SimDisk;

#[derive(Clone, Debug)]
enum Step {
    Commit {
        count: usize,
        payload_bytes: usize,
    },
    /// Events that come later have a later time.
    Wait,
    /// Every sink gets to a part of the watermark, in 1/255, and what is behind them goes.
    Trim {
        part: u8,
    },
    Pack,
    Crash,
    Close,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        10 => (1..60_usize, 0..2000_usize)
            .prop_map(|(count, payload_bytes)| Step::Commit { count, payload_bytes }),
        4 => Just(Step::Wait),
        1 => any::<u8>().prop_map(|part| Step::Trim { part }),
        2 => Just(Step::Pack),
        1 => Just(Step::Crash),
        1 => Just(Step::Close),
    ]
}

fn take(world: &mut World, step: &Step) {
    match *step {
        Step::Commit { count, payload_bytes } => world.commit_events(count, payload_bytes),
        Step::Wait => world.now_us += 10,
        Step::Trim { part } => {
            let offset = world.store.mark().watermark * u64::from(part) / 255;
            for sink in SINKS {
                world.cursor_to(sink, offset).unwrap();
            }
            world.retain().unwrap();
        }
        Step::Pack => {
            world.settle();
            world.store.packer().step(&|| true).unwrap();
        }
        Step::Crash => {
            world.settle();
            world.reopen(world.disk.after_kill());
        }
        Step::Close => world.reopen_cleanly(),
    }
}

/// What of a store can be read.
fn readable(store: &Store) -> Vec<StoredEvent> {
    let (mut events, mut from) = (Vec::new(), 0);
    while from < store.mark().watermark {
        let read = store.look(from, 500, 1 << 20).unwrap();
        events.extend(read.events);
        from = read.next;
    }
    events
}

/// Places at and beside some of the events, and beyond them all.
fn places(events: &[StoredEvent], every: usize) -> Vec<Place> {
    let mut places = vec![Place::Received(0), Place::Received(u64::MAX)];
    let seq = |partition, seq| Place::Seq { partition, seq };
    places.extend([seq(0, 0), seq(3, 0), seq(1, u64::MAX), seq(9, 0)]);
    for event in events.iter().step_by(every) {
        let us = event.event.received_us;
        places.extend([us - 1, us, us + 1].map(Place::Received));
        places.extend([event.seq, event.seq + 1].map(|n| seq(event.event.partition, n)));
    }
    places
}

/// The offset of a place, found the slow way.
fn searched(events: &[StoredEvent], place: Place, watermark: u64) -> u64 {
    let fits = |stored: &&StoredEvent| match place {
        Place::Offset(offset) => stored.offset >= offset,
        Place::Received(us) => stored.event.received_us >= us,
        Place::Seq { partition, seq } => stored.event.partition == partition && stored.seq >= seq,
    };
    events.iter().find(fits).map_or(watermark, |stored| stored.offset)
}

/// Flips bits of any of the log files.
fn damage(disk: &SimDisk, flips: &[(u16, u16, u16, u8)]) {
    let files = disk.list(log::FOLDER).unwrap();
    let mut files: Vec<_> = files.iter().filter(|name| !name.starts_with("journal")).collect();
    files.sort();
    for &(file, page, within, bit) in flips {
        let name = format!("{}/{}", log::FOLDER, files[usize::from(file) % files.len()]);
        let pages = disk.page_offsets(&name);
        disk.flip(&name, pages[usize::from(page) % pages.len()] + u64::from(within), bit);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    #[test]
    fn a_place_is_where_a_search_finds_it(
        journal in prop_oneof![Just(JournalMode::Off), Just(JournalMode::On)],
        compression in prop_oneof![Just(Compression::None), Just(Compression::Zstd)],
        seed in any::<u64>(),
        steps in vec(step(), 4..40),
        flips in vec((any::<u16>(), any::<u16>(), 0..4096_u16, 0..8_u8), 0..10),
    ) {
        let options = StoreOptions { journal, compression, ..super::world::options() };
        let mut world = World::new(SimDisk::new(seed), options);
        // So that there are events and a file behind them.
        for _ in 0..3 {
            world.commit_events(50, 1500);
            world.now_us += 10;
        }
        for step in &steps {
            take(&mut world, step);
        }
        world.settle();
        let (events, watermark) = (readable(&world.store), world.store.mark().watermark);
        for place in places(&events, 7) {
            let found = world.store.seek(place).unwrap();
            prop_assert_eq!(found, searched(&events, place, watermark), "{:?}", place);
        }
        // Who seeks first finds what is damaged; who has read knows.
        let disk = world.disk.after_kill();
        damage(&disk, &flips);
        let places = places(&events, events.len() / 4 + 1);
        let unread: Vec<u64> =
            places.iter().map(|place| world.look(&disk).seek(*place).unwrap()).collect();
        let store = world.look(&disk);
        let (events, watermark) = (readable(&store), store.mark().watermark);
        for (place, unread) in places.into_iter().zip(unread) {
            let expected = searched(&events, place, watermark);
            prop_assert_eq!(unread, expected, "{:?}", place);
            prop_assert_eq!(store.seek(place).unwrap(), expected, "{:?}", place);
        }
    }
}

/// The events of a file stay where they are while it is packed anew, but its batches begin elsewhere. A
/// walk that went on from where a batch had begun once passed over those before the next new one.
#[test]
fn a_file_that_is_packed_during_a_seek_hides_nothing() {
    let options = StoreOptions {
        file_bytes_max: 4 << 20,
        cache_bytes: 16 << 20,
        quota_bytes: 1 << 30,
        ..super::world::options()
    };
    let mut world = World::new(SimDisk::new(51), options);
    while world.store.stats().files < 2 {
        world.commit_events(30, 1500);
    }
    world.settle();
    let events = read_all(&world.store, 0);
    let end = world.store.files().unwrap()[1].offsets.start;
    let packing = |compression| Packing { compression, if_smaller: false, goes_on: &|| true };
    let (store, log) = (world.store.clone(), &world.writer.shared.log);
    let packed = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let seeker = scope.spawn(|| {
            let mut random = fastrand::Rng::with_seed(51);
            let mut sought = 0;
            while !packed.load(Ordering::Acquire) {
                // Not among the first, which the first look at the file finds.
                let stored = &events[random.usize(end as usize / 3..end as usize)];
                let place = Place::Seq { partition: stored.event.partition, seq: stored.seq };
                assert_eq!(store.seek(place).unwrap(), stored.offset, "{place:?}");
                sought += 1;
            }
            sought
        });
        let mut encoder = Encoder::new(4);
        for round in 0..24 {
            let compression = [Compression::Lz4, Compression::None][round % 2];
            assert!(log.pack_anew(0, end, &mut encoder, &packing(compression)).unwrap());
        }
        packed.store(true, Ordering::Release);
        let sought = seeker.join().unwrap();
        println!("{sought} seeks while a file was packed 24 times");
    });
}
