//! The committer over a log that does what a script says, and over the real one.

mod resends;

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Mutex;

use proptest::prelude::*;
use storage::Attributes;

use super::*;
use crate::ingest::clock::MachineClock;
use crate::ingest::{AckLedger, AckMailbox, CommitterHandle, Ingest, Known, Ticket};

/// What the log answers next; `Ok` once the script is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    Ok,
    /// As `Ok`, but the commit is not durable yet.
    RunAhead,
    Quota,
    DiskFull,
    Io,
    Panic,
}

/// A commit as the log saw it: (partition, number) of its events, its cursors, and the first byte of
/// the key of each other change.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Seen {
    events: Vec<(u16, u64)>,
    cursors: Vec<(String, u64)>,
    changes: Vec<u8>,
}

#[derive(Debug, Default)]
struct Record {
    script: VecDeque<Answer>,
    commits: Vec<Seen>,
    retained: u32,
    closed: bool,
}

/// A log in memory that does what a script says.
struct ScriptedLog {
    record: Arc<Mutex<Record>>,
    on_durable: Box<dyn Fn(Mark) + Send + Sync>,
    mark: Mark,
}

impl ScriptedLog {
    fn new(script: &[Answer]) -> (Self, Arc<Mutex<Record>>) {
        let record = Record { script: script.iter().copied().collect(), ..Record::default() };
        let record = Arc::new(Mutex::new(record));
        let on_durable = Box::new(|_| ());
        (Self { record: Arc::clone(&record), on_durable, mark: Mark::default() }, record)
    }
}

impl Append for ScriptedLog {
    fn on_durable(&mut self, callback: impl Fn(Mark) + Send + Sync + 'static) {
        self.on_durable = Box::new(callback);
    }
    fn commit(
        &mut self,
        events: &[Event],
        control: &[Control],
        _now_us: u64,
    ) -> Result<Committed, CommitError> {
        let path = PathBuf::from("log");
        let mut record = self.record.lock().expect("no panic before");
        // As in the real log, a commit of nothing touches no disk.
        let nothing = events.is_empty() && control.is_empty();
        let next = if nothing { None } else { record.script.pop_front() };
        let answer = next.unwrap_or(Answer::Ok);
        match answer {
            Answer::Ok | Answer::RunAhead => {}
            Answer::Quota => {
                return Err(CommitError::Quota { used_bytes: 2, quota_bytes: 1 });
            }
            Answer::DiskFull => return Err(CommitError::DiskFull { path }),
            Answer::Io => {
                return Err(CommitError::Io { path, reason: "EIO".to_owned() });
            }
            Answer::Panic => panic!("scripted"),
        }
        let cursor = |control: &Control| match control {
            Control::Cursor { sink, offset } => Some((sink.to_string(), *offset)),
            Control::Put { .. } | Control::Delete { .. } => None,
        };
        let change = |control: &Control| match control {
            Control::Put { key, .. } => key.first().copied(),
            // A probe is one of these, without a key.
            Control::Delete { .. } | Control::Cursor { .. } => None,
        };
        record.commits.push(Seen {
            changes: control.iter().filter_map(change).collect(),
            events: events.iter().map(|e| (e.partition, e.received_us)).collect(),
            cursors: control.iter().filter_map(cursor).collect(),
        });
        let offsets = self.mark.watermark..self.mark.watermark + events.len() as u64;
        self.mark = Mark { commit: self.mark.commit + 1, watermark: offsets.end };
        if answer == Answer::Ok {
            (self.on_durable)(self.mark);
        }
        Ok(Committed { commit: self.mark.commit, offsets })
    }
    fn make_room(&mut self, _now_us: u64) -> Result<(), CommitError> {
        let mut record = self.record.lock().expect("no panic before");
        match record.script.pop_front_if(|answer| *answer == Answer::Quota) {
            Some(_) => Err(CommitError::Quota { used_bytes: 2, quota_bytes: 1 }),
            None => Ok(()),
        }
    }
    fn retain(&mut self, _now_us: u64) -> Result<RetentionReport, StateError> {
        self.record.lock().expect("no panic before").retained += 1;
        Ok(RetentionReport::default())
    }
    fn close(self) -> Result<(), StateError> {
        self.record.lock().expect("no panic before").closed = true;
        Ok(())
    }
}

