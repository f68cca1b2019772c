//! The cursor of an exactly-once sink in Kafka: a consumer group's offset, moved in the transaction
//! that carries the events below it.
//!
//! Owns: under which names it is kept ([`Place`]), what stands beside it ([`Mark`]), and what it means
//! for a sink that starts ([`Place::resume`]). Pure.
//!
//! The offset is that of the stream that is furthest behind. How far each of the others is stands in
//! the offset's metadata: a few numbers, well below what brokers take
//! (`offset.metadata.max.bytes`, 4096 by default). So one offset of one group moves all streams at
//! once, and who may use the group need not know how many there are.
//!
//! A store can be copied, and both copies go on under one epoch: from there on, one offset names two
//! events. So a mark names the last event that was sent, by its offset and a digest ([`Witness`]), and
//! vouches for what is before that one in the log that holds it, and for nothing else.
//!
//! Invariants:
//! - A mark of another store is no cursor: offsets count within one epoch.
//! - What a sink skips because of a mark is what was sent: up to its witness, the two logs are the same.
//! - No two sinks have one name, whatever hyphens are in theirs and their gateway's.

use std::fmt;
use std::str::FromStr;

use ring::digest::{Context, SHA256};
use storage::{Ahead, Lane, Lanes, Read, ReadError, StoredEvent};

use crate::config::{KafkaConfig, KafkaTopic};
use crate::origin::Origin;
use crate::reach::Reach;

/// Where the cursor of a sink is kept, and who keeps it.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    /// Transactional id and consumer group alike: one writer per gateway and sink.
    pub(super) name: String,
    /// The name that former versions used, if it was another.
    pub(super) former_name: Option<String>,
    /// Topic under whose partition 0 the group keeps the offset.
    pub(super) topic: String,
    epoch: u64,
    /// Names this process among those that have written under this name.
    instance: u64,
}

impl Place {
    pub(crate) fn new(origin: &Origin, sink: &str, config: &KafkaConfig) -> Self {
        // The last hyphen is the one between the two: `~` is in neither.
        let former_name = format!("gw-{}-{sink}", origin.gateway);
        let name = format!("gw-{}-{}", origin.gateway, sink.replace('-', "~"));
        Self {
            former_name: (former_name != name).then_some(former_name),
            name,
            topic: match (&config.cursor_topic, &config.topic) {
                (Some(topic), _) | (None, KafkaTopic::Fixed(topic)) => topic.clone(),
                (None, KafkaTopic::Made(_)) => unreachable!("a template comes with a cursor_topic"),
            },
            epoch: origin.epoch,
            instance: fastrand::u64(..),
        }
    }

    /// The mark that this process sets.
    pub(super) fn mark(&self, reach: Reach, witness: Option<Witness>) -> Mark {
        Mark { reach, witness, epoch: self.epoch, instance: self.instance }
    }

    /// How far Kafka is, if it knows: the mark found there, as this process would set it. `read` reads
    /// this store's log from an offset on, an event at least if there is one.
    ///
    /// # Errors
    /// [`NoCursor`].
    pub(super) fn resume(
        &self,
        found: Option<&Mark>,
        read: impl FnOnce(u64) -> Result<Read, ReadError>,
    ) -> Result<Option<Mark>, NoCursor> {
        let Some(found) = found.filter(|mark| mark.epoch == self.epoch) else { return Ok(None) };
        let Some(witness) = &found.witness else {
            return Ok(Some(self.mark(Reach::default(), None)));
        };
        let Read { events, next, .. } = read(witness.offset)?;
        let held = events.first().filter(|stored| stored.offset == witness.offset);
        // If it is gone from the log, so is all that could be skipped because of it.
        if held.map_or(next <= witness.offset, |held| Witness::of(held) != *witness) {
            return Err(NoCursor::Forked(format!(
                "Kafka has another event {} of this store than the store itself: was the store \
                 restored from a copy, or does a copy of it send? Nothing is sent until you delete \
                 the consumer group {}; then what is stored here goes out, and what was stored after \
                 the copy bears names that Kafka has seen",
                witness.offset, self.name
            )));
        }
        let mut reach = found.reach.clone();
        reach.cut(witness.offset + 1);
        Ok(Some(self.mark(reach, Some(*witness))))
    }
}

