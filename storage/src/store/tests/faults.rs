//! Failing, full and power-cut disks.

use std::collections::BTreeMap;

use super::world::{self, SINKS, World};
use super::*;
use crate::dead_letter::DeadLetter;
use crate::disk::Disk;
use crate::sim::{Cut, Lies, Operation, SimDisk};

#[test]
fn a_failed_sync_acks_nothing_and_the_log_goes_on_in_a_new_file() {
    let mut world = World::new(SimDisk::new(1), world::options());
    world.commit_events(20, 100);
    let files = world.store.stats().files;

    world.disk.set_faults(|faults| faults.fail_sync_after = Some(0));
    let events = world.make(10, 100);
    let Err(CommitError::Io { reason, .. }) = world.commit(events, vec![]) else {
        panic!("the commit went through")
    };
    assert!(reason.contains("Input/output error"), "{reason}");
    world.check();

    // The numbers of the failed commit go to the next one.
    world.commit_events(10, 100);
    assert_eq!(world.store.stats().files, files + 1);
    world.check();
    world.commit_events(10, 100);
    world.check();

    // What the failed commit left in the page cache is void, and so is it after a power cut,
    // which takes it away.
    let killed = world.disk.after_kill();
    let cut = world.disk.after_cut();
    world.reopen(killed);
    world.reopen(cut);
    world.commit_events(10, 100);
    world.check();
}

#[test]
fn a_file_without_events_that_failed_is_replaced_and_its_control_records_stay() {
    let mut world = World::new(SimDisk::new(2), world::options());
    world.commit_events(20, 100);
    let killed = world.disk.after_kill();
    world.reopen(killed);
    world.cursor_to("cloud", 7).unwrap();
    world.disk.set_faults(|faults| faults.fail_sync_after = Some(0));
    let events = world.make(1, 100);
    world.commit(events, vec![]).unwrap_err();
    world.cursor_to("local", 9).unwrap();
    let cut = world.disk.after_cut();
    world.reopen(cut);
    assert_eq!(world.store.cursor("cloud"), Some(7));
    assert_eq!(world.store.cursor("local"), Some(9));
}

/// The process ends between the failed sync and the new file. Its pages read back well from the
/// page cache, but nothing may be built on them: they go with the power.
#[test]
fn what_a_failed_sync_left_behind_is_not_built_upon_after_a_restart() {
    let mut world = World::new(SimDisk::new(5), world::options());
    world.commit_events(20, 100);
    world.disk.set_faults(|faults| faults.fail_sync_after = Some(0));
    let events = world.make(10, 100);
    world.commit(events, vec![]).unwrap_err();
    let killed = world.disk.after_kill();
    world.reopen(killed);
    world.commit_events(10, 100);
    let cut = world.disk.after_cut();
    world.reopen(cut);
}

#[test]
fn control_records_of_a_failed_commit_stay_void() {
    let mut world = World::new(SimDisk::new(6), world::options());
    world.commit_events(20, 100);
    world.disk.set_faults(|faults| faults.fail_sync_after = Some(0));
    world.cursor_to("cloud", 20).unwrap_err();
    world.commit_events(1, 100);
    let killed = world.disk.after_kill();
    world.reopen(killed);
    assert_eq!(world.store.cursor("cloud"), Some(0));
}

#[test]
fn a_full_disk_refuses_and_recovers_when_there_is_room() {
    let mut world = World::new(SimDisk::new(3), world::options());
    world.commit_events(20, 100);
    let pages = world.disk.pages();
    world.disk.set_faults(|faults| faults.pages_max = Some(pages));
    let mut refused = 0;
    for _ in 0..5 {
        let events = world.make(50, 1000);
        match world.commit(events, vec![]) {
            Ok(_) => {}
            Err(CommitError::DiskFull { .. }) => refused += 1,
            Err(error) => panic!("{error}"),
        }
        world.check();
    }
    assert!(refused > 3);
    world.disk.set_faults(|faults| faults.pages_max = None);
    world.commit_events(50, 1000);
    world.check();
    let killed = world.disk.after_kill();
    world.reopen(killed);
    world.commit_events(50, 1000);
    world.check();
}

