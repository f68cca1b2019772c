//! Dead letters: kept whole and once, within their bound, delivered again or dropped; and at every
//! step the balance adds up.

use super::world::balance;
use super::*;
use crate::{DeadLetter, KeptLetter, SinkBalance};

fn letter(event: StoredEvent) -> DeadLetter {
    DeadLetter {
        sink: "cloud".into(),
        event,
        reason: "400: cannot parse".into(),
        attempts: 3,
        first_us: NOW_US,
        last_us: NOW_US + 9,
    }
}

/// A store whose sink has refused every one of so many events.
fn refused(dir: &std::path::Path, count: u64) -> (Store, Writer, Vec<DeadLetter>) {
    let (store, mut writer) = Store::open(options(dir), NOW_US).unwrap();
    let events: Vec<Event> = (0..count).map(|n| event(n as u16 % 4, &format!("{n}"))).collect();
    writer.commit(&events, &[], NOW_US).unwrap();
    let letters: Vec<DeadLetter> = read_all(&store, 0).into_iter().map(letter).collect();
    assert_eq!(store.put_dead_letters(&letters).unwrap(), []);
    writer.commit(&[], &[cursor("cloud", count)], NOW_US).unwrap();
    (store, writer, letters)
}

fn kept(store: &Store) -> Vec<DeadLetter> {
    let kept = store.dead_letters("cloud", 0, usize::MAX).unwrap();
    kept.into_iter().map(|kept| kept.letter).collect()
}

fn stats(store: &Store) -> (u64, u64) {
    store.stats().dead_letters.first().map_or((0, 0), |(_, stats)| (stats.events, stats.requeued))
}

/// The sums of the one sink; they add up.
fn sums(store: &Store) -> SinkBalance {
    let mut balance = balance(store);
    assert!(balance.adds_up(), "{balance:?}");
    balance.sinks.remove(0)
}

fn all(_: &DeadLetter) -> bool {
    true
}

#[test]
fn dead_letters_are_kept_whole_and_once() {
    let dir = tempfile::tempdir().unwrap();
    let (store, writer, letters) = refused(dir.path(), 2);
    assert_eq!(stats(&store), (2, 0));
    store.put_dead_letters(&letters[1..]).unwrap();
    assert_eq!(stats(&store), (2, 0));
    let copy = copy_of(dir.path());
    drop((store, writer));
    for dir in [dir.path(), copy.path()] {
        let (store, _writer) = Store::open(options(dir), NOW_US).unwrap();
        let look = |sink, from, max| -> Vec<DeadLetter> {
            let kept = store.dead_letters(sink, from, max).unwrap();
            assert!(kept.iter().all(|kept| kept.requeued_us.is_none()));
            kept.into_iter().map(|kept| kept.letter).collect()
        };
        assert_eq!(look("cloud", 0, 10), letters);
        assert_eq!(look("cloud", 1, 10), letters[1..]);
        assert_eq!(look("cloud", 0, 1), letters[..1]);
        assert_eq!(look("clou", 0, 10), []);
        assert_eq!(stats(&store), (2, 0));
        assert_eq!(sums(&store).dead_lettered, 2);
    }
}

#[test]
fn a_requeued_letter_stays_one_until_it_is_settled() {
    let dir = tempfile::tempdir().unwrap();
    let (store, writer, letters) = refused(dir.path(), 10);
    let even = |letter: &DeadLetter| letter.event.offset.is_multiple_of(2);
    let picked = store.requeue("cloud", 0, &even, NOW_US + 50).unwrap();
    assert_eq!((picked.events, picked.next), (5, None));
    assert_eq!(store.requeue("cloud", 0, &even, NOW_US + 60).unwrap().events, 0, "they are marked");
    assert_eq!((stats(&store), sums(&store).dead_lettered), ((10, 5), 10));
    // A crash keeps the marks.
    let copy = copy_of(dir.path());
    drop((store, writer));
    for dir in [dir.path(), copy.path()] {
        let (store, _writer) = Store::open(options(dir), NOW_US).unwrap();
        let waiting = store.requeued("cloud", 3, 1 << 20).unwrap();
        let offsets: Vec<u64> = waiting.iter().map(|kept| kept.letter.event.offset).collect();
        assert_eq!(offsets, [0, 2, 4]);
        assert!(waiting.iter().all(|kept| kept.requeued_us == Some(NOW_US + 50)));
        assert_eq!(store.requeued("cloud", 9, 1).unwrap().len(), 1, "at least one");
        // Two were taken, the third was refused again.
        let reason = "400: still".to_owned();
        let again =
            DeadLetter { reason, attempts: 2, first_us: 1, last_us: 2, ..letters[4].clone() };
        store.settle_requeued("cloud", &waiting[..2], std::slice::from_ref(&again)).unwrap();
        assert_eq!(stats(&store), (8, 2));
        let balance = sums(&store);
        assert_eq!((balance.delivered, balance.dead_lettered), (2, 8));
        let stored = kept(&store).into_iter().find(|l| l.event.offset == 4).unwrap();
        assert_eq!(
            (stored.attempts, stored.first_us, stored.last_us, &*stored.reason),
            (5, NOW_US, 2, "400: still")
        );
        // Settled twice is settled once, and what was marked anew meanwhile is another matter.
        store.settle_requeued("cloud", &waiting[..2], &[]).unwrap();
        store.requeue("cloud", 4, &|l| l.event.offset == 4, NOW_US + 70).unwrap();
        store.settle_requeued("cloud", &waiting, &[]).unwrap();
        assert_eq!(stats(&store), (8, 3));
        let waiting = store.requeued("cloud", 9, 1 << 20).unwrap();
        store.settle_requeued("cloud", &waiting, &[]).unwrap();
        assert_eq!((stats(&store), sums(&store).delivered), ((5, 0), 5));
    }
}