fn config() -> IngestConfig {
    IngestConfig {
        partitions: 4,
        ring_events_max: 64,
        ring_bytes_max: 1 << 20,
        commit_linger_max: Duration::ZERO,
        commit_events_max: 1000,
        commit_bytes_max: 1 << 20,
        held_bytes_max: 1 << 20,
    }
}

/// Nothing happens by the clock, and a retry need not be waited for.
const AT_ONCE: Pace = Pace {
    cursor_delay_max: Duration::ZERO,
    retain_every: Duration::from_hours(1),
    retain_idle_every: Duration::from_hours(1),
    quota_retry_every: Duration::ZERO,
    disk_retry_every: Duration::ZERO,
    failing_max: Duration::from_hours(1),
    clock_every: Duration::from_hours(1),
};

/// A committer without its thread: every step is the test's.
struct Bench {
    committer: Committer<ScriptedLog>,
    ingest: Ingest,
    record: Arc<Mutex<Record>>,
}

impl Bench {
    fn new(script: &[Answer], at_quota: AtQuota, config: &IngestConfig) -> Self {
        let (log, record) = ScriptedLog::new(script);
        Self::with_dedup(log, record, at_quota, config, None)
    }
    fn with_dedup(
        log: ScriptedLog,
        record: Arc<Mutex<Record>>,
        at_quota: AtQuota,
        config: &IngestConfig,
        dedup: Option<Dedup>,
    ) -> Self {
        let shared = Arc::new(Shared::new(0, config, MachineClock::new(None)));
        let ingest = Ingest(Arc::clone(&shared));
        let committer = Committer::new(log, shared, config, at_quota, AT_ONCE, dedup);
        Self { committer, ingest, record }
    }
    fn turn(&mut self) {
        let flow = self.committer.turn().expect("goes on");
        assert!(flow.is_continue());
    }
    /// As `turn`; a pause ends at once.
    fn turn_awake(&mut self) {
        std::thread::current().unpark();
        self.turn();
    }
    fn commits(&self) -> Vec<Seen> {
        self.record.lock().expect("no panic before").commits.clone()
    }
}

/// A connection as the committer sees one; its events count up.
#[derive(Default)]
struct Client {
    mailbox: Arc<AckMailbox>,
    ledger: AckLedger<u64>,
}

impl Client {
    fn next(&mut self, partition: u16) -> Pending {
        let number = self.ledger.enter(0);
        let event = Event {
            partition,
            received_us: number,
            device_key: "dev".into(),
            topic: "t".into(),
            attributes: Attributes::default(),
            payload: vec![0; 10].into(),
        };
        let ticket = Ticket { mailbox: Arc::clone(&self.mailbox), number };
        Pending {
            event,
            read_at: Instant::now(),
            ticket: Some(ticket),
            riders: None,
            identity: None,
        }
    }
    fn push(&mut self, ingest: &Ingest, partition: u16) {
        let pending = self.next(partition);
        ingest.try_push(pending).expect("room");
    }
    /// Acks that may leave now; `None` once the connection must close.
    fn acks(&mut self) -> Option<usize> {
        let mut numbers = Vec::new();
        let open = self.mailbox.collect(&mut numbers).is_ok();
        for number in numbers {
            self.ledger.complete(number);
        }
        let acks = std::iter::from_fn(|| self.ledger.release()).count();
        open.then_some(acks)
    }
}

fn events(list: &[(u16, u64)]) -> Seen {
    Seen { events: list.to_vec(), ..Seen::default() }
}

fn cursor(sink: &str, offset: u64) -> Seen {
    Seen { cursors: vec![(sink.to_owned(), offset)], ..Seen::default() }
}

