//! The file sink: structured CloudEvents, one a line, in a file that is rotated by size.
//!
//! Owns: the file and those rotated away from it (`path.1` is the youngest).
//! Invariants:
//! - A request is delivered once `fdatasync` has returned, and the names of new files are synced
//!   with their folder.
//! - The file holds whole lines: what a crash or a full disk tore is cut off before anything else is
//!   written, so a request is in it once or, after a failure, again as a whole.
//!
//! Deliberately absent: readers of the file, and sharing it with another writer.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use tokio::task::JoinSet;

use crate::cloudevents::{Envelope, Framing};
use crate::config::FileConfig;
use crate::sink::{Answer, Failure, Request, RequestId, Sink, Window};

/// Writes requests to a local file.
pub(crate) struct FileSink {
    /// Away while a request is being written.
    writer: Option<Writer>,
    writes: JoinSet<(Writer, RequestId, Answer)>,
}

impl FileSink {
    pub(crate) fn new(config: FileConfig, envelope: Envelope) -> Self {
        let writer = Writer { config, envelope, open: None, lines: Vec::new() };
        Self { writer: Some(writer), writes: JoinSet::new() }
    }
}

impl Sink for FileSink {
    fn window(&self) -> Window {
        Window { requests_max: 1, events_max: usize::MAX, bytes_max: usize::MAX }
    }

    fn begin(&mut self, request: Request) {
        let mut writer = self.writer.take().expect("one request at a time");
        self.writes.spawn_blocking(move || {
            let answer = match writer.write(&request) {
                Ok(()) => Answer::delivered(),
                Err(error) => writer.sort(&error),
            };
            (writer, request.id, answer)
        });
    }

    async fn answer(&mut self) -> (RequestId, Answer) {
        match self.writes.join_next().await {
            Some(Ok((writer, id, answer))) => {
                self.writer = Some(writer);
                (id, answer)
            }
            // A bug of ours: it ends this sink's task and no other.
            Some(Err(error)) => std::panic::resume_unwind(error.into_panic()),
            None => std::future::pending().await,
        }
    }
}

struct Writer {
    config: FileConfig,
    envelope: Envelope,
    open: Option<Open>,
    /// Kept for its capacity.
    lines: Vec<u8>,
}

/// The current file; everything in it is whole lines, synced.
struct Open {
    file: File,
    len_bytes: u64,
}

impl Writer {
    fn write(&mut self, request: &Request) -> io::Result<()> {
        // Taken, and put back only when all went well: after a failure nothing is known about the
        // end of the file, and opening it again cuts it clean.
        let mut open = match self.open.take() {
            Some(open) => open,
            None => Open::at(&self.config.path)?,
        };
        if open.len_bytes >= self.config.rotate_bytes {
            drop(open);
            self.rotate()?;
            open = Open::at(&self.config.path)?;
        }
        self.lines.clear();
        let events = request.events.iter();
        self.envelope.write_all(&mut self.lines, events, request.stream, Framing::Lines);
        if let Err(error) = open.append(&self.lines) {
            open.take_back();
            return Err(error);
        }
        self.open = Some(open);
        Ok(())
    }

    /// Moves every file one number up; the one that leaves the range is removed.
    fn rotate(&self) -> io::Result<()> {
        let path = &self.config.path;
        let keep = self.config.rotate_keep;
        for number in (0..keep).rev() {
            let from = if number == 0 { path.clone() } else { numbered(path, number) };
            match std::fs::rename(from, numbered(path, number + 1)) {
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        if keep == 0 {
            std::fs::remove_file(path)?;
        }
        Ok(())
    }

    /// A place that is wrong is held for somebody to mend; a disk that is full or failing may mend.
    fn sort(&self, error: &io::Error) -> Answer {
        let path = self.config.path.display();
        match error.kind() {
            ErrorKind::NotFound
            | ErrorKind::PermissionDenied
            | ErrorKind::IsADirectory
            | ErrorKind::NotADirectory
            | ErrorKind::ReadOnlyFilesystem
            // Not a regular file.
            | ErrorKind::InvalidInput => {
                let advice = "check that its folder exists and is writable";
                Answer::failed(
                    Failure::Hold,
                    format!("cannot write {path}: {error}; {advice}"),
                )
            }
            _ => Answer::failed(
                Failure::Retry { after: None },
                format!("writing {path} failed: {error}"),
            ),
        }
    }
}

impl Open {
    fn at(path: &Path) -> io::Result<Self> {
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        let len_bytes = whole_lines(&mut file)?;
        file.set_len(len_bytes)?;
        file.seek(SeekFrom::Start(len_bytes))?;
        file.sync_data()?;
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        File::open(folder.unwrap_or(Path::new(".")))?.sync_all()?;
        Ok(Self { file, len_bytes })
    }

    fn append(&mut self, lines: &[u8]) -> io::Result<()> {
        self.file.write_all(lines)?;
        self.file.sync_data()?;
        self.len_bytes += lines.len() as u64;
        Ok(())
    }

    /// Removes what a failed append left behind, where the disk lets it: a torn line would go at the
    /// next opening, but whole lines would stay and come twice.
    fn take_back(self) {
        let _ = self.file.set_len(self.len_bytes);
    }
}

/// Length in bytes up to and with the last line break.
fn whole_lines(file: &mut File) -> io::Result<u64> {
    const BLOCK_BYTES: u64 = 64 * 1024;
    let mut end = file.metadata()?.len();
    let mut block = Vec::new();
    while end > 0 {
        let start = end.saturating_sub(BLOCK_BYTES);
        block.clear();
        file.seek(SeekFrom::Start(start))?;
        io::Read::by_ref(file).take(end - start).read_to_end(&mut block)?;
        if let Some(place) = block.iter().rposition(|&byte| byte == b'\n') {
            return Ok(start + place as u64 + 1);
        }
        end = start;
    }
    Ok(0)
}

/// `path.number`.
fn numbered(path: &Path, number: u32) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{number}"));
    name.into()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::Value;

    use super::*;
    use crate::config::SinkConfig;
    use crate::fake;

    fn sink(path: &Path, rotate_bytes: u64, rotate_keep: u32) -> FileSink {
        let config = FileConfig { path: path.into(), rotate_bytes, rotate_keep };
        FileSink::new(config, Envelope::new(&fake::origin(), SinkConfig::EVENT_TYPE))
    }

    async fn write(sink: &mut FileSink, offset: u64) -> Answer {
        let events = Arc::new(vec![fake::stored(offset, "dev", &"x".repeat(100))]);
        sink.begin(Request { id: offset, stream: None, events });
        let (id, answer) = sink.answer().await;
        assert_eq!(id, offset);
        answer
    }

    fn seqs(path: &Path) -> Vec<u64> {
        let text = std::fs::read_to_string(path).expect("a file");
        assert!(text.ends_with('\n'), "whole lines only");
        let seq = |line| {
            let event: Value = serde_json::from_str(line).expect("a line is JSON");
            event["sequence"].as_str().and_then(|s| s.parse().ok()).expect("a number")
        };
        text.lines().map(seq).collect()
    }

    #[tokio::test]
    async fn requests_are_appended_also_after_a_restart() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("events.ndjson");
        for offset in 0..4 {
            let mut sink = sink(&path, 1 << 20, 1);
            assert_eq!(write(&mut sink, offset).await, Answer::delivered());
        }
        assert_eq!(seqs(&path), [0, 1, 2, 3]);
    }

