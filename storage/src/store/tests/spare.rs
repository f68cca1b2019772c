//! Trimmed files whose blocks are written over.

use super::world::{self, SINKS, World};
use super::*;
use crate::batch::BatchHead;
use crate::disk::Disk;
use crate::head::Position;
use crate::sim::SimDisk;

const BOTH: [JournalMode; 2] = [JournalMode::Off, JournalMode::On];

fn new_world(seed: u64) -> World {
    World::new(SimDisk::new(seed), world::options())
}

fn has_spare(world: &World) -> bool {
    world.disk.list(log::FOLDER).unwrap().contains(&"spare".to_owned())
}

fn is_over_spare(world: &World) -> bool {
    world.writer.shared.log.is_over_spare()
}

/// Commits until a new file begins after the one that there is now.
fn roll(world: &mut World) {
    world.commit_events(10, 1000);
    let first = world.writer.shared.log.last_first_offset();
    while world.writer.shared.log.last_first_offset() == first {
        world.commit_events(10, 1000);
    }
}

/// Every sink gets everything up to an offset, and what they all have goes.
fn deliver(world: &mut World, offset: u64) {
    for sink in SINKS {
        world.cursor_to(sink, offset).unwrap();
    }
    world.writer.shared.log.empty_journal().unwrap();
    world.retain().unwrap();
}

/// A world whose first file, of some batches, has become the spare; the second is appended to.
fn with_spare(seed: u64) -> World {
    with_spare_under(seed, JournalMode::Off)
}

fn with_spare_under(seed: u64, journal: JournalMode) -> World {
    with_spare_of(seed, under(journal))
}

fn under(journal: JournalMode) -> StoreOptions {
    let mut options = StoreOptions { journal, ..world::options() };
    if journal == JournalMode::On {
        // It takes a megabyte of room at once: else every commit would begin a new file.
        options.file_bytes_max += 1 << 20;
    }
    options
}

fn with_spare_of(seed: u64, options: StoreOptions) -> World {
    let mut world = World::new(SimDisk::new(seed), options);
    roll(&mut world);
    let second = world.writer.shared.log.last_first_offset().unwrap();
    deliver(&mut world, second);
    assert!(has_spare(&world));
    world
}

#[test]
fn a_trimmed_file_is_written_over_and_takes_no_more_of_the_disk() {
    let mut world = with_spare(1);
    let spare_bytes = world.disk.used_bytes("log/spare");
    roll(&mut world);
    assert!(is_over_spare(&world) && !has_spare(&world));
    let (pages, stats) = (world.disk.pages(), world.store.stats());
    let active = world.store.files().unwrap().pop().unwrap();
    let name = active.path.display().to_string();
    let blocks_bytes = world.disk.used_bytes(&name);
    // It has begun, by itself, and a new one begins when it is as full as any other.
    assert!(active.size_bytes < blocks_bytes / 2, "{active:?}");
    world.commit_events(10, 1000);
    assert_eq!(world.disk.pages(), pages);
    roll(&mut world);
    let sealed = world.store.files().unwrap().into_iter().rev().nth(1).unwrap();
    assert!(sealed.size_bytes >= world.options.file_bytes_max, "{sealed:?}");
    assert_eq!(sealed.size_bytes, world.disk.used_bytes(&name));
    assert!(stats.log_bytes < world.store.stats().log_bytes);
    // What it was longer than redb made it was cut off: nothing has to be repaired to read it.
    world.check();
    assert!(!world.writer.shared.log.is_unclean(sealed.offsets.start));
    world.reopen_cleanly();
    assert!(!world.writer.shared.log.is_unclean(sealed.offsets.start));

    // The disk stays as it is, from one file to the next, once those of the process before are gone.
    for round in 0..20 {
        roll(&mut world);
        assert!(is_over_spare(&world) || round < 2, "round {round}");
        let offset = world.writer.shared.log.last_first_offset().unwrap();
        deliver(&mut world, offset);
        assert!(has_spare(&world) || round < 2, "round {round}");
        assert!(world.disk.pages() < 2 * pages, "{} of {pages} pages", world.disk.pages());
    }
    // What a file has not taken of the blocks goes when it is sealed.
    world.commit_events(30, 1000);
    let watermark = world.watermark();
    deliver(&mut world, watermark);
    let left_bytes = world.disk.used_bytes("log/spare");
    assert!((1..spare_bytes * 3 / 4).contains(&left_bytes), "{left_bytes} of {spare_bytes}");
    world.check();
}