#[test]
fn at_the_quota_devices_wait_until_a_cursor_makes_room() {
    for at_quota in [AtQuota::Hold, AtQuota::DropOldest] {
        use Answer::{Ok, Quota};
        let script = [Quota, Quota, Quota, Ok];
        let mut bench = Bench::new(&script, at_quota, &config());
        let mut client = Client::default();
        client.push(&bench.ingest, 0);
        client.push(&bench.ingest, 0);

        bench.turn();
        assert_eq!(bench.ingest.admission(), Admission::Open, "retention was not asked yet");
        bench.turn();
        assert_eq!(bench.ingest.admission(), Admission::Hold);
        assert!(matches!(bench.ingest.health(), Health::AtQuota { .. }));
        assert!(bench.ingest.health().is_ready());
        assert_eq!(bench.record.lock().expect("no panic").retained, 1);
        bench.turn();
        client.push(&bench.ingest, 0);
        assert_eq!(client.acks(), Some(0));

        bench.ingest.move_cursor()("cloud", &7.into());
        bench.turn();
        assert_eq!(bench.commits(), [cursor("cloud", 7), events(&[(0, 0), (0, 1)])]);
        assert_eq!(bench.record.lock().expect("no panic").retained, 3);
        assert_eq!(bench.ingest.admission(), Admission::Open);
        assert_eq!(bench.ingest.health(), Health::Storing);
        bench.turn();
        assert_eq!(bench.commits().last(), Some(&events(&[(0, 2)])));
        assert_eq!(client.acks(), Some(3));
    }
}

#[test]
fn who_was_let_in_before_the_quota_was_reached_is_refused_as_those_who_come_later() {
    use Answer::{Ok, Quota};
    let mut bench = Bench::new(&[Quota, Quota, Ok, Quota], AtQuota::Refuse, &config());
    let mut clients = [Client::default(), Client::default(), Client::default()];
    clients[0].push(&bench.ingest, 0);
    bench.turn();
    // Taken meanwhile: into the same ring, and into another.
    clients[0].push(&bench.ingest, 0);
    clients[1].push(&bench.ingest, 1);
    assert_eq!(bench.ingest.admission(), Admission::Open, "retention was not asked yet");
    bench.turn();
    assert_eq!(bench.ingest.admission(), Admission::Refuse);
    assert!(bench.ingest.health().is_ready(), "it does what it was told to");
    for client in &clients[..2] {
        let mut numbers = Vec::new();
        assert_eq!(client.mailbox.collect(&mut numbers), Err(GivenUp::Refused));
        assert!(numbers.is_empty());
    }
    assert_eq!(bench.ingest.stats().counters.failed_events, 3);

    // It saw that it was open, and came too late.
    clients[2].push(&bench.ingest, 2);
    bench.ingest.move_cursor()("cloud", &7.into());
    bench.turn();
    assert_eq!(bench.commits(), [cursor("cloud", 7)], "state passes at the quota");
    assert_eq!(bench.ingest.admission(), Admission::Refuse);
    assert_eq!(clients[2].acks(), None);

    bench.turn();
    assert_eq!(bench.ingest.health(), Health::Storing);
    assert_eq!(bench.ingest.admission(), Admission::Open);
    let mut again = Client::default();
    again.push(&bench.ingest, 0);
    bench.turn();
    assert_eq!(bench.commits().last(), Some(&events(&[(0, 0)])));
    assert_eq!(again.acks(), Some(1));
}

#[test]
fn room_that_retention_makes_at_once_is_no_standstill() {
    let mut bench = Bench::new(&[Answer::Quota], AtQuota::Refuse, &config());
    let mut client = Client::default();
    client.push(&bench.ingest, 0);
    bench.turn();
    bench.turn();
    assert_eq!(bench.ingest.admission(), Admission::Open);
    assert_eq!(client.acks(), Some(1));
}

#[test]
fn a_full_disk_holds_and_is_not_ready() {
    use Answer::DiskFull;
    let mut bench = Bench::new(&[DiskFull, DiskFull], AtQuota::Hold, &config());
    let mut client = Client::default();
    client.push(&bench.ingest, 0);
    bench.turn();
    bench.turn();
    assert_eq!(bench.ingest.admission(), Admission::Hold);
    assert!(!bench.ingest.health().is_ready());
    assert_eq!(client.acks(), Some(0));
    bench.turn();
    assert!(bench.ingest.health().is_ready());
    assert_eq!(client.acks(), Some(1));
    assert_eq!(bench.ingest.stats().counters.failed_events, 0);
}