#[test]
fn dropped_letters_stand_in_the_loss_ledger() {
    let dir = tempfile::tempdir().unwrap();
    let (store, writer, letters) = refused(dir.path(), 10);
    store.requeue("cloud", 0, &|l| l.event.offset == 3, NOW_US).unwrap();
    let wanted = |l: &DeadLetter| (2..5).contains(&l.event.offset) || l.event.offset == 8;
    assert_eq!(store.drop_dead_letters("cloud", 0, &wanted, NOW_US + 7).unwrap().events, 4);
    let check = |store: &Store| {
        assert_eq!(stats(store), (6, 0));
        let losses = store.losses().unwrap();
        let ranges: Vec<_> = losses.iter().map(|loss| loss.offsets.clone()).collect();
        assert_eq!(ranges, [2..5, 8..9]);
        let size_bytes: usize = letters[2..5].iter().map(|l| l.event.event.size_bytes()).sum();
        assert_eq!(losses[0].size_bytes, size_bytes as u64);
        assert!(losses.iter().all(|l| l.reason == LossReason::DroppedByHand && l.at_us > NOW_US));
        let balance = sums(store);
        let places = (balance.delivered, balance.dead_lettered, balance.dropped.by_hand);
        assert_eq!(places, (0, 6, 4));
    };
    check(&store);
    // A cursor that was not durable lets one come back; dropped again it takes no other with it.
    store.put_dead_letters(&letters[2..3]).unwrap();
    assert_eq!(sums(&store).dead_lettered, 7);
    let second = |l: &DeadLetter| l.event.offset == 2;
    assert_eq!(store.drop_dead_letters("cloud", 0, &second, NOW_US + 8).unwrap().events, 1);
    let copy = copy_of(dir.path());
    drop((store, writer));
    for dir in [dir.path(), copy.path()] {
        check(&Store::open(options(dir), NOW_US).unwrap().0);
    }
}

#[test]
fn beyond_their_bound_the_oldest_go_into_the_loss_ledger() {
    let dir = tempfile::tempdir().unwrap();
    let (store, mut writer, letters) = refused(dir.path(), 40);
    let row_bytes = letters[39].encode().len() as u64;
    writer.close().unwrap();
    drop(store);
    // Those that are there already are counted when the next one comes.
    let tight = StoreOptions { dead_letter_bytes_max: 10 * row_bytes, ..options(dir.path()) };
    let (store, again) = Store::open(tight, NOW_US).unwrap();
    writer = again;
    let losses = store.put_dead_letters(&letters[39..]).unwrap();
    assert_eq!(losses.len(), 1, "neighbours are one row: {losses:?}");
    assert_eq!(losses[0].reason, LossReason::DeadLetterLimit);
    assert_eq!(losses[0].offsets, 0..30);
    let balance = sums(&store);
    assert_eq!((balance.dropped.dead_letter_limit, balance.dead_lettered), (30, 10));
    assert_eq!(kept(&store), letters[30..]);
    // One that is larger than the bound is not kept at all, and says so.
    let large = event(0, &"x".repeat(1 << 16));
    writer.commit(&[large], &[], NOW_US).unwrap();
    let large = letter(read_all(&store, 40).remove(0));
    store.put_dead_letters(&[large]).unwrap();
    writer.commit(&[], &[cursor("cloud", 41)], NOW_US).unwrap();
    let balance = sums(&store);
    assert_eq!((balance.dropped.dead_letter_limit, balance.dead_lettered), (41, 0));
}

/// Every other letter dropped, one at a time: rows that never touch. The ledger stays bounded, and
/// the sums stay right, also over a restart.
#[test]
fn the_ledger_is_bounded_and_keeps_every_event() {
    const EVENTS: u64 = 2 * (crate::loss_ledger::ROWS_MAX as u64 + 500);
    let dir = tempfile::tempdir().unwrap();
    let (store, writer, _) = refused(dir.path(), EVENTS);
    let mut from = Some(0);
    let mut dropped = 0;
    while let Some(at) = from {
        let odd = |l: &DeadLetter| !l.event.offset.is_multiple_of(2);
        let picked = store.drop_dead_letters("cloud", at, &odd, NOW_US + at).unwrap();
        dropped += picked.events;
        from = picked.next;
        assert!(store.stats().losses <= crate::loss_ledger::ROWS_MAX as u64);
        assert_eq!(sums(&store).dropped.by_hand, dropped);
    }
    assert_eq!(dropped, EVENTS / 2);
    assert!(store.losses().unwrap().iter().any(|loss| !loss.is_exact()));
    drop((store, writer));
    let (store, _writer) = Store::open(options(dir.path()), NOW_US).unwrap();
    let balance = sums(&store);
    assert_eq!((balance.dropped.by_hand, balance.dead_lettered), (EVENTS / 2, EVENTS / 2));
    let left = store.drop_dead_letters("cloud", 0, &all, NOW_US).unwrap();
    assert_eq!((left.events, left.next), (1_000, Some(1_999)), "a thousand at a time");
}

/// What is settled is settled whole or not at all.
#[test]
fn a_kept_letter_names_what_was_delivered() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _writer, letters) = refused(dir.path(), 1);
    let never_marked = KeptLetter { letter: letters[0].clone(), requeued_us: Some(1) };
    store.settle_requeued("cloud", &[never_marked], &[]).unwrap();
    assert_eq!(stats(&store), (1, 0));
}
