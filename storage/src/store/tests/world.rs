//! A store on a simulated disk, and beside it a plain model of what it must hold.

use std::collections::BTreeMap;

use super::*;
use crate::ranges::Ranges;
use crate::sim::{Faults, SimDisk};
use crate::{Balance, Damage, Progress, Verification};

/// Sinks of the store under test.
pub(super) const SINKS: [&str; 2] = ["cloud", "local"];

/// What the store must hold.
#[derive(Clone, Default)]
struct Model {
    /// Every event by offset.
    events: Vec<StoredEvent>,
    /// Whether an event was acked: it was in a commit that succeeded.
    acked: Vec<bool>,
    cursors: BTreeMap<String, u64>,
    state: BTreeMap<Bytes, Bytes>,
    next_seq: Vec<u64>,
    received_us: u64,
}

/// What a commit was given.
type Attempt = (Vec<Event>, Vec<Control>);

/// Commits in their order, each on the one before. After a crash the first few of them may be there.
type Chain = Vec<Attempt>;

/// Opens a store on a simulated disk, whose journal works when it is told to.
pub(super) fn open(
    disk: SimDisk,
    options: &StoreOptions,
    now_us: u64,
) -> Result<(Store, Writer), OpenError> {
    let opening = Opening::ToWrite(journal::Pump::ByHand);
    Store::open_with(Arc::new(disk), None, opening, options.clone(), now_us)
}

pub(super) struct World {
    pub(super) disk: SimDisk,
    pub(super) options: StoreOptions,
    pub(super) store: Store,
    pub(super) writer: Writer,
    pub(super) now_us: u64,
    /// As of the last mark.
    model: Model,
    /// Commits that returned and that no mark has covered, with their numbers.
    ahead: Vec<(u64, Attempt)>,
    /// Commits that failed, and what ran ahead of them, since the last mark.
    failed: Vec<Chain>,
    marks: Arc<Mutex<Vec<Mark>>>,
    /// Makes every event another one.
    made: u64,
    /// Events whose batches were damaged: they may be missing, and are in the ledger if they are.
    damaged: Ranges,
}

pub(super) fn options() -> StoreOptions {
    let sinks = SINKS.map(SinkRetention::new);
    StoreOptions {
        sinks: sinks.into(),
        file_bytes_max: 128 << 10,
        cache_bytes: 1 << 20,
        // Small enough to go round, and for some transactions to be too large for it.
        journal_bytes: 192 << 10,
        ..super::options(std::path::Path::new("sim"))
    }
}

impl World {
    pub(super) fn new(disk: SimDisk, options: StoreOptions) -> Self {
        let (store, writer) = open(disk.clone(), &options, NOW_US).unwrap();
        let mut model = Model { next_seq: vec![0; 4], ..Model::default() };
        for sink in &options.sinks {
            model.cursors.insert(sink.name.clone(), 0);
        }
        let mut world = Self {
            disk,
            options,
            store,
            writer,
            now_us: NOW_US,
            model,
            ahead: Vec::new(),
            failed: Vec::new(),
            marks: Arc::default(),
            made: 0,
            damaged: Ranges::default(),
        };
        world.listen();
        world
    }

    fn listen(&mut self) {
        // What the writer of an earlier life still does is nothing to this one.
        self.marks = Arc::default();
        let marks = self.marks.clone();
        self.writer.on_durable(move |mark| marks.lock().unwrap().push(mark));
    }

    /// `count` new events of about `payload_bytes` each.
    pub(super) fn make(&mut self, count: usize, payload_bytes: usize) -> Vec<Event> {
        (0..count)
            .map(|_| {
                self.made += 1;
                let mut payload = format!("event {} ", self.made).into_bytes();
                payload.resize(payload.len().max(payload_bytes), b'.');
                Event {
                    received_us: self.now_us - self.made % 3,
                    payload: payload.into(),
                    ..event((self.made % 4) as u16, "")
                }
            })
            .collect()
    }

