//! The store on a real folder, one behaviour a test.

mod clock;
mod edges;
mod faults;
mod formats;
mod letters;
mod model;
mod packer;
mod seek;
mod spare;
mod tools;
mod world;

use redb::ReadableTable;

use super::open::Opening;
use super::*;
use crate::batch::Encoder;
use crate::head::FORMAT;
use crate::passed::Lanes;
use crate::{Attributes, CommitError, Control, Event, OpenError, journal, log};

const NOW_US: u64 = 1_700_000_000_000_000;

fn options(dir: &std::path::Path) -> StoreOptions {
    StoreOptions {
        dir: dir.to_owned(),
        partitions: 4,
        sinks: vec![SinkRetention::new("cloud")],
        file_bytes_max: 1 << 20,
        cache_bytes: 4 << 20,
        quota_bytes: 1 << 30,
        free_bytes_min: 0,
        at_quota: AtQuota::Hold,
        retain_bytes: 0,
        retain_age_us: 0,
        dead_letter_bytes_max: 1 << 20,
        journal: JournalMode::Off,
        journal_bytes: 1 << 20,
        compression: Compression::None,
        commits_ahead_max: 2,
    }
}

fn event(partition: u16, text: &str) -> Event {
    Event {
        partition,
        received_us: NOW_US,
        device_key: format!("dev-{partition}").into(),
        topic: format!("devices/dev-{partition}/telemetry").into(),
        attributes: Attributes::encode([crate::Attribute::QoS(1)]),
        payload: Bytes::copy_from_slice(text.as_bytes()),
    }
}

fn cursor(sink: &str, offset: u64) -> Control {
    Control::Cursor { sink: sink.into(), offset }
}

fn read_all(store: &Store, from: u64) -> Vec<StoredEvent> {
    let mut from = from;
    let mut events = Vec::new();
    loop {
        let read = store.read(from, 100, 1 << 20).unwrap();
        assert_eq!(read.missing, []);
        if read.events.is_empty() {
            assert_eq!(from, store.mark().watermark);
            return events;
        }
        from = read.next;
        events.extend(read.events);
    }
}

#[test]
fn what_is_committed_is_read_back_also_after_a_reopen() {
    let dir = tempfile::tempdir().unwrap();
    let (store, mut writer) = Store::open(options(dir.path()), NOW_US).unwrap();
    let (marks, epoch) = (Arc::new(Mutex::new(Vec::new())), store.epoch());
    let seen = marks.clone();
    writer.on_durable(move |mark| seen.lock().unwrap().push(mark));
    let events: Vec<Event> = (0..10).map(|i| event(i % 3, &format!("event {i}"))).collect();
    let first = writer.commit(&events[..4], &[], NOW_US).unwrap();
    let second = writer.commit(&events[4..], &[], NOW_US).unwrap();
    assert_eq!((first.commit, first.offsets), (1, 0..4));
    assert_eq!((second.commit, second.offsets), (2, 4..10));
    let mark = Mark { commit: 2, watermark: 10 };
    assert_eq!(*marks.lock().unwrap(), [Mark { commit: 1, watermark: 4 }, mark]);

    let stored = read_all(&store, 0);
    assert_eq!(stored.iter().map(|e| e.offset).collect::<Vec<_>>(), (0..10).collect::<Vec<_>>());
    assert_eq!(stored.iter().map(|e| e.seq).collect::<Vec<_>>(), [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]);
    assert_eq!(stored.into_iter().map(|e| e.event).collect::<Vec<_>>(), events);

    writer.close().unwrap();
    let (store, mut writer) = Store::open(options(dir.path()), NOW_US).unwrap();
    assert_eq!((store.epoch(), store.mark().watermark), (epoch, 10));
    assert_eq!(read_all(&store, 7).len(), 3);
    assert_eq!(writer.commit(&events[..1], &[], NOW_US).unwrap().offsets, 10..11);
    assert_eq!(read_all(&store, 10)[0].seq, 4);
    assert_eq!(store.stats().files, 1);
}