/// The log is full, the sinks have stopped, and their cursors are known: nothing is written until the
/// next try is due, or the log and the card would wear out over it.
#[test]
fn a_standstill_rests_between_its_tries() {
    use Answer::{DiskFull, Ok, Quota};
    for answer in [Quota, DiskFull] {
        // Commits with events fail, cursors alone go through.
        let script: Vec<_> = [Ok, answer].into_iter().chain([Ok, answer].repeat(100)).collect();
        let mut bench = Bench::new(&script, AtQuota::Hold, &config());
        bench.committer.pace.quota_retry_every = Duration::from_hours(1);
        bench.committer.pace.disk_retry_every = Duration::from_hours(1);
        bench.ingest.move_cursor()("cloud", &3.into());
        let mut client = Client::default();
        client.push(&bench.ingest, 0);
        bench.turn();
        client.push(&bench.ingest, 0);
        bench.turn();
        bench.turn();
        let written = bench.commits().len();
        let asked = bench.ingest.stats().counters.failed_commits;
        for _ in 0..10 {
            bench.turn_awake();
        }
        assert_eq!(bench.commits().len(), written, "{answer:?}");
        assert_eq!(bench.ingest.stats().counters.failed_commits, asked, "{answer:?}");
    }
}

#[test]
fn a_cursor_that_cannot_be_stored_either_waits_for_the_next_try() {
    let mut bench = Bench::new(&[Answer::DiskFull; 100], AtQuota::Hold, &config());
    bench.committer.pace.disk_retry_every = Duration::from_hours(1);
    let mut client = Client::default();
    client.push(&bench.ingest, 0);
    bench.turn();
    bench.turn();
    bench.ingest.move_cursor()("cloud", &3.into());
    bench.turn();
    let asked = bench.ingest.stats().counters.failed_commits;
    for _ in 0..10 {
        bench.turn_awake();
    }
    assert_eq!(bench.ingest.stats().counters.failed_commits, asked);
}

#[test]
fn a_failed_commit_acks_nothing_and_stores_nothing_that_followed_it() {
    let mut bench = Bench::new(
        &[Answer::Io],
        AtQuota::Hold,
        &IngestConfig { commit_events_max: 2, ..config() },
    );
    let [mut hit, mut spared] = [Client::default(), Client::default()];
    bench.ingest.move_cursor()("cloud", &3.into());
    for _ in 0..3 {
        hit.push(&bench.ingest, 0);
    }
    spared.push(&bench.ingest, 0);
    let mut late = hit.next(0);
    late.ticket = None;

    bench.turn();
    assert_eq!(hit.acks(), None, "its connection must close");
    assert!(!bench.ingest.health().is_ready());
    assert_eq!(bench.ingest.admission(), Admission::Hold);
    bench.ingest.try_push(late).expect("room");

    bench.turn();
    assert!(bench.ingest.health().is_ready(), "the probe succeeded");
    bench.turn();
    assert_eq!(
        bench.commits(),
        [cursor("cloud", 3), events(&[(0, 0)])],
        "the third event of the failed connection is not stored, the other connection's is"
    );
    assert_eq!(spared.acks(), Some(1));
    assert_eq!(hit.acks(), None);
    bench.turn();
    assert_eq!(bench.commits().last(), Some(&events(&[(0, 3)])), "QoS 0 waits for no ack");

    let counters = bench.ingest.stats().counters;
    assert_eq!((counters.failed_commits, counters.failed_events), (1, 3));
    assert_eq!(bench.ingest.stats().durable.events, 2);
}

#[test]
fn a_gateway_without_sinks_is_ready_only_after_a_commit_that_touched_the_disk() {
    let mut bench = Bench::new(&[Answer::Io, Answer::Io], AtQuota::Hold, &config());
    Client::default().push(&bench.ingest, 0);
    for ready in [false, false, true] {
        bench.turn();
        assert_eq!(bench.ingest.health().is_ready(), ready);
    }
}

