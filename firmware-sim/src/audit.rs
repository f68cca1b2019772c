//! Compares what a fleet sent with what arrived upstream.
//!
//! Owns: [`Audit`] (the pure comparison, one row at a time) and [`AuditReport`].
//! Rules: an event is named by device, boot id and device sequence number. *Lost* is acked and
//! never received. A repeat is a duplicate, never disorder: order is judged on first arrivals,
//! where one that comes after a higher sequence number of its device and boot is out of order.
//! Invariant: received = delivered + duplicates + unknown + foreign, and the memory for a dense
//! run of sequence numbers is three bits per event.
//! Deliberately absent: reading files, apart from the short shell [`audit`].

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    path::Path,
};

use serde::Serialize;

use crate::ledger::{self, LedgerError, ReceivedRow, SentRow};

/// Devices named in a report, at most.
const WORST_DEVICES_MAX: usize = 10;

/// What came out of an audit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct AuditReport {
    /// Events published at least once.
    pub sent: u64,
    /// Events whose ack arrived at the device.
    pub acked: u64,
    /// Rows of the received ledger.
    pub received: u64,
    /// Sent events that arrived, each counted once.
    pub delivered: u64,
    /// Acked, and never received.
    pub lost: u64,
    /// Received although the device never saw the ack: no fault, it would have sent them again.
    pub unacked_received: u64,
    /// Arrivals of an event beyond its first.
    pub duplicates: u64,
    /// First arrivals that came after a higher sequence number of the same device and boot.
    pub out_of_order: u64,
    /// Fleet events received that are in no row of the sent ledger, each counted once.
    pub unknown: u64,
    /// Received events that no fleet made: their payload has no device sequence number.
    pub foreign: u64,
    /// Sequence numbers of the gateway that never arrived, between the first and the last of
    /// their partition. For information: dead letters and filters make such gaps too.
    pub gateway_gaps: u64,
    /// Devices in either ledger.
    pub devices: u64,
    /// Devices with loss or disorder, worst first, at most ten.
    pub worst_devices: Vec<DeviceReport>,
}

/// What went wrong for one device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DeviceReport {
    /// Its name.
    pub device: String,
    /// Acked, and never received.
    pub lost: u64,
    /// First arrivals after a higher sequence number.
    pub out_of_order: u64,
    /// Arrivals beyond the first.
    pub duplicates: u64,
    /// The lowest lost sequence number, with its boot id.
    pub first_lost: Option<(u32, u64)>,
}

impl AuditReport {
    /// Whether nothing acked was lost or reordered.
    pub fn is_clean(&self) -> bool {
        self.lost == 0 && self.out_of_order == 0
    }
}

impl fmt::Display for AuditReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = |name: &str, value: u64, note: &str| {
            let gap = if note.is_empty() { "" } else { "  " };
            writeln!(f, "{name:<18}{value:>14}{gap}{note}")
        };
        line("devices", self.devices, "")?;
        line("sent", self.sent, "")?;
        line("acked", self.acked, "")?;
        line("received", self.received, "")?;
        line("delivered", self.delivered, "")?;
        line("duplicates", self.duplicates, "")?;
        line("unacked received", self.unacked_received, "stored, but the ack was lost: no fault")?;
        line("unknown", self.unknown, "received, in no row of the sent ledger")?;
        line("foreign", self.foreign, "received, not from a fleet")?;
        line("gateway gaps", self.gateway_gaps, "sequence numbers of the gateway that never came")?;
        line("lost", self.lost, "acked, never received")?;
        line("out of order", self.out_of_order, "first arrivals after a later one")?;
        if !self.worst_devices.is_empty() {
            writeln!(f)?;
            writeln!(
                f,
                "{:<24}{:>10}{:>14}{:>12}  first lost (boot/seq)",
                "device", "lost", "out of order", "duplicates"
            )?;
        }
        for DeviceReport { device, lost, out_of_order, duplicates, first_lost } in
            &self.worst_devices
        {
            write!(f, "{device:<24}{lost:>10}{out_of_order:>14}{duplicates:>12}")?;
            match first_lost {
                Some((boot, seq)) => writeln!(f, "  {boot}/{seq}")?,
                None => writeln!(f)?,
            }
        }
        Ok(())
    }
}

/// An audit under way: first every row of the sent ledger, then every row of the received one,
/// in order of arrival.
#[derive(Debug, Default)]
pub struct Audit {
    devices: HashMap<String, BTreeMap<u32, Stream>>,
    partitions: HashMap<String, Vec<Numbers<1>>>,
    sent: u64,
    acked: u64,
    received: u64,
    delivered: u64,
    unacked_received: u64,
    unknown: u64,
    foreign: u64,
}