#[test]
fn a_spare_is_gone_after_a_close_and_after_a_crash() {
    for journal in BOTH {
        let mut world = with_spare_under(2, journal);
        assert!(world.store.stats().log_bytes > world.disk.used_bytes("log/spare"));
        let killed = world.disk.after_kill();
        world.close();
        assert!(!has_spare(&world));
        let mut world = with_spare_under(2, journal);
        world.reopen(killed);
        assert!(!has_spare(&world));
    }
}

/// Closing cuts a file to the length that redb left it at, without a sync. A power cut may take that back:
/// then it is longer than its header says, and is appended to as it is.
#[test]
fn a_file_that_was_closed_and_is_too_long_goes_on() {
    let mut longer = 0;
    for seed in 0..20 {
        let mut world = with_spare(seed);
        roll(&mut world);
        let first = world.writer.shared.log.last_first_offset().unwrap();
        let name = world.writer.shared.log.path_of(first).display().to_string();
        let len = |disk: &SimDisk| disk.open(&name).unwrap().len().unwrap();
        world.close();
        let (closed, cut) = (world.disk.clone(), world.disk.after_cut());
        longer += u64::from(len(&cut) > len(&closed));
        world.reopen(cut);
        let log = &world.writer.shared.log;
        assert!(log.has_active() && !log.is_unclean(first), "seed {seed}");
        world.commit_events(5, 1000);
        world.reopen_cleanly();
    }
    assert!(longer > 3, "{longer} are too long");
}

#[test]
fn under_the_journal_what_a_file_has_not_taken_goes_when_it_is_closed_and_home() {
    let options = StoreOptions {
        journal: JournalMode::On,
        file_bytes_max: 4 << 20,
        quota_bytes: 64 << 20,
        ..world::options()
    };
    let mut world = with_spare_of(12, options);
    let len = |world: &World, name: &str| world.disk.open(name).unwrap().len().unwrap();
    let spare_len = len(&world, "log/spare");
    roll(&mut world);
    let first = world.writer.shared.log.last_first_offset().unwrap();
    let name = world.writer.shared.log.path_of(first).display().to_string();
    assert!(is_over_spare(&world));
    assert_eq!(len(&world, &name), spare_len);
    world.close();
    assert!(len(&world, &name) < spare_len, "{} of {spare_len}", len(&world, &name));
    let closed = world.disk.clone();
    world.reopen(closed);
    assert!(!world.writer.shared.log.is_unclean(first));
    world.commit_events(5, 1000);
    world.check();
}

/// What is sound in the blocks that a file has not taken is not its own. The power is cut or the process
/// killed before the file has taken many; then its tree turns out to be damaged.
#[test]
fn salvage_takes_nothing_of_the_file_before() {
    for journal in BOTH {
        salvage_from_a_file_over_the_spare(with_spare_under(3, journal));
    }
}

fn salvage_from_a_file_over_the_spare(mut world: World) {
    roll(&mut world);
    let first = world.writer.shared.log.last_first_offset().unwrap();
    world.commit_events(5, 100);
    let killed = world.disk.after_kill();
    let name = world.writer.shared.log.path_of(first).display().to_string();
    assert!(killed.page_offsets(&name).len() > 30);
    world.reopen(killed);
    let batches = |world: &World| {
        let files = world.store.files().unwrap().into_iter();
        files.map(|file| (file.offsets.start, file.batches)).find(|(start, _)| *start == first)
    };
    let by_tree = batches(&world);
    assert!(world.writer.shared.log.distrust(first).unwrap());
    assert_eq!(batches(&world), by_tree);
    world.check();
}