#[test]
fn a_failed_sync_also_fails_the_commits_that_ran_ahead_of_it() {
    let script = [Answer::Ok, Answer::RunAhead, Answer::Io];
    let config = IngestConfig { commit_events_max: 1, ..config() };
    let mut bench = Bench::new(&script, AtQuota::Hold, &config);
    let mut clients = [(); 3].map(|()| Client::default());
    for client in &mut clients {
        client.push(&bench.ingest, 0);
        bench.turn();
    }
    assert_eq!(clients.each_mut().map(Client::acks), [Some(1), None, None]);
    bench.turn();
    assert_eq!(clients.each_mut().map(Client::acks), [Some(0), None, None]);
}

#[test]
fn a_disk_that_fails_for_long_ends_the_committer() {
    let (log, _record) = ScriptedLog::new(&[Answer::Io; 3]);
    let shared = Arc::new(Shared::new(0, &config(), MachineClock::new(None)));
    let ingest = Ingest(Arc::clone(&shared));
    let pace = Pace { failing_max: Duration::ZERO, ..AT_ONCE };
    Client::default().push(&ingest, 0);
    let error = Committer::new(log, shared, &config(), AtQuota::Hold, pace, None).run();
    assert!(matches!(error, Err(CommitterError::Failing { .. })), "{error:?}");
}

#[test]
fn cursors_ride_with_events_and_go_alone_when_there_are_none() {
    let mut bench = Bench::new(&[], AtQuota::Hold, &config());
    let (mut client, move_cursor) = (Client::default(), bench.ingest.move_cursor());
    move_cursor("cloud", &4.into());
    move_cursor("cloud", &5.into());
    client.push(&bench.ingest, 1);
    bench.turn();
    move_cursor("file", &6.into());
    bench.turn();
    let with_events = Seen { cursors: vec![("cloud".to_owned(), 5)], ..events(&[(1, 0)]) };
    assert_eq!(bench.commits(), [with_events, cursor("file", 6)]);
}

fn put(key: u8) -> Control {
    Control::Put { namespace: 1, key: vec![key].into(), value: Bytes::new() }
}

#[test]
fn changes_ride_with_events_or_go_alone_and_complete_their_tickets() {
    let mut bench = Bench::new(&[], AtQuota::Hold, &config());
    let mut client = Client::default();
    let mut pending = client.next(1);
    pending.riders = Some([put(2), put(3)].into());
    bench.ingest.try_push(pending).expect("room");
    bench.ingest.submit(vec![put(1)], None);
    bench.turn();
    let number = client.ledger.enter(0);
    let ticket = Ticket { mailbox: Arc::clone(&client.mailbox), number };
    bench.ingest.submit(vec![put(4)], Some(ticket));
    assert_eq!(client.acks(), Some(1));
    bench.turn();
    assert_eq!(client.acks(), Some(1));
    let with_event = Seen { changes: vec![1, 2, 3], ..events(&[(1, 0)]) };
    assert_eq!(bench.commits(), [with_event, Seen { changes: vec![4], ..Seen::default() }]);
}

#[test]
fn changes_pass_while_events_wait_at_the_quota() {
    use Answer::{Ok, Quota};
    let mut bench = Bench::new(&[Quota, Quota, Ok, Quota, Ok], AtQuota::Hold, &config());
    let mut client = Client::default();
    let mut pending = client.next(1);
    pending.riders = Some([put(9)].into());
    bench.ingest.try_push(pending).expect("room");
    bench.turn();
    bench.turn();
    bench.ingest.submit(vec![put(1)], None);
    bench.turn_awake();
    assert_eq!(bench.commits(), [Seen { changes: vec![1], ..Seen::default() }]);
    bench.turn_awake();
    let with_event = Seen { changes: vec![9], ..events(&[(1, 0)]) };
    assert_eq!(bench.commits().last(), Some(&with_event));
}

#[test]
fn a_failed_commit_fails_those_who_wait_for_a_change_and_keeps_the_others() {
    let mut bench = Bench::new(&[Answer::Io], AtQuota::Hold, &config());
    let client = Client::default();
    bench.ingest.submit(vec![put(1)], None);
    let ticket = Ticket { mailbox: Arc::clone(&client.mailbox), number: 0 };
    bench.ingest.submit(vec![put(2)], Some(ticket));
    bench.turn();
    assert!(client.mailbox.is_given_up());
    bench.turn_awake();
    assert_eq!(bench.commits(), [Seen { changes: vec![1], ..Seen::default() }]);
}