#[test]
fn cursors_and_state_ride_in_commits_without_events() {
    let dir = tempfile::tempdir().unwrap();
    let (store, mut writer) = Store::open(options(dir.path()), NOW_US).unwrap();
    let put = |key: &'static [u8], value: &'static [u8]| Control::Put {
        namespace: 7,
        key: Bytes::from_static(key),
        value: Bytes::from_static(value),
    };
    writer.commit(&[event(0, "one"), event(1, "two")], &[put(b"a", b"1")], NOW_US).unwrap();
    writer.commit(&[], &[cursor("cloud", 1), put(b"b", b"2")], NOW_US).unwrap();
    writer.commit(&[], &[cursor("cloud", 2)], NOW_US).unwrap();
    writer.commit(&[], &[Control::Delete { namespace: 7, key: b"a"[..].into() }], NOW_US).unwrap();
    writer.commit(&[event(0, "three")], &[cursor("cloud", 1)], NOW_US).unwrap();
    let look = |store: &Store| {
        assert_eq!(store.cursor("cloud"), Some(2));
        assert_eq!(store.state(7, b"a").unwrap(), None);
        assert_eq!(store.state(7, b"b").unwrap().as_deref(), Some(&b"2"[..]));
        assert_eq!(store.state(8, b"b").unwrap(), None);
        let all = [(Bytes::from_static(b"b"), Bytes::from_static(b"2"))];
        assert_eq!(store.states(7).unwrap(), all, "what was deleted is not among them");
        assert_eq!(store.states(6).unwrap(), []);
        assert_eq!(read_all(store, 0).len(), 3);
    };
    look(&store);
    let copy = copy_of(dir.path());
    writer.close().unwrap();
    drop(store);
    look(&Store::open(options(dir.path()), NOW_US).unwrap().0);
    look(&Store::open(options(copy.path()), NOW_US).unwrap().0);
}

/// What a crash leaves behind: the folder as it is while the writer is alive.
fn copy_of(dir: &std::path::Path) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    std::fs::create_dir(copy.path().join(log::FOLDER)).unwrap();
    for folder in ["", log::FOLDER] {
        for entry in std::fs::read_dir(dir.join(folder)).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_file() {
                let to = copy.path().join(folder).join(entry.file_name());
                std::fs::copy(entry.path(), to).unwrap();
            }
        }
    }
    copy
}

#[test]
fn a_crash_keeps_everything_committed_and_goes_on_in_a_new_file() {
    let dir = tempfile::tempdir().unwrap();
    let (_store, mut writer) = Store::open(options(dir.path()), NOW_US).unwrap();
    let mut dir = dir;
    for round in 0..5_u64 {
        let events: Vec<Event> = (0..50).map(|i| event(i % 4, &format!("{round} {i}"))).collect();
        assert_eq!(writer.commit(&events, &[], NOW_US).unwrap().offsets.start, round * 50);
        let copy = copy_of(dir.path());
        let (store, reopened) = Store::open(options(copy.path()), NOW_US).unwrap();
        writer = reopened;
        dir = copy;
        let stored = read_all(&store, 0);
        assert_eq!(stored.len() as u64, (round + 1) * 50);
        let mut next_seq = [0; 4];
        for (offset, stored) in stored.iter().enumerate() {
            assert_eq!(stored.offset, offset as u64);
            let seq = &mut next_seq[usize::from(stored.event.partition)];
            assert_eq!(stored.seq, *seq);
            *seq += 1;
        }
    }
}

#[test]
fn a_second_process_is_told_that_the_store_is_in_use() {
    let dir = tempfile::tempdir().unwrap();
    let (store, writer) = Store::open(options(dir.path()), NOW_US).unwrap();
    assert!(matches!(Store::open(options(dir.path()), NOW_US), Err(OpenError::InUse { .. })));
    writer.close().unwrap();
    Store::open(options(dir.path()), NOW_US).unwrap();
    drop(store);
}