#[test]
fn while_little_of_the_disk_is_free_events_wait_and_cursors_move() {
    let options = StoreOptions { free_bytes_min: 400 << 10, ..world::options() };
    let mut world = World::new(SimDisk::new(7), options);
    world.commit_events(20, 100);
    let pages = world.disk.pages();
    world.disk.set_faults(|faults| faults.pages_max = Some(pages + 90));
    let events = world.make(1, 10);
    let Err(CommitError::LittleSpace { free_bytes, .. }) = world.commit(events, vec![]) else {
        panic!("it was committed")
    };
    assert_eq!(free_bytes, 90 << 12);
    world.cursor_to("cloud", 10).unwrap();
    assert_eq!(world.store.cursor("cloud"), Some(10));
    world.disk.set_faults(|faults| faults.pages_max = Some(pages + 200));
    world.commit_events(1, 10);
    world.check();
}

/// Runs a life of commits, cursor moves, trims, packing and failing syncs until the power is cut. Says
/// whether the file that was appended to last was written over another's blocks.
fn live_until_cut(seed: u64, world: &mut World, rng: &mut fastrand::Rng) -> bool {
    let mut over_spare = false;
    // So often that most files are written over trimmed ones.
    let trims_often = match world.options.journal {
        JournalMode::Off => rng.bool(),
        // Lives that showed what was once wrong go on as they did.
        _ => seed % 4 == 3,
    };
    let operations_max = if trims_often { 1000 } else { 400 };
    let (power_left, failing) = (rng.u64(..operations_max), rng.u8(..4) == 0);
    let fail_sync_after = failing.then(|| rng.u64(..40));
    world.disk.set_faults(|faults| {
        (faults.power_left, faults.fail_sync_after) = (Some(power_left), fail_sync_after);
    });
    for _ in 0..100 {
        over_spare = world.writer.shared.log.is_over_spare();
        let kind = if trims_often && rng.bool() { 20 } else { rng.u8(..22) };
        let result = match kind {
            0..12 => {
                let (count, payload_bytes) = (rng.usize(1..40), rng.usize(..2000));
                let events = world.make(count, payload_bytes);
                let control = if rng.bool() { vec![] } else { vec![put(rng)] };
                world.commit(events, control).map(drop)
            }
            12..16 => {
                let watermark = world.watermark();
                let offset = rng.u64(watermark / 2..=watermark);
                world.cursor_to(SINKS[rng.usize(..2)], offset).map(drop)
            }
            16..18 => world.commit(vec![], vec![put(rng)]).map(drop),
            18..20 => {
                // Whichever fails, nothing is lost by it.
                let _ = world.writer.checkpoint(&[]);
                let _ = world.store.packer().step(&|| true);
                Ok(())
            }
            _ => {
                // Every sink has got the most of it.
                let watermark = world.watermark();
                let most = if trims_often { watermark - watermark / 32 } else { watermark / 4 * 3 };
                let got =
                    SINKS.map(|sink| world.cursor_to(sink, rng.u64(most..=watermark)).map(drop));
                // What goes then takes few operations: the power finds them seldom by itself.
                if !trims_often && rng.bool() {
                    let power_left = rng.u64(..40);
                    world.disk.set_faults(|faults| {
                        faults.power_left = faults.power_left.map(|left| left.min(power_left));
                    });
                }
                let _ = world.retain();
                let is_spare = world.writer.shared.log.spare_bytes() > 0;
                assert!(!is_spare || !world.disk.has_failed("log/spare"), "seed {seed}");
                got.into_iter().collect()
            }
        };
        if world.options.journal == JournalMode::On {
            (0..rng.u8(..3)).for_each(|_| world.step(rng.u8(..8) == 0));
        }
        if let Err(error) = result {
            assert!(matches!(error, CommitError::Io { .. }), "seed {seed}: {error}");
        }
        if world.disk.cut().is_some() {
            break;
        }
        world.now_us += 1_000_000;
    }
    over_spare
}

