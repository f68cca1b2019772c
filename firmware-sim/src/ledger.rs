//! The two ledgers that an audit compares: what a fleet sent, and what arrived upstream.
//!
//! Both are CSV (RFC 4180) with one header line, one row per line; times are microseconds since
//! the Unix epoch, an absent value is an empty field.
//!
//! | ledger | columns |
//! | --- | --- |
//! | sent | [`SENT_HEADER`]: one row per event that was published at least once; `acked_us` is empty when no ack arrived |
//! | received | [`RECEIVED_HEADER`]: one row per event that arrived, in order of arrival; `boot` and `seq` are empty when the payload is not a fleet's, `partition` and `gateway_seq` when no gateway numbered it |
//!
//! Invariant: a row is written whole or, after a crash, cut off by [`append_to`]; what a reader
//! cannot parse is an error with its line, never skipped.
//! Deliberately absent: what the ledgers mean (see `audit`).

use std::{
    borrow::Cow,
    fmt::Display,
    fs::{File, OpenOptions},
    io::{self, BufRead, BufReader, BufWriter, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    thread::JoinHandle,
};

use tokio::sync::mpsc;

use crate::frame::DeviceId;

/// Columns of the sent ledger.
pub const SENT_HEADER: &str = "device,boot,seq,sent_us,acked_us";
/// Columns of the received ledger.
pub const RECEIVED_HEADER: &str = "arrival,received_us,device,boot,seq,partition,gateway_seq,id";

/// Longest line of a ledger that is read; longer ones are an error.
const LINE_BYTES_MAX: u64 = 1 << 20;

/// One event that a device published at least once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SentRow<'a> {
    /// Name of the device.
    pub device: Cow<'a, str>,
    /// Which life of the device.
    pub boot: u32,
    /// Device sequence number.
    pub seq: u64,
    /// When it was first published.
    pub sent_us: u64,
    /// When its ack arrived.
    pub acked_us: Option<u64>,
}

/// One event that arrived upstream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReceivedRow<'a> {
    /// Position in the order of arrival, from 0.
    pub arrival: u64,
    /// When it arrived.
    pub received_us: u64,
    /// Name of the device: from the payload, else the source of the event.
    pub device: Cow<'a, str>,
    /// Boot id and device sequence number, when the payload is a fleet's.
    pub origin: Option<Origin>,
    /// Partition and sequence number that the gateway gave it.
    pub place: Option<Place>,
    /// The event's id.
    pub id: Cow<'a, str>,
}

/// Which event of its device a payload is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// Which life of the device.
    pub boot: u32,
    /// Device sequence number.
    pub seq: u64,
}

/// Where a gateway put an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Partition.
    pub partition: u16,
    /// Sequence number within the partition.
    pub seq: u64,
}

impl<'a> SentRow<'a> {
    /// Appends the row, with its line end, to `out`.
    pub fn write_to(&self, out: &mut Vec<u8>) {
        put_text(out, &self.device);
        put(out, self.boot);
        put(out, self.seq);
        put(out, self.sent_us);
        put_option(out, self.acked_us);
        out.push(b'\n');
    }

    fn parse(line: &'a str) -> Option<Self> {
        let mut fields = Fields(Some(line));
        let row = Self {
            device: fields.text()?,
            boot: fields.number()?,
            seq: fields.number()?,
            sent_us: fields.number()?,
            acked_us: if fields.skip_absent_end() { None } else { Some(fields.number()?) },
        };
        fields.end().then_some(row)
    }
}

impl<'a> ReceivedRow<'a> {
    /// Appends the row, with its line end, to `out`.
    pub fn write_to(&self, out: &mut Vec<u8>) {
        // A Vec takes everything.
        let _ = write!(out, "{}", self.arrival);
        put(out, self.received_us);
        out.push(b',');
        put_text(out, &self.device);
        put_option(out, self.origin.map(|origin| origin.boot));
        put_option(out, self.origin.map(|origin| origin.seq));
        put_option(out, self.place.map(|place| place.partition));
        put_option(out, self.place.map(|place| place.seq));
        out.push(b',');
        put_text(out, &self.id);
        out.push(b'\n');
    }

