//! One life of a transactional producer: connect, fence, ask for the cursor, commit.
//!
//! Owns: every call into librdkafka that blocks. All of it is for the blocking pool, is cut into
//! slices, and gives up as soon as the ledger is broken (a wrong password), the gateway stops, or the
//! request timeout has passed.
//! Invariants:
//! - The cursor is asked for after `init_transactions` came back: by then the old instance is fenced,
//!   and what it left open is committed or aborted for good.
//! - It is looked at before that, too: who may not go on from it leaves the name to whoever has it.
//!   This look takes what is committed, whatever is pending: waiting for the end of a transaction whose
//!   gateway was killed would be to wait for its timeout.
//! - Who has taken the name says so in the mark before it sends anything: so that whoever had it, and
//!   finds itself fenced, sees that it was not for nothing.
//!
//! Deliberately absent: mending. After any error the session is dropped, and the next one asks Kafka
//! how the last transaction ended.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rdkafka::ClientContext;
use rdkafka::config::{ClientConfig, FromClientConfigAndContext};
use rdkafka::consumer::{BaseConsumer, Consumer as _, ConsumerGroupMetadata};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::producer::Producer as _;
use rdkafka::topic_partition_list::TopicPartitionListElem;
use rdkafka::{Offset, TopicPartitionList};
use storage::{Read, ReadError};

use super::cannot_start;
use super::client::{
    Producer, Quiet, Reports, Shared, Tokens, client_config, code, producer_config,
};
use super::cursor::{Mark, NoCursor, Place};
use super::ledger::{FENCED, describe, is_fenced, sort};
use crate::config::KafkaConfig;
use crate::reach::Reach;
use crate::sink::{Failure, Window};

/// How long one call may block before it is looked whether anybody still waits for it.
const SLICE: Duration = Duration::from_millis(500);
/// After this the brokers end an open transaction, if the gateway is gone for good.
const TRANSACTION_TIMEOUT_MIN: Duration = Duration::from_mins(1);
/// Brokers take no more by default (`transaction.max.timeout.ms`).
const TRANSACTION_TIMEOUT_MAX: Duration = Duration::from_mins(15);
/// The partition that stands for the cursor.
const CURSOR_PARTITION: i32 = 0;

/// Why a step did not succeed.
#[derive(Debug)]
pub(super) struct Setback {
    pub(super) failure: Failure,
    pub(super) reason: String,
    /// Somebody else writes under our name, or the brokers believe so.
    pub(super) fenced: bool,
}

impl Setback {
    fn of(error: &KafkaError) -> Self {
        let code = code(error);
        let failure = match sort(code) {
            Failure::Hold => Failure::Hold,
            _ => Failure::Retry { after: None },
        };
        let mut reason = describe(code);
        if let KafkaError::Transaction(error) = error {
            // librdkafka's own words say more.
            reason = format!("{}: {reason}", error.string());
        }
        Self { failure, reason, fenced: is_fenced(code) }
    }

    pub(super) fn hold(reason: String) -> Self {
        Self { failure: Failure::Hold, reason, fenced: false }
    }

    fn retry(reason: impl Into<String>) -> Self {
        Self { failure: Failure::Retry { after: None }, reason: reason.into(), fenced: false }
    }
}

/// Reads the store's log from an offset on, an event at least if there is one. Blocks.
pub(crate) type Log = Arc<dyn Fn(u64) -> Result<Read, ReadError> + Send + Sync>;

/// Everything that it takes to begin a session.
pub(super) struct Start {
    pub(super) config: KafkaConfig,
    /// What the producer may be given at once.
    pub(super) window: Window,
    pub(super) place: Arc<Place>,
    pub(super) patience: Patience,
    pub(super) claim: Claim,
    pub(super) log: Log,
}

/// What a session begins with.
pub(super) struct Started {
    pub(super) session: Session,
    /// The mark that stands in Kafka: its own.
    pub(super) mark: Mark,
}

/// Whether the name is ours to take.
#[derive(Clone, Debug)]
pub(super) enum Claim {
    /// As when a gateway starts: whoever had it before is gone, or to be fenced.
    Ours,
    /// It was ours, and this mark with it. A writer that has set another one since is left alone,
    /// whatever error told of it: brokers do not always say that a producer was fenced.
    After(Option<Mark>),
}

