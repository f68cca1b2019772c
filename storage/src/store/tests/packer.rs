//! Files packed in the background: what they hold stays what it was.

use super::world::{self, SINKS, World, balance, verify};
use super::*;
use crate::sim::SimDisk;

/// A store of a few files that nobody has got, all of it in the checkpoint and none in a journal.
fn backlog(seed: u64, journal: JournalMode, compression: Compression) -> World {
    let options = StoreOptions { journal, compression, ..world::options() };
    let mut world = World::new(SimDisk::new(seed), options);
    for _ in 0..12 {
        world.commit_events(60, 700);
        world.cursor_to("cloud", 7).unwrap();
    }
    // The file that is appended to has some too.
    world.commit_events(1, 10);
    world.settle();
    world
}

#[test]
fn a_backlog_takes_less_room_and_is_the_same() {
    for journal in [JournalMode::Off, JournalMode::On] {
        for compression in [Compression::Lz4, Compression::Zstd] {
            let mut world = backlog(41, journal, compression);
            let before = world.store.stats();
            let sealed = before.files - 1;
            // One that was looked at before it is packed is not read from the old handle's pages.
            world.check();
            let mut packer = world.store.packer();
            let packed = std::iter::from_fn(|| packer.step(&|| true).unwrap().then_some(()));
            assert_eq!(packed.count() as u32, sealed);
            let after = world.store.stats();
            assert!(after.log_bytes * 3 < before.log_bytes * 2, "{before:?} {after:?}");
            assert!(!world.store.packer().step(&|| true).unwrap(), "they are packed again");
            world.check();
            world.commit_events(5, 100);
            world.settle();
            for disk in [world.disk.after_kill(), world.disk.after_cut()] {
                world.reopen(disk);
                assert!(verify(&world.store).is_sound());
            }
            world.reopen_cleanly();
            assert!(balance(&world.store).adds_up());
        }
    }
}

/// They go as they are: nothing is spent on them.
#[test]
fn what_every_sink_has_got_is_not_packed() {
    let mut world = backlog(42, JournalMode::Off, Compression::Zstd);
    let watermark = world.watermark();
    for sink in SINKS {
        world.cursor_to(sink, watermark).unwrap();
    }
    assert!(!world.store.packer().step(&|| true).unwrap());
}

/// Control records behind the checkpoint are nowhere else.
#[test]
fn what_the_checkpoint_has_not_passed_is_not_packed() {
    let options = StoreOptions { compression: Compression::Zstd, ..world::options() };
    let mut world = World::new(SimDisk::new(43), options);
    for _ in 0..8 {
        world.commit_events(60, 700);
    }
    assert!(world.store.stats().files > 2);
    assert!(!world.store.packer().step(&|| true).unwrap());
    world.settle();
    assert!(!world.store.packer().step(&|| false).unwrap());
    assert!(world.store.packer().step(&|| true).unwrap());
    world.check();
}

/// A journal that holds pages of the old file would write them over the new one.
#[test]
fn what_a_journal_may_still_write_home_is_not_packed() {
    let options = StoreOptions {
        compression: Compression::Zstd,
        journal: JournalMode::On,
        journal_bytes: 8 << 20,
        ..world::options()
    };
    let mut world = World::new(SimDisk::new(44), options);
    for _ in 0..8 {
        world.commit_events(60, 700);
    }
    world.writer.checkpoint(&[]).unwrap();
    assert!(!world.store.packer().step(&|| true).unwrap());
    world.settle();
    assert!(world.store.packer().step(&|| true).unwrap());
    let cut = world.disk.after_cut();
    world.reopen(cut);
}

#[test]
fn a_file_after_a_crash_is_repaired_once() {
    let mut world = backlog(45, JournalMode::Off, Compression::None);
    let crashed = world.store.files().unwrap().last().unwrap().offsets.start;
    world.reopen(world.disk.after_kill());
    world.commit_events(60, 700);
    world.settle();
    assert!(world.writer.shared.log.is_unclean(crashed));
    let mut packer = world.store.packer();
    assert!(packer.step(&|| true).unwrap());
    assert!(!packer.step(&|| true).unwrap());
    world.check();
    world.reopen(world.disk.after_cut());
    assert!(!world.writer.shared.log.is_unclean(crashed), "it is repaired again");
    assert!(verify(&world.store).is_sound());
}

/// What is trimmed while it is packed does not come back.
#[test]
fn a_file_that_is_trimmed_meanwhile_stays_gone() {
    let mut world = backlog(46, JournalMode::Off, Compression::Lz4);
    let (store, watermark) = (world.store.clone(), world.watermark());
    for sink in SINKS {
        world.cursor_to(sink, watermark / 2).unwrap();
    }
    let trimmed = std::cell::Cell::new(false);
    let world = std::cell::RefCell::new(world);
    let goes_on = || {
        // Asked once before it begins, then between the pieces.
        if trimmed.replace(true) {
            world.borrow_mut().retain().unwrap();
        }
        true
    };
    let mut packer = store.packer();
    packer.step(&goes_on).unwrap();
    let world = world.into_inner();
    assert!(world.store.stats().first_offset > 0);
    world.check();
    let mut world = world;
    world.reopen(world.disk.after_kill());
}

/// The power goes at any moment of it.
#[test]
fn packing_that_is_cut_short_loses_nothing() {
    for seed in 0..12 {
        let mut world = backlog(seed, JournalMode::Off, Compression::Zstd);
        world.disk.set_faults(|faults| faults.power_left = Some(2 + seed * 5));
        let mut packer = world.store.packer();
        while packer.step(&|| true).is_ok_and(|packed| packed) {}
        world.reopen(world.disk.after_cut());
        world.commit_events(3, 100);
        world.check();
    }
}
