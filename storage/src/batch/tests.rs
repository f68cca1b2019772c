use bytes::Bytes;
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::clock::Clock;
use crate::codec::Compression;
use crate::control::Control;
use crate::event::{Attribute, Attributes, Event, StoredEvent};

const PARTITIONS: u16 = 8;
const START_US: u64 = 1_700_000_000_000_000;

fn start() -> Tail {
    Tail {
        position: Position { offset: 1000, ordinal: 2 },
        received_us: START_US,
        event_bytes: 5,
        next_seq: (0..u64::from(PARTITIONS)).map(|p| p * 100).collect(),
    }
}

/// Up for ten seconds, of which it makes 1.7 billion.
fn clock(synchronised: bool) -> Clock {
    Clock { boot: 77, offset_us: START_US.cast_signed() - 10_000_000, synchronised }
}

fn clocks() -> impl Strategy<Value = Option<Clock>> {
    proptest::option::of(any::<bool>().prop_map(clock))
}

/// Everything as batches, each head and body in one.
fn pack_all(events: &[Event], controls: &[Control], tail: &mut Tail) -> Vec<Bytes> {
    pack_stamped(None, events, controls, tail)
}

fn pack_stamped(
    clock: Option<Clock>,
    mut events: &[Event],
    mut controls: &[Control],
    tail: &mut Tail,
) -> Vec<Bytes> {
    let mut encoder = Encoder::new(PARTITIONS);
    encoder.set_clock(clock);
    let mut batches = Vec::new();
    while !events.is_empty() || !controls.is_empty() {
        let packed = encoder.pack(events, controls, tail);
        batches.push(Bytes::from([packed.head, packed.body].concat()));
        events = &events[packed.events..];
        controls = &controls[packed.controls..];
    }
    batches
}

fn event_of(
    (partition, key, topic): (u16, u8, u8),
    (received, attribute, payload): (u64, u8, Vec<u8>),
) -> Event {
    Event {
        partition,
        received_us: START_US - 500 + received,
        device_key: format!("dev-{key}").into(),
        topic: format!("devices/dev-{key}/{topic}").into(),
        attributes: Attributes::encode([Attribute::QoS(attribute)]),
        payload: payload.into(),
    }
}

fn events(max: usize, payload_max: usize) -> impl Strategy<Value = Vec<Event>> {
    let place = (0..PARTITIONS, 0..6_u8, 0..3_u8);
    let rest = (0..1000_u64, 0..3_u8, vec(any::<u8>(), 0..payload_max));
    vec((place, rest).prop_map(|(place, rest)| event_of(place, rest)), 0..max)
}

fn controls(max: usize, value_max: usize) -> impl Strategy<Value = Vec<Control>> {
    let bytes = |max| vec(any::<u8>(), 0..max).prop_map(Bytes::from);
    let control = prop_oneof![
        ("[a-z]{0,8}", any::<u64>())
            .prop_map(|(sink, offset)| Control::Cursor { sink: sink.into(), offset }),
        (any::<u16>(), bytes(20), bytes(value_max))
            .prop_map(|(namespace, key, value)| { Control::Put { namespace, key, value } }),
        (any::<u16>(), bytes(20)).prop_map(|(namespace, key)| Control::Delete { namespace, key }),
    ];
    vec(control, 0..max)
}

/// What must come out: dense offsets, dense sequence numbers, receive times raised.
fn expected(events: &[Event], tail: &Tail) -> Vec<StoredEvent> {
    expected_of(None, events, tail)
}

/// As [`expected`]; the times of the clock may be below those before the batch.
fn expected_of(clock: Option<Clock>, events: &[Event], tail: &Tail) -> Vec<StoredEvent> {
    let mut time_us = 0;
    let (mut next_seq, mut received_us) = (tail.next_seq.clone(), tail.received_us);
    (tail.position.offset..)
        .zip(events)
        .map(|(offset, event)| {
            received_us = received_us.max(event.received_us);
            let seq = &mut next_seq[usize::from(event.partition)];
            *seq += 1;
            time_us = time_us.max(event.received_us);
            let stamp = clock.map(|clock| Stamp {
                boot: 77,
                uptime_us: 10_000_000 + time_us - START_US,
                received_us: time_us,
                quality: TimeQuality::ALL[usize::from(!clock.synchronised)],
            });
            let event = Event { received_us, ..event.clone() };
            StoredEvent { offset, seq: *seq - 1, event, stamp }
        })
        .collect()
}