#[test]
fn changes_that_ran_ahead_of_a_failed_sync_are_committed_again_in_their_order() {
    let script = [Answer::Ok, Answer::RunAhead, Answer::Io];
    let mut bench = Bench::new(&script, AtQuota::Hold, &config());
    let client = Client::default();
    for key in 1..=2 {
        bench.ingest.submit(vec![put(key)], None);
        bench.turn();
    }
    bench.ingest.submit(vec![put(3)], None);
    let ticket = Ticket { mailbox: Arc::clone(&client.mailbox), number: 0 };
    bench.ingest.submit(vec![put(4)], Some(ticket));
    bench.turn();
    assert!(client.mailbox.is_given_up());
    bench.turn_awake();
    // The first was durable.
    let again = Seen { changes: vec![2, 3], ..Seen::default() };
    assert_eq!(bench.commits().last(), Some(&again));
}

#[test]
fn a_stop_stores_what_lies_in_the_rings_and_closes() {
    let mut bench =
        Bench::new(&[], AtQuota::Hold, &IngestConfig { commit_events_max: 3, ..config() });
    let mut client = Client::default();
    for partition in [0, 1, 2, 3, 0, 1, 2, 3] {
        client.push(&bench.ingest, partition);
    }
    bench.ingest.move_cursor()("cloud", &2.into());
    bench.turn();
    bench.ingest.move_cursor()("cloud", &5.into());
    bench.ingest.0.stopping.store(true, std::sync::atomic::Ordering::Release);
    let Bench { committer, record, .. } = bench;
    committer.run().expect("closes");
    assert_eq!(client.acks(), Some(8));
    let record = record.lock().expect("no panic before");
    assert!(record.closed);
    assert_eq!(record.commits.iter().map(|c| c.events.len()).sum::<usize>(), 8);
    assert_eq!(record.commits[1].cursors, [("cloud".to_owned(), 5)]);
}

#[test]
fn a_stop_at_the_quota_gives_up_what_was_not_acked() {
    let mut bench = Bench::new(&[Answer::Quota; 4], AtQuota::Hold, &config());
    let mut client = Client::default();
    client.push(&bench.ingest, 0);
    bench.turn();
    bench.ingest.0.stopping.store(true, std::sync::atomic::Ordering::Release);
    let Bench { committer, record, .. } = bench;
    committer.run().expect("closes");
    assert_eq!(client.acks(), None);
    assert!(record.lock().expect("no panic before").closed);
}

fn start(
    script: &[Answer],
    config: &IngestConfig,
) -> (Ingest, CommitterHandle, Arc<Mutex<Record>>) {
    let (log, record) = ScriptedLog::new(script);
    let (ingest, handle) =
        Ingest::start_paced(log, 0, config, AtQuota::Hold, AT_ONCE, Known::default())
            .expect("a thread");
    (ingest, handle, record)
}

async fn push_all(ingest: &Ingest, client: &mut Client, count: usize) {
    for index in 0..count {
        let mut pending = client.next(index as u16 % ingest.partitions());
        while let Err(back) = ingest.try_push(pending) {
            pending = back;
            ingest.room().await;
        }
    }
}

async fn wait_for_acks(client: &mut Client, count: usize) {
    let mut acks = 0;
    while acks < count {
        client.mailbox.changed().await;
        acks += client.acks().expect("open");
    }
}

#[tokio::test]
async fn a_running_committer_acks_everything_through_small_rings() {
    let config = IngestConfig { ring_events_max: 4, commit_events_max: 7, ..config() };
    let (ingest, handle, record) = start(&[], &config);
    let mut client = Client::default();
    push_all(&ingest, &mut client, 1000).await;
    wait_for_acks(&mut client, 1000).await;
    handle.stop().await.expect("closes");
    let record = record.lock().expect("no panic");
    assert!(record.closed);
    assert!(record.commits.iter().all(|commit| commit.events.len() <= 7));
    assert_eq!(ingest.stats().ack_latency.count, 1000);
    assert_eq!(*ingest.watermark().borrow(), 1000);
}