/// One boot of one device.
#[derive(Debug, Default)]
struct Stream {
    numbers: Numbers<3>,
    highest_received: Option<u64>,
    out_of_order: u64,
    duplicates: u64,
}

const SENT: usize = 0;
const ACKED: usize = 1;
const RECEIVED: usize = 2;

impl Audit {
    /// Takes a row of the sent ledger. The same event may stand in it more than once.
    pub fn sent(&mut self, row: &SentRow<'_>) {
        let numbers = &mut self.stream(&row.device, row.boot).numbers;
        let new = numbers.insert(SENT, row.seq);
        let newly_acked = row.acked_us.is_some() && numbers.insert(ACKED, row.seq);
        self.sent += u64::from(new);
        self.acked += u64::from(newly_acked);
    }

    /// Takes a row of the received ledger.
    pub fn received(&mut self, row: &ReceivedRow<'_>) {
        self.received += 1;
        self.place(row);
        let Some(origin) = row.origin else {
            self.foreign += 1;
            return;
        };
        let stream = self.stream(&row.device, origin.boot);
        if !stream.numbers.insert(RECEIVED, origin.seq) {
            stream.duplicates += 1;
            return;
        }
        if stream.highest_received > Some(origin.seq) {
            stream.out_of_order += 1;
        }
        stream.highest_received = stream.highest_received.max(Some(origin.seq));
        let sent = stream.numbers.contains(SENT, origin.seq);
        let acked = stream.numbers.contains(ACKED, origin.seq);
        self.delivered += u64::from(sent);
        self.unacked_received += u64::from(sent && !acked);
        self.unknown += u64::from(!sent);
    }

    /// The result.
    pub fn finish(self) -> AuditReport {
        let mut report = AuditReport {
            sent: self.sent,
            acked: self.acked,
            received: self.received,
            delivered: self.delivered,
            unacked_received: self.unacked_received,
            unknown: self.unknown,
            foreign: self.foreign,
            gateway_gaps: self.partitions.values().flatten().map(Numbers::gaps).sum(),
            devices: self.devices.len() as u64,
            ..AuditReport::default()
        };
        for (device, boots) in self.devices {
            let mut own =
                DeviceReport { device, lost: 0, out_of_order: 0, duplicates: 0, first_lost: None };
            for (boot, stream) in boots {
                own.out_of_order += stream.out_of_order;
                own.duplicates += stream.duplicates;
                let (lost, first) = stream.numbers.count_without(ACKED, RECEIVED);
                own.lost += lost;
                own.first_lost = own.first_lost.or(first.map(|seq| (boot, seq)));
            }
            report.lost += own.lost;
            report.out_of_order += own.out_of_order;
            report.duplicates += own.duplicates;
            if own.lost + own.out_of_order > 0 {
                report.worst_devices.push(own);
                if report.worst_devices.len() > 2 * WORST_DEVICES_MAX {
                    keep_worst(&mut report.worst_devices);
                }
            }
        }
        keep_worst(&mut report.worst_devices);
        report
    }

    fn stream(&mut self, device: &str, boot: u32) -> &mut Stream {
        // Two look-ups, but no new name for each row.
        if !self.devices.contains_key(device) {
            self.devices.insert(device.to_owned(), BTreeMap::new());
        }
        self.devices.get_mut(device).expect("just put in").entry(boot).or_default()
    }

    /// Notes where the gateway put the event; what is before the partition in its id names the
    /// gateway and its store's life.
    fn place(&mut self, row: &ReceivedRow<'_>) {
        let Some(place) = row.place else { return };
        let store = row.id.rsplitn(3, '/').nth(2).unwrap_or("");
        if !self.partitions.contains_key(store) {
            self.partitions.insert(store.to_owned(), Vec::new());
        }
        let partitions = self.partitions.get_mut(store).expect("just put in");
        let at = usize::from(place.partition);
        if partitions.len() <= at {
            partitions.resize_with(at + 1, Numbers::default);
        }
        partitions[at].insert(0, place.seq);
    }
}

fn keep_worst(devices: &mut Vec<DeviceReport>) {
    devices.sort_by(|a, b| {
        (b.lost, b.out_of_order).cmp(&(a.lost, a.out_of_order)).then(a.device.cmp(&b.device))
    });
    devices.truncate(WORST_DEVICES_MAX);
}

/// Numbers in one block.
const BLOCK: u64 = 256;
const WORDS: usize = (BLOCK / 64) as usize;

/// `SETS` sets of numbers, kept as blocks of bits: dense runs cost a bit each, and a lone number
/// from a damaged file costs one block.
#[derive(Debug)]
struct Numbers<const SETS: usize>(BTreeMap<u64, [[u64; WORDS]; SETS]>);