/// Why a sink cannot go on from a mark.
#[derive(Debug, thiserror::Error)]
pub(super) enum NoCursor {
    /// Kafka has other events under the offsets of this store: one of the two logs is a copy of the
    /// other, and has gone on by itself or has lost its end.
    #[error("{0}")]
    Forked(String),
    /// The log cannot be read.
    #[error(transparent)]
    Unread(#[from] ReadError),
}

/// The last event that was sent, in the order of the log: who holds it has what was before it, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Witness {
    offset: u64,
    digest: u64,
}

impl Witness {
    pub(super) fn of(stored: &StoredEvent) -> Self {
        let StoredEvent { offset, seq, event, .. } = stored;
        let mut digest = Context::new(&SHA256);
        for number in [*seq, u64::from(event.partition), event.received_us] {
            digest.update(&number.to_le_bytes());
        }
        for text in [event.device_key.as_bytes(), event.topic.as_bytes(), &event.payload] {
            digest.update(&(text.len() as u64).to_le_bytes());
            digest.update(text);
        }
        let digest = digest.finish();
        let (first, _) = digest.as_ref().split_first_chunk().expect("32 bytes");
        Self { offset: *offset, digest: u64::from_be_bytes(*first) }
    }
}

/// A cursor as it stands in Kafka.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mark {
    /// What Kafka has.
    reach: Reach,
    /// `None` if nothing was sent yet.
    witness: Option<Witness>,
    epoch: u64,
    instance: u64,
}

impl Mark {
    /// A group's offset with its metadata; `None` if none was committed, or not by a gateway.
    pub(super) fn read(offset: Option<i64>, metadata: &str) -> Option<Self> {
        let Metadata { epoch, instance, witness, ahead } = metadata.parse().ok()?;
        let cursor = offset?.try_into().ok()?;
        Some(Self { reach: Reach { cursor, ahead }, witness, epoch, instance })
    }

    /// What Kafka has.
    pub(super) fn reach(&self) -> &Reach {
        &self.reach
    }

    /// The last event that Kafka has.
    pub(super) fn witness(&self) -> Option<Witness> {
        self.witness
    }

    /// The group's offset.
    pub(super) fn offset(&self) -> i64 {
        i64::try_from(self.reach.cursor).expect("a log has fewer than 2^63 events")
    }

    /// What goes beside the offset.
    pub(super) fn metadata(&self) -> String {
        let Self { ref reach, witness, epoch, instance } = *self;
        Metadata { epoch, instance, witness, ahead: reach.ahead.clone() }.to_string()
    }

    /// Whether the same process set both.
    pub(super) fn has_the_writer_of(&self, other: &Self) -> bool {
        (self.epoch, self.instance) == (other.epoch, other.instance)
    }
}

/// `edge-gateway/3 EPOCH INSTANCE`, both in 16 hexadecimal digits; once something was sent, the witness
/// as `OFFSET=DIGEST`, the latter in 16 hexadecimal digits; and for each range ahead of the cursor
/// `LANE[+LANE ...]:START-END`. Former versions wrote 1 and 2, which have no witness: they name their
/// writer, and vouch for nothing.
struct Metadata {
    epoch: u64,
    instance: u64,
    witness: Option<Witness>,
    ahead: Vec<Ahead>,
}

const FORMAT: &str = "edge-gateway/3";
const FORMER_FORMATS: [&str; 2] = ["edge-gateway/1", "edge-gateway/2"];
/// More ranges than any sink runs ahead in.
const AHEAD_MAX: usize = 64;

impl fmt::Display for Metadata {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{FORMAT} {:016x} {:016x}", self.epoch, self.instance)?;
        if let Some(Witness { offset, digest }) = self.witness {
            write!(f, " {offset}={digest:016x}")?;
        }
        for Ahead { lanes, offsets } in &self.ahead {
            let names = Lane::ALL.into_iter().filter(|&lane| lanes.contains(lane)).map(Lane::name);
            let names: Vec<_> = names.collect();
            write!(f, " {}:{}-{}", names.join("+"), offsets.start, offsets.end)?;
        }
        Ok(())
    }
}