    #[tokio::test]
    async fn a_line_torn_by_a_crash_is_cut_off() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("events.ndjson");
        write(&mut sink(&path, 1 << 20, 1), 0).await;
        let whole = std::fs::read(&path).expect("a file");
        for torn_bytes in [1, 100, 64 * 1024, 200_000] {
            let torn = [&whole[..], &vec![b'x'; torn_bytes]].concat();
            std::fs::write(&path, torn).expect("written");
            write(&mut sink(&path, 1 << 20, 1), 1).await;
            assert_eq!(seqs(&path), [0, 1]);
        }
        std::fs::write(&path, "no line at all").expect("written");
        write(&mut sink(&path, 1 << 20, 1), 2).await;
        assert_eq!(seqs(&path), [2]);
    }

    #[tokio::test]
    async fn rotation_keeps_the_youngest() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("events.ndjson");
        let mut sink = sink(&path, 1, 2);
        for offset in 0..5 {
            assert_eq!(write(&mut sink, offset).await, Answer::delivered());
        }
        assert_eq!(seqs(&path), [4]);
        assert_eq!(seqs(&numbered(&path, 1)), [3]);
        assert_eq!(seqs(&numbered(&path, 2)), [2]);
        assert!(!numbered(&path, 3).exists());
    }

    #[tokio::test]
    async fn rotation_may_keep_nothing() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("events.ndjson");
        let mut sink = sink(&path, 1, 0);
        for offset in 0..3 {
            write(&mut sink, offset).await;
        }
        assert_eq!(seqs(&path), [2]);
        assert_eq!(std::fs::read_dir(dir.path()).expect("a folder").count(), 1);
    }

    #[tokio::test]
    async fn a_wrong_place_is_held_and_works_once_it_is_mended() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("later/events.ndjson");
        let mut sink = sink(&path, 1 << 20, 1);
        let answer = write(&mut sink, 0).await;
        assert_eq!(answer.failed[0].failure, Failure::Hold);
        assert!(answer.failed[0].reason.contains("events.ndjson"), "{answer:?}");
        std::fs::create_dir(dir.path().join("later")).expect("created");
        assert_eq!(write(&mut sink, 0).await, Answer::delivered());
        assert_eq!(seqs(&path), [0]);
    }

    #[tokio::test]
    async fn a_full_disk_is_a_retry_and_nothing_comes_twice() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("events.ndjson");
        let mut sink = sink(&path, 1 << 20, 1);
        assert_eq!(write(&mut sink, 0).await, Answer::delivered());
        // The next write finds no room.
        let writer = sink.writer.as_mut().expect("nothing in flight");
        let full = OpenOptions::new().write(true).open("/dev/full").expect("Linux has it");
        writer.open.as_mut().expect("open").file = full;
        let answer = write(&mut sink, 1).await;
        assert_eq!(answer.failed[0].failure, Failure::Retry { after: None });
        assert!(answer.failed[0].reason.contains("No space left"), "{answer:?}");
        assert_eq!(write(&mut sink, 1).await, Answer::delivered());
        assert_eq!(seqs(&path), [0, 1]);
    }

    #[tokio::test]
    async fn a_write_that_failed_is_taken_back() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("events.ndjson");
        let mut open = Open::at(&path).expect("opened");
        open.append(b"{}\n").expect("written");
        open.file.write_all(b"{}\n{}\n{").expect("written, but the sync fails");
        open.take_back();
        assert_eq!(std::fs::read(&path).expect("a file"), b"{}\n");
    }
}