#[test]
fn another_number_of_partitions_is_refused_with_the_remedy() {
    let dir = tempfile::tempdir().unwrap();
    drop(Store::open(options(dir.path()), NOW_US).unwrap());
    let Err(error) = Store::open(StoreOptions { partitions: 8, ..options(dir.path()) }, NOW_US)
    else {
        panic!("opened")
    };
    assert!(error.to_string().contains("ingest.partitions = 4"), "{error}");
}

/// Appends files' worth of events until there are `files` of them.
fn fill(store: &Store, writer: &mut Writer, files: u32) {
    while store.stats().files < files {
        let events: Vec<Event> = (0..16).map(|i| event(i % 4, &"x".repeat(1000))).collect();
        writer.commit(&events, &[], NOW_US).unwrap();
    }
}

fn small(dir: &std::path::Path) -> StoreOptions {
    StoreOptions { file_bytes_max: 256 << 10, ..options(dir) }
}

#[test]
fn delivered_files_go_and_the_numbers_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let (store, mut writer) = Store::open(small(dir.path()), NOW_US).unwrap();
    fill(&store, &mut writer, 4);
    assert_eq!(writer.retain(NOW_US).unwrap().files, 0);

    let watermark = store.mark().watermark;
    writer.commit(&[], &[cursor("cloud", watermark / 2)], NOW_US).unwrap();
    let report = writer.retain(NOW_US).unwrap();
    assert!(report.files > 0 && report.losses.is_empty());
    let first = store.stats().first_offset;
    assert!(first > 0 && first <= watermark / 2);
    let read = store.read(0, 1, 1).unwrap();
    assert!(read.missing.iter().eq([&(0..first)]) && read.events[0].offset == first);

    // All of it, and then nothing holds an event any more.
    fill(&store, &mut writer, store.stats().files + 1);
    let watermark = store.mark().watermark;
    writer.commit(&[], &[cursor("cloud", watermark)], NOW_US).unwrap();
    writer.retain(NOW_US).unwrap();
    let next_seq = store.stats().next_seq;
    writer.close().unwrap();
    let (store, mut writer) = Store::open(small(dir.path()), NOW_US).unwrap();
    assert_eq!((store.mark().watermark, store.cursor("cloud")), (watermark, Some(watermark)));
    let committed = writer.commit(&[event(1, "next")], &[], NOW_US).unwrap();
    assert_eq!(committed.offsets, watermark..watermark + 1);
    assert_eq!(read_all(&store, watermark)[0].seq, next_seq[1]);
    assert_eq!(store.losses().unwrap(), []);
}

/// Commits wait while it runs: it does a little at a time and says that there is more.
#[test]
fn delivered_files_go_a_few_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let (store, mut writer) = Store::open(small(dir.path()), NOW_US).unwrap();
    fill(&store, &mut writer, 6);
    writer.commit(&[], &[cursor("cloud", store.mark().watermark)], NOW_US).unwrap();
    for _ in 0..2 {
        let report = writer.retain(NOW_US).unwrap();
        assert_eq!((report.files, report.more), (2, true));
    }
    while writer.retain(NOW_US).unwrap().more {}
    assert_eq!(store.stats().files, 1);
}

/// Whoever reads events again when it is started anew has them until it says that it needs them no more.
#[test]
fn what_the_caller_keeps_stays_whatever_the_policy() {
    for at_quota in [AtQuota::Hold, AtQuota::DropOldest] {
        let dir = tempfile::tempdir().unwrap();
        let tight = StoreOptions { quota_bytes: 1 << 20, at_quota, ..small(dir.path()) };
        let (store, mut writer) = Store::open(tight, NOW_US).unwrap();
        writer.keep_from(20);
        let events: Vec<Event> = (0..16).map(|i| event(i % 4, &"x".repeat(1000))).collect();
        let full = |writer: &mut Writer| {
            let mut commits = 0..200;
            while commits.next().is_some() && writer.commit(&events, &[], NOW_US).is_ok() {}
            writer.commit(&[], &[cursor("cloud", store.mark().watermark)], NOW_US).unwrap();
            while writer.retain(NOW_US).unwrap().more {}
        };
        full(&mut writer);
        assert!(store.stats().first_offset <= 20, "{at_quota:?}");
        let watermark = store.mark().watermark;
        writer.keep_from(watermark);
        while writer.retain(NOW_US).unwrap().more {}
        assert!(store.stats().first_offset > 20, "{at_quota:?}");
        writer.commit(&events, &[], NOW_US).unwrap();
    }
}