/// What a look at the mark does about an offset that a transaction has set and not committed.
#[derive(Clone, Copy, Debug)]
enum Pending {
    /// Waits until that has ended.
    Awaited,
    /// Takes the one before.
    Passed,
}

/// How long to go on.
#[derive(Clone)]
pub(super) struct Patience {
    pub(super) shared: Arc<Shared>,
    pub(super) timeout: Duration,
}

/// A producer that may begin transactions.
pub(super) struct Session {
    pub(super) producer: Producer,
    group: ConsumerGroupMetadata,
}

impl Start {
    /// Connects, fences whoever wrote under this name before, and reads the mark. Blocks.
    pub(super) fn run(self) -> Result<Started, Setback> {
        let name = &self.place.name;
        let producer = self.producer(name)?;
        let before = self.read_mark(&self.consumer(name, Pending::Passed)?)?;
        self.resume(before.as_ref())?;
        if let Claim::After(known) = &self.claim {
            let is_known =
                |mark: &Mark| known.as_ref().is_some_and(|known| mark.has_the_writer_of(known));
            if before.as_ref().is_some_and(|mark| !is_known(mark)) {
                return Err(Setback { fenced: true, ..Setback::hold(FENCED.to_owned()) });
            }
        }
        let inherited = match &self.place.former_name {
            Some(former_name) if before.is_none() => self.inherit(former_name)?,
            _ => None,
        };
        self.patience.wait(|slice| producer.init_transactions(slice))?;
        let consumer = self.consumer(name, Pending::Awaited)?;
        let mark = self.read_mark(&consumer)?.or(inherited);
        let resumed = self.resume(mark.as_ref())?;
        let group = consumer.group_metadata().expect("the consumer has a group");
        let session = Session { producer, group };
        let claim = resumed.unwrap_or_else(|| self.place.mark(Reach::default(), None));
        if !mark.is_some_and(|mark| mark.has_the_writer_of(&claim)) {
            session.begin()?;
            session.commit(&self.place, &claim, &self.patience)?;
        }
        Ok(Started { session, mark: claim })
    }

    fn resume(&self, mark: Option<&Mark>) -> Result<Option<Mark>, Setback> {
        self.place.resume(mark, &*self.log).map_err(|error| match error {
            NoCursor::Forked(told) => Setback::hold(told),
            NoCursor::Unread(error) => Setback::retry(error.to_string()),
        })
    }

    /// The mark that a former version left under another name, if it is of this store: what that left
    /// open is ended first.
    fn inherit(&self, former_name: &str) -> Result<Option<Mark>, Setback> {
        let look = self.consumer(former_name, Pending::Passed)?;
        let mark = match self.read_mark(&look) {
            Ok(mark) => mark,
            // A gateway that never used that name need not be allowed to.
            Err(setback) if setback.failure == Failure::Hold => return Ok(None),
            Err(setback) => return Err(setback),
        };
        if self.resume(mark.as_ref())?.is_none() {
            return Ok(None);
        }
        let producer = self.producer(former_name)?;
        self.patience.wait(|slice| producer.init_transactions(slice))?;
        self.read_mark(&self.consumer(former_name, Pending::Awaited)?)
    }

    fn producer(&self, name: &str) -> Result<Producer, Setback> {
        let Start { config, patience, window, .. } = self;
        let mut client =
            producer_config(config, window.events_max, window.bytes_max).map_err(Setback::hold)?;
        let timeout =
            (2 * patience.timeout).clamp(TRANSACTION_TIMEOUT_MIN, TRANSACTION_TIMEOUT_MAX);
        client
            .set("transactional.id", name)
            .set("transaction.timeout.ms", timeout.as_millis().to_string());
        made(&client, Reports::to(&patience.shared, Tokens::of(config)))
    }

    fn consumer(&self, name: &str, pending: Pending) -> Result<BaseConsumer<Quiet>, Setback> {
        let mut client = client_config(&self.config).map_err(Setback::hold)?;
        let isolation = match pending {
            Pending::Awaited => "read_committed",
            Pending::Passed => "read_uncommitted",
        };
        client
            .set("group.id", name)
            .set("isolation.level", isolation)
            .set("enable.auto.commit", "false");
        made(&client, Quiet(Tokens::of(&self.config)))
    }