impl<const SETS: usize> Default for Numbers<SETS> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<const SETS: usize> Numbers<SETS> {
    /// `false` when it was in already.
    fn insert(&mut self, set: usize, number: u64) -> bool {
        let block = self.0.entry(number / BLOCK).or_insert([[0; WORDS]; SETS]);
        let (word, bit) = place_in_block(number);
        let new = block[set][word] & bit == 0;
        block[set][word] |= bit;
        new
    }

    fn contains(&self, set: usize, number: u64) -> bool {
        let (word, bit) = place_in_block(number);
        self.0.get(&(number / BLOCK)).is_some_and(|block| block[set][word] & bit != 0)
    }

    /// How many numbers are in `set` and not in `other`, and the lowest of them.
    fn count_without(&self, set: usize, other: usize) -> (u64, Option<u64>) {
        let (mut count, mut lowest) = (0, None);
        for (number, block) in &self.0 {
            for (word, (has, has_other)) in block[set].iter().zip(&block[other]).enumerate() {
                let missing = has & !has_other;
                count += u64::from(missing.count_ones());
                if missing != 0 && lowest.is_none() {
                    let bit = u64::from(missing.trailing_zeros());
                    lowest = Some(number * BLOCK + word as u64 * 64 + bit);
                }
            }
        }
        (count, lowest)
    }

    /// How many numbers are missing between the lowest and the highest of the first set.
    fn gaps(&self) -> u64 {
        let numbers = || {
            self.0.iter().flat_map(|(number, block)| {
                (0..WORDS).map(move |word| (number * BLOCK + word as u64 * 64, block[0][word]))
            })
        };
        let count: u64 = numbers().map(|(_, bits)| u64::from(bits.count_ones())).sum();
        let first = numbers().find(|(_, bits)| *bits != 0);
        let last = numbers().rfind(|(_, bits)| *bits != 0);
        let (Some((first, low)), Some((last, high))) = (first, last) else {
            return 0;
        };
        let first = first + u64::from(low.trailing_zeros());
        let last = last + u64::from(high.ilog2());
        // The span less one, less the numbers but one: never past the range of u64.
        (last - first) - (count - 1)
    }
}

fn place_in_block(number: u64) -> (usize, u64) {
    ((number % BLOCK / 64) as usize, 1 << (number % 64))
}

/// Audits two ledger files.
///
/// # Errors
/// A ledger that cannot be read: see [`LedgerError`].
pub fn audit(sent: &Path, received: &Path) -> Result<AuditReport, LedgerError> {
    let mut audit = Audit::default();
    ledger::read_sent(sent, |row| audit.sent(&row))?;
    ledger::read_received(received, |row| audit.received(&row))?;
    Ok(audit.finish())
}

#[cfg(test)]
mod tests {
    use std::{borrow::Cow, collections::BTreeSet};

    use proptest::prelude::*;

    use super::*;
    use crate::ledger::{Origin, Place};