#[test]
fn delivered_files_stay_as_long_as_they_are_wanted() {
    let dir = tempfile::tempdir().unwrap();
    let wanted = StoreOptions { retain_bytes: 600 << 10, retain_age_us: 50, ..small(dir.path()) };
    let (store, mut writer) = Store::open(wanted, NOW_US).unwrap();
    fill(&store, &mut writer, 5);
    writer.commit(&[], &[cursor("cloud", store.mark().watermark)], NOW_US).unwrap();
    assert_eq!(writer.retain(NOW_US + 49).unwrap().files, 0);
    assert!(writer.retain(NOW_US + 50).unwrap().files > 0);
    assert!(store.stats().log_bytes >= 600 << 10);
    assert_eq!(store.losses().unwrap(), []);
}

#[test]
fn without_sinks_the_ledger_says_what_expired() {
    let dir = tempfile::tempdir().unwrap();
    let local = StoreOptions { sinks: vec![], retain_age_us: 50, ..small(dir.path()) };
    let (store, mut writer) = Store::open(local, NOW_US).unwrap();
    fill(&store, &mut writer, 3);
    assert_eq!(writer.retain(NOW_US).unwrap().files, 0);
    let report = writer.retain(NOW_US + 50).unwrap();
    let first = store.stats().first_offset;
    let [loss] = &report.losses[..] else { panic!("{:?}", report.losses) };
    assert_eq!((&loss.sink, &loss.offsets, loss.reason), (&None, &(0..first), LossReason::Expired));
    assert_eq!(loss.size_bytes, store.stats().event_bytes - store.lag_bytes(first));
    assert_eq!(store.losses().unwrap(), report.losses);
}

#[test]
fn at_the_quota_commits_wait_until_a_sink_moves_on() {
    let dir = tempfile::tempdir().unwrap();
    let tight = StoreOptions { quota_bytes: 1 << 20, ..small(dir.path()) };
    let (store, mut writer) = Store::open(tight, NOW_US).unwrap();
    let events: Vec<Event> = (0..16).map(|i| event(i % 4, &"x".repeat(1000))).collect();
    let used_bytes = loop {
        match writer.commit(&events, &[], NOW_US) {
            Ok(_) => {}
            Err(CommitError::Quota { used_bytes, .. }) => break used_bytes,
            Err(error) => panic!("{error}"),
        }
    };
    assert!((1 << 20..2 << 20).contains(&used_bytes), "{used_bytes}");
    writer.commit(&events, &[], NOW_US).unwrap_err();
    // Cursor moves still go through, and make room.
    writer.commit(&[], &[cursor("cloud", store.mark().watermark)], NOW_US).unwrap();
    let committed = writer.commit(&events, &[], NOW_US).unwrap();
    assert_eq!(read_all(&store, committed.offsets.start).len(), 16);
    assert_eq!(store.losses().unwrap(), []);
}