/// The lingering committer sleeps through pushes: only a ring without room gets it up.
#[tokio::test]
async fn lingering_ends_when_the_batch_is_full() {
    let config = IngestConfig {
        ring_events_max: 4,
        partitions: 1,
        commit_events_max: 12,
        commit_linger_max: Duration::from_hours(1),
        ..config()
    };
    let (ingest, handle, record) = start(&[], &config);
    let mut client = Client::default();
    // One more than the batch, so that somebody misses the room at the end of it.
    push_all(&ingest, &mut client, 17).await;
    wait_for_acks(&mut client, 12).await;
    assert_eq!(record.lock().expect("no panic").commits[0].events.len(), 12);
    handle.stop().await.expect("closes");
    assert_eq!(client.acks(), Some(5), "a stop does not linger");
}

#[tokio::test]
async fn a_panic_of_the_committer_is_noticed() {
    let (ingest, handle, _record) = start(&[Answer::Panic], &config());
    Client::default().push(&ingest, 0);
    handle.ended().await;
    let error = handle.stop().await.expect_err("it panicked");
    assert!(error.to_string().contains("panicked: scripted"), "{error}");
}

#[test]
fn the_clock_never_goes_back() {
    let shared = Shared::new(0, &config(), MachineClock::new(None));
    let ahead = shared.now_us() + 3_600_000_000;
    shared.clock_us.store(ahead, std::sync::atomic::Ordering::Relaxed);
    assert_eq!(shared.now_us(), ahead, "the system's clock was set back by an hour");
}

proptest! {
    /// A connection's events take any partitions and commits of any size; some commits are
    /// refused before they succeed. Acks leave in order, partitions keep theirs, and in the
    /// end everything is there once.
    #[test]
    fn acks_and_partitions_keep_their_order(
        pushes in prop::collection::vec((0..2_usize, 0..4_u16), 0..200),
        commit_events_max in 1..40_usize,
        script in prop::collection::vec(
            prop_oneof![Just(Answer::Ok), Just(Answer::Quota), Just(Answer::DiskFull)],
            0..20,
        ),
    ) {
        let config = IngestConfig { commit_events_max, ..config() };
        let mut bench = Bench::new(&script, AtQuota::Hold, &config);
        let mut clients = [Client::default(), Client::default()];
        let mut acks = [0; 2];
        let mut pushed: Vec<Vec<u64>> = vec![Vec::new(); 4];
        let total = pushes.len();
        for (client, partition) in pushes {
            let mut pending = clients[client].next(partition);
            pushed[usize::from(partition)].push(pending.event.received_us);
            while let Err(back) = bench.ingest.try_push(pending) {
                pending = back;
                bench.turn();
                for (client, acks) in clients.iter_mut().zip(&mut acks) {
                    *acks += client.acks().expect("open");
                }
            }
        }
        while bench.ingest.stats().durable.events < total as u64 {
            bench.turn();
        }
        for (client, acks) in clients.iter_mut().zip(&mut acks) {
            *acks += client.acks().expect("open");
            prop_assert!(client.ledger.is_empty());
        }
        prop_assert_eq!(acks[0] + acks[1], total);
        for (partition, pushed) in (0..).zip(&pushed) {
            let stored: Vec<u64> = bench.commits().iter().flat_map(|c| c.events.clone())
                .filter(|(p, _)| *p == partition).map(|(_, n)| n).collect();
            prop_assert_eq!(&stored, pushed);
        }
    }
}

mod over_the_real_log {
    use storage::{SinkRetention, Store, StoreOptions};

    use super::*;

    fn options(dir: &std::path::Path, quota_bytes: u64) -> StoreOptions {
        StoreOptions {
            dir: dir.to_owned(),
            partitions: config().partitions,
            sinks: vec![SinkRetention::new("cloud")],
            file_bytes_max: 1 << 20,
            cache_bytes: 1 << 20,
            quota_bytes,
            free_bytes_min: 0,
            at_quota: AtQuota::Hold,
            retain_bytes: 0,
            retain_age_us: 0,
            dead_letter_bytes_max: 64 << 20,
            journal: storage::JournalMode::Auto,
            journal_bytes: 32 << 20,
            compression: storage::Compression::None,
            commits_ahead_max: 2,
        }
    }