fn decode_all(batches: &[Bytes]) -> (Vec<StoredEvent>, Vec<Control>) {
    let mut all = (Vec::new(), Vec::new());
    for batch in batches {
        let batch = Batch::decode(batch.clone()).unwrap();
        all.0.extend(batch.events(0).map(Result::unwrap));
        all.1.extend(batch.controls().unwrap());
    }
    all
}

proptest! {
    #[test]
    fn what_is_packed_comes_back(
        clock in clocks(),
        mut events in events(300, 600),
        controls in controls(40, 4000),
    ) {
        if clock.is_some() {
            // A clock does not go back; the times of several may.
            events.sort_by_key(|event| event.received_us);
        }
        let (before, mut tail) = (start(), start());
        let batches = pack_stamped(clock, &events, &controls, &mut tail);
        let (got_events, got_controls) = decode_all(&batches);
        prop_assert_eq!(got_events, expected_of(clock, &events, &before));
        prop_assert_eq!(got_controls, controls);

        // Heads alone lead to the same tail, and each batch knows where it stands.
        let mut replayed = before.clone();
        for batch in &batches {
            let head = BatchHead::decode(batch).unwrap();
            prop_assert_eq!(head.position(), replayed.position);
            prop_assert_eq!(head.event_bytes_before(), replayed.event_bytes);
            prop_assert!(u64::from(head.count()) <= events_max(batch.len()));
            prop_assert!(batch.len() <= BATCH_BYTES_MAX);
            head.advance(&mut replayed);
        }
        prop_assert_eq!(&replayed, &tail);
        let event_bytes: usize = events.iter().map(Event::size_bytes).sum();
        prop_assert_eq!(tail.event_bytes - before.event_bytes, event_bytes as u64);
    }

    #[test]
    fn reading_may_start_at_any_offset(events in events(60, 40), skip in 0..80_u64) {
        let mut tail = start();
        let from = tail.position.offset + skip;
        let expected = expected(&events, &tail);
        let mut got = Vec::new();
        for batch in pack_all(&events, &[], &mut tail) {
            got.extend(Batch::decode(batch).unwrap().events(from).map(Result::unwrap));
        }
        prop_assert_eq!(got, expected.into_iter().filter(|e| e.offset >= from).collect::<Vec<_>>());
    }

    /// The checksums are made to match, so that the bytes get as far as the fields.
    #[test]
    fn forged_bytes_never_panic(
        clock in clocks(),
        events in events(20, 30),
        controls in controls(5, 20),
        forged in vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in any::<prop::sample::Index>(),
    ) {
        for batch in pack_stamped(clock, &events, &controls, &mut start()) {
            let mut bytes = batch.to_vec();
            for (at, byte) in &forged {
                let at = at.index(bytes.len());
                bytes[at] = *byte;
            }
            bytes.truncate(bytes.len() - cut.index(bytes.len().min(9)));
            for reseal in [false, true] {
                if reseal {
                    seal(&mut bytes);
                }
                if let Ok(batch) = Batch::decode(Bytes::from(bytes.clone())) {
                    let _ = batch.events(0).count();
                    let _ = batch.controls();
                    batch.head().advance(&mut start());
                }
            }
        }
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in vec(any::<u8>(), 0..300)) {
        prop_assert!(Batch::decode(Bytes::from(bytes)).is_err());
    }
}