#[test]
fn a_file_that_failed_is_not_written_over() {
    let mut world = new_world(4);
    world.commit_events(20, 1000);
    world.disk.set_faults(|faults| faults.fail_sync_after = Some(0));
    let events = world.make(10, 100);
    world.commit(events, vec![]).unwrap_err();
    world.commit_events(2, 100);
    deliver(&mut world, 21);
    assert_eq!((world.store.stats().files, has_spare(&world)), (1, false));
}

#[test]
fn a_file_in_which_damage_was_found_is_not_written_over() {
    let mut world = new_world(9);
    roll(&mut world);
    assert!(world.writer.shared.log.distrust(0).unwrap());
    let second = world.writer.shared.log.last_first_offset().unwrap();
    deliver(&mut world, second);
    assert_eq!((world.store.stats().files, has_spare(&world)), (1, false));
}

/// Its last sync may still fail.
#[test]
fn a_file_that_the_journal_has_not_let_go_of_is_not_written_over() {
    let mut world = World::new(SimDisk::new(13), under(JournalMode::On));
    roll(&mut world);
    let second = world.writer.shared.log.last_first_offset().unwrap();
    for sink in SINKS {
        world.cursor_to(sink, second).unwrap();
    }
    world.writer.shared.log.settle().unwrap();
    world.retain().unwrap();
    assert_eq!((world.store.stats().first_offset, has_spare(&world)), (second, false));
}

#[test]
fn a_file_of_an_earlier_process_is_not_written_over() {
    let mut world = new_world(5);
    world.commit_events(20, 1000);
    world.reopen_cleanly();
    roll(&mut world);
    let second = world.writer.shared.log.last_first_offset().unwrap();
    deliver(&mut world, second);
    assert_eq!((world.store.stats().first_offset, has_spare(&world)), (second, false));
}

/// The sync that fails is one of those with which the old file is closed as the next one begins, or any
/// other.
#[test]
fn a_file_of_which_a_sync_failed_is_not_written_over() {
    let (mut failed, mut kept) = (0, 0);
    for fail_sync_after in 0..40 {
        let mut world = new_world(10);
        world.commit_events(80, 1000);
        world.disk.set_faults(|faults| faults.fail_sync_after = Some(fail_sync_after));
        for _ in 0..10 {
            let events = world.make(10, 1000);
            let _ = world.commit(events, vec![]);
        }
        failed += world.disk.failed_syncs();
        world.disk.set_faults(|faults| faults.fail_sync_after = None);
        world.commit_events(1, 10);
        let last = world.writer.shared.log.last_first_offset().unwrap();
        while world.store.stats().first_offset < last {
            deliver(&mut world, last);
            assert!(!world.disk.has_failed("log/spare"), "sync {fail_sync_after}");
            kept += u64::from(has_spare(&world));
        }
        world.check();
    }
    assert!(failed > 10 && kept > 10, "{failed} failed, {kept} kept");
}

/// Its control records stand where the file begins that takes over from the one after it.
#[test]
fn a_file_that_takes_over_from_one_without_events_is_not_written_over_the_one_before() {
    let mut world = new_world(6);
    world.commit_events(50, 1000);
    deliver(&mut world, 50);
    assert_eq!(world.store.files().unwrap().len(), 1);
    assert!(has_spare(&world));
    world.disk.set_faults(|faults| faults.fail_sync_after = Some(0));
    world.commit(vec![], vec![cursor("cloud", 50)]).unwrap_err();
    world.commit_events(5, 100);
    assert!(has_spare(&world) && !is_over_spare(&world));
    world.check();
    let killed = world.disk.after_kill();
    world.reopen(killed);
}

