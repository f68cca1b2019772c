//! What the store tools stand on: looking without changing anything, seeking, verifying, balancing.

use super::world::{self, World, balance, verify};
use super::*;
use crate::disk::Disk;
use crate::passed::{Ahead, Spent};
use crate::sim::SimDisk;
use crate::{Attribute, Attributes, Damage, DeadLetter, Lane, Place};

type Batches<'a> = redb::Table<'a, (u64, u32), &'static [u8]>;

fn contents(dir: &std::path::Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut files = Vec::new();
    for folder in [dir.to_owned(), dir.join(log::FOLDER)] {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_file() {
                files.push((path.clone(), std::fs::read(path).unwrap()));
            }
        }
    }
    files.sort();
    files
}

#[test]
fn a_look_changes_nothing_also_where_run_would_repair() {
    let dir = tempfile::tempdir().unwrap();
    let (store, mut writer) = Store::open(options(dir.path()), NOW_US).unwrap();
    writer.commit(&[event(0, "one"), event(1, "two")], &[cursor("cloud", 1)], NOW_US).unwrap();
    let Err(error) = Store::open_to_look(options(dir.path()), NOW_US) else { panic!("opened") };
    assert!(matches!(error, OpenError::InUse { .. }), "{error}");
    let crashed = copy_of(dir.path());
    writer.close().unwrap();
    drop(store);
    for dir in [dir.path(), crashed.path()] {
        let before = contents(dir);
        // A sink that is new and one that is gone would both be written by `run`.
        let sinks = vec![SinkRetention::new("other")];
        let looked = Store::open_to_look(StoreOptions { sinks, ..options(dir) }, NOW_US).unwrap();
        let again = Store::open_to_look(options(dir), NOW_US).unwrap();
        assert!(matches!(Store::open(options(dir), NOW_US), Err(OpenError::InUse { .. })));
        assert_eq!(read_all(&looked, 0).len(), 2);
        assert_eq!(again.cursor("cloud"), Some(1));
        assert!(verify(&looked).is_sound() && balance(&looked).adds_up());
        drop((looked, again));
        assert!(contents(dir) == before, "a look wrote something");
        assert_eq!(read_all(&Store::open(options(dir), NOW_US).unwrap().0, 0).len(), 2);
    }
}