fn put(rng: &mut fastrand::Rng) -> Control {
    let value = vec![rng.u8(..); rng.usize(..300)];
    Control::Put { namespace: 1, key: Bytes::from(vec![rng.u8(..8)]), value: value.into() }
}

/// How many cuts fell into what, by name.
type Tally = BTreeMap<&'static str, u64>;

/// What was under way when the power of a disk went.
fn under_way(disk: &SimDisk, journal: JournalMode) -> &'static str {
    let Some(Cut { operation, name }) = disk.cut() else {
        return "nothing";
    };
    let in_log = |name: &str| format!("{}/{name}", log::FOLDER);
    let journaled = journal == JournalMode::On;
    let of_log = |name: &String| name.starts_with(|first: char| first.is_ascii_digit());
    let last = disk.list(log::FOLDER).unwrap().into_iter().filter(of_log).max();
    match name.as_str() {
        "log/new" => "rolling",
        "log/spare" if operation != Operation::Remove => "rolling over the spare",
        "log/packing" => "packing",
        "state.redb" | "state.new" => "checkpointing",
        "ballast" => "ballast",
        ring if ring.starts_with("log/journal") => "journal",
        _ if matches!(operation, Operation::Remove | Operation::Rename) => "trimming",
        _ if last.is_some_and(|last| in_log(&last) != name) => "sealing",
        _ if !journaled => "committing",
        _ if operation == Operation::Sync => "journal's checkpoint",
        _ => "going home",
    }
}

/// Four lives of a store, each ended by a power cut, some of them by a second one while the store is
/// opened again.
fn cut_power(seed: u64, journal: JournalMode, sync_lies: Lies) -> Tally {
    let mut rng = fastrand::Rng::with_seed(seed);
    let compression = [Compression::None, Compression::Lz4, Compression::Zstd][rng.usize(..3)];
    let mut options = StoreOptions { journal, compression, ..world::options() };
    if journal == JournalMode::On && rng.bool() {
        // A journal takes a megabyte of room at once: else every commit would begin a new file.
        options.file_bytes_max += 1 << 20;
    } else if journal == JournalMode::Off && rng.bool() {
        // Files fill quickly, so that trimmed ones are written over.
        options.file_bytes_max /= 4;
    }
    let mut world = World::new(SimDisk::new(seed), options);
    world.disk.set_faults(|faults| faults.sync_lies = sync_lies);
    let mut tally = Tally::new();
    for _ in 0..4 {
        let over_spare = live_until_cut(seed, &mut world, &mut rng);
        let under_way = under_way(&world.disk, journal);
        *tally.entry(under_way).or_default() += 1;
        if over_spare && ["committing", "journal", "going home"].contains(&under_way) {
            *tally.entry("committing over a spare").or_default() += 1;
        }
        if world.disk.failed_syncs() > 0 {
            *tally.entry("after a failed sync").or_default() += 1;
        }
        let mut cut = world.disk.after_cut();
        if rng.u8(..3) == 0 {
            let power_left = rng.u64(..60);
            cut.set_faults(|faults| faults.power_left = Some(power_left));
            let opened = world::open(cut.clone(), &world.options, world.now_us);
            assert!(opened.is_ok() || cut.cut().is_some(), "seed {seed}");
            if cut.cut().is_some() {
                *tally.entry("opening").or_default() += 1;
            }
            drop(opened);
            cut = cut.after_cut();
        }
        world.reopen(cut);
    }
    world.commit_events(3, 100);
    world.check();
    tally
}

/// How many power cuts by default.
const CUTS: u64 = 2_000;

/// How many power cuts; the environment may ask for others.
fn cuts() -> u64 {
    std::env::var("POWER_CUTS").ok().and_then(|cuts| cuts.parse().ok()).unwrap_or(CUTS)
}