/// Makes both checksums match whatever the bytes say.
fn seal(bytes: &mut [u8]) {
    let Ok((header, _)) = Header::mut_from_prefix(bytes) else {
        return;
    };
    let groups = usize::from(header.groups.get());
    let stamps_bytes = if header.version == STAMPED { STAMPS_BYTES } else { 0 };
    let body_start = HEADER_BYTES + stamps_bytes + groups * GROUP_BYTES;
    let Some(body) = bytes.get(body_start..) else {
        return;
    };
    let (body_bytes, body_crc) = (body.len() as u32, crc32c::crc32c(body));
    let Ok((header, _)) = Header::mut_from_prefix(bytes) else {
        return;
    };
    header.magic = u32::from_le_bytes(MAGIC).into();
    if stamps_bytes == 0 {
        header.version = PLAIN;
    }
    header.codec = Compression::None.number();
    header.body_bytes = body_bytes.into();
    header.body_crc = body_crc.into();
    let head_crc = crc32c::crc32c(&bytes[HEAD_CRC_END..body_start]);
    bytes[4..HEAD_CRC_END].copy_from_slice(&head_crc.to_le_bytes());
}

fn telemetry(count: usize, payload_bytes: usize) -> Vec<Event> {
    (0..count)
        .map(|i| Event {
            partition: (i % usize::from(PARTITIONS)) as u16,
            received_us: START_US + i as u64,
            device_key: format!("dev-{:06}", i % 200).into(),
            topic: format!("devices/dev-{:06}/telemetry", i % 200).into(),
            attributes: Attributes::encode([Attribute::QoS(1)]),
            payload: vec![7; payload_bytes].into(),
        })
        .collect()
}

#[test]
fn every_flipped_bit_is_found_and_leaves_the_other_half_readable() {
    for clock in [None, Some(clock(true))] {
        let control = Control::Cursor { sink: "cloud".into(), offset: 1 };
        let batches = pack_stamped(clock, &telemetry(3, 20), &[control], &mut start());
        let [batch] = &batches[..] else { panic!("{} batches", batches.len()) };
        every_flipped_bit_is_found(batch);
    }
}

fn every_flipped_bit_is_found(batch: &Bytes) {
    let head_bytes = BatchHead::decode(batch).unwrap().head_bytes();
    for bit in 0..batch.len() * 8 {
        let mut bad = batch.to_vec();
        bad[bit / 8] ^= 1 << (bit % 8);
        let body_is_bad = bit / 8 >= head_bytes;
        assert_eq!(BatchHead::decode(&bad).is_ok(), body_is_bad, "bit {bit}");
        assert!(Batch::decode(bad.into()).is_err(), "bit {bit}");
    }
}

#[test]
fn every_cut_is_found() {
    for clock in [None, Some(clock(true))] {
        let batches = pack_stamped(clock, &telemetry(3, 20), &[], &mut start());
        let [batch] = &batches[..] else { panic!() };
        for len in 0..batch.len() {
            assert!(Batch::decode(batch.slice(..len)).is_err(), "length {len}");
        }
    }
}

/// What the boot, the uptime and the word on the clock cost: of a batch, not of an event.
#[test]
fn stamps_cost_nothing_an_event() {
    let events = telemetry(100, 100);
    let bytes = |clock| -> usize {
        let batches = pack_stamped(clock, &events, &[], &mut start());
        batches.iter().map(|batch| batch.len() - head_stamps_bytes(batch)).sum()
    };
    assert_eq!(STAMPS_BYTES, 25);
    assert_eq!(bytes(Some(clock(false))), bytes(None));
}

fn head_stamps_bytes(batch: &[u8]) -> usize {
    BatchHead::decode(batch).unwrap().stamps.map_or(0, |_| STAMPS_BYTES)
}

/// What redb writes for a row, and what a commit of these events could do with at the least.
#[test]
fn batches_fill_their_pages() {
    for (count, payload_bytes) in [(256, 128), (256, 1024), (4096, 128), (100, 128), (40, 200)] {
        let batches = pack_all(&telemetry(count, payload_bytes), &[], &mut start());
        let used: usize = batches.iter().map(Bytes::len).sum();
        let pages: usize = batches
            .iter()
            .map(|batch| (batch.len() + ROW_OVERHEAD_BYTES).next_power_of_two())
            .map(|row_bytes| row_bytes.max(PAGE_BYTES))
            .sum();
        assert!(
            pages <= used + used / 4 + PAGE_BYTES,
            "{count} × {payload_bytes}: {used} in {pages}"
        );
    }
}