    fn sent(device: &str, boot: u32, seq: u64, acked: bool) -> SentRow<'_> {
        let acked_us = acked.then_some(2);
        SentRow { device: Cow::Borrowed(device), boot, seq, sent_us: 1, acked_us }
    }

    fn received(device: &str, boot: u32, seq: u64) -> ReceivedRow<'_> {
        ReceivedRow {
            arrival: 0,
            received_us: 3,
            device: Cow::Borrowed(device),
            origin: Some(Origin { boot, seq }),
            place: None,
            id: Cow::Borrowed(""),
        }
    }

    fn audit_of(sent_rows: &[(u64, bool)], received_rows: &[u64]) -> AuditReport {
        let mut audit = Audit::default();
        for (seq, acked) in sent_rows {
            audit.sent(&sent("a", 1, *seq, *acked));
        }
        for seq in received_rows {
            audit.received(&received("a", 1, *seq));
        }
        audit.finish()
    }

    #[test]
    fn a_resend_after_a_lost_ack_is_a_duplicate_not_disorder() {
        let report = audit_of(&[(1, true), (2, true), (3, true)], &[1, 2, 1, 2, 3]);
        assert_eq!((report.duplicates, report.out_of_order, report.lost), (2, 0, 0));
        assert!(report.is_clean());
    }

    #[test]
    fn a_first_arrival_after_a_later_one_is_disorder() {
        let report = audit_of(&[(1, true), (2, true), (3, true)], &[1, 3, 2]);
        assert_eq!((report.out_of_order, report.duplicates), (1, 0));
        assert!(!report.is_clean());
    }

    #[test]
    fn only_the_acked_can_be_lost() {
        let report = audit_of(&[(1, true), (2, false), (3, true), (4, false)], &[1, 4]);
        assert_eq!((report.lost, report.delivered, report.unacked_received), (1, 2, 1));
        assert_eq!(report.worst_devices[0].first_lost, Some((1, 3)));
    }

    #[test]
    fn order_is_judged_within_one_boot() {
        let mut audit = Audit::default();
        for (boot, seq) in [(7, 1), (7, 2), (9, 1)] {
            audit.sent(&sent("a", boot, seq, true));
            audit.received(&received("a", boot, seq));
        }
        let report = audit.finish();
        assert_eq!((report.out_of_order, report.lost, report.devices), (0, 0, 1));
    }

    #[test]
    fn gaps_are_counted_per_store_and_partition() {
        let mut audit = Audit::default();
        for (id, partition, seq) in [
            ("edge/01/aa/0/5", 0, 5),
            ("edge/01/aa/0/8", 0, 8),
            ("edge/01/aa/1/1", 1, 1),
            ("edge/01/bb/0/100", 0, 100),
            ("edge/01/aa/0/8", 0, 8),
        ] {
            audit.received(&ReceivedRow {
                origin: None,
                place: Some(Place { partition, seq }),
                id: Cow::Borrowed(id),
                ..received("a", 0, 0)
            });
        }
        let report = audit.finish();
        assert_eq!((report.gateway_gaps, report.foreign), (2, 5));
    }

    #[test]
    fn the_ends_of_the_range_are_numbers_like_others() {
        let report = audit_of(&[(0, true), (u64::MAX, true)], &[0, u64::MAX]);
        assert_eq!((report.delivered, report.lost), (2, 0));
        let mut numbers = Numbers::<1>::default();
        numbers.insert(0, 0);
        numbers.insert(0, u64::MAX);
        assert_eq!(numbers.gaps(), u64::MAX - 1);
    }

    #[derive(Clone, Debug)]
    struct Ledgers {
        sent: Vec<(u8, u32, u64, bool)>,
        received: Vec<(u8, u32, u64)>,
    }

    fn ledgers() -> impl Strategy<Value = Ledgers> {
        // Small ranges, so that rows meet; around a block's border.
        let seq = 250_u64..262;
        (
            proptest::collection::vec((0..3_u8, 0..2_u32, seq.clone(), any::<bool>()), 0..60),
            proptest::collection::vec((0..3_u8, 0..2_u32, seq), 0..60),
        )
            .prop_map(|(sent, received)| Ledgers { sent, received })
    }

    proptest! {
        /// Against an oracle of plain sets and loops.
        #[test]
        fn it_agrees_with_a_naive_oracle(Ledgers { sent: s, received: r } in ledgers()) {
            let name = |device: u8| format!("dev-{device}");
            let mut audit = Audit::default();
            for &(device, boot, seq, acked) in &s {
                audit.sent(&sent(&name(device), boot, seq, acked));
            }
            for &(device, boot, seq) in &r {
                audit.received(&received(&name(device), boot, seq));
            }
            let report = audit.finish();

            let sent_set: BTreeSet<_> = s.iter().map(|&(d, b, q, _)| (d, b, q)).collect();
            let acked: BTreeSet<_> = s.iter().filter(|row| row.3).map(|&(d, b, q, _)| (d, b, q)).collect();
            let arrived: BTreeSet<_> = r.iter().copied().collect();
            let firsts: Vec<_> =
                (0..r.len()).filter(|&i| !r[..i].contains(&r[i])).map(|i| r[i]).collect();
            let disorder = (0..firsts.len())
                .filter(|&i| firsts[..i].iter().any(|e| (e.0, e.1) == (firsts[i].0, firsts[i].1) && e.2 > firsts[i].2))
                .count();
            prop_assert_eq!(report.sent, sent_set.len() as u64);
            prop_assert_eq!(report.acked, acked.len() as u64);
            prop_assert_eq!(report.received, r.len() as u64);
            prop_assert_eq!(report.delivered, sent_set.intersection(&arrived).count() as u64);
            prop_assert_eq!(report.lost, acked.difference(&arrived).count() as u64);
            prop_assert_eq!(report.unknown, arrived.difference(&sent_set).count() as u64);
            prop_assert_eq!(report.duplicates, (r.len() - arrived.len()) as u64);
            prop_assert_eq!(report.out_of_order, disorder as u64);
            prop_assert_eq!(report.received,
                report.delivered + report.duplicates + report.unknown + report.foreign);
            prop_assert_eq!(report.worst_devices.iter().map(|d| d.lost).sum::<u64>(), report.lost);
        }
    }
}