/// The seed to begin with, if the environment asks for one.
fn first_seed() -> Option<u64> {
    std::env::var("EDGE_GATEWAY_SEED").ok().and_then(|seed| seed.parse().ok())
}

fn cut_power_often(journal: JournalMode, phases: &[&str]) {
    let mut all = Tally::new();
    let first = first_seed().unwrap_or(0);
    for seed in first..first + cuts() / 4 {
        let tally = std::panic::catch_unwind(|| cut_power(seed, journal, Lies::Nobodys));
        for (name, cuts) in tally.unwrap_or_else(|_| panic!("seed {seed}")) {
            *all.entry(name).or_default() += cuts;
        }
    }
    println!("{all:?}");
    // What is never cut is not proved.
    for phase in phases.iter().filter(|_| cuts() >= CUTS) {
        let cut = all.get(phase).copied().unwrap_or(0);
        assert!(cut >= 10, "{phase} was cut {cut} times only: {all:?}");
    }
}

#[test]
fn no_power_cut_loses_what_was_acked() {
    let phases = ["committing", "opening", "after a failed sync"];
    cut_power_often(JournalMode::Off, &[&phases[..], &PHASES].concat());
}

#[test]
fn no_power_cut_loses_what_the_journal_acked() {
    let phases = ["journal", "going home", "opening", "after a failed sync"];
    cut_power_often(JournalMode::On, &[&phases[..], &PHASES].concat());
}

/// A file that took over from one of its name twice left out hundreds of thousands of numbers if the power
/// went before it had that name: the old one was worth nothing without the journal's records, which
/// were not replayed into it any more. The lives that showed it: one without a new journal, one with.
#[test]
fn a_takeover_that_the_power_cuts_short_leaves_out_no_number() {
    for seed in [940, 4653] {
        cut_power(seed, JournalMode::On, Lies::Nobodys);
    }
}

const PHASES: [&str; 7] = [
    "rolling",
    "rolling over the spare",
    "committing over a spare",
    "sealing",
    "checkpointing",
    "trimming",
    "packing",
];

/// One life of a store: how many events it was told are safe, and how many of those its power cut took.
fn acked_and_lost(seed: u64, journal: JournalMode, sync_lies: Lies) -> (usize, usize) {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut world = World::new(SimDisk::new(seed), StoreOptions { journal, ..world::options() });
    world.disk.set_faults(|faults| faults.sync_lies = sync_lies);
    live_until_cut(seed, &mut world, &mut rng);
    world.acked_and_lost_on(world.disk.after_cut())
}

/// The same lives, whose power goes at the same moments, on a disk that keeps its word and on two that
/// do not: one that syncs nothing, and one that syncs all but what the files of the log hold. On the
/// first nothing that was acked is lost. On the others it is, in nearly every life that had any, and the
/// proof above sees each of these.
#[test]
fn without_syncs_power_cuts_do_lose_what_was_acked() {
    const LIVES: u64 = 24;
    for journal in [JournalMode::Off, JournalMode::On] {
        for seed in 0..LIVES {
            let (acked, lost) = acked_and_lost(seed, journal, Lies::Nobodys);
            assert_eq!(lost, 0, "seed {seed}, {journal:?}: of {acked} acked events");
        }
        for lies in [Lies::Everybodys, Lies::FilesIn(log::FOLDER)] {
            let (mut acking, mut losing) = (0, 0);
            for seed in 0..LIVES {
                let (acked, lost) = acked_and_lost(seed, journal, lies);
                acking += u64::from(acked > 0);
                if lost > 0 {
                    losing += 1;
                    let proof = std::panic::catch_unwind(|| cut_power(seed, journal, lies));
                    assert!(proof.is_err(), "seed {seed}, {journal:?}: {lost} events lost unseen");
                }
            }
            println!("{journal:?}, {lies:?}: acked events are lost in {losing} of {acking} lives");
            let nearly_all = acking > LIVES / 2 && losing * 10 >= acking * 9;
            assert!(nearly_all, "{journal:?}, {lies:?}: the simulated cuts prove little");
        }
    }
}