fn pack_compressed(events: &[Event], compression: Compression, tail: &mut Tail) -> Vec<Bytes> {
    let (mut encoder, mut batches, mut left) = (Encoder::new(PARTITIONS), Vec::new(), events);
    while !left.is_empty() {
        let packed = encoder.pack_compressed(left, compression, tail);
        batches.push(Bytes::from([packed.head, packed.body].concat()));
        left = &left[packed.events..];
    }
    batches
}

/// JSON that repeats itself as telemetry does, and numbers that do not.
fn readings(count: usize, random_bytes: usize) -> Vec<Event> {
    let mut rng = fastrand::Rng::with_seed(7);
    let mut events = telemetry(count, 0);
    for (at, event) in events.iter_mut().enumerate() {
        let noise: String =
            std::iter::repeat_with(|| rng.alphanumeric()).take(random_bytes).collect();
        let text = format!(r#"{{"temperature":21.{at},"unit":"celsius","noise":"{noise}"}}"#);
        event.payload = text.into_bytes().into();
    }
    events
}

#[test]
fn compressed_batches_come_back_and_fill_their_pages() {
    for compression in [Compression::Lz4, Compression::Zstd, Compression::None] {
        for random_bytes in [0, 16, 400] {
            let (events, mut tail) = (readings(6_000, random_bytes), start());
            let batches = pack_compressed(&events, compression, &mut tail);
            assert_eq!(decode_all(&batches).0, expected(&events, &start()));
            let mut replayed = start();
            for batch in &batches {
                let head = BatchHead::decode(batch).unwrap();
                assert_eq!(head.position(), replayed.position);
                head.advance(&mut replayed);
                assert!(batch.len() <= BATCH_BYTES_MAX);
            }
            assert_eq!(replayed, tail);
            // But for the first, which has learnt nothing, and the last.
            if compression != Compression::None && batches.len() > 3 {
                for batch in &batches[1..batches.len() - 1] {
                    assert!(
                        batch.len() > BATCH_BYTES_MAX / 8 * 6,
                        "{} {compression:?}",
                        batch.len()
                    );
                }
            }
            let plain: usize = pack_all(&events, &[], &mut start()).iter().map(Bytes::len).sum();
            let packed: usize = batches.iter().map(Bytes::len).sum();
            assert!(packed <= plain + plain / 64, "{compression:?} {random_bytes}");
            if compression != Compression::None && random_bytes == 0 {
                assert!(packed * 2 < plain, "{compression:?}: {packed} of {plain}");
            }
        }
    }
}

#[test]
fn every_flipped_bit_of_a_compressed_batch_is_found() {
    let batches = pack_compressed(&readings(40, 0), Compression::Zstd, &mut start());
    let [batch] = &batches[..] else { panic!("{} batches", batches.len()) };
    for bit in 0..batch.len() * 8 {
        let mut bad = batch.to_vec();
        bad[bit / 8] ^= 1 << (bit % 8);
        assert!(Batch::decode(bad.into()).is_err(), "bit {bit}");
    }
}

#[test]
fn a_single_larger_event_is_a_batch_of_its_own() {
    let mut events = telemetry(3, 100);
    events[1].payload = vec![1; 200_000].into();
    let batches = pack_all(&events, &[], &mut start());
    let counts: Vec<u32> =
        batches.iter().map(|batch| BatchHead::decode(batch).unwrap().count()).collect();
    assert_eq!(counts, [1, 1, 1]);
    assert_eq!(decode_all(&batches).0, expected(&events, &start()));
}

#[test]
fn events_share_what_they_have_in_common() {
    let [batch] = &pack_all(&telemetry(2, 20), &[], &mut start())[..] else { panic!() };
    let one = batch.len();
    let mut events = telemetry(2, 20);
    events[1] = Event { payload: events[1].payload.clone(), ..events[0].clone() };
    let [batch] = &pack_all(&events, &[], &mut start())[..] else { panic!() };
    assert!(one - batch.len() > 40, "{one} and {}", batch.len());
    let got = decode_all(std::slice::from_ref(batch)).0;
    assert_eq!(got[0].event.topic.as_ptr(), got[1].event.topic.as_ptr());
}