    fn parse(line: &'a str) -> Option<Self> {
        let mut fields = Fields(Some(line));
        let arrival = fields.number()?;
        let received_us = fields.number()?;
        let device = fields.text()?;
        let origin = if fields.skip_two_absent() {
            None
        } else {
            Some(Origin { boot: fields.number()?, seq: fields.number()? })
        };
        let place = if fields.skip_two_absent() {
            None
        } else {
            Some(Place { partition: fields.number()?, seq: fields.number()? })
        };
        let id = fields.text()?;
        let row = Self { arrival, received_us, device, origin, place, id };
        fields.end().then_some(row)
    }
}

fn put(out: &mut Vec<u8>, value: impl Display) {
    // A Vec takes everything.
    let _ = write!(out, ",{value}");
}

fn put_option(out: &mut Vec<u8>, value: Option<impl Display>) {
    match value {
        Some(value) => put(out, value),
        None => out.push(b','),
    }
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    if text.contains([',', '"']) {
        out.push(b'"');
        out.extend_from_slice(text.replace('"', "\"\"").as_bytes());
        out.push(b'"');
    } else {
        out.extend_from_slice(text.as_bytes());
    }
}

/// What is left of a line; `None` after its last field.
struct Fields<'a>(Option<&'a str>);

impl<'a> Fields<'a> {
    fn raw(&mut self) -> Option<&'a str> {
        let line = self.0?;
        let (field, rest) = match line.split_once(',') {
            Some((field, rest)) => (field, Some(rest)),
            None => (line, None),
        };
        self.0 = rest;
        Some(field)
    }

    fn number<T: std::str::FromStr>(&mut self) -> Option<T> {
        self.raw()?.parse().ok()
    }

    /// Passes two empty fields that have others after them, if they are next.
    fn skip_two_absent(&mut self) -> bool {
        let Some(rest) = self.0.and_then(|rest| rest.strip_prefix(",,")) else {
            return false;
        };
        self.0 = Some(rest);
        true
    }

    /// Passes the last field, if it is empty.
    fn skip_absent_end(&mut self) -> bool {
        let absent = self.0 == Some("");
        if absent {
            self.0 = None;
        }
        absent
    }

    fn end(&self) -> bool {
        self.0.is_none()
    }

    fn text(&mut self) -> Option<Cow<'a, str>> {
        let Some(quoted) = self.0?.strip_prefix('"') else {
            return self.raw().map(Cow::Borrowed);
        };
        // The closing quote is the first that is not doubled.
        let mut end = 0;
        loop {
            end += quoted[end..].find('"')?;
            if quoted[end + 1..].starts_with('"') {
                end += 2;
            } else {
                break;
            }
        }
        let text = quoted[..end].replace("\"\"", "\"");
        let rest = &quoted[end + 1..];
        self.0 = if rest.is_empty() { None } else { Some(rest.strip_prefix(',')?) };
        Some(Cow::Owned(text))
    }
}

/// A ledger that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// It cannot be opened or read.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The first line is not the header of this kind of ledger.
    #[error("{} is not such a ledger: its first line must be \"{expected}\"", path.display())]
    Header {
        /// Which file.
        path: PathBuf,
        /// The header it should have.
        expected: &'static str,
    },
    /// A line is not a row.
    #[error("{}, line {line}: not a row of this ledger", path.display())]
    Row {
        /// Which file.
        path: PathBuf,
        /// Line number, from 1.
        line: u64,
    },
}

