use std::pin::pin;
use std::task::{Context, Waker};

use bytes::Bytes;
use storage::{Attribute, Attributes, Event, StoredEvent};
use tokio::task::spawn_blocking;

use super::follower::{Follower, MESSAGES_AT_ONCE, UNTAKEN_BYTES_MAX};
use super::*;
use crate::mqtt::reason;
use crate::mqtt::subscriptions::Manner;

const PLAIN: Options = Options { qos: 0, no_local: false, retain_as_published: false, id: None };

fn downlink() -> (watch::Sender<u64>, Downlink) {
    let (tx, rx) = watch::channel(0);
    (tx, Downlink::new(rx, 16))
}

fn event(topic: &str, payload: &[u8]) -> StoredEvent {
    StoredEvent {
        offset: 0,
        seq: 0,
        event: Event {
            partition: 0,
            received_us: 0,
            device_key: "dev".into(),
            topic: topic.into(),
            attributes: Attributes::default(),
            payload: Bytes::copy_from_slice(payload),
        },
        stamp: None,
    }
}

fn connect(downlink: &Downlink) -> Inbox {
    downlink.inbox(&"client".into())
}

async fn publish(downlink: &Downlink, events: Vec<StoredEvent>) {
    Follower::new(downlink.clone(), None).hand_out(&events, 0).await;
}

async fn subscribe(inbox: &mut Inbox, filter: &str) -> u8 {
    inbox.subscribe(&[(filter.into(), PLAIN)]).await.unwrap()[0]
}

/// Kills the router with a name whose first character is not ASCII, and waits until it is dead.
async fn kill(downlink: &Downlink) {
    let (mut tx, _rx) = downlink.connect("killer".to_owned()).await.unwrap();
    spawn_blocking(move || while tx.publish("é/x", "").is_ok() {}).await.unwrap();
}

async fn next(inbox: &mut Inbox) -> (String, Vec<u8>) {
    let (message, _) = inbox.next().await.unwrap();
    (message.topic.to_string(), message.payload.to_vec())
}

#[tokio::test]
async fn in_a_storm_of_subscribers_most_wait_without_a_thread() {
    let (_watermark, downlink) = downlink();
    let calls = downlink.0.calls.acquire_many(ROUTER_CALLS_MAX as u32).await.unwrap();
    let mut inbox = connect(&downlink);
    let mut subscribing = pin!(subscribe(&mut inbox, "x"));
    let mut context = Context::from_waker(Waker::noop());
    assert!(subscribing.as_mut().poll(&mut context).is_pending());
    assert_eq!(lock(&downlink.0.table).streams.places(), (0, 0), "no link was asked for");
    drop(calls);
    assert_eq!(subscribing.await, reason::SUCCESS);
}

#[tokio::test]
async fn a_subscriber_gets_what_it_asked_for_and_nothing_else() {
    let (_watermark, downlink) = downlink();
    let (mut one, mut two) = (connect(&downlink), connect(&downlink));
    assert_eq!(subscribe(&mut one, "é/+").await, reason::SUCCESS);
    assert_eq!(subscribe(&mut two, "#").await, reason::SUCCESS);
    publish(&downlink, vec![event("x", b"1"), event("é/y", b"2"), event("$dev/x", b"3")]).await;
    assert_eq!(next(&mut one).await, ("é/y".to_owned(), b"2".to_vec()));
    assert_eq!(next(&mut two).await, ("x".to_owned(), b"1".to_vec()));
    assert_eq!(next(&mut two).await, ("é/y".to_owned(), b"2".to_vec()));
    assert!(one.try_next().is_none() && two.try_next().is_none());
}

#[tokio::test]
async fn overlapping_subscriptions_get_one_copy_for_all_mqtt_3_3_4_2_mqtt_3_3_4_4() {
    let (_watermark, downlink) = downlink();
    let mut inbox = connect(&downlink);
    let filters = [
        ("a/b".into(), Options { id: Some(1), ..PLAIN }),
        ("a/#".into(), Options { qos: 1, id: Some(2), ..PLAIN }),
    ];
    assert_eq!(inbox.subscribe(&filters).await.unwrap(), [0, 1]);
    let mut event = event("a/b", b"");
    event.event.attributes = Attributes::encode([Attribute::QoS(2)]);
    publish(&downlink, vec![event]).await;
    let (_, mut manner) = inbox.next().await.unwrap();
    manner.ids.sort_unstable();
    assert_eq!(manner, Manner { qos: 1, retain: false, ids: vec![1, 2] });
    assert!(inbox.try_next().is_none());
}

