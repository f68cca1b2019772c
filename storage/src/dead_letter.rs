//! Dead letters: events a sink refused for good, kept whole with the reason.
//!
//! Owns: [`DeadLetter`] and its stored form. Keyed by sink and offset in `state.redb`, so that
//! writing one twice is writing it once. One that is to be delivered again stays here, marked
//! ([`KeptLetter`]), until the upstream has taken it.

use bytes::Bytes;

use crate::clock::{Stamp, TimeQuality};
use crate::event::{Attributes, Event, StoredEvent};
use crate::row::{Corrupt, Reader, Row};

/// One event that a sink will never take, keyed by sink and offset so that writing it twice is one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeadLetter {
    /// The sink that refused it.
    pub sink: String,
    /// The event, whole.
    pub event: StoredEvent,
    /// What the sink said.
    pub reason: String,
    /// How many times it was offered.
    pub attempts: u32,
    /// First attempt, microseconds since the Unix epoch.
    pub first_us: u64,
    /// Last attempt, microseconds since the Unix epoch.
    pub last_us: u64,
}

/// A dead letter as it is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeptLetter {
    /// The letter.
    pub letter: DeadLetter,
    /// Since when it is to be delivered again, microseconds since the Unix epoch.
    pub requeued_us: Option<u64>,
}

/// What the dead letters of a sink come to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeadLetterStats {
    /// Letters.
    pub events: u64,
    /// Bytes that they take as they are stored, which is what their bound counts.
    pub size_bytes: u64,
    /// Of the letters, those that are to be delivered again.
    pub requeued: u64,
}

/// What a change of dead letters has found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Picked {
    /// Letters that were changed.
    pub events: u64,
    /// Where to look on, if there may be more.
    pub next: Option<u64>,
}

impl DeadLetter {
    /// The stored row; sink and offset are its key.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let StoredEvent { offset: _, seq, event, stamp } = &self.event;
        let mut row = Row::new();
        row.number(u64::from(self.attempts)).number(self.first_us).number(self.last_us);
        row.number(*seq).number(u64::from(event.partition)).number(event.received_us);
        row.bytes(self.reason.as_bytes());
        row.bytes(event.device_key.as_bytes()).bytes(event.topic.as_bytes());
        row.bytes(event.attributes.as_bytes()).bytes(&event.payload);
        if let Some(Stamp { boot, uptime_us, received_us, quality }) = *stamp {
            row.number(boot).number(uptime_us).number(received_us).number(quality as u64);
        }
        row.finish()
    }

    /// Reads a stored row.
    pub(crate) fn decode(sink: &str, offset: u64, row: Bytes) -> Result<Self, Corrupt> {
        let mut row = Reader::checked(row)?;
        let attempts = u32::try_from(row.number()?).map_err(|_| Corrupt)?;
        let (first_us, last_us, seq) = (row.number()?, row.number()?, row.number()?);
        let partition = u16::try_from(row.number()?).map_err(|_| Corrupt)?;
        let received_us = row.number()?;
        let reason = row.string()?.to_string();
        let event = Event {
            partition,
            received_us,
            device_key: row.string()?,
            topic: row.string()?,
            attributes: Attributes::from_bytes(row.bytes()?),
            payload: row.bytes()?,
        };
        // A letter of an event without one ends here, as all did before there were stamps.
        let stamp = if row.is_empty() { None } else { Some(stamp(&mut row)?) };
        let event = StoredEvent { offset, seq, event, stamp };
        Ok(Self { sink: sink.to_owned(), event, reason, attempts, first_us, last_us })
    }
}

fn stamp(row: &mut Reader) -> Result<Stamp, Corrupt> {
    Ok(Stamp {
        boot: row.number()?,
        uptime_us: row.number()?,
        received_us: row.number()?,
        quality: usize::try_from(row.number()?)
            .ok()
            .and_then(|number| TimeQuality::ALL.get(number).copied())
            .ok_or(Corrupt)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_letter_round_trips() {
        let letter = DeadLetter {
            sink: "cloud".into(),
            event: StoredEvent {
                offset: 7,
                seq: 3,
                event: Event {
                    partition: 2,
                    received_us: 1_700_000_000_000_000,
                    device_key: "dev-1".into(),
                    topic: "a/b".into(),
                    attributes: Attributes::default(),
                    payload: Bytes::from_static(b"\0payload"),
                },
                stamp: Some(Stamp {
                    boot: u64::MAX,
                    uptime_us: 9,
                    received_us: 1_700_000_000_000_001,
                    quality: TimeQuality::Corrected,
                }),
            },
            reason: "413: too large".into(),
            attempts: 2,
            first_us: 5,
            last_us: 6,
        };
        let row = letter.encode();
        assert_eq!(DeadLetter::decode("cloud", 7, row.clone().into()), Ok(letter.clone()));
        let unstamped =
            DeadLetter { event: StoredEvent { stamp: None, ..letter.event.clone() }, ..letter };
        assert_eq!(DeadLetter::decode("cloud", 7, unstamped.encode().into()), Ok(unstamped));
        for len in 0..row.len() {
            let cut = Bytes::copy_from_slice(&row[..len]);
            assert_eq!(DeadLetter::decode("cloud", 7, cut), Err(Corrupt));
        }
    }
}