    fn open(dir: &std::path::Path, quota_bytes: u64) -> (Store, Ingest, CommitterHandle) {
        let (store, writer) = Store::open(options(dir, quota_bytes), 1).expect("opens");
        let watermark = store.mark().watermark;
        let pace = Pace::default();
        let (ingest, handle) = Ingest::start_paced(
            writer,
            watermark,
            &config(),
            AtQuota::Hold,
            pace,
            Known::default(),
        )
        .expect("starts");
        (store, ingest, handle)
    }

    /// Numbers in each partition, in the order of the log.
    fn stored(store: &Store) -> Vec<Vec<u64>> {
        let mut stored = vec![Vec::new(); usize::from(config().partitions)];
        let mut from = 0;
        loop {
            let read = store.read(from, 1000, 1 << 20).expect("readable");
            if read.events.is_empty() {
                return stored;
            }
            for event in read.events {
                let partition = &mut stored[usize::from(event.event.partition)];
                assert_eq!(event.seq, partition.len() as u64);
                partition.push(u64::from_le_bytes(event.event.payload[..8].try_into().expect("8")));
            }
            from = read.next;
        }
    }

    async fn push_numbered(ingest: &Ingest, client: &mut Client, count: usize, size_bytes: usize) {
        for _ in 0..count {
            let mut pending = client.next(0);
            let number = pending.event.received_us;
            pending.event.partition = (number % 4) as u16;
            pending.event.received_us = ingest.received_us();
            let mut payload = vec![0; size_bytes];
            payload[..8].copy_from_slice(&number.to_le_bytes());
            pending.event.payload = payload.into();
            while let Err(back) = ingest.try_push(pending) {
                pending = back;
                ingest.room().await;
            }
        }
    }

    #[tokio::test]
    async fn what_was_acked_is_there_in_order_after_a_restart() {
        let dir = tempfile::tempdir().expect("a folder");
        let (store, ingest, handle) = open(dir.path(), 1 << 30);
        let mut client = Client::default();
        push_numbered(&ingest, &mut client, 500, 100).await;
        wait_for_acks(&mut client, 500).await;
        assert_eq!(*ingest.watermark().borrow(), 500);
        assert_eq!(store.mark().watermark, 500);
        ingest.move_cursor()("cloud", &123.into());
        handle.stop().await.expect("closes");
        drop((store, ingest));

        let (store, ingest, handle) = open(dir.path(), 1 << 30);
        assert_eq!(store.cursor("cloud"), Some(123));
        assert_eq!(*ingest.watermark().borrow(), 500);
        push_numbered(&ingest, &mut client, 100, 100).await;
        wait_for_acks(&mut client, 100).await;
        let expected: Vec<Vec<u64>> = (0..4).map(|p| (p..600).step_by(4).collect()).collect();
        assert_eq!(stored(&store), expected);
        handle.stop().await.expect("closes");
    }

    #[tokio::test]
    async fn a_reached_quota_holds_until_the_sink_has_taken_what_fills_it() {
        let dir = tempfile::tempdir().expect("a folder");
        let (store, ingest, handle) = open(dir.path(), 4 << 20);
        let (pushed, mut acked, mut held) = (4000, 0, false);
        let mut client = Client::default();
        let mailbox = Arc::clone(&client.mailbox);
        let take = async {
            let move_cursor = ingest.move_cursor();
            while acked < pushed {
                if ingest.admission() == Admission::Hold {
                    held = true;
                    move_cursor("cloud", &(*ingest.watermark().borrow()).into());
                }
                tokio::task::yield_now().await;
                let mut numbers = Vec::new();
                mailbox.collect(&mut numbers).expect("open");
                acked += numbers.len();
            }
        };
        tokio::join!(push_numbered(&ingest, &mut client, pushed, 4096), take);
        assert!(held, "16 MB do not fit into 4 MB");
        assert!(store.stats().log_bytes <= 6 << 20, "{:?}", store.stats());
        assert_eq!(store.mark().watermark, pushed as u64);
        assert_eq!(ingest.health(), Health::Storing);
        handle.stop().await.expect("closes");
    }
}