/// Events of the largest commit of [`filled`]: a batch each.
const BATCH_EVENTS_MAX: u64 = 59;

/// A store of several files, with what has to be kept in its state database.
fn filled(seed: u64, journal: JournalMode) -> World {
    let options = StoreOptions { journal, ..world::options() };
    let mut world = World::new(SimDisk::new(seed), options);
    for round in 0..15 {
        world.commit_events(45 + round, 150);
        world.cursor_to("cloud", 5).unwrap();
    }
    let letters: Vec<DeadLetter> = read_all(&world.store, 0)
        .into_iter()
        .take(30)
        .map(|event| DeadLetter {
            sink: "local".into(),
            event,
            reason: "400".into(),
            attempts: 1,
            first_us: 0,
            last_us: 0,
        })
        .collect();
    world.store.put_dead_letters(&letters).unwrap();
    world
}

/// A byte of the store: of the state database now and then, else of any file of the log.
fn any_byte(disk: &SimDisk, rng: &mut fastrand::Rng) -> (String, u64) {
    let files = disk.list(log::FOLDER).unwrap();
    let name = match rng.u8(..4) {
        0 => crate::state::NAME.to_owned(),
        _ => format!("{}/{}", log::FOLDER, files[rng.usize(..files.len())]),
    };
    let pages = disk.page_offsets(&name);
    (name, pages[rng.usize(..pages.len())] + rng.u64(..4096))
}

/// How many flipped bytes; the environment may ask for more.
fn flips() -> usize {
    std::env::var("FLIPPED_BYTES").ok().and_then(|flips| flips.parse().ok()).unwrap_or(200)
}

