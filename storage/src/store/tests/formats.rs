//! Stores that other versions wrote: later ones are refused, older ones taken over, also when the power
//! goes in the middle of that.

use super::world::{self, verify};
use super::*;
use crate::disk::Disk;
use crate::sim::{Lies, SimDisk};
use crate::state::State;

#[test]
fn a_store_of_a_later_format_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    drop(Store::open(options(dir.path()), NOW_US).unwrap());
    let later = |row: &[u8]| {
        let mut row = row.to_vec();
        row[8..12].copy_from_slice(&(FORMAT + 1).to_le_bytes());
        let crc = crc32c::crc32c(&row[8..]);
        row[4..8].copy_from_slice(&crc.to_le_bytes());
        row
    };
    let meta: redb::TableDefinition<'_, &str, &[u8]> = redb::TableDefinition::new("meta");
    let database = redb::Database::open(dir.path().join("state.redb")).unwrap();
    let transaction = database.begin_write().unwrap();
    {
        let mut table = transaction.open_table(meta).unwrap();
        let row = later(table.get("head").unwrap().unwrap().value());
        table.insert("head", row.as_slice()).unwrap();
    }
    transaction.commit().unwrap();
    drop(database);
    let Err(error) = Store::open(options(dir.path()), NOW_US) else { panic!("opened") };
    assert!(matches!(error, OpenError::NewerFormat { found, .. } if found == FORMAT + 1));
}

/// A store that a version of an older format wrote: events, a key, a cursor, a dead letter.
struct Older {
    format: u32,
    /// Events that it holds.
    count: u64,
    /// Its files: names and contents.
    files: Vec<(String, Vec<u8>)>,
}

impl Older {
    fn of_first_format() -> Self {
        Self::unpack(
            (1, 10),
            include_bytes!("format-1/state.redb.zst"),
            &[(0, include_bytes!("format-1/log.redb.zst"))],
        )
    }

    /// With a file whose batches are compressed, which is what this format brought.
    fn of_second_format() -> Self {
        Self::unpack(
            (2, 11),
            include_bytes!("format-2/state.redb.zst"),
            &[
                (0, include_bytes!("format-2/log.redb.zst")),
                (10, include_bytes!("format-2/log-10.redb.zst")),
            ],
        )
    }

    fn unpack((format, count): (u32, u64), state: &[u8], log: &[(u64, &[u8])]) -> Self {
        let unpacked = |packed| zstd::decode_all(packed).unwrap();
        let log = log.iter().map(|&(first, packed)| (log::name(first), unpacked(packed)));
        let state = (crate::state::NAME.to_owned(), unpacked(state));
        Self { format, count, files: log.chain([state]).collect() }
    }

    fn write_to(&self, dir: &std::path::Path) {
        std::fs::create_dir(dir.join(log::FOLDER)).unwrap();
        for (name, bytes) in &self.files {
            std::fs::write(dir.join(name), bytes).unwrap();
        }
    }

    /// On a disk that has synced all of it.
    fn on_disk(&self, seed: u64) -> SimDisk {
        let disk = SimDisk::new(seed);
        for (name, bytes) in &self.files {
            let copied = format!("{name}.copy");
            let file = disk.create(&copied).unwrap();
            file.set_len(bytes.len() as u64).unwrap();
            file.write(0, bytes).unwrap();
            file.sync_data().unwrap();
            disk.rename(&copied, name).unwrap();
        }
        disk
    }

    /// That everything the older version wrote is there, under its numbers.
    fn is_in(&self, store: &Store) {
        let stored = read_all(store, 0);
        let mut next_seq = [0; 4];
        for (i, stored) in stored.iter().take(self.count as usize).enumerate() {
            let text = String::from_utf8_lossy(&stored.event.payload);
            assert_eq!(text.split(' ').nth(1), Some(&i.to_string()[..]), "{text}");
            assert_eq!((stored.stamp, stored.received_us()), (None, NOW_US));
        }
        for (i, stored) in stored.iter().enumerate() {
            let seq = &mut next_seq[usize::from(stored.event.partition)];
            assert_eq!((stored.offset, stored.seq), (i as u64, *seq));
            *seq += 1;
        }
        assert_eq!(store.stats().next_seq, next_seq);
        assert_eq!(store.cursor("cloud"), Some(3));
        assert_eq!(store.state(7, b"key").unwrap().as_deref(), Some(&b"value"[..]));
        let [letter] = &store.dead_letters("cloud", 0, 9).unwrap()[..] else { panic!() };
        assert_eq!((&letter.letter.event, &letter.letter.reason[..]), (&stored[1], "400"));
    }
}