/// Each filter had a queue of its own on the bus once, and they were read in turns.
#[tokio::test]
async fn order_holds_while_overlapping_subscriptions_come_and_go_mqtt_4_6_0_6() {
    let (_watermark, downlink) = downlink();
    let mut inbox = connect(&downlink);
    subscribe(&mut inbox, "#").await;
    let filters = ["t", "+", "t/#"];
    let mut number = 0u32;
    // Nothing is taken meanwhile: each round's messages wait while filters change.
    for round in 0..12 {
        let events = (0..20).map(|_| {
            number += 1;
            event(if number.is_multiple_of(3) { "u" } else { "t" }, &number.to_be_bytes())
        });
        let events = events.collect();
        publish(&downlink, events).await;
        let filter = filters[round % 3];
        if round % 2 == 0 {
            subscribe(&mut inbox, filter).await;
        } else {
            inbox.unsubscribe(&[filters[(round - 1) % 3].into()]);
        }
    }
    for expected in 1..=number {
        assert_eq!(next(&mut inbox).await.1, expected.to_be_bytes());
    }
    assert!(inbox.try_next().is_none());
    assert_eq!(downlink.stats().missed.load(Ordering::Relaxed), 0);
}

#[tokio::test]
async fn a_second_subscription_to_a_filter_replaces_the_first_mqtt_3_8_4_3() {
    let (_watermark, downlink) = downlink();
    let mut inbox = connect(&downlink);
    subscribe(&mut inbox, "a").await;
    let again = Options { id: Some(3), ..PLAIN };
    assert_eq!(inbox.subscribe(&[("a".into(), again)]).await.unwrap(), [0]);
    publish(&downlink, vec![event("a", b"")]).await;
    assert_eq!(inbox.next().await.unwrap().1.ids, [3]);
    assert!(inbox.try_next().is_none());
}

#[tokio::test]
async fn bad_shares_and_too_many_are_refused() {
    let (_watermark, downlink) = downlink();
    let mut inbox = connect(&downlink);
    assert_eq!(subscribe(&mut inbox, "$share/g").await, reason::FILTER_INVALID);
    let filters: Vec<_> =
        (0..=SUBSCRIPTIONS_MAX).map(|i| (ByteString::from(i.to_string()), PLAIN)).collect();
    let codes = inbox.subscribe(&filters).await.unwrap();
    let (last, others) = codes.split_last().unwrap();
    assert_eq!(*last, reason::QUOTA_EXCEEDED);
    assert!(others.iter().all(|code| *code == reason::SUCCESS));
}

#[tokio::test]
async fn after_unsubscribe_nothing_more_is_handed_out_mqtt_3_10_4_2() {
    let (_watermark, downlink) = downlink();
    let mut inbox = connect(&downlink);
    subscribe(&mut inbox, "a").await;
    publish(&downlink, vec![event("a", b"before")]).await;
    let codes = inbox.unsubscribe(&["a".into(), "never".into()]);
    assert_eq!(codes, [reason::SUCCESS, reason::NO_SUBSCRIPTION_EXISTED]);
    assert!(lock(&downlink.0.table).subscriptions.is_empty());
    subscribe(&mut inbox, "b").await;
    publish(&downlink, vec![event("a", b"after"), event("b", b"new")]).await;
    assert_eq!(next(&mut inbox).await, ("a".to_owned(), b"before".to_vec()));
    assert_eq!(next(&mut inbox).await, ("b".to_owned(), b"new".to_vec()));
}

#[tokio::test]
async fn a_place_that_is_taken_anew_gets_nothing_of_the_one_before() {
    let (_watermark, downlink) = downlink();
    let mut old = connect(&downlink);
    subscribe(&mut old, "a").await;
    publish(&downlink, vec![event("a", b"old")]).await;
    let late = Reader::Connection { number: 1, slot: 0, client_id: "client".into() };
    drop(old);
    let mut new = connect(&downlink);
    subscribe(&mut new, "b").await;
    // As if the table still had it: the number tells them apart.
    downlink.enter("a", &late, PLAIN, 0).unwrap();
    publish(&downlink, vec![event("a", b"late"), event("b", b"new")]).await;
    assert_eq!(next(&mut new).await, ("b".to_owned(), b"new".to_vec()));
    assert_eq!(lock(&downlink.0.table).streams.places(), (1, 1));
}

#[tokio::test]
async fn more_than_the_router_hands_over_at_once_arrives_whole_and_in_order() {
    let (_watermark, downlink) = downlink();
    let mut inbox = connect(&downlink);
    subscribe(&mut inbox, "t").await;
    for batch in 0..10u32 {
        let events = (0..200).map(|i| event("t", &(batch * 200 + i).to_be_bytes())).collect();
        publish(&downlink, events).await;
    }
    for i in 0..2000u32 {
        assert_eq!(next(&mut inbox).await.1, i.to_be_bytes());
    }
    assert_eq!(downlink.stats().missed.load(Ordering::Relaxed), 0);
}

