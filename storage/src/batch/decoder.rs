//! Reads a batch: its records in offset order, then its control records.
//!
//! Invariant: whatever the bytes, an error ends it and nothing panics; what is decoded shares the batch's
//! bytes.

use bytes::Bytes;
use bytestring::ByteString;
use zerocopy::FromBytes;

use super::{
    BatchHead, CONTROL_CURSOR, CONTROL_DELETE, CONTROL_PUT, DEFINE, Group, Header, STAMPED, Stamps,
};
use crate::clock::Clock;
use crate::codec::Compression;
use crate::control::Control;
use crate::event::{Attributes, Event, StoredEvent};
use crate::row::{Corrupt, Reader};

/// A whole batch, checked.
pub(crate) struct Batch {
    bytes: Bytes,
    body_start: usize,
}

impl Batch {
    /// Checks a stored batch. Everything decoded from it shares `bytes`.
    pub(crate) fn decode(bytes: Bytes) -> Result<Self, Corrupt> {
        let head = BatchHead::decode(&bytes)?;
        let body_start = head.head_bytes();
        let body = &bytes[body_start..];
        let header = head.header;
        if body.len() != header.body_bytes.get() as usize
            || header.body_crc.get() != crc32c::crc32c(body)
        {
            return Err(Corrupt);
        }
        let records_bytes = header.records_bytes.get() as usize;
        match Compression::of(header.codec).ok_or(Corrupt)? {
            Compression::None if records_bytes <= body.len() => Ok(Self { bytes, body_start }),
            Compression::None => Err(Corrupt),
            compression => {
                if header.controls.get() != 0 {
                    return Err(Corrupt);
                }
                let plain = compression.unpack(body, records_bytes)?;
                let bytes = [&bytes[..body_start], &plain].concat().into();
                Ok(Self { bytes, body_start })
            }
        }
    }

    /// Its head.
    pub(crate) fn head(&self) -> BatchHead<'_> {
        const CHECKED: &str = "the head was checked when it was decoded";
        let (header, rest) = Header::ref_from_prefix(&self.bytes).expect(CHECKED);
        let (stamps, rest) = if header.version == STAMPED {
            let (stamps, rest) = Stamps::ref_from_prefix(rest).expect(CHECKED);
            (Some(stamps), rest)
        } else {
            (None, rest)
        };
        let groups = usize::from(header.groups.get());
        let (groups, _) = <[Group]>::ref_from_prefix_with_elems(rest, groups).expect(CHECKED);
        BatchHead { header, stamps, groups }
    }

    /// What gave the times of its events.
    pub(crate) fn clock(&self) -> Option<Clock> {
        let stamps = self.head().stamps?;
        let (time_us, uptime_us) = (stamps.time_us.get(), stamps.uptime_us.get());
        Some(Clock {
            boot: stamps.boot.get(),
            offset_us: time_us.cast_signed().wrapping_sub(uptime_us.cast_signed()),
            synchronised: stamps.synchronised != 0,
        })
    }

    /// Its events at or after the offset `from`, in offset order. Ends early with an error if the
    /// records do not add up, which a matching checksum rules out but for a forged batch.
    pub(crate) fn events(&self, from: u64) -> Events {
        let head = self.head();
        let records_end = self.body_start + head.header.records_bytes.get() as usize;
        Events {
            reader: Reader::new(&self.bytes, self.body_start..records_end),
            from,
            offset: head.position().offset,
            left: head.count(),
            received_min_us: head.header.received_min_us.get(),
            time_us: head
                .stamps
                .map_or(head.header.received_min_us.get(), |stamps| stamps.time_us.get()),
            stamps: head.stamps.copied(),
            partitions: head
                .groups
                .iter()
                .map(|group| (group.partition.get(), group.base_seq.get()))
                .collect(),
            keys: Vec::new(),
            topics: Vec::new(),
            attributes: Vec::new(),
        }
    }

    /// Its control records, in order.
    pub(crate) fn controls(&self) -> Result<Vec<Control>, Corrupt> {
        let header = self.head().header;
        let start = self.body_start + header.records_bytes.get() as usize;
        let mut reader = Reader::new(&self.bytes, start..self.bytes.len());
        (0..header.controls.get()).map(|_| control(&mut reader)).collect()
    }
}