/// Reads a sent ledger row by row, in constant memory.
///
/// # Errors
/// See [`LedgerError`].
pub fn read_sent(path: &Path, mut row: impl FnMut(SentRow<'_>)) -> Result<(), LedgerError> {
    read(path, SENT_HEADER, |line| SentRow::parse(line).map(&mut row))
}

/// Reads a received ledger row by row, in constant memory.
///
/// # Errors
/// See [`LedgerError`].
pub fn read_received(path: &Path, mut row: impl FnMut(ReceivedRow<'_>)) -> Result<(), LedgerError> {
    read(path, RECEIVED_HEADER, |line| ReceivedRow::parse(line).map(&mut row))
}

fn read(
    path: &Path,
    header: &'static str,
    mut take: impl FnMut(&str) -> Option<()>,
) -> Result<(), LedgerError> {
    let io_error = |source| LedgerError::Io { path: path.to_owned(), source };
    let mut file = BufReader::with_capacity(1 << 16, File::open(path).map_err(io_error)?);
    let mut line = String::new();
    for number in 1.. {
        line.clear();
        let bad = || LedgerError::Row { path: path.to_owned(), line: number };
        match file.by_ref().take(LINE_BYTES_MAX).read_line(&mut line) {
            Ok(0) if number > 1 => break,
            Ok(_) => {}
            Err(source) if source.kind() == io::ErrorKind::InvalidData => return Err(bad()),
            Err(source) => return Err(io_error(source)),
        }
        let row = line.strip_suffix('\n').map(|row| row.strip_suffix('\r').unwrap_or(row));
        if number == 1 {
            if row != Some(header) {
                return Err(LedgerError::Header { path: path.to_owned(), expected: header });
            }
        } else {
            row.and_then(&mut take).ok_or_else(bad)?;
        }
    }
    Ok(())
}

/// Opens a ledger to add rows, and gives the number of rows that it holds. A new or empty file
/// gets the header. A last line without its end, left behind by a crash, is cut off.
///
/// # Errors
/// I/O, and [`io::ErrorKind::InvalidData`] when the file has another header.
pub fn append_to(path: &Path, header: &'static str) -> io::Result<(File, u64)> {
    let mut file = OpenOptions::new().read(true).append(true).create(true).open(path)?;
    let (mut lines, mut whole_bytes) = (0, 0);
    let mut reader = BufReader::with_capacity(1 << 16, &file);
    let mut line = Vec::new();
    loop {
        line.clear();
        reader.by_ref().take(LINE_BYTES_MAX).read_until(b'\n', &mut line)?;
        if line.last() != Some(&b'\n') {
            break;
        }
        if lines == 0 && line.trim_ascii_end() != header.as_bytes() {
            let message = format!("exists and is not such a ledger: no header \"{header}\"");
            return Err(io::Error::new(io::ErrorKind::InvalidData, message));
        }
        lines += 1;
        whole_bytes += line.len() as u64;
    }
    if lines == 0 && !header.as_bytes().starts_with(&line) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "exists and is not a ledger"));
    }
    file.set_len(whole_bytes)?;
    file.seek(SeekFrom::End(0))?;
    if lines == 0 {
        file.write_all(header.as_bytes())?;
        file.write_all(b"\n")?;
        lines = 1;
    }
    Ok((file, lines - 1))
}

/// Rows that wait for the ledger's thread; senders wait when it is full.
const SENT_QUEUE_ROWS: usize = 16 * 1024;

/// One row of the sent ledger on its way to the file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct QueuedRow {
    pub(crate) device: DeviceId,
    pub(crate) boot: u32,
    pub(crate) seq: u64,
    pub(crate) sent_us: u64,
    pub(crate) acked_us: Option<u64>,
}

/// Writes the sent ledger on a thread of its own, so that no device waits for a disk.
#[derive(Debug)]
pub(crate) struct SentLedger {
    thread: JoinHandle<io::Result<()>>,
}

impl SentLedger {
    /// Creates the file, or empties it, and starts the thread. It ends when every sender is gone.
    pub(crate) fn create(path: &Path) -> io::Result<(Self, mpsc::Sender<QueuedRow>)> {
        let mut file = BufWriter::with_capacity(1 << 16, File::create(path)?);
        writeln!(file, "{SENT_HEADER}")?;
        let (rows, queue) = mpsc::channel(SENT_QUEUE_ROWS);
        let thread = std::thread::Builder::new()
            .name("sent-ledger".to_owned())
            .spawn(move || write_sent(file, queue))?;
        Ok((Self { thread }, rows))
    }

    /// Waits until every row is written. Call it after the last sender is gone, and not on an
    /// async worker.
    pub(crate) fn finish(self) -> io::Result<()> {
        self.thread.join().map_err(|_| io::Error::other("the ledger's thread panicked"))?
    }
}