    /// Commits and holds the store to what it says.
    pub(super) fn commit(
        &mut self,
        events: Vec<Event>,
        control: Vec<Control>,
    ) -> Result<Committed, CommitError> {
        let count: usize = self.ahead.iter().map(|(_, (events, _))| events.len()).sum();
        let first = self.watermark() + count as u64;
        let result = self.writer.commit(&events, &control, self.now_us);
        if let Ok(committed) = &result {
            assert_eq!(committed.offsets, first..first + events.len() as u64);
            self.ahead.push((committed.commit, (events, control)));
            self.follow_marks();
            let ahead_max = match self.options.journal {
                JournalMode::Off => 0,
                _ => self.options.commits_ahead_max,
            };
            assert!(self.ahead.len() <= ahead_max, "{} commits run ahead", self.ahead.len());
        } else {
            self.follow_marks();
            let mut chain = self.voided();
            assert!(chain.is_empty() || matches!(result, Err(CommitError::Io { .. })));
            if self.ahead.is_empty() {
                chain.push((events, control));
                self.failed.push(chain);
            }
        }
        self.follow_losses();
        result
    }

    /// What ran ahead, if the store has given it up.
    fn voided(&mut self) -> Chain {
        if self.writer.shared.progress.ahead() == 0 {
            self.ahead.drain(..).map(|(_, attempt)| attempt).collect()
        } else {
            Vec::new()
        }
    }

    /// Everything is in the checkpoint, and nothing in the journal.
    pub(super) fn settle(&mut self) {
        self.writer.shared.log.empty_journal().unwrap();
        self.follow_marks();
        self.writer.checkpoint(&[]).unwrap();
    }

    /// Lets the journal do one of its jobs.
    pub(super) fn step(&mut self, checkpoint: bool) {
        self.writer.shared.log.step(checkpoint);
        self.follow_marks();
    }

    /// What the marks cover is acked, and visible.
    fn follow_marks(&mut self) {
        for mark in std::mem::take(&mut *self.marks.lock().unwrap()) {
            let covered = self.ahead.iter().take_while(|(number, _)| *number <= mark.commit);
            let covered = covered.count();
            assert!(covered > 0, "a mark that covers nothing: {mark:?}");
            for (_, attempt) in self.ahead.drain(..covered) {
                self.model.apply(attempt, true);
            }
            assert_eq!(mark.watermark, self.watermark(), "{mark:?}");
            self.failed.clear();
        }
        assert_eq!(self.store.mark().watermark, self.watermark());
    }

    pub(super) fn commit_events(&mut self, count: usize, payload_bytes: usize) {
        let events = self.make(count, payload_bytes);
        self.commit(events, vec![]).unwrap();
    }

    /// Moves the cursor of a sink to an offset at most the watermark.
    pub(super) fn cursor_to(&mut self, sink: &str, offset: u64) -> Result<Committed, CommitError> {
        let offset = offset.min(self.store.mark().watermark);
        self.commit(vec![], vec![cursor(sink, offset)])
    }

    pub(super) fn watermark(&self) -> u64 {
        self.model.events.len() as u64
    }

    /// Opens the store on another disk, as the next process does, and checks all of it.
    pub(super) fn reopen(&mut self, disk: SimDisk) {
        (self.store, self.writer) = open(disk.clone(), &self.options, self.now_us).unwrap();
        self.disk = disk;
        self.listen();
        self.follow_losses();
        let watermark = self.store.mark().watermark;
        while self.watermark() > watermark {
            assert_eq!(self.model.acked.pop(), Some(false), "an acked event is gone");
            let event = self.model.events.pop().expect("counted once");
            self.model.next_seq[usize::from(event.event.partition)] -= 1;
        }
        let mut chains = std::mem::take(&mut self.failed);
        chains.push(self.ahead.drain(..).map(|(_, attempt)| attempt).collect());
        let back = chains.into_iter().rev().find_map(|chain| {
            let mut model = self.model.clone();
            let prefixes = chain.into_iter().map(|attempt| {
                model.apply(attempt, false);
                model.clone()
            });
            prefixes.filter(|model| self.shows(model)).last()
        });
        if let Some(model) = back {
            self.model = model;
        }
        self.check();
    }

    /// How many events were acked that some sink still needs, and how many of them the next process
    /// cannot read on this disk: all, if it cannot open the store.
    pub(super) fn acked_and_lost_on(&self, disk: SimDisk) -> (usize, usize) {
        let needed = self.model.cursors.values().min().copied().unwrap_or(0) as usize;
        let acked = self.model.events.iter().zip(&self.model.acked).skip(needed);
        let acked: Vec<_> = acked.filter(|(_, acked)| **acked).map(|(event, _)| event).collect();
        let Ok((store, mut writer)) = open(disk, &self.options, self.now_us) else {
            return (acked.len(), acked.len());
        };
        let (mut found, mut from) = (BTreeMap::new(), needed as u64);
        while from < store.mark().watermark.min(self.watermark()) {
            let read = store.read(from, 64, 32 << 10).or_else(|_| {
                // It is the file that is appended to, which the writer gives up first.
                writer.check().unwrap();
                store.read(from, 64, 32 << 10)
            });
            let Ok(read) = read else { break };
            found.extend(read.events.into_iter().map(|event| (event.offset, event)));
            from = read.next;
        }
        let lost = acked.iter().filter(|event| found.get(&event.offset) != Some(**event)).count();
        (acked.len(), lost)
    }