#[tokio::test]
async fn what_is_for_very_many_is_handed_out_in_pieces() {
    let (_watermark, downlink) = downlink();
    let mut inboxes = [connect(&downlink), connect(&downlink), connect(&downlink)];
    for inbox in &mut inboxes {
        subscribe(inbox, "t").await;
    }
    let events: Vec<_> = (0..MESSAGES_AT_ONCE as u32 / 2)
        .map(|number| StoredEvent { offset: number.into(), ..event("t", &number.to_be_bytes()) })
        .collect();
    let (addressed, rest) = downlink.address(&events);
    assert!(addressed.messages.len() < MESSAGES_AT_ONCE + inboxes.len());
    assert_eq!(addressed.messages.len(), inboxes.len() * (events.len() - rest.len()));
    drop(inboxes);

    let mut inbox = connect(&downlink);
    for group in 0..3 {
        subscribe(&mut inbox, &format!("$share/{group}/t")).await;
    }
    publish(&downlink, events.clone()).await;
    for event in &events {
        for _ in 0..3 {
            assert_eq!(next(&mut inbox).await.1, event.event.payload);
        }
    }
}

#[tokio::test]
async fn who_does_not_keep_up_misses_messages_and_they_are_counted() {
    let (_watermark, downlink) = downlink();
    let (mut slow, mut fast) = (connect(&downlink), connect(&downlink));
    subscribe(&mut slow, "t").await;
    subscribe(&mut fast, "t").await;
    let payload = [0; 1024];
    let (batches, size) = (40, 64);
    for _ in 0..batches {
        publish(&downlink, (0..size).map(|_| event("t", &payload)).collect()).await;
        for _ in 0..size {
            fast.next().await.unwrap();
        }
    }
    assert_eq!(downlink.stats().missed.load(Ordering::Relaxed), 0, "one that keeps up misses none");
    publish(&downlink, vec![event("t", b"last")]).await;
    let mut got = 0;
    while next(&mut slow).await.1 != b"last" {
        got += 1;
    }
    let missed = downlink.stats().missed.load(Ordering::Relaxed);
    assert!(missed > 0);
    assert_eq!(got + missed, batches * size);
}

#[tokio::test]
async fn the_bus_is_replaced_when_it_dies_and_its_users_are_told() {
    let (_watermark, downlink) = downlink();
    let mut inbox = connect(&downlink);
    subscribe(&mut inbox, "t").await;
    kill(&downlink).await;
    assert_eq!(inbox.next().await.unwrap_err(), Interrupted);
    publish(&downlink, vec![event("t", b"1")]).await;
    assert_eq!(downlink.stats().respawns.load(Ordering::Relaxed), 1);
    drop(inbox);

    let mut inbox = connect(&downlink);
    subscribe(&mut inbox, "t").await;
    publish(&downlink, vec![event("t", b"2")]).await;
    assert_eq!(next(&mut inbox).await.1, b"2");
}

#[tokio::test]
async fn a_subscription_brings_a_dead_bus_back() {
    let (_watermark, downlink) = downlink();
    let mut inbox = connect(&downlink);
    subscribe(&mut inbox, "t").await;
    kill(&downlink).await;
    assert_eq!(inbox.next().await.unwrap_err(), Interrupted);
    drop(inbox);
    let mut inbox = connect(&downlink);
    assert_eq!(subscribe(&mut inbox, "t").await, reason::SUCCESS);
}

#[tokio::test]
async fn a_connection_that_goes_gives_everything_back() {
    let (_watermark, downlink) = downlink();
    for _ in 0..50 {
        let mut inbox = connect(&downlink);
        subscribe(&mut inbox, "a/+").await;
        subscribe(&mut inbox, "b").await;
    }
    let table = lock(&downlink.0.table);
    assert!(table.subscriptions.is_empty());
    assert_eq!(table.streams.places(), (1, 0), "one place was enough for all");
}

#[tokio::test]
async fn the_first_subscription_starts_at_the_watermark() {
    let (watermark, downlink) = downlink();
    watermark.send(41).unwrap();
    let mut inbox = connect(&downlink);
    subscribe(&mut inbox, "a").await;
    watermark.send(43).unwrap();
    subscribe(&mut inbox, "b").await;
    assert_eq!(lock(&downlink.0.table).next, 41);
}

#[tokio::test]
async fn the_follower_waits_for_a_subscriber_before_it_leaves_it_behind() {
    let (_watermark, downlink) = downlink();
    let mut inbox = connect(&downlink);
    subscribe(&mut inbox, "t").await;
    let large = vec![0; UNTAKEN_BYTES_MAX as usize + 1];
    // One event alone may be larger than what may be untaken: it is waited for once it is out.
    publish(&downlink, vec![event("t", &large)]).await;
    let left_behind = lock(&downlink.0.table).streams.in_reach(&[0], UNTAKEN_BYTES_MAX);
    assert!(left_behind, "nobody took it: the follower has waited, and goes on");
    inbox.next().await.unwrap();
    let untaken = event("t", &large);
    let (mut follower, events) = (Follower::new(downlink.clone(), None), [untaken]);
    let ((), taken) = tokio::join!(follower.hand_out(&events, 0), inbox.next());
    taken.unwrap();
    assert_eq!(downlink.stats().missed.load(Ordering::Relaxed), 0);
}
