//! Where two failures meet: a crash with what was not synced, a crash or a grown state on a full
//! disk, damage in front of sound files.

use super::world::{self, SINKS, World};
use super::*;
use crate::DeadLetter;
use crate::disk::Disk;
use crate::sim::{Lies, SimDisk};

/// A commit whose sync was under way when the process was killed is in the page cache only. The next
/// process shows it, so it must be on the disk: redb syncs a file that it finds unclosed.
#[test]
fn what_a_killed_process_left_in_the_page_cache_is_synced_before_it_is_shown() {
    for seed in 0..20 {
        let mut world = World::new(SimDisk::new(seed), world::options());
        world.commit_events(20, 100);
        world.disk.set_faults(|faults| faults.sync_lies = Lies::Everybodys);
        world.commit_events(10, 100);
        let killed = world.disk.after_kill();
        killed.set_faults(|faults| faults.sync_lies = Lies::Nobodys);
        world.reopen(killed);
        assert_eq!(world.store.mark().watermark, 30, "seed {seed}");
        let cut = world.disk.after_cut();
        world.reopen(cut);
        assert_eq!(read_all(&world.store, 0).len(), 30, "seed {seed}");
    }
}

#[test]
fn a_full_disk_does_not_keep_what_was_delivered_for_a_wish() {
    let options = StoreOptions { retain_bytes: 1 << 29, ..world::options() };
    let mut world = World::new(SimDisk::new(12), options);
    for _ in 0..40 {
        world.commit_events(50, 1000);
    }
    fill_up(&mut world);
    let watermark = world.watermark();
    for sink in SINKS {
        world.cursor_to(sink, watermark).unwrap();
    }
    world.retain().unwrap();
    world.commit_events(10, 100);
    world.check();
}

#[test]
fn a_process_that_was_killed_on_a_full_disk_starts_in_the_room_of_the_ballast() {
    let mut world = World::new(SimDisk::new(13), world::options());
    for _ in 0..40 {
        world.commit_events(50, 1000);
    }
    let killed = world.disk.after_kill();
    let pages = killed.pages();
    killed.set_faults(|faults| faults.pages_max = Some(pages));
    world.reopen(killed);
    let watermark = world.watermark();
    for sink in SINKS {
        world.cursor_to(sink, watermark).unwrap();
    }
    world.retain().unwrap();
    world.check();
}

/// A write to the state database that finds no room leaves it to be copied: the ballast must have
/// grown with it.
#[test]
fn a_full_disk_is_freed_however_large_the_state_has_grown() {
    let mut world = World::new(SimDisk::new(14), world::options());
    for _ in 0..40 {
        world.commit_events(50, 1000);
    }
    for key in 0..8 {
        let (key, value) = (Bytes::from(vec![key]), Bytes::from(vec![key; 1_500_000]));
        world.commit(vec![], vec![Control::Put { namespace: 1, key, value }]).unwrap();
    }
    world.commit_events(1, 100);
    let pages = world.disk.pages();
    world.disk.set_faults(|faults| faults.pages_max = Some(pages));
    let event =
        StoredEvent { offset: 0, seq: 0, event: event(0, &"x".repeat(1_000_000)), stamp: None };
    let letter = DeadLetter {
        sink: "cloud".into(),
        event,
        reason: String::new(),
        attempts: 1,
        first_us: 0,
        last_us: 0,
    };
    let error = world.store.put_dead_letters(&[letter]).unwrap_err();
    assert!(error.disk_full, "{error}");
    fill_up(&mut world);
    let watermark = world.watermark();
    for sink in SINKS {
        world.cursor_to(sink, watermark).unwrap();
    }
    world.retain().unwrap();
    world.commit_events(10, 100);
    world.check();
}

/// Leaves no room at all, and commits until the store says so.
fn fill_up(world: &mut World) {
    let pages = world.disk.pages();
    world.disk.set_faults(|faults| faults.pages_max = Some(pages));
    for _ in 0..100 {
        let events = world.make(50, 1000);
        match world.commit(events, vec![]) {
            Ok(_) => {}
            Err(CommitError::DiskFull { .. }) => return,
            Err(error) => panic!("{error}"),
        }
    }
    panic!("the disk is not full");
}

/// The folder could not be synced after a new file got its name. It once went on in the file before,
/// beyond the new one's offset: after a crash all that was void.
#[test]
fn a_new_file_whose_name_could_not_be_synced_ends_the_one_before() {
    let mut failed = 0;
    for after in 0..6 {
        let mut world = World::new(SimDisk::new(after), world::options());
        // The file is full.
        world.commit_events(80, 2000);
        world.disk.set_faults(|faults| faults.fail_sync_after = Some(after));
        for _ in 0..4 {
            let events = world.make(10, 2000);
            failed += usize::from(world.commit(events, vec![]).is_err());
        }
        world.disk.set_faults(|faults| faults.fail_sync_after = None);
        let (killed, cut) = (world.disk.after_kill(), world.disk.after_cut());
        world.reopen(killed);
        world.check();
        world.reopen(cut);
        world.check();
    }
    assert!(failed > 0, "no sync has failed");
}

