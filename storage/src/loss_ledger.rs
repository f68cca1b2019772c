//! The loss ledger: a durable row for everything dropped by policy, written before the data goes.
//!
//! Owns: [`Loss`] and its stored form. Keyed by sink, first offset and reason in `state.redb`, so
//! that writing one again, after a crash between the row and the drop, is writing it once.

use std::ops::Range;

use bytes::Bytes;

use crate::row::{Corrupt, Reader, Row};

/// Why data that a sink still needed, or that cannot be read, went away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LossReason {
    /// `storage.at_quota = "drop_oldest"`.
    Quota,
    /// Retention of a store without sinks.
    Expired,
    /// The sink was absent from the configuration while its data was trimmed.
    SinkAbsent,
    /// The batch fails its checksum.
    Corrupt,
    /// The sink's `lag_bytes_max`.
    Lag,
}

impl LossReason {
    pub(crate) const ALL: [Self; 5] =
        [Self::Quota, Self::Expired, Self::SinkAbsent, Self::Corrupt, Self::Lag];

    fn code(self) -> u8 {
        match self {
            Self::Quota => 1,
            Self::Expired => 2,
            Self::SinkAbsent => 3,
            Self::Corrupt => 4,
            Self::Lag => 5,
        }
    }
}

/// One row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loss {
    /// The sink that lost it; `None` where there was no sink at all.
    pub sink: Option<String>,
    /// Offsets lost, end-exclusive.
    pub offsets: Range<u64>,
    /// Event bytes lost, 0 where unknown.
    pub size_bytes: u64,
    /// Why.
    pub reason: LossReason,
    /// When the row was written, microseconds since the Unix epoch.
    pub at_us: u64,
}

/// Key of a row: sink (empty for none), first offset, reason.
pub(crate) type LossKey<'a> = (&'a str, u64, u8);

impl Loss {
    pub(crate) fn key(&self) -> LossKey<'_> {
        (self.sink.as_deref().unwrap_or_default(), self.offsets.start, self.reason.code())
    }

    /// The stored row beside its key.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut row = Row::new();
        row.number(self.offsets.end).number(self.size_bytes).number(self.at_us);
        row.finish()
    }

    /// Reads a stored row.
    pub(crate) fn decode((sink, start, code): LossKey<'_>, row: &[u8]) -> Result<Self, Corrupt> {
        let mut row = Reader::checked(Bytes::copy_from_slice(row))?;
        let reason = LossReason::ALL.into_iter().find(|reason| reason.code() == code);
        Ok(Self {
            sink: (!sink.is_empty()).then(|| sink.to_owned()),
            offsets: start..row.number()?,
            size_bytes: row.number()?,
            reason: reason.ok_or(Corrupt)?,
            at_us: row.number()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loss_round_trips() {
        for (reason, sink) in LossReason::ALL.into_iter().zip([None, Some("cloud".to_owned())]) {
            let loss = Loss { sink, offsets: 5..900, size_bytes: 1 << 40, reason, at_us: 17 };
            assert_eq!(Loss::decode(loss.key(), &loss.encode()), Ok(loss));
        }
    }
}
