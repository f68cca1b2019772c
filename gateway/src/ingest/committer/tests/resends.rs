//! Resends that carry an id: stored once, acked after their original, counted, known after a restart,
//! and never taken for one whose original is not stored.

use bytes::Bytes;
use storage::{Attribute, SinkRetention, Store, StoreOptions};

use super::*;
use crate::config::DedupConfig;
use crate::ingest::Identity;
use crate::ingest::dedup::duplicates_of;
use crate::ingest::event_id::EventIdFrom;

fn dedup_config() -> DedupConfig {
    DedupConfig { devices_max: 4, window_events_max: 16, window_max: Duration::ZERO }
}

fn id_from() -> EventIdFrom {
    EventIdFrom::parse("property:id").expect("a place")
}

/// An event with an id, as a connection makes it.
fn identified(client: &mut Client, device: &str, id: &str, payload: &'static [u8]) -> Pending {
    let mut pending = client.next(0);
    pending.event.device_key = device.into();
    pending.event.attributes = Attributes::encode([Attribute::UserProperty("id", id)]);
    pending.event.payload = Bytes::from_static(payload);
    let id = id_from().of(&pending.event).expect("it has one");
    pending.identity = Some(Identity { id, riders: 0 });
    pending
}

fn bench(script: &[Answer]) -> Bench {
    let (log, record) = ScriptedLog::new(script);
    let dedup = Dedup::new(&dedup_config(), 0);
    Bench::with_dedup(log, record, AtQuota::Hold, &config(), Some(dedup))
}

impl Bench {
    fn push(&self, client: &mut Client, device: &str, id: &str) {
        let pending = identified(client, device, id, b"");
        self.ingest.try_push(pending).expect("room");
    }
    /// Number of events in each commit.
    fn stored(&self) -> Vec<usize> {
        self.commits().iter().map(|commit| commit.events.len()).collect()
    }
}

#[test]
fn two_connections_that_send_the_same_event_at_once_store_it_once_and_get_both_acks() {
    let mut bench = bench(&[]);
    let mut clients = [Client::default(), Client::default()];
    for client in &mut clients {
        bench.push(client, "d", "1");
    }
    bench.push(&mut clients[1], "e", "1");
    bench.turn();
    assert_eq!(bench.stored(), [2]);
    assert_eq!(clients.each_mut().map(Client::acks), [Some(1), Some(2)]);
    bench.push(&mut clients[0], "d", "1");
    bench.turn();
    assert_eq!((bench.stored(), clients[0].acks()), (vec![2, 0], Some(1)));
    assert_eq!(bench.ingest.stats().counters.duplicate_events, 2);
}

#[test]
fn a_resend_is_acked_no_sooner_than_its_original_is_durable() {
    let mut bench = bench(&[Answer::RunAhead, Answer::RunAhead, Answer::Ok]);
    let mut clients = [Client::default(), Client::default()];
    bench.push(&mut clients[0], "d", "1");
    bench.turn();
    bench.push(&mut clients[1], "d", "1");
    bench.turn();
    assert_eq!(clients.each_mut().map(Client::acks), [Some(0), Some(0)]);
    bench.push(&mut clients[0], "d", "2");
    bench.turn();
    assert_eq!(clients.each_mut().map(Client::acks), [Some(2), Some(1)]);
}

/// A loss, if the failed one were taken for stored.
#[test]
fn what_a_failed_commit_took_along_is_stored_when_it_is_sent_again() {
    let mut bench = bench(&[Answer::Ok, Answer::Io, Answer::Ok]);
    let mut clients = [Client::default(), Client::default()];
    bench.push(&mut clients[0], "d", "1");
    bench.turn();
    bench.push(&mut clients[0], "d", "2");
    bench.turn();
    assert_eq!(clients[0].acks(), None, "closed");
    bench.turn();
    for id in ["1", "2"] {
        bench.push(&mut clients[1], "d", id);
    }
    bench.turn();
    assert_eq!((bench.stored(), clients[1].acks()), (vec![1, 0, 1], Some(2)));
}