/// Changes one byte of a store at a time, closed or killed. A page of the log costs one batch at most,
/// one of its tree costs nothing; a state database that is damaged is refused, and made anew.
#[test]
fn a_flipped_byte_is_found_or_harmless() {
    let seed = first_seed().unwrap_or(4);
    println!("seed {seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    let (mut lossy, mut refused) = (0, 0);
    for (round, journal) in [JournalMode::Off, JournalMode::On].into_iter().enumerate() {
        let mut world = filled(4, journal);
        if round == 0 {
            world.close();
        } else {
            world.reopen(world.disk.after_kill());
        }
        for _ in 0..flips() / 2 {
            let disk = world.disk.after_kill();
            let (name, at) = any_byte(&disk, &mut rng);
            let change = rng.u8(1..);
            for bit in (0..8).filter(|bit| change >> bit & 1 == 1) {
                assert!(disk.flip(&name, at, bit));
            }
            let damage = format!("{journal:?} {name} {at}^{change}");
            let mut made_anew = false;
            if name == crate::state::NAME
                && let Err(error) = world::open(disk.after_kill(), &world.options, NOW_US)
            {
                assert!(matches!(error, OpenError::DamagedState { .. }), "{damage}: {error}");
                Store::rebuild_state_on(&(Arc::new(disk.clone()) as SharedDisk)).unwrap();
                refused += 1;
                made_anew = true;
            }
            // A dead letter whose key was hit counts for an event that was not refused.
            let lost = world.reads_nothing_wrong_and(disk, &damage, !made_anew);
            assert!(lost <= BATCH_EVENTS_MAX, "{damage}: {lost} events are lost");
            lossy += usize::from(lost > 0);
        }
    }
    let all = flips();
    println!("{all} flipped bytes: {lossy} cost a batch, {refused} a damaged state");
    assert!(lossy > all / 10 && refused > 0, "of {all}: {lossy} and {refused}");
}

/// Each page of a log file in turn cannot be read: of a batch, or of the tree.
#[test]
fn a_bad_sector_costs_its_own_batch_and_nothing_else() {
    for killed in [false, true] {
        let mut world = filled(16, JournalMode::Off);
        if killed {
            world.reopen(world.disk.after_kill());
        } else {
            world.close();
        }
        let files = world.disk.list(log::FOLDER).unwrap();
        // The first one is sealed, the last one would be appended to.
        for file in [&files[0], files.last().unwrap()] {
            let name = format!("{}/{file}", log::FOLDER);
            let (mut lossy, mut harmless) = (0, 0);
            for at in world.disk.page_offsets(&name) {
                let disk = world.disk.after_kill();
                disk.spoil(&name, at);
                let lost = world.reads_nothing_wrong(disk, &format!("{name} {at}"));
                assert!(lost <= BATCH_EVENTS_MAX, "{name} {at}: {lost} events are lost");
                *if lost > 0 { &mut lossy } else { &mut harmless } += 1;
            }
            assert!(lossy > 0 && harmless > 0, "{name}: {lossy} {harmless}");
        }
    }
}

/// Whoever reads it is told to try again; the writer, without a commit, gives it up.
#[test]
fn a_bad_sector_in_the_active_file_is_passed_over_and_the_log_goes_on() {
    for journal in [JournalMode::Off, JournalMode::On] {
        let mut world = filled(17, journal);
        // So that nothing of it is in redb's cache.
        world.options.cache_bytes = 4096;
        world.commit_events(20, 150);
        world.reopen_cleanly();
        let watermark = world.watermark();
        let active = world.store.files().unwrap().last().unwrap().clone();
        let name = active.path.display().to_string();
        for at in world.disk.page_offsets(&name) {
            world.disk.spoil(&name, at);
        }
        let told = Arc::new(AtomicU64::new(0));
        let telling = told.clone();
        world.writer.on_failure(move || {
            telling.fetch_add(1, Ordering::Relaxed);
        });
        world.store.read(active.offsets.start, 10, 1 << 20).unwrap_err();
        world.store.read(active.offsets.start, 10, 1 << 20).unwrap_err();
        assert_eq!(told.load(Ordering::Relaxed), 1);
        world.writer.check().unwrap();
        let read = world.store.read(active.offsets.start, 10, 1 << 20).unwrap();
        assert_eq!((read.next, &read.missing[..]), (watermark, &[active.offsets.clone()][..]));
        for sink in SINKS {
            let losses = world.store.losses().unwrap();
            let loss = losses.iter().find(|l| l.sink.as_deref() == Some(sink)).unwrap();
            assert_eq!((&loss.offsets, loss.reason), (&active.offsets, LossReason::Corrupt));
        }
        let events = world.make(3, 10);
        let committed = world.commit(events, vec![]).unwrap();
        assert_eq!(committed.offsets, watermark..watermark + 3);
        world.writer.shared.log.settle().unwrap();
        assert_eq!(read_all(&world.store, watermark).len(), 3);
    }
}

/// What is refused with a remedy is mended by it: nothing is lost, and nothing is used twice.
#[test]
fn a_damaged_state_is_made_anew_from_the_log() {
    let mut world = filled(18, JournalMode::Off);
    world.close();
    let disk = world.disk.after_kill();
    let page = disk.page_offsets(crate::state::NAME)[0];
    assert!(disk.flip(crate::state::NAME, page, 0));
    let Err(error) = world::open(disk.clone(), &world.options, NOW_US) else { panic!("opened") };
    assert!(error.to_string().contains("store repair"), "{error}");
    // Also for who only looks, and for a disk that does not give it.
    let look = Store::look_on(Arc::new(disk.clone()), None, world.options.clone(), NOW_US);
    assert!(matches!(look, Err(OpenError::DamagedState { .. })));
    let unreadable = world.disk.after_kill();
    unreadable.spoil(crate::state::NAME, page);
    let opened = world::open(unreadable, &world.options, NOW_US);
    assert!(matches!(opened, Err(OpenError::DamagedState { .. })));

    let shared: SharedDisk = Arc::new(disk.clone());
    Store::rebuild_state_on(&shared).unwrap();
    assert_eq!(world.reads_nothing_wrong(disk.after_kill(), "made anew"), 0);
    let (store, _writer) = world::open(disk, &world.options, NOW_US).unwrap();
    assert_eq!(store.mark().watermark, world.watermark());
    // The log knows where this one was; of the other it does not, which begins anew.
    assert_eq!((store.cursor("cloud"), store.cursor("local")), (Some(5), Some(0)));
}

/// A disk that does not sync was once told as damage of the state, with the advice to make it anew: that
/// would have cost a state that is whole.
#[test]
fn a_disk_that_fails_is_not_taken_for_a_damaged_state() {
    for (journal, closed) in
        [(JournalMode::Off, false), (JournalMode::Off, true), (JournalMode::On, false)]
    {
        let mut world = filled(20, journal);
        if closed {
            world.close();
        }
        let mut refused = 0;
        for after in 0..12 {
            let disk = world.disk.after_kill();
            disk.set_faults(|faults| faults.fail_sync_after = Some(after));
            match world::open(disk, &world.options, NOW_US) {
                Ok(_) => {}
                Err(OpenError::Database { reason, .. }) => {
                    assert!(reason.contains("Input/output error"), "{reason}");
                    refused += 1;
                }
                Err(error) => panic!("{journal:?}, closed {closed}, sync {after}: {error}"),
            }
        }
        assert!(refused > 0, "{journal:?}, closed {closed}: no sync has failed");
    }
}

/// The dead letters are whole as far as their own pages are.
#[test]
fn a_state_that_is_made_anew_keeps_the_dead_letters() {
    let mut world = filled(19, JournalMode::Off);
    world.close();
    let kept = world.disk.page_offsets(crate::state::NAME).into_iter().filter(|page| {
        let disk = world.disk.after_kill();
        disk.flip(crate::state::NAME, page + 40, 1);
        if world::open(disk.after_kill(), &world.options, NOW_US).is_ok() {
            return false;
        }
        Store::rebuild_state_on(&(Arc::new(disk.clone()) as SharedDisk)).unwrap();
        let (store, _writer) = world::open(disk, &world.options, NOW_US).unwrap();
        store.dead_letters("local", 0, 100).unwrap().len() == 30
    });
    assert!(kept.count() > 0);
}

/// A journal that failed is kept where its home file could not be synced. It once was replayed into
/// the file that had replaced that one, under the same name.
#[test]
fn a_file_that_was_replaced_takes_nothing_from_a_journal_that_failed() {
    let mut replaced = 0;
    for after in 0..8 {
        let options = StoreOptions { journal: JournalMode::On, ..world::options() };
        let mut world = World::new(SimDisk::new(8), options);
        world.cursor_to("cloud", 0).unwrap();
        world.step(true);
        // The commit is too large for the journal, so that log files are synced as well.
        world.disk.set_faults(|faults| faults.fail_sync_after = Some(after));
        let events = world.make(57, 2000);
        let _ = world.commit(events, vec![]);
        world.disk.set_faults(|faults| faults.fail_sync_after = None);
        world.commit_events(44, 1500);
        let rings = world.disk.list(crate::log::FOLDER).unwrap();
        replaced += usize::from(rings.iter().any(|name| name.contains("-without-")));
        let cut = world.disk.after_cut();
        world.reopen(cut);
        world.commit_events(3, 100);
        world.check();
    }
    assert!(replaced > 0, "no sync of a log file has failed");
}

/// The first commit to a new journal once waited for the one after it: it is too large for the journal,
/// and no sync of the ring tells that it is durable.
#[test]
fn a_commit_that_is_too_large_for_a_new_journal_is_acked() {
    let options = StoreOptions { journal: JournalMode::On, ..world::options() };
    let mut world = World::new(SimDisk::new(9), options);
    world.commit_events(2, 10);
    world.disk.set_faults(|faults| faults.fail_sync_after = Some(0));
    world.step(false);
    let events = world.make(1, 10);
    world.commit(events, vec![]).unwrap_err();
    let watermark = world.watermark();
    world.commit_events(57, 2000);
    world.step(false);
    assert_eq!(world.store.mark().watermark, watermark + 57);
    world.check();
}