    /// Whether the store's end and state are those of a model.
    fn shows(&self, model: &Model) -> bool {
        let stats = self.store.stats();
        let end = stats.watermark.saturating_sub(1);
        let last = self.store.read(end, 1, 1).unwrap().events.pop();
        let cursors: BTreeMap<_, _> = stats.cursors.into_iter().collect();
        stats.watermark == model.events.len() as u64
            && last.as_ref().is_none_or(|last| model.events.last() == Some(last))
            && cursors == model.cursors
            && (0..8).all(|key| {
                let key = Bytes::from(vec![key]);
                self.store.state(1, &key).unwrap().as_ref() == model.state.get(&key)
            })
    }

    /// Closes the store cleanly; another, empty one takes its place.
    pub(super) fn close(&mut self) {
        // A failure that no commit has met yet: what ran ahead is void, the rest is closed well.
        if self.writer.check().is_err() {
            let chain = self.voided();
            self.failed.push(chain);
        }
        let (store, writer) = open(SimDisk::new(0), &options(), self.now_us).unwrap();
        self.store = store;
        std::mem::replace(&mut self.writer, writer).close().unwrap();
        for (_, attempt) in std::mem::take(&mut self.ahead) {
            self.model.apply(attempt, true);
        }
        self.marks.lock().unwrap().clear();
    }

    /// Closes the store and opens it again.
    pub(super) fn reopen_cleanly(&mut self) {
        self.disk.set_faults(|faults| *faults = Faults::default());
        self.close();
        self.reopen(self.disk.clone());
    }

    /// A bit of a log file flips while nobody has the store open. Not of the last file: what is lost at
    /// its end nobody can know, so numbers are left out there.
    pub(super) fn damage(&mut self, file: u16, page: u16, within: u16, bit: u8) {
        self.reopen_cleanly();
        self.settle();
        let disk = self.disk.after_kill();
        let files = self.store.files().unwrap();
        let Some((_last, sealed)) = files.split_last().filter(|(_, sealed)| !sealed.is_empty())
        else {
            return;
        };
        let name = sealed[usize::from(file) % sealed.len()].path.display().to_string();
        let pages = disk.page_offsets(&name);
        disk.flip(&name, pages[usize::from(page) % pages.len()] + u64::from(within), bit);
        // What a look finds is all that anybody misses from here on.
        for finding in verify(&self.look(&disk)).findings {
            if finding.damage == Damage::Unreadable {
                self.damaged.insert(finding.offsets);
            }
        }
        self.reopen(disk);
    }

    /// Whether acked events are in a range that no damage excuses.
    fn lacks_acked(&self, offsets: &Range<u64>) -> bool {
        let unexcused = Ranges::from(offsets.clone()).without(&self.damaged);
        let lacks = |range: &Range<u64>| {
            self.model.acked[range.start as usize..range.end as usize].contains(&true)
        };
        unexcused.iter().any(lacks)
    }

    /// Opens and reads a store that is damaged somewhere: every event is right or reported
    /// missing, and numbers go on past all that was given. Says how many are missing.
    pub(super) fn reads_nothing_wrong(&self, disk: SimDisk, damage: &str) -> u64 {
        self.reads_nothing_wrong_and(disk, damage, true)
    }