/// The number of its format, that it says how many events, and that from here on it is one of this.
fn taken_over(older: &Older) {
    let (of, count) = (older.format, older.count);
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    older.write_to(dir);
    let format = || {
        let meta: redb::TableDefinition<'_, &str, &[u8]> = redb::TableDefinition::new("meta");
        let database = redb::Database::open(dir.join("state.redb")).unwrap();
        let table =
            redb::ReadableDatabase::begin_read(&database).unwrap().open_table(meta).unwrap();
        let row = table.get("head").unwrap().unwrap();
        u32::from_le_bytes(row.value()[8..12].try_into().unwrap())
    };
    assert_eq!(format(), of);
    let looked = Store::open_to_look(options(dir), NOW_US).unwrap();
    assert_eq!((read_all(&looked, 0).len() as u64, format()), (count, of));
    drop(looked);
    // From here on an older version refuses it, before there is anything that it cannot read.
    let (store, mut writer) = Store::open(options(dir), NOW_US).unwrap();
    older.is_in(&store);
    assert_eq!(writer.set_clock(CLOCK), []);
    let committed = writer.commit(&[event(0, "next")], &[], NOW_US).unwrap();
    assert_eq!(committed.offsets, count..count + 1);
    assert!(read_all(&store, count)[0].stamp.is_some());
    drop((store, writer));
    assert_eq!(format(), FORMAT);
}

#[test]
fn a_store_of_the_first_format_is_taken_over() {
    taken_over(&Older::of_first_format());
}

#[test]
fn a_store_of_the_second_format_is_taken_over() {
    taken_over(&Older::of_second_format());
}

const CLOCK: crate::Clock = crate::Clock { boot: 1, offset_us: 0, synchronised: false };

/// What was acked when the power went.
struct Life {
    acked: u64,
    tried: u64,
}

/// Takes an older store over and stores a few events in it, which carry what the format before did not
/// know, until the power goes, if it does.
fn take_over_until_cut(older: &Older, disk: &SimDisk, options: &StoreOptions) -> Life {
    let mut life = Life { acked: older.count, tried: older.count };
    let Ok((store, mut writer)) = world::open(disk.clone(), options, NOW_US) else {
        assert!(disk.cut().is_some(), "refused");
        return life;
    };
    let _ = writer.set_clock(CLOCK);
    for i in 0..3 {
        life.tried += 1;
        let text = format!("new {i}");
        if writer.commit(&[event(0, &text)], &[], NOW_US).is_err() {
            break;
        }
        writer.shared.log.step(false);
        life.acked = store.mark().watermark;
    }
    life
}

/// What the next process finds.
fn check_taken_over(older: &Older, life: &Life, disk: &SimDisk, options: &StoreOptions) {
    let (_, checkpoint) =
        State::open(Arc::new(disk.after_kill()), 4, || panic!("it has no state")).unwrap();
    let (store, mut writer) = world::open(disk.clone(), options, NOW_US).unwrap();
    let watermark = store.mark().watermark;
    assert!((life.acked..=life.tried).contains(&watermark), "{watermark} of {}", life.acked);
    // An older version refuses it before there is anything that it cannot read.
    let untouched = watermark == older.count && checkpoint.format == older.format;
    assert!(checkpoint.format == FORMAT || untouched, "of format {}", checkpoint.format);
    older.is_in(&store);
    for (i, stored) in read_all(&store, older.count).iter().enumerate() {
        assert_eq!(stored.event.payload, format!("new {i}"));
        assert!(stored.stamp.is_some());
    }
    assert_eq!(verify(&store).findings, []);
    let committed = writer.commit(&[event(1, "next")], &[], NOW_US).unwrap();
    assert_eq!(committed.offsets, watermark..watermark + 1);
}

/// Cuts the power at each writing operation of a takeover and of the commits after it, and once more
/// at some operation of the next try. Says how many cuts there were.
fn cut_takeovers(older: &Older, journal: JournalMode, sync_lies: Lies) -> u64 {
    let options = StoreOptions { journal, journal_bytes: 192 << 10, ..options("sim".as_ref()) };
    let mut cuts = 0;
    loop {
        let mut rng = fastrand::Rng::with_seed(cuts);
        let disk = older.on_disk(cuts);
        let power_left = Some(cuts);
        disk.set_faults(|faults| (faults.power_left, faults.sync_lies) = (power_left, sync_lies));
        let mut life = take_over_until_cut(older, &disk, &options);
        if disk.cut().is_none() {
            return cuts;
        }
        let mut disk = disk.after_cut();
        if rng.bool() && life.tried == older.count {
            let power_left = Some(rng.u64(..60));
            disk.set_faults(|faults| faults.power_left = power_left);
            life = take_over_until_cut(older, &disk, &options);
            disk = disk.after_cut();
        }
        disk.set_faults(|faults| faults.sync_lies = Lies::Nobodys);
        check_taken_over(older, &life, &disk, &options);
        cuts += 1;
    }
}

/// On a disk that only says that it syncs, the same cuts are seen to lose something.
#[test]
fn a_power_cut_in_a_takeover_loses_nothing() {
    for older in [Older::of_first_format(), Older::of_second_format()] {
        for journal in [JournalMode::Off, JournalMode::On] {
            let cuts = cut_takeovers(&older, journal, Lies::Nobodys);
            println!("format {}, {journal:?}: {cuts} cuts", older.format);
            assert!(cuts > 20, "{cuts} cuts");
            let lying = || cut_takeovers(&older, journal, Lies::Everybodys);
            assert!(std::panic::catch_unwind(lying).is_err(), "the cuts prove nothing");
        }
    }
}