/// It is read in pieces: what comes after the first row is read when the file is long out of the list,
/// and others have been begun and filled.
#[test]
fn a_file_that_is_being_read_is_not_written_over() {
    let mut world = new_world(7);
    // So that nothing of it is in redb's cache.
    world.options.cache_bytes = 4096;
    world.reopen_cleanly();
    roll(&mut world);
    roll(&mut world);
    let shared = world.writer.shared.clone();
    let files = world.store.files().unwrap();
    let read = files[0].offsets.clone();
    let mut end = read.start;
    let range = Position::at(read.start)..Position::at(read.end);
    let walked = shared.log.walk(range, |position, row| {
        if end == read.start {
            deliver(&mut world, read.end);
            assert_eq!(world.store.stats().first_offset, read.end);
            (0..3).for_each(|_| roll(&mut world));
        }
        let head = BatchHead::decode(row).unwrap();
        assert_eq!((head.position(), position.offset), (position, end));
        Batch::decode(Bytes::copy_from_slice(row)).unwrap();
        end = head.end();
    });
    assert_eq!((walked.unwrap(), end), (None, read.end));
    // It had a place in the list only while it was read.
    assert!(shared.log.walk(Position::at(read.start)..Position::at(read.end), |_, _| ()).is_err());
}

#[test]
fn at_the_quota_the_spare_goes_first() {
    let options = StoreOptions { quota_bytes: 640 << 10, ..world::options() };
    let mut world = World::new(SimDisk::new(8), options);
    roll(&mut world);
    let second = world.writer.shared.log.last_first_offset().unwrap();
    (0..3).for_each(|_| roll(&mut world));
    deliver(&mut world, second);
    assert!(has_spare(&world));
    let files = world.store.stats().files;
    while has_spare(&world) {
        let StoreStats { quota_bytes, log_bytes, room_bytes, .. } = world.store.stats();
        let spare_bytes = world.disk.used_bytes("log/spare");
        assert_eq!(room_bytes, quota_bytes + spare_bytes - log_bytes);
        world.commit_events(2, 1000);
    }
    assert_eq!((world.store.stats().files, is_over_spare(&world)), (files, false));
    world.check();
}

/// Such a log is at its quota for good.
#[test]
fn at_the_quota_what_is_dropped_is_written_over() {
    let at_quota = AtQuota::DropOldest;
    let options = StoreOptions { quota_bytes: 640 << 10, at_quota, ..world::options() };
    let quota_bytes = options.quota_bytes;
    let mut world = World::new(SimDisk::new(11), options);
    for round in 0..20 {
        roll(&mut world);
        assert!(is_over_spare(&world) || round < 5, "round {round}");
        let files = world.store.files().unwrap();
        let largest = files.iter().map(|file| file.size_bytes).max().unwrap();
        let log_bytes = world.store.stats().log_bytes;
        assert!(log_bytes < quota_bytes + largest, "{log_bytes}");
        let files = world.disk.list(log::FOLDER).unwrap().into_iter();
        let blocks_bytes: u64 =
            files.map(|file| world.disk.used_bytes(&format!("{}/{file}", log::FOLDER))).sum();
        assert!(blocks_bytes < quota_bytes + 2 * largest, "{blocks_bytes}");
    }
    assert!(world.store.stats().first_offset > 0);
    world.check();
}

#[test]
fn on_a_full_disk_the_spare_goes_first() {
    let mut world = with_spare(9);
    let pages = world.disk.pages();
    world.disk.set_faults(|faults| faults.pages_max = Some(pages));
    let ballast_pages = world.disk.used_bytes("ballast") as usize >> 12;
    let refused = loop {
        let events = world.make(2, 1000);
        if let Err(error) = world.commit(events, vec![]) {
            break error;
        }
    };
    assert!(matches!(refused, CommitError::DiskFull { .. }), "{refused}");
    // Somebody else takes some of what the ballast has given back.
    let pages = world.disk.pages() + ballast_pages - 10;
    world.disk.set_faults(|faults| faults.pages_max = Some(pages));
    assert!(has_spare(&world));
    world.commit_events(2, 1000);
    assert!(!has_spare(&world) && !is_over_spare(&world));
    world.check();
}
