//! What every sink is: something that takes requests and says what became of their events.
//!
//! Owns: the [`Sink`] trait, and the one vocabulary ([`Answer`], [`Failure`]) into which a sink
//! sorts what its upstream said. Nothing behind the trait decides what to do next: that is
//! `delivery`.
//! Deliberately absent: retries, pauses, cursors. A sink that failed is simply asked again.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use storage::StoredEvent;

use crate::reach::Reach;

/// Number of a request, rising by one within a sink's life.
pub(crate) type RequestId = u64;

/// Requests from this number on carry requeued dead letters, each alone, or what is replayed. They
/// stand outside the order: whatever their offsets, they are to be sent, and a sink that keeps a cursor of its own
/// leaves it where it is.
pub(crate) const OUTSIDE_ORDER: RequestId = 1 << 63;

/// Events that are sent at once, in offset order.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    /// Names it in the answer.
    pub(crate) id: RequestId,
    /// What its events say of their stream, where a sink has more than one.
    pub(crate) stream: Option<Mark>,
    /// Never empty. The indexes of an [`Answer`] are positions in here.
    pub(crate) events: Arc<Vec<StoredEvent>>,
}

impl Request {
    /// Event bytes in it.
    pub(crate) fn size_bytes(&self) -> usize {
        self.events.iter().map(|stored| stored.event.size_bytes()).sum()
    }
}

/// Which stream of a sink an event comes in. Order holds per device within one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mark {
    /// As it comes.
    Live,
    /// What an outage held up, while later events go ahead of it.
    Backfill,
    /// Sent again because somebody asked for it: outside the order.
    Replay,
}

impl Mark {
    /// Value of the CloudEvents attribute `stream`.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Live => "live",
            Self::Backfill => "backfill",
            Self::Replay => "replay",
        }
    }
}

/// How much may be in flight at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::struct_field_names, reason = "a bound ends the name")]
pub(crate) struct Window {
    /// Requests.
    pub(crate) requests_max: usize,
    /// Events over all requests; bounds one request as well.
    pub(crate) events_max: usize,
    /// Event bytes over all requests; a single larger event still goes, alone.
    pub(crate) bytes_max: usize,
}

/// What became of the events of a request: those that no failure names were delivered.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Answer {
    /// Disjoint groups of events that were not delivered.
    pub(crate) failed: Vec<Failed>,
}

/// A group of events that were not delivered, for one reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failed {
    /// Which ones.
    pub(crate) which: Which,
    /// What it means for them.
    pub(crate) failure: Failure,
    /// What the upstream said, in one line.
    pub(crate) reason: String,
}

/// Events of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Which {
    /// All of them.
    All,
    /// These, by index; not empty.
    These(Vec<usize>),
}

/// The ways to fail: every answer of every upstream is sorted into one of them, once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// Nothing wrong with the events and nothing that they say of the upstream: they were taken back
    /// because of a neighbour that is bad or that failed, and may go again after that one.
    Again,
    /// Nothing wrong with the events: try again later, and not before the upstream asks for it.
    Retry {
        /// Pause that the upstream asked for.
        after: Option<Duration>,
    },
    /// At least one of these events is bad, and the upstream does not say which.
    Suspect,
    /// Each of these events is bad.
    Reject,
    /// The upstream refuses us, not the events (authentication, unknown topic ...). Somebody must
    /// act, and the reason says how; until then nothing is dropped.
    Hold,
}

impl Answer {
    /// Every event was delivered.
    pub(crate) fn delivered() -> Self {
        Self::default()
    }
    /// No event was delivered.
    pub(crate) fn failed(failure: Failure, reason: impl Into<String>) -> Self {
        Self { failed: vec![Failed { which: Which::All, failure, reason: reason.into() }] }
    }
    /// Events of it were taken back: see [`Failure::Again`].
    pub(crate) fn was_taken_back(&self) -> bool {
        self.failed.iter().any(|failed| failed.failure == Failure::Again)
    }
}

/// One upstream.
///
/// Contract, on which the order per device rests: requests are taken in the order in which they
/// were begun, and once one of them was not delivered, no later one that was in flight beside it
/// delivers an event of the same device.
///
/// For a sink that keeps its cursor upstream, beside the data (Kafka, exactly once), and says so by
/// [`Sink::KEEPS_CURSOR`], three things more hold:
/// - With a request that is part of the order comes how far the sink is once that request, and all
///   that were begun before it, are done ([`Sink::begin_reaching`]): what else is in there is
///   delivered, a durable dead letter, filtered, or gone from the log.
/// - Answers may come together, once what was begun is delivered as one; [`Sink::close`] says when it
///   is no use to wait for more.
/// - A request may be answered as delivered without being sent: the upstream knows that it has it.
pub(crate) trait Sink: Send + 'static {
    /// It keeps its cursor upstream.
    const KEEPS_CURSOR: bool = false;

    /// What may be in flight; constant through the sink's life.
    fn window(&self) -> Window;

    /// Hands a request over. Does not wait for the upstream.
    fn begin(&mut self, request: Request);

    /// As [`Sink::begin`], for a request below [`OUTSIDE_ORDER`]: `reach` is how far the sink is once
    /// this request and all that were begun before it are done.
    fn begin_reaching(&mut self, request: Request, reach: impl FnOnce() -> Reach) {
        drop(reach);
        self.begin(request);
    }

    /// How far the upstream turned out to be, once, where an earlier process has split streams
    /// ([`Streams::split_as`](crate::streams::Streams::split_as)): what was begun before is answered
    /// as taken back. Asked for after each answer.
    fn found(&mut self) -> Option<Reach> {
        None
    }

    /// Nothing more is at hand: what was begun is to be answered without waiting for what may come.
    fn close(&mut self) {}

    /// Nothing will be begun any more: a sink that knows its upstream to be away answers for what is
    /// in flight at once, instead of waiting until it comes back.
    fn stop(&mut self) {}

    /// Waits for the answer to any request that was begun. Each gets exactly one, within the request
    /// timeout for every step that it takes. Pends while nothing is in flight.
    ///
    /// Cancel-safe: dropping the future loses no answer.
    fn answer(&mut self) -> impl Future<Output = (RequestId, Answer)> + Send;
}