/// What cannot be read is passed over by more than it can have held, but not past the next file,
/// whose head says where it starts.
#[test]
fn a_damaged_file_hides_no_control_record_of_the_files_after_it() {
    let mut world = World::new(SimDisk::new(15), world::options());
    for _ in 0..8 {
        world.commit_events(50, 1000);
    }
    world.cursor_to("cloud", 321).unwrap();
    let mut names = world.disk.list(log::FOLDER).unwrap();
    names.sort();
    let first = format!("{}/{}", log::FOLDER, names[0]);
    assert!(names.len() > 3, "{names:?}");
    let killed = world.disk.after_kill();
    for at in killed.page_offsets(&first) {
        for within in [0, 7, 64, 1000] {
            killed.flip(&first, at + within, 3);
        }
    }
    let opened = world::open(killed, &world.options, world.now_us).unwrap();
    assert_eq!(opened.0.cursor("cloud"), Some(321));
    assert_eq!(opened.0.mark().watermark, world.watermark());
    assert_eq!(opened.0.stats().next_seq, world.store.stats().next_seq);
}

/// Room for what a journal will write home is taken before it is there. redb doubles its file and puts a
/// page at the far end: room was once taken for all between, and a file was called full that was half
/// empty.
#[test]
fn a_journal_takes_no_more_room_than_what_it_holds_needs() {
    let mut events_per_file = [JournalMode::Off, JournalMode::On].map(|journal| {
        let options = StoreOptions {
            journal,
            file_bytes_max: 24 << 20,
            journal_bytes: 2 << 20,
            quota_bytes: 1 << 30,
            ..world::options()
        };
        let mut world = World::new(SimDisk::new(16), options);
        while world.store.stats().files < 2 {
            world.commit_events(58, 4000);
        }
        world.store.files().unwrap()[1].offsets.start
    });
    println!("events in a file of 24 MB, without a journal and with one: {events_per_file:?}");
    // A megabyte is taken at a time.
    events_per_file[0] -= events_per_file[0] / 4;
    assert!(events_per_file[1] >= events_per_file[0], "{events_per_file:?}");
}

/// What the checkpoint has passed needs no replay. Damage there once left out numbers behind it, as if more
/// had been lost than there was.
#[test]
fn damage_in_front_of_the_checkpoint_leaves_out_no_numbers() {
    let mut world = World::new(SimDisk::new(17), world::options());
    for _ in 0..4 {
        world.commit_events(50, 1000);
    }
    world.reopen(world.disk.after_kill());
    // A file without events: the checkpoint stands at its beginning.
    world.cursor_to("cloud", 10).unwrap();
    world.settle();
    let files = world.store.files().unwrap();
    let [.., before, last] = &files[..] else { panic!("{files:?}") };
    assert!(last.offsets.is_empty(), "{files:?}");
    let name = before.path.display().to_string();
    for at in world.disk.page_offsets(&name) {
        for within in [10, 100, 1000] {
            let disk = world.disk.after_kill();
            disk.flip(&name, at + within, 3);
            let (store, _writer) = world::open(disk, &world.options, world.now_us).unwrap();
            assert_eq!(store.mark().watermark, world.watermark(), "{at} {within}");
        }
    }
}

/// The power took back the length of a file that a commit had grown, and left the header of that commit.
/// It once made a damaged file of a sound one, and left out numbers behind it.
#[test]
fn a_header_that_outlives_the_length_of_its_file_gives_way_to_the_one_before() {
    let dir = tempfile::tempdir().unwrap();
    let large = |dir| StoreOptions { file_bytes_max: 16 << 20, ..options(dir) };
    let (_store, mut writer) = Store::open(large(dir.path()), NOW_US).unwrap();
    let events: Vec<Event> = (0..16).map(|i| event(i % 4, &"x".repeat(1000))).collect();
    let file_len = |dir: &std::path::Path| std::fs::metadata(dir.join(log::name(0))).unwrap().len();
    writer.commit(&events, &[], NOW_US).unwrap();
    let mut committed = 16;
    let len = loop {
        let len = file_len(dir.path());
        writer.commit(&events, &[], NOW_US).unwrap();
        if file_len(dir.path()) > len {
            break len;
        }
        committed += 16;
    };
    let copy = copy_of(dir.path());
    let file = File::options().write(true).open(copy.path().join(log::name(0))).unwrap();
    file.set_len(len).unwrap();
    let (store, _writer) = Store::open(large(copy.path()), NOW_US).unwrap();
    assert_eq!(store.mark().watermark, committed);
    assert_eq!(read_all(&store, 0).len() as u64, committed);
}