impl FromStr for Metadata {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let mut words = text.split(' ').peekable();
        let format = words.next().ok_or(())?;
        let mut number = || u64::from_str_radix(words.next()?, 16).ok();
        let (epoch, instance) = (number().ok_or(())?, number().ok_or(())?);
        let witness = match words.peek().and_then(|word| word.split_once('=')) {
            Some(words) => Some(read_witness(words).ok_or(())?),
            None => None,
        };
        let rest = words.skip(usize::from(witness.is_some()));
        let ahead: Vec<_> = rest.map(read_ahead).collect::<Option<_>>().ok_or(())?;
        let is_known = format == FORMAT || FORMER_FORMATS.contains(&format) && witness.is_none();
        if is_known && ahead.len() <= AHEAD_MAX {
            Ok(Self { epoch, instance, witness, ahead })
        } else {
            Err(())
        }
    }
}

fn read_witness((offset, digest): (&str, &str)) -> Option<Witness> {
    let digest = u64::from_str_radix(digest, 16).ok()?;
    Some(Witness { offset: offset.parse().ok()?, digest })
}

fn read_ahead(text: &str) -> Option<Ahead> {
    let (names, offsets) = text.split_once(':')?;
    let (start, end) = offsets.split_once('-')?;
    let lanes = names.split('+').try_fold(Lanes::NONE, |lanes, name| {
        Some(lanes.with(Lane::ALL.into_iter().find(|lane| lane.name() == name)?))
    })?;
    Some(Ahead { lanes, offsets: start.parse().ok()?..end.parse().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake;

    fn place() -> Place {
        Place::new(&fake::origin(), "bus", &KafkaConfig::new("b:9092", "events"))
    }

    fn reach(cursor: u64, ahead: &[(Lanes, std::ops::Range<u64>)]) -> Reach {
        let ahead = ahead.iter().cloned().map(|(lanes, offsets)| Ahead { lanes, offsets });
        Reach { cursor, ahead: ahead.collect() }
    }

    fn witness(offset: u64) -> Witness {
        Witness::of(&fake::stored(offset, "dev", "1"))
    }

    #[test]
    fn a_mark_comes_back_as_it_was_set() {
        let place = place();
        assert_eq!((&*place.name, &*place.topic), ("gw-edge-01-bus", "events"));
        let alarm = Lanes::NONE.with(Lane::Alarm);
        let many = vec![(alarm, u64::MAX - 9..u64::MAX); 16];
        for set in [
            reach(42, &[]),
            reach(42, &[(alarm, 50..60), (Lanes::ALL.without(alarm), 70..1 << 50)]),
            reach(42, &many),
        ] {
            for witness in [None, Some(witness(u64::MAX))] {
                let mark = place.mark(set.clone(), witness);
                assert_eq!(Mark::read(Some(42), &mark.metadata()), Some(mark.clone()));
                assert!(mark.metadata().len() < 1024, "brokers take 4096 by default");
            }
        }
        let mark = place.mark(42.into(), None);
        for (offset, metadata) in [
            (None, mark.metadata().as_str()),
            (Some(-1), mark.metadata().as_str()),
            (Some(1), ""),
            (Some(1), "edge-gateway/3 00"),
            (Some(1), "edge-gateway/3 00 00 00"),
            (Some(1), "edge-gateway/3 00 00 1=zz"),
            (Some(1), "edge-gateway/3 00 00 -1=00"),
            (Some(1), "edge-gateway/3 00 00 alarm:1-2 1=00"),
            (Some(1), "edge-gateway/3 00 00 alarm+:1-2"),
            (Some(1), "edge-gateway/3 00 00 alarm:1"),
            (Some(1), "edge-gateway/2 00 00 1=00"),
            (Some(1), "edge-gateway/4 00 00 alarm:1-2"),
            (Some(1), "edge-gateway/3 00 zz"),
        ] {
            assert_eq!(Mark::read(offset, metadata), None, "{metadata:?}");
        }
    }

    /// What an upgrade finds in Kafka, and what the next one will: pinned.
    #[test]
    fn a_mark_of_a_former_version_names_its_writer_and_vouches_for_nothing() {
        let place = Place { epoch: 0xab, instance: 0xcd, ..place() };
        let own = place.mark(reach(7, &[(Lanes::NONE.with(Lane::Alarm), 8..9)]), Some(witness(8)));
        let rest = "00000000000000ab 00000000000000cd";
        assert_eq!(own.metadata(), format!("edge-gateway/3 {rest} 8=887529933e22a819 alarm:8-9"));
        for metadata in
            [format!("edge-gateway/1 {rest}"), format!("edge-gateway/2 {rest} alarm:8-9")]
        {
            let former = Mark::read(Some(7), &metadata).unwrap();
            assert!(former.has_the_writer_of(&own));
            let resumed = place.resume(Some(&former), |_| unreachable!("no witness")).unwrap();
            assert_eq!(resumed, Some(place.mark(0.into(), None)));
        }
    }

    #[test]
    fn no_two_sinks_have_one_name_and_the_former_one_is_known() {
        let names = |gateway: &str, sink: &str| {
            let origin = Origin { gateway: gateway.into(), epoch: 1 };
            let place = Place::new(&origin, sink, &KafkaConfig::new("b:9092", "events"));
            (place.name, place.former_name)
        };
        assert_eq!(names("a-b", "c"), ("gw-a-b-c".into(), None));
        assert_eq!(names("a", "b-c"), ("gw-a-b~c".into(), Some("gw-a-b-c".into())));
        assert_eq!(names("a", "-"), ("gw-a-~".into(), Some("gw-a--".into())));
        assert_eq!(names("a-", "b").0, "gw-a--b");
    }

    /// Looks for a mark's witness in a log that begins and ends at these offsets.
    fn resumed(
        place: &Place,
        mark: &Mark,
        log: std::ops::Range<u64>,
    ) -> Result<Option<Mark>, NoCursor> {
        let log: Vec<_> = log.map(|offset| fake::stored(offset, "dev", "1")).collect();
        place.resume(Some(mark), |from| Ok(fake::read(&log, from)))
    }

    #[test]
    fn only_a_mark_of_this_store_is_a_cursor() {
        let place = place();
        let foreign = Place { epoch: place.epoch + 1, ..place.clone() };
        let before = Place { instance: place.instance.wrapping_add(1), ..place.clone() };
        let unread = |_| unreachable!("nothing to look for");
        assert!(place.resume(None, unread).unwrap().is_none());
        let mark = foreign.mark(50.into(), Some(witness(49)));
        assert!(place.resume(Some(&mark), unread).unwrap().is_none());
        assert!(!place.mark(7.into(), None).has_the_writer_of(&before.mark(7.into(), None)));
        assert!(place.mark(7.into(), None).has_the_writer_of(&place.mark(8.into(), None)));
    }

    /// One store, copied: where the copy has something else than what was sent, and where it has
    /// nothing yet, it goes on from nowhere.
    #[test]
    fn a_mark_is_a_cursor_only_in_a_log_that_holds_its_last_event() {
        let place = place();
        let mark = place.mark(9.into(), Some(witness(8)));
        assert_eq!(resumed(&place, &mark, 0..9).unwrap().unwrap().reach(), &9.into());
        // Trimmed: all that it vouches for is gone.
        assert_eq!(resumed(&place, &mark, 20..30).unwrap().unwrap().reach(), &9.into());
        let mut other = fake::stored(8, "dev", "1");
        other.event.received_us += 1;
        let forked = place.mark(9.into(), Some(Witness::of(&other)));
        for (mark, log) in [(&mark, 0..8), (&mark, 0..0), (&forked, 0..9), (&forked, 8..100)] {
            match resumed(&place, mark, log) {
                Err(NoCursor::Forked(told)) => assert!(told.contains("a copy"), "{told}"),
                other => panic!("{other:?}"),
            }
        }
    }

    /// What the sink passed without sending it may be something else in a copy.
    #[test]
    fn a_mark_vouches_for_nothing_beyond_its_last_event() {
        let place = place();
        let alarm = Lanes::NONE.with(Lane::Alarm);
        let set = reach(4, &[(alarm, 6..20), (Lanes::ALL.without(alarm), 12..20)]);
        let mark = place.mark(set, Some(witness(8)));
        let resumed = resumed(&place, &mark, 0..9).unwrap();
        assert_eq!(resumed.unwrap(), place.mark(reach(4, &[(alarm, 6..9)]), Some(witness(8))));
    }
}
