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
//! Invariants:
//! - A mark of another store is no cursor: offsets count within one epoch.
//! - No two sinks have one name, whatever hyphens are in theirs and their gateway's.

use std::fmt;
use std::str::FromStr;

use storage::{Ahead, Lane, Lanes};

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
    pub(super) fn mark(&self, reach: Reach) -> Mark {
        Mark { reach, epoch: self.epoch, instance: self.instance }
    }

    /// How far Kafka is, if it knows: the mark found there, judged by where this store's log ended
    /// when this process started.
    ///
    /// # Errors
    /// One line: another process has set the mark, for this store and beyond its end. So the store
    /// has lost its end, and new events take the offsets of those that Kafka has already.
    pub(super) fn resume(
        &self,
        found: Option<&Mark>,
        log_end: u64,
    ) -> Result<Option<Reach>, String> {
        let Some(mark) = found.filter(|mark| mark.epoch == self.epoch) else { return Ok(None) };
        if mark.instance != self.instance && mark.reach.end() > log_end {
            return Err(format!(
                "Kafka has events up to offset {} of this store, which ended at {log_end}: was it \
                 restored from a copy? Begin with an empty data_dir, or delete the consumer group {}",
                mark.reach.end(),
                self.name
            ));
        }
        Ok(Some(mark.reach.clone()))
    }
}

/// A cursor as it stands in Kafka.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mark {
    /// What Kafka has.
    reach: Reach,
    epoch: u64,
    instance: u64,
}

impl Mark {
    /// A group's offset with its metadata; `None` if none was committed, or not by a gateway.
    pub(super) fn read(offset: Option<i64>, metadata: &str) -> Option<Self> {
        let Metadata { epoch, instance, ahead } = metadata.parse().ok()?;
        let cursor = offset?.try_into().ok()?;
        Some(Self { reach: Reach { cursor, ahead }, epoch, instance })
    }

    /// The group's offset.
    pub(super) fn offset(&self) -> i64 {
        i64::try_from(self.reach.cursor).expect("a log has fewer than 2^63 events")
    }

    /// What goes beside the offset.
    pub(super) fn metadata(&self) -> String {
        let ahead = self.reach.ahead.clone();
        Metadata { epoch: self.epoch, instance: self.instance, ahead }.to_string()
    }

    /// Whether the same process set both.
    pub(super) fn has_the_writer_of(&self, other: &Self) -> bool {
        (self.epoch, self.instance) == (other.epoch, other.instance)
    }
}

/// `edge-gateway/1 EPOCH INSTANCE`, both in 16 hexadecimal digits; where something is ahead of the
/// cursor, `edge-gateway/2`, the same, and for each range `LANE[+LANE ...]:START-END`.
struct Metadata {
    epoch: u64,
    instance: u64,
    ahead: Vec<Ahead>,
}

const FORMAT: &str = "edge-gateway/1";
const FORMAT_WITH_STREAMS: &str = "edge-gateway/2";
/// More ranges than any sink runs ahead in.
const AHEAD_MAX: usize = 64;

impl fmt::Display for Metadata {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let format = if self.ahead.is_empty() { FORMAT } else { FORMAT_WITH_STREAMS };
        write!(f, "{format} {:016x} {:016x}", self.epoch, self.instance)?;
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
        let mut words = text.split(' ');
        let format = words.next();
        let mut number = || u64::from_str_radix(words.next()?, 16).ok();
        let (epoch, instance) = (number().ok_or(())?, number().ok_or(())?);
        let ahead: Vec<_> = words.map(read_ahead).collect::<Option<_>>().ok_or(())?;
        match (format, ahead.len()) {
            (Some(FORMAT), 0) | (Some(FORMAT_WITH_STREAMS), 1..=AHEAD_MAX) => {
                Ok(Self { epoch, instance, ahead })
            }
            _ => Err(()),
        }
    }
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
            let mark = place.mark(set);
            assert_eq!(Mark::read(Some(42), &mark.metadata()), Some(mark.clone()));
            assert!(mark.metadata().len() < 1024, "brokers take 4096 by default");
        }
        let mark = place.mark(42.into());
        for (offset, metadata) in [
            (None, mark.metadata().as_str()),
            (Some(-1), mark.metadata().as_str()),
            (Some(1), ""),
            (Some(1), "edge-gateway/2 00 00"),
            (Some(1), "edge-gateway/1 00"),
            (Some(1), "edge-gateway/1 00 00 00"),
            (Some(1), "edge-gateway/1 00 00 alarm:1-2"),
            (Some(1), "edge-gateway/2 00 00 alarm+:1-2"),
            (Some(1), "edge-gateway/2 00 00 alarm:1"),
            (Some(1), "edge-gateway/3 00 00 alarm:1-2"),
            (Some(1), "edge-gateway/1 00 zz"),
        ] {
            assert_eq!(Mark::read(offset, metadata), None, "{metadata:?}");
        }
    }

    /// What a version that knew of one stream has left is read by this one, and, while there is one
    /// stream, the other way round.
    #[test]
    fn a_mark_of_one_stream_looks_as_it_always_did() {
        let place = Place { epoch: 0xab, instance: 0xcd, ..place() };
        let metadata = "edge-gateway/1 00000000000000ab 00000000000000cd";
        assert_eq!(place.mark(7.into()).metadata(), metadata);
        assert_eq!(Mark::read(Some(7), metadata), Some(place.mark(7.into())));
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

    #[test]
    fn only_a_mark_of_this_store_is_a_cursor_and_none_of_another_process_is_beyond_its_end() {
        let place = place();
        let foreign = Place { epoch: place.epoch + 1, ..place.clone() };
        let before = Place { instance: place.instance.wrapping_add(1), ..place.clone() };
        let resumed = |writer: &Place, found: Reach| place.resume(Some(&writer.mark(found)), 9);
        assert_eq!(place.resume(None, 9), Ok(None));
        assert_eq!(resumed(&foreign, 5.into()), Ok(None));
        assert_eq!(resumed(&foreign, 50.into()), Ok(None));
        // Another process of the same store: its mark counts, and it is another writer.
        assert_eq!(resumed(&before, 9.into()), Ok(Some(9.into())));
        for beyond in [10.into(), reach(5, &[(Lanes::ALL, 8..10)])] {
            let refused = resumed(&before, beyond).unwrap_err();
            assert!(refused.contains("restored"), "{refused}");
        }
        // What this process has sent came in after it started.
        assert_eq!(place.resume(Some(&place.mark(10.into())), 9), Ok(Some(10.into())));
        assert!(!place.mark(7.into()).has_the_writer_of(&before.mark(7.into())));
        assert!(place.mark(7.into()).has_the_writer_of(&place.mark(8.into())));
    }
}