#[test]
fn where_there_is_no_store_a_look_says_so_and_makes_none() {
    let dir = tempfile::tempdir().unwrap();
    for dir in [dir.path().to_owned(), dir.path().join("none")] {
        let Err(error) = Store::open_to_look(options(&dir), NOW_US) else { panic!("opened") };
        assert!(matches!(error, OpenError::Missing { .. }), "{error}");
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn every_event_is_found_by_its_sequence_number_and_its_time() {
    let mut world = World::new(SimDisk::new(21), world::options());
    for _ in 0..30 {
        world.commit_events(20, 500);
        world.now_us += 1_000_000;
    }
    assert!(world.store.stats().files > 3);
    let events = read_all(&world.store, 0);
    for stored in &events {
        let place = Place::Seq { partition: stored.event.partition, seq: stored.seq };
        assert_eq!(world.store.seek(place).unwrap(), stored.offset);
        let us = stored.event.received_us;
        let first = events.iter().find(|e| e.event.received_us >= us).unwrap();
        assert_eq!(world.store.seek(Place::Received(us)).unwrap(), first.offset);
    }
    let watermark = world.watermark();
    for (place, offset) in [
        (Place::Received(0), 0),
        (Place::Received(u64::MAX), watermark),
        (Place::Seq { partition: 0, seq: 1 << 40 }, watermark),
        (Place::Seq { partition: 99, seq: 0 }, watermark),
        (Place::Offset(7), 7),
        (Place::Offset(u64::MAX), watermark),
    ] {
        assert_eq!(world.store.seek(place).unwrap(), offset, "{place:?}");
    }
    // Behind what was trimmed, the first that is left.
    for sink in world::SINKS {
        world.cursor_to(sink, watermark / 2).unwrap();
    }
    world.retain().unwrap();
    let first = world.store.stats().first_offset;
    assert!(first > 0);
    assert_eq!(world.store.seek(Place::Offset(0)).unwrap(), first);
    assert_eq!(world.store.seek(Place::Received(0)).unwrap(), first);
    let seq = Place::Seq { partition: 1, seq: 0 };
    let found = world.store.seek(seq).unwrap();
    let left = events.iter().find(|e| e.offset >= first && e.event.partition == 1).unwrap();
    assert_eq!(found, left.offset);
}

#[test]
fn each_file_says_what_it_holds() {
    let mut world = World::new(SimDisk::new(22), world::options());
    for _ in 0..30 {
        world.commit_events(20, 500);
    }
    let (files, stats) = (world.store.files().unwrap(), world.store.stats());
    assert_eq!(files.len() as u32, stats.files);
    assert_eq!(files.iter().map(|f| f.size_bytes).sum::<u64>(), stats.log_bytes);
    assert_eq!(files.iter().map(|f| f.event_bytes.unwrap()).sum::<u64>(), stats.event_bytes);
    for pair in files.windows(2) {
        assert_eq!(pair[0].offsets.end, pair[1].offsets.start);
    }
    let events = read_all(&world.store, 0);
    for file in &files {
        let of = |e: &&StoredEvent| file.offsets.contains(&e.offset);
        let bytes: usize = events.iter().filter(of).map(|e| e.event.size_bytes()).sum();
        assert_eq!(file.event_bytes, Some(bytes as u64));
        let first = events.iter().filter(of).find(|e| e.event.partition == 2).unwrap();
        assert_eq!(file.before.as_ref().unwrap().next_seq[2], first.seq);
    }
}

/// A batch that was never written, one that was written twice over another: what no checksum sees.
#[test]
fn disorder_is_found_where_every_checksum_fits() {
    let dir = tempfile::tempdir().unwrap();
    let (store, mut writer) = Store::open(options(dir.path()), NOW_US).unwrap();
    for round in 0..6_u32 {
        let received_us = NOW_US + u64::from(round);
        let event = |i| Event { received_us, ..event(i, &format!("{round} {i}")) };
        let events: Vec<Event> = (0..4).map(event).collect();
        writer.commit(&events, &[], received_us).unwrap();
    }
    let file = store.files().unwrap()[0].path.clone();
    writer.close().unwrap();
    drop(store);
    let batches: redb::TableDefinition<'_, (u64, u32), &[u8]> =
        redb::TableDefinition::new("batches");
    let change = |f: &dyn Fn(&mut Batches<'_>)| {
        let copy = copy_of(dir.path());
        let database =
            redb::Database::open(copy.path().join(file.strip_prefix(dir.path()).unwrap())).unwrap();
        let transaction = database.begin_write().unwrap();
        f(&mut transaction.open_table(batches).unwrap());
        transaction.commit().unwrap();
        drop(database);
        let store = Store::open_to_look(options(copy.path()), NOW_US).unwrap();
        (verify(&store), balance(&store))
    };
    let (verification, sums) = change(&|_| {});
    assert!(verification.is_sound() && sums.adds_up());
    assert_eq!((verification.batches, verification.events), (6, 24));
    assert_eq!(verification.seqs, [Some((0, 5)); 4]);

    let (verification, sums) = change(&|table| drop(table.remove((8, 0)).unwrap()));
    let [finding] = &verification.findings[..] else { panic!("{:?}", verification.findings) };
    assert_eq!((finding.damage, finding.offsets.clone()), (Damage::Unreadable, 8..12));
    assert_eq!(sums.sinks[0].unaccounted, std::iter::once(8..12).collect::<Vec<_>>());
    assert!(!sums.adds_up());
    assert_eq!(sums.sinks[0].pending, 20);

    // The same sequence numbers again, under another offset, with a checksum that fits.
    let (verification, sums) = change(&|table| {
        // Its head ends where the checksum in front of it says so.
        let mut row = table.get((0, 0)).unwrap().unwrap().value().to_vec();
        row[16..24].copy_from_slice(&8_u64.to_le_bytes());
        let stored = table.get((0, 0)).unwrap().unwrap().value().to_vec();
        let crc = (8..=row.len()).find_map(|end| {
            let fits = crc32c::crc32c(&stored[8..end]).to_le_bytes() == stored[4..8];
            fits.then(|| crc32c::crc32c(&row[8..end]))
        });
        row[4..8].copy_from_slice(&crc.unwrap().to_le_bytes());
        table.insert((8, 0), row.as_slice()).unwrap();
    });
    let disorder = verification.findings.iter().filter(|f| f.damage == Damage::Disorder).count();
    assert!(disorder > 0, "{:?}", verification.findings);
    // By each rule on its own: none hides behind another.
    for rule in ["goes on with", "event bytes", "receive times go back"] {
        let broken = verification.findings.iter().any(|f| f.reason.contains(rule));
        assert!(broken, "{rule}: {:?}", verification.findings);
    }
    assert_eq!(verification.unreadable, 0);
    assert!(!sums.adds_up() && !verification.is_sound());
}

#[test]
fn the_sums_know_every_place_that_an_event_can_be_in() {
    let options =
        StoreOptions { quota_bytes: 900 << 10, at_quota: AtQuota::DropOldest, ..world::options() };
    let mut world = World::new(SimDisk::new(23), options);
    for _ in 0..4 {
        world.commit_events(50, 1000);
    }
    world.cursor_to("local", 100).unwrap();
    let letter = DeadLetter {
        sink: "local".into(),
        event: world.store.read(40, 1, 1).unwrap().events.remove(0),
        reason: "400".into(),
        attempts: 1,
        first_us: 0,
        last_us: 0,
    };
    world.store.put_dead_letters(std::slice::from_ref(&letter)).unwrap();
    for _ in 0..20 {
        world.commit_events(50, 1000);
    }
    let first = world.store.stats().first_offset;
    assert!(first > 100);
    let sums = balance(&world.store);
    assert!(sums.adds_up(), "{sums:?}");
    let [cloud, local] = &sums.sinks[..] else { panic!("{sums:?}") };
    let pending = world.watermark() - first;
    assert_eq!((cloud.delivered, cloud.dropped.quota, cloud.pending), (0, first, pending));
    assert_eq!(
        (local.delivered, local.dead_lettered, local.dropped.quota, local.pending),
        (99, 1, first - 100, pending)
    );
    // A dead letter of an event that there never was.
    let event = StoredEvent { offset: 1 << 40, ..letter.event.clone() };
    world.store.put_dead_letters(&[DeadLetter { event, ..letter }]).unwrap();
    let sums = balance(&world.store);
    assert!(!sums.adds_up() && sums.sinks[0].adds_up(), "{sums:?}");
}

/// What a sink filtered, and what it got ahead of its cursor in all lanes or in one, is not pending;
/// and a policy that drops for it does not call lost what it has.
#[test]
fn what_a_sink_has_passed_beside_its_cursor_is_in_the_sums() {
    let dir = tempfile::tempdir().unwrap();
    let (store, mut writer) = Store::open(super::options(dir.path()), NOW_US).unwrap();
    let event = |n: u64| {
        let lane = if n.is_multiple_of(10) { Lane::Alarm } else { Lane::Live };
        let attributes = Attributes::encode([Attribute::Lane(lane)]);
        Event { attributes, ..super::event(0, "of some lane") }
    };
    let events: Vec<Event> = (0..200).map(event).collect();
    writer.commit(&events, &[], NOW_US).unwrap();
    let alarms = Lanes::NONE.with(Lane::Alarm);
    let passed = Passed {
        filtered: 7,
        ahead: vec![
            Ahead { lanes: Lanes::ALL, offsets: 100..120 },
            Ahead { lanes: alarms, offsets: 50..180 },
        ],
        spent: Spent::default(),
    };
    let moves = [Control::Cursor { sink: "cloud".into(), offset: 50 }, passed.control("cloud")];
    let letter = |offset: u64| DeadLetter {
        sink: "cloud".into(),
        event: store.read(offset, 1, 1).unwrap().events.remove(0),
        reason: "400".into(),
        attempts: 1,
        first_us: 0,
        last_us: 0,
    };
    // An alarm that is done, and a live event that is not.
    let letters = [letter(130), letter(131)];
    store.put_dead_letters(&letters).unwrap();
    writer.commit(&[], &moves, NOW_US).unwrap();
    let sums = balance(&store);
    assert!(sums.adds_up(), "{sums:?}");
    let [cloud] = &sums.sinks[..] else { panic!("{sums:?}") };
    assert_eq!(cloud.committed, 200);
    // Of the 150 from the cursor on, 20 are done in every lane, and 11 alarms outside of those.
    assert_eq!((cloud.pending, cloud.filtered, cloud.dead_lettered), (119, 7, 1));
    assert_eq!(cloud.delivered, 200 - 119 - 7 - 1);
    assert_eq!(store.passed("cloud").unwrap(), passed);
    assert_eq!(store.passed("other").unwrap(), Passed::default());
}

/// A store that lost a file: the sinks that had it already are whole, the others are not.
#[test]
fn a_file_that_is_gone_is_missing_from_the_sums_of_those_who_needed_it() {
    let mut world = World::new(SimDisk::new(24), world::options());
    for _ in 0..12 {
        world.commit_events(50, 1000);
    }
    let files = world.store.files().unwrap();
    let gone = files[1].offsets.clone();
    world.cursor_to("cloud", gone.end).unwrap();
    world.close();
    let name = files[1].path.display().to_string();
    world.disk.remove(&name).unwrap();
    let store = world.look(&world.disk);
    let verification = verify(&store);
    assert_eq!(verification.unreadable, gone.end - gone.start);
    let [finding] = &verification.findings[..] else { panic!("{:?}", verification.findings) };
    assert_eq!((finding.damage, &finding.offsets), (Damage::Unreadable, &gone));
    let sums = balance(&store);
    assert!(sums.sinks[0].adds_up(), "{sums:?}");
    assert_eq!(sums.sinks[1].unaccounted, [gone]);
    assert!(!sums.adds_up());
}

/// Small commits with control records between them; sealed files are packed anew.
#[test]
fn a_compacted_store_holds_the_same_events_in_less_room() {
    let mut world = World::new(SimDisk::new(25), world::options());
    for round in 0..300 {
        world.commit_events(1 + round % 3, 300);
        world.cursor_to("cloud", round as u64).unwrap();
    }
    let (files, events) = (world.store.stats().files, read_all(&world.store, 0));
    assert!(files > 2, "{files}");
    let done = world.writer.compact().unwrap();
    assert_eq!((done.files, done.rewritten), (files - 1, files - 1));
    assert!(done.after_bytes < done.before_bytes, "{done:?}");
    assert_eq!(read_all(&world.store, 0), events);
    assert!(verify(&world.store).is_sound());
    assert_eq!(world.writer.compact().unwrap().rewritten, 0, "there is nothing more to gain");
    world.commit_events(5, 100);
    world.check();
    for disk in [world.disk.after_kill(), world.disk.after_cut()] {
        world.reopen(disk);
        world.check();
    }
    world.reopen_cleanly();
}

/// The power goes at any moment of it.
#[test]
fn a_compaction_that_is_cut_short_loses_nothing() {
    for seed in 0..12 {
        let mut world = World::new(SimDisk::new(seed), world::options());
        for round in 0..60 {
            world.commit_events(1 + round % 3, 600);
        }
        world.disk.set_faults(|faults| faults.power_left = Some(3 + seed * 7));
        world.writer.compact().ok();
        world.reopen(world.disk.after_cut());
        world.commit_events(3, 100);
        world.check();
    }
}

#[test]
fn a_damaged_file_is_not_compacted() {
    let mut world = World::new(SimDisk::new(26), world::options());
    for round in 0..120 {
        world.commit_events(1 + round % 3, 300);
    }
    let first = world.store.files().unwrap()[0].path.display().to_string();
    let pages = world.disk.page_offsets(&first);
    let sound = world.store.stats().files - 1;
    world.close();
    let damaged = pages.into_iter().rev().find(|page| {
        let disk = world.disk.after_kill();
        disk.flip(&first, page + 2000, 3);
        !verify(&world.look(&disk)).is_sound()
    });
    world.disk.flip(&first, damaged.unwrap() + 2000, 3);
    let opened = world::open(world.disk.clone(), &world.options, NOW_US).unwrap();
    let (store, mut writer) = opened;
    let lost = verify(&store).unreadable;
    assert_eq!(writer.compact().unwrap().rewritten, sound - 1);
    assert_eq!((verify(&store).unreadable, lost > 0), (lost, true));

    // What cannot be read is recorded: no new damage, and every sum adds up.
    let ranges: Vec<Range<u64>> =
        verify(&store).findings.iter().map(|finding| finding.offsets.clone()).collect();
    assert!(!balance(&store).adds_up());
    writer.record_unreadable(&ranges, NOW_US).unwrap();
    assert!(verify(&store).is_sound() && balance(&store).adds_up());
    assert_eq!(verify(&store).recorded, lost);
}

/// A file without events is replaced by one whose head row stands behind control records of its own:
/// an event that a failed commit left in the file before is in front of them, and void all the same.
#[test]
fn what_a_failed_commit_left_in_front_of_a_replaced_file_is_void() {
    let mut world = World::new(SimDisk::new(31), world::options());
    world.commit_events(2, 10);
    world.disk.set_faults(|faults| faults.fail_sync_after = Some(0));
    let events = world.make(1, 10);
    world.commit(events, vec![]).unwrap_err();
    world.cursor_to("cloud", 1).unwrap();
    world.reopen(world.disk.after_kill());
    world.commit_events(1, 10);
    world.check();
    let found = verify(&world.look(&world.disk.after_kill()));
    assert!(found.is_sound(), "{found:?}");
}

/// After a power cut the journal holds what the log file lacks; a look replays nothing, and sees it.
#[test]
fn a_look_sees_what_only_the_journal_holds() {
    let mut lacking = 0;
    for seed in 0..8 {
        let options = StoreOptions { journal: JournalMode::On, ..world::options() };
        let mut world = World::new(SimDisk::new(seed), options);
        world.commit_events(5, 100);
        world.commit_events(5, 100);
        world.step(false);
        let cut = world.disk.after_cut();
        let store = world.look(&cut);
        assert_eq!(store.mark().watermark, 10);
        assert!(verify(&store).is_sound());
        let before: Vec<_> = cut.list(crate::log::FOLDER).unwrap();
        // Without the journal's file it would not be there.
        let ring = before.iter().find(|name| name.starts_with("journal-")).unwrap();
        cut.remove(&format!("{}/{ring}", crate::log::FOLDER)).unwrap();
        lacking += usize::from(world.look(&cut).mark().watermark < 10);
    }
    assert!(lacking > 0, "the log files lacked nothing");
}

/// Nobody lost anything by it, and still it is told from new damage: the store has a row of its own.
#[test]
fn damage_behind_every_cursor_is_recorded_too() {
    let mut world = World::new(SimDisk::new(27), world::options());
    for _ in 0..12 {
        world.commit_events(50, 1000);
    }
    let files = world.store.files().unwrap();
    let gone = files[1].offsets.clone();
    for sink in world::SINKS {
        world.cursor_to(sink, gone.end).unwrap();
    }
    world.close();
    world.disk.remove(&files[1].path.display().to_string()).unwrap();
    let (store, mut writer) = world::open(world.disk.clone(), &world.options, NOW_US).unwrap();
    assert!(balance(&store).adds_up() && !verify(&store).is_sound());
    let losses = writer.record_unreadable(std::slice::from_ref(&gone), NOW_US).unwrap();
    let [loss] = &losses[..] else { panic!("{losses:?}") };
    assert_eq!((&loss.sink, &loss.offsets, loss.reason), (&None, &gone, LossReason::Corrupt));
    assert!(verify(&store).is_sound() && balance(&store).adds_up());
    assert_eq!(verify(&store).recorded, gone.end - gone.start);
}