/// The events of a batch.
pub(crate) struct Events {
    reader: Reader,
    from: u64,
    offset: u64,
    left: u32,
    /// Receive time that none is below.
    received_min_us: u64,
    /// Time of the last record.
    time_us: u64,
    stamps: Option<Stamps>,
    /// Partition and next sequence number of each group.
    partitions: Vec<(u16, u64)>,
    /// Device keys seen, each with its group.
    keys: Vec<(ByteString, usize)>,
    topics: Vec<ByteString>,
    attributes: Vec<Bytes>,
}

impl Iterator for Events {
    type Item = Result<StoredEvent, Corrupt>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.left > 0 {
            self.left -= 1;
            match self.record() {
                Ok(Some(event)) => return Some(Ok(event)),
                Ok(None) => {}
                Err(corrupt) => {
                    self.left = 0;
                    return Some(Err(corrupt));
                }
            }
        }
        None
    }
}

impl Events {
    /// The next record, or nothing if it lies before `from`.
    fn record(&mut self) -> Result<Option<StoredEvent>, Corrupt> {
        let reader = &mut self.reader;
        self.time_us = self.time_us.checked_add(reader.number()?).ok_or(Corrupt)?;
        let key = match reader.number()? {
            DEFINE => {
                let group = usize::try_from(reader.number()?).map_err(|_| Corrupt)?;
                self.keys.push((reader.string()?, group));
                self.keys.len() - 1
            }
            reference => index(reference)?,
        };
        let topic = match reader.number()? {
            DEFINE => {
                self.topics.push(reader.string()?);
                self.topics.len() - 1
            }
            reference => index(reference)?,
        };
        let attributes = match reader.number()? {
            DEFINE => {
                self.attributes.push(reader.bytes()?);
                self.attributes.len() - 1
            }
            reference => index(reference)?,
        };
        let payload = reader.range()?;

        let (device_key, group) = self.keys.get(key).ok_or(Corrupt)?;
        let (partition, next_seq) = self.partitions.get_mut(*group).ok_or(Corrupt)?;
        let seq = *next_seq;
        *next_seq = seq.checked_add(1).ok_or(Corrupt)?;
        let offset = self.offset;
        self.offset = offset.checked_add(1).ok_or(Corrupt)?;
        if offset < self.from {
            return Ok(None);
        }
        Ok(Some(StoredEvent {
            offset,
            seq,
            event: Event {
                partition: *partition,
                received_us: self.received_min_us.max(self.time_us),
                device_key: device_key.clone(),
                topic: self.topics.get(topic).ok_or(Corrupt)?.clone(),
                attributes: Attributes::from_bytes(
                    self.attributes.get(attributes).ok_or(Corrupt)?.clone(),
                ),
                payload: reader.slice(payload),
            },
            stamp: self.stamps.map(|stamps| stamps.stamp(self.time_us)),
        }))
    }
}

fn index(reference: u64) -> Result<usize, Corrupt> {
    usize::try_from(reference - 1).map_err(|_| Corrupt)
}

fn control(reader: &mut Reader) -> Result<Control, Corrupt> {
    match reader.byte()? {
        CONTROL_CURSOR => Ok(Control::Cursor { sink: reader.string()?, offset: reader.number()? }),
        CONTROL_PUT => Ok(Control::Put {
            namespace: reader.u16()?,
            key: reader.bytes()?,
            value: reader.bytes()?,
        }),
        CONTROL_DELETE => Ok(Control::Delete { namespace: reader.u16()?, key: reader.bytes()? }),
        _ => Err(Corrupt),
    }
}