#[test]
fn a_resend_leaves_what_its_original_changed_and_gets_its_receipt() {
    let rider = |key: &'static [u8]| Control::Put {
        namespace: 1,
        key: Bytes::from_static(key),
        value: Bytes::new(),
    };
    let mut bench = bench(&[]);
    let mut client = Client::default();
    for _ in 0..2 {
        let mut pending = identified(&mut client, "d", "1", b"");
        pending.riders = Some([rider(b"receipt"), rider(b"kept")].into());
        pending.identity.as_mut().expect("it has one").riders = 1;
        bench.ingest.try_push(pending).expect("room");
        bench.turn();
    }
    let changes: Vec<_> = bench.commits().into_iter().map(|commit| commit.changes).collect();
    assert_eq!(changes, [b"rk".to_vec(), b"r".to_vec()]);
}

/// Over the real store, which is left without a word or filled up.
struct Life {
    store: Store,
    ingest: Ingest,
    handle: CommitterHandle,
    client: Client,
}

impl Life {
    fn new(dir: &std::path::Path, is_on: bool) -> Self {
        let options = StoreOptions {
            dir: dir.to_owned(),
            partitions: 4,
            sinks: vec![SinkRetention::new("cloud")],
            file_bytes_max: 1 << 20,
            cache_bytes: 1 << 20,
            quota_bytes: 8 << 20,
            free_bytes_min: 0,
            at_quota: AtQuota::Hold,
            retain_bytes: 0,
            retain_age_us: 0,
            dead_letter_bytes_max: 1 << 20,
            journal: storage::JournalMode::Off,
            journal_bytes: 1 << 20,
            compression: storage::Compression::None,
            commits_ahead_max: 2,
        };
        let (store, writer) = Store::open(options, 1).expect("opens");
        let from = id_from();
        let dedup = Dedup::load(&dedup_config(), &store, |_| Some(&from)).expect("loads");
        let known = Known { dedup: is_on.then_some(dedup), ..Known::default() };
        // Retention comes at once whenever something was delivered.
        let pace = Pace { retain_every: Duration::ZERO, ..Pace::default() };
        let watermark = store.mark().watermark;
        let (ingest, handle) =
            Ingest::start_paced(writer, watermark, &config(), AtQuota::Hold, pace, known)
                .expect("starts");
        Self { store, ingest, handle, client: Client::default() }
    }

    async fn send(&mut self, id: u64, payload: &'static [u8]) {
        let mut pending = identified(&mut self.client, "d", &id.to_string(), payload);
        while let Err(back) = self.ingest.try_push(pending) {
            pending = back;
            self.ingest.room().await;
        }
        wait_for_acks(&mut self.client, 1).await;
        self.ingest.move_cursor()("cloud", &(*self.ingest.watermark().borrow()).into());
    }

    /// As a crash leaves it: what was acked is there, and nothing that a stop would still write.
    fn copy(&self) -> tempfile::TempDir {
        let from = self.store.files().expect("files")[0].path.clone();
        let from = from.parent().and_then(|log| log.parent()).expect("a folder").to_owned();
        let to = tempfile::tempdir().expect("a folder");
        std::fs::create_dir(to.path().join("log")).expect("a folder");
        for folder in ["", "log"] {
            for entry in std::fs::read_dir(from.join(folder)).expect("readable") {
                let entry = entry.expect("readable");
                if entry.file_type().expect("a type").is_file() {
                    let name = to.path().join(folder).join(entry.file_name());
                    std::fs::copy(entry.path(), name).expect("copied");
                }
            }
        }
        to
    }
}

/// Files are trimmed as fast as the sink is, and ids are in rows or in what is left.
#[tokio::test]
async fn the_last_ids_are_known_after_a_crash_though_their_files_are_gone() {
    const LARGE: &[u8] = &[7; 64 << 10];
    let dir = tempfile::tempdir().expect("a folder");
    let mut life = Life::new(dir.path(), true);
    for id in 0..100 {
        life.send(id, LARGE).await;
    }
    assert!(life.store.stats().first_offset > 50, "nothing was trimmed");
    let crashed = life.copy();
    let resend = async |mut life: Life| {
        for id in 84..100 {
            life.send(id, LARGE).await;
        }
        let stored = life.store.mark().watermark - 100;
        let duplicates = duplicates_of(&life.store).expect("readable");
        life.handle.stop().await.expect("closes");
        (stored, duplicates)
    };
    assert_eq!(resend(Life::new(crashed.path(), true)).await, (0, 16));
    assert_eq!(resend(life).await, (0, 16));
    // And it is the window that does it.
    assert_eq!(resend(Life::new(dir.path(), false)).await, (16, 16));
}