    /// As [`World::reads_nothing_wrong`]; the sums must be right only if they can be.
    pub(super) fn reads_nothing_wrong_and(
        &self,
        disk: SimDisk,
        damage: &str,
        adds_up: bool,
    ) -> u64 {
        let looked = self.look(&disk.after_kill());
        let opened = open(disk, &self.options, self.now_us);
        let (store, mut writer) = opened.unwrap_or_else(|e| panic!("{damage}: {e}"));
        let watermark = store.mark().watermark;
        assert!(watermark >= self.watermark(), "{damage}: the end is lost");
        let (mut from, mut missing, mut tries) = (0, Vec::new(), 0);
        while from < watermark {
            let read = match store.read(from, 64, 32 << 10) {
                Ok(read) => read,
                Err(error) => {
                    // It is the file that is appended to, which the writer gives up first.
                    writer.check().unwrap();
                    tries += 1;
                    assert!(!writer.shared.log.has_active() && tries < 3, "{damage}: {error}");
                    continue;
                }
            };
            for event in &read.events {
                let expected = self.model.events.get(event.offset as usize);
                assert_eq!(Some(event), expected, "{damage}");
            }
            let read_missing: u64 = read.missing.iter().map(|range| range.end - range.start).sum();
            assert_eq!(read.events.len() as u64 + read_missing, read.next - from, "{damage}");
            missing.extend(read.missing);
            from = read.next;
        }
        // A look at the same disk tells the same events missing, and before any of them was read.
        let verification = verify(&looked);
        let told = verification.findings.iter().filter(|f| f.damage == Damage::Unreadable);
        let told: Ranges = told.map(|finding| finding.offsets.clone()).collect();
        assert_eq!(told, missing.iter().cloned().collect::<Ranges>(), "{damage}");
        assert_eq!((told.count(), verification.recorded), (verification.unreadable, 0), "{damage}");
        let disorder = verification.findings.iter().find(|f| f.damage == Damage::Disorder);
        assert_eq!(disorder, None, "{damage}");
        for sink in &balance(&looked).sinks {
            let owed = told.within(&(sink.cursor..watermark));
            assert_eq!(sink.unaccounted, owed.iter().cloned().collect::<Vec<_>>(), "{damage}");
            assert!(!adds_up || sink.adds_up() == (owed.count() == 0), "{damage}: {sink:?}");
        }
        assert_eq!(store.stats().quarantined_events, told.count(), "{damage}");
        // Once the ledger has them, they are told apart from what is new, and every sum adds up.
        if !missing.is_empty() {
            let verification = verify(&store);
            assert_eq!(verification.unreadable, 0, "{damage}");
            assert!(!adds_up || balance(&store).adds_up(), "{damage}: {:?}", balance(&store));
        }
        let losses = store.losses().unwrap();
        for range in &missing {
            let written = losses.iter().any(|l| {
                l.offsets.start <= range.start.max(l.offsets.start)
                    && l.offsets.end == range.end
                    && l.reason == LossReason::Corrupt
            });
            assert!(written, "{damage}: {range:?} is not in {losses:?}");
        }
        // A damaged tree can refuse the first: then the log goes on in a new file.
        let mut commit = || writer.commit(&[event(0, "after")], &[], self.now_us);
        let committed = commit().or_else(|_| commit()).unwrap();
        assert!(committed.offsets.start >= self.watermark());
        writer.shared.log.settle().unwrap();
        let read = store.read(committed.offsets.start, 1, 1).unwrap();
        let seq = read.events.first().map(|event| event.seq);
        assert!(
            seq.is_some_and(|seq| seq >= self.model.next_seq[0]),
            "{damage}: an identity is used twice: {read:?}"
        );
        told.within(&(0..self.watermark())).count()
    }

    /// Opens a disk only to look.
    pub(super) fn look(&self, disk: &SimDisk) -> Store {
        let disk = Arc::new(disk.clone());
        Store::look_on(disk, None, self.options.clone(), self.now_us).unwrap()
    }

    /// Trims; what the report says was lost must be in the ledger.
    pub(super) fn retain(&mut self) -> Result<RetentionReport, StateError> {
        let report = self.writer.retain(self.now_us);
        self.follow_marks();
        let chain = self.voided();
        if !chain.is_empty() {
            assert!(self.writer.void.is_some(), "the next commit must tell");
            self.failed.push(chain);
        }
        let report = report?;
        let ledger = self.store.losses().unwrap();
        for loss in &report.losses {
            // A row that was written before and then failed keeps its time.
            let (at_us, since_us) = (loss.at_us, loss.since_us);
            let written = |l: &Loss| Loss { at_us, since_us, ..l.clone() } == *loss;
            assert!(ledger.iter().any(written), "{loss:?} is not in {ledger:?}");
        }
        Ok(report)
    }

