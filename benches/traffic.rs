//! What the benches of the log share: the events that it gets, a writer that can wait until they
//! are durable, and what the system counts for the disk.
//!
//! Topic `devices/dev-000123/telemetry`, key `dev-000123`, a random payload that no codec makes
//! smaller. The events of a batch come from 1,000 devices in turn, which are spread evenly over 16
//! partitions. Event bytes are payload + topic + key.
//!
//! Deliberately absent: the gateway. These benches stand on `storage` alone, and so link in no time.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::{Context, ensure};
use storage::{Attribute, Attributes, Event, Writer};

pub(crate) const PARTITIONS: u16 = 16;
const DEVICES: usize = 1000;

pub(crate) fn events(batch: usize, payload_bytes: usize) -> Vec<Event> {
    (0..batch)
        .map(|index| {
            let number = index % DEVICES;
            let device = format!("dev-{number:06}");
            Event {
                partition: number as u16 % PARTITIONS,
                received_us: now_us(),
                topic: format!("devices/{device}/telemetry").into(),
                device_key: device.into(),
                attributes: Attributes::encode([Attribute::QoS(1)]),
                payload: (0..payload_bytes).map(|_| fastrand::u8(..)).collect(),
            }
        })
        .collect()
}

pub(crate) fn event_bytes(events: &[Event]) -> u64 {
    events.iter().map(|e| (e.payload.len() + e.topic.len() + e.device_key.len()) as u64).sum()
}

pub(crate) fn now_us() -> u64 {
    SystemTime::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_micros() as u64)
}

/// A writer, and how far it is durable: its commits may return before that.
pub(crate) struct Durable {
    pub(crate) writer: Writer,
    commit: Arc<(Mutex<u64>, Condvar)>,
}

impl Durable {
    pub(crate) fn new(mut writer: Writer) -> Self {
        let commit = Arc::new((Mutex::new(0), Condvar::new()));
        let told = commit.clone();
        writer.on_durable(move |mark| {
            *told.0.lock().unwrap_or_else(PoisonError::into_inner) = mark.commit;
            told.1.notify_one();
        });
        Self { writer, commit }
    }

    /// Waits until a commit is durable.
    pub(crate) fn wait(&self, commit: u64) -> anyhow::Result<()> {
        let (durable, raised) = &*self.commit;
        let durable = durable.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = raised.wait_timeout_while(durable, Duration::from_mins(1), |c| *c < commit);
        let (_durable, waited) = waited.unwrap_or_else(PoisonError::into_inner);
        ensure!(!waited.timed_out(), "commit {commit} does not become durable");
        Ok(())
    }
}

/// Bytes that were written to the device under a folder, by whoever: only a quiet machine counts right.
/// The file system's own journal is in it. What the process has made dirty would say less: the system
/// counts that in the unit in which its page cache happens to hold a file. Only where there is no such
/// device, as in memory, it has to do.
pub(crate) fn written_bytes(dir: &Path) -> anyhow::Result<u64> {
    const SECTOR_BYTES: u64 = 512; // the unit of these counters, whatever the device
    let device = std::fs::metadata(dir)?.dev();
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    if let Ok(stat) = std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/stat")) {
        let sectors = stat.split_whitespace().nth(6).context("no sectors written in its stat")?;
        return Ok(sectors.parse::<u64>()? * SECTOR_BYTES);
    }
    let io = std::fs::read_to_string("/proc/self/io")?;
    let bytes = io.lines().find_map(|line| line.strip_prefix("write_bytes: "));
    Ok(bytes.context("no write_bytes in /proc/self/io")?.parse()?)
}