#[test]
fn at_the_quota_the_oldest_goes_once_the_ledger_says_who_lost_it() {
    let dir = tempfile::tempdir().unwrap();
    let tight = StoreOptions {
        quota_bytes: 1 << 20,
        at_quota: AtQuota::DropOldest,
        sinks: ["cloud", "local"].map(SinkRetention::new).into(),
        ..small(dir.path())
    };
    let (store, mut writer) = Store::open(tight.clone(), NOW_US).unwrap();
    writer.commit(&[event(0, "first")], &[], NOW_US).unwrap();
    writer.commit(&[], &[cursor("local", 1)], NOW_US).unwrap();
    let events: Vec<Event> = (0..16).map(|i| event(i % 4, &"x".repeat(1000))).collect();
    for _ in 0..200 {
        writer.commit(&events, &[], NOW_US).unwrap();
        assert!(store.stats().log_bytes < 2 << 20);
    }
    let first = store.stats().first_offset;
    let dropped = |sink: &str| -> (u64, u64) {
        let losses = store.losses().unwrap();
        let losses = losses.iter().filter(|loss| loss.sink.as_deref() == Some(sink));
        losses.fold((0, 0), |(events, bytes), loss| {
            assert_eq!(loss.reason, LossReason::Quota);
            (events + loss.offsets.end - loss.offsets.start, bytes + loss.size_bytes)
        })
    };
    let before_bytes = store.stats().event_bytes - store.lag_bytes(first);
    assert_eq!(dropped("cloud"), (first, before_bytes));
    let first_bytes = event(0, "first").size_bytes() as u64;
    assert_eq!(dropped("local"), (first - 1, before_bytes - first_bytes));
    assert_eq!((store.cursor("cloud"), store.cursor("local")), (Some(first), Some(first)));
    drop(writer);
    drop(store);
    let (store, _writer) = Store::open(tight, NOW_US).unwrap();
    assert_eq!((store.stats().first_offset, store.cursor("cloud")), (first, Some(first)));
}

#[test]
fn a_sink_that_lags_too_far_loses_its_oldest_and_the_other_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let limited = StoreOptions {
        sinks: vec![
            SinkRetention { lag_bytes_max: 100_000, ..SinkRetention::new("cloud") },
            SinkRetention::new("local"),
        ],
        ..small(dir.path())
    };
    let (store, mut writer) = Store::open(limited.clone(), NOW_US).unwrap();
    let one = event(0, &"x".repeat(1000));
    let one_bytes = one.size_bytes() as u64;
    for _ in 0..90 {
        writer.commit(std::slice::from_ref(&one), &[], NOW_US).unwrap();
    }
    assert!(store.lag_bytes(0) < 100_000);
    assert_eq!(writer.retain(NOW_US).unwrap().losses, []);
    for _ in 0..30 {
        writer.commit(std::slice::from_ref(&one), &[], NOW_US).unwrap();
    }
    let losses = writer.retain(NOW_US).unwrap().losses;
    let [loss] = &losses[..] else { panic!("{losses:?}") };
    assert_eq!((loss.sink.as_deref(), loss.reason), (Some("cloud"), LossReason::Lag));
    assert_eq!(loss.size_bytes, (loss.offsets.end - loss.offsets.start) * one_bytes);
    assert_eq!(store.losses().unwrap(), losses);
    let cursor = store.cursor("cloud").unwrap();
    assert_eq!(loss.offsets, 0..cursor);
    // To a little below the limit, and not further.
    assert!((90_000..=93_750).contains(&store.lag_bytes(cursor)), "{}", store.lag_bytes(cursor));
    assert!(store.lag_bytes(cursor - 1) > 93_750);
    assert_eq!(writer.retain(NOW_US).unwrap().losses, []);
    // The other sink still has everything.
    assert_eq!((store.cursor("local"), read_all(&store, 0).len()), (Some(0), 120));
    writer.close().unwrap();
    drop(store);
    let (store, _writer) = Store::open(limited, NOW_US).unwrap();
    assert_eq!(store.cursor("cloud"), Some(cursor));
}