    /// Moves the model's cursors over what the ledger says its sinks lost.
    fn follow_losses(&mut self) {
        let start = self.store.stats().first_offset;
        for sink in &self.options.sinks {
            // A new sink starts at the first stored offset.
            self.model.cursors.entry(sink.name.clone()).or_insert(start);
        }
        for loss in self.store.losses().unwrap() {
            // A row whose transaction failed may show before the data is gone.
            if loss.reason != LossReason::Corrupt
                && loss.offsets.end <= start
                && let Some(sink) = &loss.sink
            {
                let cursor = self.model.cursors.entry(sink.clone()).or_default();
                *cursor = loss.offsets.end.max(*cursor);
            }
        }
    }

    /// Everything that the store shows is what the model says.
    pub(super) fn check(&self) {
        let stats = self.store.stats();
        assert_eq!(stats.watermark, self.watermark());
        assert_eq!(stats.next_seq, self.model.next_seq, "sequence numbers");
        for sink in self.options.sinks.iter().map(|sink| &sink.name) {
            let cursor = self.model.cursors[sink];
            assert_eq!(self.store.cursor(sink), Some(cursor), "cursor of {sink}");
            assert!(cursor >= stats.first_offset, "{sink} was passed without a loss");
        }
        for key in 0..8_u8 {
            let key = Bytes::from(vec![key]);
            let value = self.store.state(1, &key).unwrap();
            assert_eq!(value.as_ref(), self.model.state.get(&key), "state of {key:?}");
        }
        let mut from = stats.first_offset;
        let mut received_us = 0;
        while from < stats.watermark {
            let read = self.store.read(from, 64, 32 << 10).unwrap();
            let mut offset = from;
            for missing in &read.missing {
                assert!(!self.lacks_acked(missing), "acked events are missing: {missing:?}");
            }
            for event in read.events {
                offset = offset.max(event.offset);
                assert!(event.event.received_us >= received_us, "receive times go back");
                received_us = event.event.received_us;
                let expected = self.model.events.get(event.offset as usize);
                assert_eq!(Some(&event), expected, "offset {}", event.offset);
            }
            assert!(read.next > from, "reading makes no progress at {from}");
            from = read.next;
        }
        assert_eq!(from, stats.watermark);
        self.check_tools();
    }

    /// What the tools say of a store without damage: it is whole, and every sink's sums add up.
    /// Never acked events may be missing.
    fn check_tools(&self) {
        let verification = verify(&self.store);
        let lost = verification.findings.iter().filter(|f| f.damage != Damage::Bookkeeping);
        for finding in lost {
            assert!(!finding.offsets.is_empty(), "{finding:?}");
            assert!(!self.lacks_acked(&finding.offsets), "{finding:?}");
        }
        let stored = verification.offsets.end - verification.offsets.start;
        let missing = verification.unreadable + verification.recorded;
        assert_eq!(verification.events, stored - missing);
        let balance = balance(&self.store);
        for sink in &balance.sinks {
            let unaccounted: u64 = sink.unaccounted.iter().map(|r| r.end - r.start).sum();
            assert!(sink.adds_up() || (0..=missing).contains(&unaccounted), "{sink:?}");
            assert_eq!(sink.problems, Vec::<String>::new(), "{sink:?}");
        }
    }
}

pub(super) fn verify(store: &Store) -> Verification {
    let mut verifier = store.verify().unwrap();
    while verifier.step().unwrap() {}
    let Progress { done, total } = verifier.progress();
    assert_eq!(done, total);
    verifier.finish()
}

pub(super) fn balance(store: &Store) -> Balance {
    let mut balancer = store.balance().unwrap();
    while balancer.step().unwrap() {}
    balancer.finish().unwrap()
}

impl Model {
    fn apply(&mut self, (events, control): Attempt, acked: bool) {
        for event in events {
            self.received_us = self.received_us.max(event.received_us);
            let seq = &mut self.next_seq[usize::from(event.partition)];
            let event = Event { received_us: self.received_us, ..event };
            let offset = self.events.len() as u64;
            self.events.push(StoredEvent { offset, seq: *seq, event, stamp: None });
            self.acked.push(acked);
            *seq += 1;
        }
        for control in control {
            match control {
                Control::Cursor { sink, offset } => {
                    let cursor = self.cursors.entry(sink.to_string()).or_default();
                    *cursor = offset.max(*cursor);
                }
                Control::Put { key, value, .. } => {
                    self.state.insert(key, value);
                }
                Control::Delete { key, .. } => {
                    self.state.remove(&key);
                }
            }
        }
    }
}