    fn read_mark(&self, consumer: &BaseConsumer<Quiet>) -> Result<Option<Mark>, Setback> {
        let found = self.patience.wait(|slice| {
            // It asks for its token here.
            consumer.poll(Duration::ZERO);
            let mut list = TopicPartitionList::new();
            list.add_partition(&self.place.topic, CURSOR_PARTITION);
            let list = consumer.committed_offsets(list, slice)?;
            let elements = list.elements();
            let [element] = &elements[..] else { return Ok(None) };
            element.error()?;
            Ok(Some((raw(element), element.metadata().to_owned())))
        })?;
        Ok(found.and_then(|(offset, metadata)| Mark::read(offset, &metadata)))
    }
}

fn made<C, T>(client: &ClientConfig, context: C) -> Result<T, Setback>
where
    C: ClientContext,
    T: FromClientConfigAndContext<C>,
{
    client.create_with_context(context).map_err(|error| Setback::hold(cannot_start(&error)))
}

fn raw(element: &TopicPartitionListElem<'_>) -> Option<i64> {
    match element.offset() {
        Offset::Offset(offset) => Some(offset),
        _ => None,
    }
}

impl Session {
    /// Opens a transaction; only tells librdkafka, does not block.
    pub(super) fn begin(&self) -> Result<(), Setback> {
        self.producer.begin_transaction().map_err(|error| Setback::of(&error))
    }

    /// Commits the open transaction, whose events are all delivered, and the mark with it. Blocks.
    pub(super) fn commit(
        &self,
        place: &Place,
        mark: &Mark,
        patience: &Patience,
    ) -> Result<(), Setback> {
        let mut list = TopicPartitionList::new();
        let mut element = list.add_partition(&place.topic, CURSOR_PARTITION);
        element.set_offset(Offset::Offset(mark.offset())).expect("a plain offset");
        element.set_metadata(mark.metadata());
        patience
            .wait(|slice| self.producer.send_offsets_to_transaction(&list, &self.group, slice))?;
        patience.wait(|slice| self.producer.commit_transaction(slice))
    }

    /// Whether the producer has ended because somebody else writes under its name.
    pub(super) fn is_fenced(&self) -> bool {
        self.producer.client().fatal_error().is_some_and(|(code, _)| is_fenced(code))
    }
}

impl Patience {
    /// Tries again while a call only asks for more time; librdkafka takes up what is under way.
    fn wait<T>(
        &self,
        mut call: impl FnMut(Duration) -> Result<T, KafkaError>,
    ) -> Result<T, Setback> {
        let started = Instant::now();
        loop {
            let error = match call(SLICE) {
                Ok(done) => return Ok(done),
                Err(error) => error,
            };
            let ledger = self.shared.ledger();
            if ledger.is_broken() {
                // Its own cause is the reason.
                return Err(Setback::retry("the producer has ended"));
            }
            if !asks_for_time(&error) {
                return Err(Setback::of(&error));
            }
            if ledger.is_hurried() {
                return Err(Setback::retry("the gateway is stopping"));
            }
            if started.elapsed() >= self.timeout {
                return Err(Setback::retry(ledger.silence(self.timeout)));
            }
            drop(ledger);
            // Most of these have waited for a slice already; those that come at once must not spin.
            std::thread::sleep(SLICE / 10);
        }
    }
}

/// Whether the call may be made again to go on with it.
fn asks_for_time(error: &KafkaError) -> bool {
    use RDKafkaErrorCode as Code;
    match error {
        KafkaError::Transaction(error) => error.is_retriable(),
        error => matches!(
            code(error),
            Code::OperationTimedOut
                | Code::RequestTimedOut
                | Code::WaitingForCoordinator
                | Code::CoordinatorNotAvailable
                | Code::CoordinatorLoadInProgress
                | Code::NotCoordinator
                | Code::UnstableOffsetCommit
                | Code::BrokerTransportFailure
                | Code::AllBrokersDown
        ),
    }
}