#[test]
fn a_sink_that_was_absent_learns_what_it_missed() {
    let dir = tempfile::tempdir().unwrap();
    let both = StoreOptions {
        sinks: ["cloud", "local"].map(SinkRetention::new).into(),
        ..small(dir.path())
    };
    let (store, writer) = Store::open(both.clone(), NOW_US).unwrap();
    writer.close().unwrap();
    drop(store);
    let (store, mut writer) = Store::open(small(dir.path()), NOW_US).unwrap();
    fill(&store, &mut writer, 3);
    writer.commit(&[], &[cursor("cloud", store.mark().watermark)], NOW_US).unwrap();
    assert!(writer.retain(NOW_US).unwrap().files > 0);
    let stats = store.stats();
    assert_eq!((store.cursor("local"), &stats.cursors[1]), (None, &("local".to_owned(), 0)));
    writer.close().unwrap();
    drop(store);

    let (store, _writer) = Store::open(both, NOW_US).unwrap();
    assert_eq!(store.cursor("local"), Some(stats.first_offset));
    let losses = store.losses().unwrap();
    let [loss] = &losses[..] else { panic!("{losses:?}") };
    assert_eq!((loss.sink.as_deref(), loss.reason), (Some("local"), LossReason::SinkAbsent));
    assert_eq!(loss.offsets, 0..stats.first_offset);
}

#[test]
fn an_unlink_that_was_cut_short_is_finished_at_open() {
    let dir = tempfile::tempdir().unwrap();
    let (store, mut writer) = Store::open(small(dir.path()), NOW_US).unwrap();
    fill(&store, &mut writer, 3);
    let before = copy_of(dir.path());
    writer.commit(&[], &[cursor("cloud", store.mark().watermark)], NOW_US).unwrap();
    let removed = writer.retain(NOW_US).unwrap().files;
    let after = copy_of(dir.path());
    for entry in std::fs::read_dir(before.path().join(log::FOLDER)).unwrap() {
        let name = entry.unwrap().file_name();
        let to = after.path().join(log::FOLDER).join(&name);
        if !to.exists() {
            std::fs::copy(before.path().join(log::FOLDER).join(&name), to).unwrap();
        }
    }
    std::fs::write(after.path().join("log/new"), b"half a file").unwrap();
    let count = || std::fs::read_dir(after.path().join(log::FOLDER)).unwrap().count() as u32;
    let cut_short = count();
    let (reopened, _writer) = Store::open(small(after.path()), NOW_US).unwrap();
    // With the half one, and with the trimmed one that the next was to be written over.
    assert_eq!(count(), cut_short - removed - 2);
    assert_eq!(reopened.stats().first_offset, store.stats().first_offset);
}

#[test]
fn lag_and_age_are_told_without_reading_the_events() {
    let dir = tempfile::tempdir().unwrap();
    let (store, mut writer) = Store::open(options(dir.path()), NOW_US).unwrap();
    assert_eq!((store.lag_bytes(0), store.received_us(0)), (0, None));
    let at = |us| Event { received_us: NOW_US + us, ..event(0, "0123456789") };
    let size_bytes = at(0).size_bytes() as u64;
    writer.commit(&[at(5), at(3), at(9)], &[], NOW_US).unwrap();
    writer.commit(&[], &[cursor("cloud", 1)], NOW_US).unwrap();
    writer.commit(&[at(7)], &[], NOW_US).unwrap();
    let lags: Vec<u64> = (0..6).map(|from| store.lag_bytes(from) / size_bytes).collect();
    assert_eq!(lags, [4, 3, 2, 1, 0, 0]);
    // Receive times never go back, whatever the events say.
    let received: Vec<_> = (0..5).map(|from| store.received_us(from)).collect();
    assert_eq!(received, [Some(5), Some(5), Some(9), Some(9), None].map(|us| Some(NOW_US + us?)));
}

#[test]
fn a_folder_that_cannot_be_used_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("no/such/parent");
    let Err(error) = Store::open(options(&missing), NOW_US) else { panic!("opened") };
    assert!(matches!(&error, OpenError::Folder { path, .. } if *path == missing), "{error}");
    let file = dir.path().join("file");
    std::fs::write(&file, b"").unwrap();
    let Err(error) = Store::open(options(&file), NOW_US) else { panic!("opened") };
    assert!(matches!(error, OpenError::Folder { .. }), "{error}");
}
