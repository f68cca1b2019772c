//! The cursor of an exactly-once sink in Kafka: a consumer group's offset, moved in the transaction
//! that carries the events below it.
//!
//! Owns: under which names it is kept ([`Place`]), what stands beside it ([`Mark`]), and what it means
//! for a sink that starts ([`Place::resume`]). Pure.
//! Invariant: a mark of another store is no cursor: offsets count within one epoch.

use std::fmt;
use std::str::FromStr;

use crate::config::{KafkaConfig, KafkaTopic};
use crate::origin::Origin;

/// Where the cursor of a sink is kept, and who keeps it.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    /// Transactional id and consumer group alike: one writer per gateway and sink.
    pub(super) name: String,
    /// Topic under whose partition 0 the group keeps the offset.
    pub(super) topic: String,
    epoch: u64,
    /// Names this process among those that have written under this name.
    instance: u64,
}

impl Place {
    pub(crate) fn new(origin: &Origin, sink: &str, config: &KafkaConfig) -> Self {
        Self {
            name: format!("gw-{}-{sink}", origin.gateway),
            topic: match (&config.cursor_topic, &config.topic) {
                (Some(topic), _) | (None, KafkaTopic::Fixed(topic)) => topic.clone(),
                (None, KafkaTopic::Made(_)) => unreachable!("a template comes with a cursor_topic"),
            },
            epoch: origin.epoch,
            instance: fastrand::u64(..),
        }
    }

    /// The mark that this process sets.
    pub(super) fn mark(&self, offset: u64) -> Mark {
        Mark { offset, epoch: self.epoch, instance: self.instance }
    }

    /// From which offset on Kafka needs events, if it knows: the mark found there, judged by where
    /// this store's log ends.
    ///
    /// # Errors
    /// One line: the mark is of this store and beyond its end, so the store has lost its end, and
    /// new events would take the offsets of those that Kafka has already.
    pub(super) fn resume(&self, found: Option<Mark>, log_end: u64) -> Result<Option<u64>, String> {
        match found {
            Some(mark) if mark.epoch != self.epoch => Ok(None),
            Some(mark) if mark.offset > log_end => Err(format!(
                "Kafka has events up to offset {} of this store, which ends at {log_end}: was it \
                 restored from a copy? Begin with an empty data_dir, or delete the consumer group {}",
                mark.offset, self.name
            )),
            Some(mark) => Ok(Some(mark.offset)),
            None => Ok(None),
        }
    }
}

/// A cursor as it stands in Kafka.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mark {
    /// Next offset that the sink needs.
    pub(super) offset: u64,
    epoch: u64,
    instance: u64,
}

impl Mark {
    /// A group's offset with its metadata; `None` if none was committed, or not by a gateway.
    pub(super) fn read(offset: Option<i64>, metadata: &str) -> Option<Self> {
        let Metadata { epoch, instance } = metadata.parse().ok()?;
        Some(Self { offset: offset?.try_into().ok()?, epoch, instance })
    }

    /// What goes beside the offset.
    pub(super) fn metadata(&self) -> String {
        Metadata { epoch: self.epoch, instance: self.instance }.to_string()
    }

    /// Whether the same process set both.
    pub(super) fn has_the_writer_of(&self, other: &Self) -> bool {
        (self.epoch, self.instance) == (other.epoch, other.instance)
    }
}

/// `edge-gateway/1 EPOCH INSTANCE`, both in 16 hexadecimal digits.
struct Metadata {
    epoch: u64,
    instance: u64,
}

const FORMAT: &str = "edge-gateway/1";

impl fmt::Display for Metadata {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{FORMAT} {:016x} {:016x}", self.epoch, self.instance)
    }
}

impl FromStr for Metadata {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let mut words = text.split(' ');
        let format = words.next();
        let mut number = || u64::from_str_radix(words.next()?, 16).ok();
        let (epoch, instance) = (number().ok_or(())?, number().ok_or(())?);
        let whole = format == Some(FORMAT) && words.next().is_none();
        if whole { Ok(Self { epoch, instance }) } else { Err(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake;

    fn place() -> Place {
        Place::new(&fake::origin(), "bus", &KafkaConfig::new("b:9092", "events"))
    }

    #[test]
    fn a_mark_comes_back_as_it_was_set() {
        let place = place();
        assert_eq!((&*place.name, &*place.topic), ("gw-edge-01-bus", "events"));
        let mark = place.mark(42);
        assert_eq!(Mark::read(Some(42), &mark.metadata()), Some(mark));
        for (offset, metadata) in [
            (None, mark.metadata().as_str()),
            (Some(-1), mark.metadata().as_str()),
            (Some(1), ""),
            (Some(1), "edge-gateway/2 00 00"),
            (Some(1), "edge-gateway/1 00"),
            (Some(1), "edge-gateway/1 00 00 00"),
            (Some(1), "edge-gateway/1 00 zz"),
        ] {
            assert_eq!(Mark::read(offset, metadata), None, "{metadata:?}");
        }
    }

    #[test]
    fn only_a_mark_of_this_store_is_a_cursor_and_none_is_beyond_its_end() {
        let place = place();
        let foreign = Place { epoch: place.epoch + 1, ..place.clone() };
        assert_eq!(place.resume(None, 9), Ok(None));
        assert_eq!(place.resume(Some(foreign.mark(5)), 9), Ok(None));
        assert_eq!(place.resume(Some(foreign.mark(50)), 9), Ok(None));
        assert_eq!(place.resume(Some(place.mark(9)), 9), Ok(Some(9)));
        assert!(place.resume(Some(place.mark(10)), 9).unwrap_err().contains("restored"));
        // Another process of the same store: its mark counts, and it is another writer.
        let before = Place { instance: place.instance.wrapping_add(1), ..place.clone() };
        assert_eq!(place.resume(Some(before.mark(7)), 9), Ok(Some(7)));
        assert!(!place.mark(7).has_the_writer_of(&before.mark(7)));
        assert!(place.mark(7).has_the_writer_of(&place.mark(8)));
    }
}