fn write_sent(mut file: BufWriter<File>, mut queue: mpsc::Receiver<QueuedRow>) -> io::Result<()> {
    let (mut rows, mut text) = (Vec::new(), Vec::new());
    while queue.blocking_recv_many(&mut rows, 1024) > 0 {
        text.clear();
        for QueuedRow { device, boot, seq, sent_us, acked_us } in rows.drain(..) {
            let device = Cow::Owned(device.to_string());
            SentRow { device, boot, seq, sent_us, acked_us }.write_to(&mut text);
        }
        file.write_all(&text)?;
        // Nothing waits: let others see what happened so far.
        if queue.is_empty() {
            file.flush()?;
        }
    }
    file.flush()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn text() -> impl Strategy<Value = Cow<'static, str>> {
        prop_oneof!["dev-[0-9]{6}", "[a,\"é ]{0,8}"].prop_map(Cow::Owned)
    }

    proptest! {
        #[test]
        fn a_sent_row_round_trips(
            device in text(),
            boot in any::<u32>(),
            seq in any::<u64>(),
            sent_us in any::<u64>(),
            acked_us in any::<Option<u64>>(),
        ) {
            let row = SentRow { device, boot, seq, sent_us, acked_us };
            let mut line = Vec::new();
            row.write_to(&mut line);
            let line = String::from_utf8(line).unwrap();
            prop_assert_eq!(SentRow::parse(line.trim_end_matches('\n')), Some(row));
        }

        #[test]
        fn a_received_row_round_trips(
            arrival in any::<u64>(),
            received_us in any::<u64>(),
            device in text(),
            origin in any::<Option<(u32, u64)>>(),
            place in any::<Option<(u16, u64)>>(),
            id in text(),
        ) {
            let origin = origin.map(|(boot, seq)| Origin { boot, seq });
            let place = place.map(|(partition, seq)| Place { partition, seq });
            let row = ReceivedRow { arrival, received_us, device, origin, place, id };
            let mut line = Vec::new();
            row.write_to(&mut line);
            let line = String::from_utf8(line).unwrap();
            prop_assert_eq!(ReceivedRow::parse(line.trim_end_matches('\n')), Some(row));
        }

        #[test]
        fn arbitrary_lines_never_panic(line in "[0-9,\"a]{0,40}") {
            let _ = (SentRow::parse(&line), ReceivedRow::parse(&line));
        }
    }

    #[test]
    fn a_row_cut_off_by_a_crash_is_removed_and_the_rest_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ledger");
        std::fs::write(&path, format!("{RECEIVED_HEADER}\n0,1,a,1,1,,,x\n1,2,a,1")).unwrap();
        let (mut file, rows) = append_to(&path, RECEIVED_HEADER).unwrap();
        assert_eq!(rows, 1);
        file.write_all(b"1,3,a,1,2,0,7,y\n").unwrap();
        let mut seen = Vec::new();
        read_received(&path, |row| {
            seen.push((row.arrival, row.place.map(|place| place.seq)));
        })
        .unwrap();
        assert_eq!(seen, [(0, None), (1, Some(7))]);
    }

    #[test]
    fn a_file_that_is_no_ledger_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        for content in ["my holiday photos\nmore\n", "no line end"] {
            let path = folder.path().join("other");
            std::fs::write(&path, content).unwrap();
            assert!(append_to(&path, RECEIVED_HEADER).is_err());
            assert_eq!(std::fs::read_to_string(&path).unwrap(), content);
        }
    }

    #[test]
    fn a_bad_line_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sent");
        std::fs::write(&path, format!("{SENT_HEADER}\na,1,1,5,\na,1,x,5,\n")).unwrap();
        let error = read_sent(&path, |_| ()).unwrap_err();
        assert!(matches!(error, LedgerError::Row { line: 3, .. }), "{error}");
        std::fs::write(&path, format!("{RECEIVED_HEADER}\n")).unwrap();
        assert!(matches!(read_sent(&path, |_| ()), Err(LedgerError::Header { .. })));
    }
}
