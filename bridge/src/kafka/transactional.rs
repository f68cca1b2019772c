//! The Kafka sink that delivers exactly once: events and cursor in one transaction.
//!
//! Owns: which requests the open transaction carries, and when it closes. It carries them in the order
//! in which they were begun, whichever stream they come in, so the reach of its last one is the cursor
//! of each stream.
//!
//! One transactional producer per gateway and sink. A session starts by fencing whoever wrote under
//! this name before and by asking Kafka for the cursor; what lies below it is answered as delivered
//! without being sent, so a gateway that was killed between a commit and the move of its own cursor
//! sends nothing twice. Then, again and again: begin, send, wait for every report, add the cursor,
//! commit, and only now answer. After any error the producer is dropped and a new session begins; how
//! the last transaction ended is then read, not guessed.
//!
//! - A transaction closes when no more events are at hand, after `transaction_time_max`, or when it
//!   carries `transaction_bytes_max`: its price is a round trip or two, not a matter of its events.
//!   What arrives while one is committed waits here for the next.
//! - An event that is too large is refused before it is sent, with everything behind it: the cursor
//!   must not pass it before it is a durable dead letter. What was begun before it is committed.
//! - The reports are counted, and the commit is asked for when all are in: `flush` and
//!   `commit_transaction` alone poll in slices of a tenth of a second.
//! - Fenced means that another gateway writes under this name. It is left alone: no session begins
//!   while the mark in Kafka is another's.
//!
//! Deliberately absent: calls that block (`session`), what the cursor means (`cursor`).

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::{JoinHandle, spawn_blocking};

use super::WINDOW;
use super::client::Shared;
use super::cursor::{Mark, Place, Witness};
use super::ledger::FENCED;
use super::record::{Recorder, TOO_LARGE};
use super::session::{Claim, Log, Patience, Session, Setback, Start, Started};
use crate::cloudevents::Envelope;
use crate::config::KafkaConfig;
use crate::reach::Reach;
use crate::sink::{Answer, Failed, Failure, Request, RequestId, Sink, Which, Window};

const REQUESTS_MAX: usize = 512;
/// Events that are begun at once, each of which takes some 300 bytes beside its own until its
/// transaction is committed.
const EVENTS_MAX: usize = 40_960;
/// What librdkafka has at once, give or take a request: what it has delivered leaves it while the
/// transaction stays open.
const PENDING: Window = WINDOW;

/// Sends requests to Kafka, exactly once.
pub(crate) struct TransactionalSink {
    config: KafkaConfig,
    recorder: Recorder,
    place: Arc<Place>,
    request_timeout: Duration,
    shared: Arc<Shared>,
    state: State,
    /// Begun, and not yet in a transaction.
    waiting: VecDeque<Begun>,
    open: Option<Transaction>,
    answers: VecDeque<(RequestId, Answer)>,
    /// Those among them that take something back: until they are out, whatever begins is taken back
    /// too.
    taken_back: usize,
    /// Nothing more is at hand.
    dry: bool,
    /// What Kafka has.
    done: Reach,
    /// A session has begun: from then on Kafka has what this process brought there.
    resumed: bool,
    /// What Kafka had before, if streams were split: for the forwarder to know.
    found: Option<Reach>,
    log: Log,
    /// The mark that stands in Kafka, as far as we know.
    mark: Option<Mark>,
    /// When the ledger was last seen to move, and how far it was.
    alive: (Instant, u64),
}

enum State {
    /// No producer.
    Down,
    Starting(JoinHandle<Result<Started, Setback>>),
    Ready(Session),
    Committing(JoinHandle<(Session, Result<(), Setback>)>),
    /// A producer on its way out: its threads take a moment to end.
    Closing(JoinHandle<()>),
}

struct Begun {
    request: Request,
    /// How far all streams are with it; `None` outside the order: it is sent although it may be done
    /// already, and moves nothing.
    reach: Option<Reach>,
}

struct Transaction {
    since: Instant,
    /// What Kafka has with it.
    reach: Reach,
    /// The last event that Kafka has with it.
    witness: Option<Witness>,
    size_bytes: usize,
}

impl Transaction {
    /// What it leaves in Kafka.
    fn mark(&self, place: &Place) -> Mark {
        place.mark(self.reach.clone(), self.witness)
    }
}

/// What there is to wait for.
enum Next {
    Job,
    Change(Option<Instant>),
}

impl TransactionalSink {
    /// `log` is the store's: a cursor found in Kafka counts if it is of that very log.
    pub(crate) fn new(
        config: KafkaConfig,
        envelope: Envelope,
        place: Place,
        log: Log,
        request_timeout: Duration,
    ) -> Self {
        Self {
            recorder: Recorder::new(&config, envelope),
            config,
            place: Arc::new(place),
            request_timeout,
            shared: Arc::default(),
            state: State::Down,
            waiting: VecDeque::new(),
            open: None,
            answers: VecDeque::new(),
            taken_back: 0,
            dry: false,
            done: Reach::default(),
            resumed: false,
            found: None,
            log,
            mark: None,
            alive: (Instant::now(), 0),
        }
    }

    fn patience(&self) -> Patience {
        Patience { shared: Arc::clone(&self.shared), timeout: self.request_timeout }
    }

    /// Does whatever can be done without waiting.
    fn advance(&mut self, now: Instant) {
        if self.shared.ledger().is_broken() {
            return self.wind_up();
        }
        match self.state {
            State::Down if !self.waiting.is_empty() => self.start(),
            State::Ready(_) => {
                self.hand_over(now);
                if self.shared.ledger().is_broken() {
                    self.wind_up();
                } else if self.is_complete(now) {
                    self.commit();
                }
            }
            _ => {}
        }
    }

    fn start(&mut self) {
        let start = Start {
            config: self.config.clone(),
            window: self.window(),
            place: Arc::clone(&self.place),
            patience: self.patience(),
            claim: if self.resumed { Claim::After(self.mark.clone()) } else { Claim::Ours },
            log: Arc::clone(&self.log),
        };
        self.state = State::Starting(spawn_blocking(move || start.run()));
    }

    fn started(&mut self, outcome: Result<Started, Setback>) {
        let Started { session, mark } = match outcome {
            Ok(started) => started,
            Err(setback) => {
                self.state = State::Down;
                return self.set_back(setback);
            }
        };
        self.state = State::Ready(session);
        let reach = mark.reach().clone();
        self.mark = Some(mark);
        let first = !std::mem::replace(&mut self.resumed, true);
        self.done.join(reach.clone());
        if first && !reach.ahead.is_empty() {
            self.take_back_waiting();
            self.found = Some(reach);
        }
    }

    fn set_back(&mut self, setback: Setback) {
        let mut ledger = self.shared.ledger();
        if setback.fenced {
            ledger.holds_after_all(FENCED.to_owned());
        } else {
            ledger.breaks(setback.failure, setback.reason);
        }
    }

    /// Drops the producer of a broken ledger; once it is gone, everything that was begun is answered.
    fn wind_up(&mut self) {
        match std::mem::replace(&mut self.state, State::Down) {
            State::Ready(session) => {
                if session.is_fenced() {
                    self.shared.ledger().holds_after_all(FENCED.to_owned());
                }
                self.state = State::Closing(spawn_blocking(move || drop(session)));
            }
            State::Down => {
                self.open = None;
                let mut ledger = self.shared.ledger();
                ledger.void();
                for Begun { request, .. } in self.waiting.drain(..) {
                    ledger.admit(request.id, request.events.len(), request.size_bytes());
                }
                ledger.settle();
                let answers = std::iter::from_fn(|| ledger.take_answer());
                let before = self.answers.len();
                self.answers.extend(answers);
                let new = self.answers.iter().skip(before);
                self.taken_back += new.filter(|(_, answer)| answer.was_taken_back()).count();
            }
            // They see by themselves that the ledger is broken.
            job => self.state = job,
        }
    }

    /// Whether the open transaction takes more.
    fn takes_more(&self, now: Instant) -> bool {
        self.open.as_ref().is_none_or(|open| {
            open.size_bytes < self.config.transaction_bytes_max && now < self.closes_at(open)
        })
    }

    fn closes_at(&self, open: &Transaction) -> Instant {
        open.since + self.config.transaction_time_max
    }

    /// Whether the open transaction has all that it will carry, delivered.
    fn is_complete(&self, now: Instant) -> bool {
        let closed = !self.takes_more(now) || self.dry && self.waiting.is_empty();
        self.open.is_some() && closed && self.shared.ledger().pending() == 0
    }

    /// Whether librdkafka has room for more.
    fn may_hand_over(&self) -> bool {
        let ledger = self.shared.ledger();
        ledger.pending() < PENDING.events_max && ledger.pending_bytes() < PENDING.bytes_max
    }

    fn hand_over(&mut self, now: Instant) {
        while self.takes_more(now) && self.may_hand_over() {
            let Some(begun) = self.waiting.pop_front() else { return };
            let events = &begun.request.events;
            if begun.reach.is_some() && events.iter().all(|stored| self.done.has(stored)) {
                self.answers.push_back((begun.request.id, Answer::delivered()));
                continue;
            }
            if events.iter().any(|stored| self.recorder.is_too_large(stored)) {
                return self.refuse(&begun.request);
            }
            self.send(begun, now);
            if self.shared.ledger().is_broken() {
                return;
            }
        }
    }

    /// Takes a request into the transaction.
    fn send(&mut self, begun: Begun, now: Instant) {
        let State::Ready(session) = &self.state else { unreachable!("only a session sends") };
        if self.open.is_none() {
            if let Err(setback) = session.begin() {
                self.waiting.push_front(begun);
                return self.set_back(setback);
            }
            let (reach, witness) = (self.done.clone(), self.mark.as_ref().and_then(Mark::witness));
            self.open = Some(Transaction { since: now, reach, witness, size_bytes: 0 });
            self.alive = (now, self.shared.ledger().moves());
        }
        let open = self.open.as_mut().expect("just begun");
        let Begun { request, reach } = begun;
        let in_order = reach.is_some();
        if let Some(reach) = reach {
            open.reach.join(reach);
            let last = request.events.iter().rfind(|stored| !self.done.has(stored));
            open.witness = open.witness.max(last.map(Witness::of));
        }
        let events = request.events.len();
        let first = self.shared.ledger().admit(request.id, events, request.size_bytes());
        for (stored, place) in request.events.iter().zip(0..) {
            let ticket = first.wrapping_add(place);
            if in_order && self.done.has(stored) {
                self.shared.ledger().report(ticket, Ok(()));
                continue;
            }
            open.size_bytes += stored.event.size_bytes();
            if let Err(code) = self.recorder.send(&session.producer, stored, request.stream, ticket)
            {
                // What else is in the transaction is as good as new.
                let mut ledger = self.shared.ledger();
                ledger.refused(ticket, code);
                let reason = format!("taken back with event {}: {code}", stored.offset);
                ledger.breaks(Failure::Again, reason);
                return;
            }
        }
    }

    /// Refuses what is too large in a request, and takes back the rest and all that waits behind it.
    fn refuse(&mut self, request: &Request) {
        let (refused, rest): (Vec<_>, Vec<_>) = (0..request.events.len())
            .partition(|&place| self.recorder.is_too_large(&request.events[place]));
        let mut failed = Vec::new();
        for (places, failure, reason) in
            [(refused, Failure::Reject, TOO_LARGE), (rest, Failure::Again, TAKEN_BACK)]
        {
            if !places.is_empty() {
                let reason = reason.to_owned();
                failed.push(Failed { which: Which::These(places), failure, reason });
            }
        }
        self.answer_later(request.id, Answer { failed });
        self.take_back_waiting();
    }

    fn take_back_waiting(&mut self) {
        while let Some(Begun { request, .. }) = self.waiting.pop_front() {
            self.answer_later(request.id, Answer::failed(Failure::Again, TAKEN_BACK));
        }
    }

    fn answer_later(&mut self, id: RequestId, answer: Answer) {
        self.taken_back += usize::from(answer.was_taken_back());
        self.answers.push_back((id, answer));
    }

    fn commit(&mut self) {
        let State::Ready(session) = std::mem::replace(&mut self.state, State::Down) else {
            unreachable!("only a session commits")
        };
        let mark = self.open.as_ref().expect("complete, so open").mark(&self.place);
        let (place, patience) = (Arc::clone(&self.place), self.patience());
        self.state = State::Committing(spawn_blocking(move || {
            let outcome = session.commit(&place, &mark, &patience);
            (session, outcome)
        }));
    }

    fn committed(&mut self, session: Session, outcome: Result<(), Setback>) {
        self.state = State::Ready(session);
        let open = self.open.take().expect("what was committed was open");
        match outcome {
            Ok(()) => {
                self.mark = Some(open.mark(&self.place));
                self.done = open.reach;
                let mut ledger = self.shared.ledger();
                self.answers.extend(std::iter::from_fn(|| ledger.take_answer()));
            }
            Err(setback) => self.set_back(setback),
        }
    }

    /// Whether there is a job to wait for, and until when to wait otherwise.
    fn next(&mut self, now: Instant) -> Next {
        let State::Ready(_) = self.state else {
            return if matches!(self.state, State::Down) { Next::Change(None) } else { Next::Job };
        };
        let ledger = self.shared.ledger();
        if ledger.moves() != self.alive.1 || ledger.pending() == 0 {
            self.alive = (now, ledger.moves());
        }
        let dies_at = (ledger.pending() > 0).then(|| self.alive.0 + self.request_timeout);
        let open = self.open.as_ref().filter(|_| self.takes_more(now));
        Next::Change(dies_at.into_iter().chain(open.map(|open| self.closes_at(open))).min())
    }

    /// Waits for the job that is under way. Cancel-safe.
    async fn job(&mut self) {
        match &mut self.state {
            State::Starting(job) => {
                let outcome = joined(job.await);
                self.started(outcome);
            }
            State::Committing(job) => {
                let (session, outcome) = joined(job.await);
                self.committed(session, outcome);
            }
            State::Closing(job) => {
                joined(job.await);
                self.state = State::Down;
            }
            State::Down | State::Ready(_) => {}
        }
    }
}

const TAKEN_BACK: &str = "taken back before it was sent";

fn joined<T>(outcome: Result<T, tokio::task::JoinError>) -> T {
    outcome.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
}

impl Sink for TransactionalSink {
    const KEEPS_CURSOR: bool = true;

    fn window(&self) -> Window {
        // While one transaction is committed, what the next one begins with gathers.
        let bytes_max = self.config.transaction_bytes_max + PENDING.bytes_max;
        Window { requests_max: REQUESTS_MAX, events_max: EVENTS_MAX, bytes_max }
    }

    fn begin(&mut self, request: Request) {
        self.admit(Begun { request, reach: None });
    }

    fn begin_reaching(&mut self, request: Request, reach: impl FnOnce() -> Reach) {
        self.admit(Begun { request, reach: Some(reach()) });
    }

    fn found(&mut self) -> Option<Reach> {
        self.found.take()
    }

    fn close(&mut self) {
        self.dry = true;
    }

    fn stop(&mut self) {
        if self.shared.ledger().hurry() {
            self.shared.changed.notify_one();
        }
    }

    async fn answer(&mut self) -> (RequestId, Answer) {
        loop {
            let now = Instant::now();
            self.advance(now);
            if let Some((id, answer)) = self.answers.pop_front() {
                self.taken_back -= usize::from(answer.was_taken_back());
                return (id, answer);
            }
            match self.next(now) {
                Next::Job => self.job().await,
                Next::Change(None) => self.shared.changed.notified().await,
                Next::Change(Some(at)) => {
                    let changed = self.shared.changed.notified();
                    // Either way the loop looks again.
                    let silent = tokio::time::timeout_at(at.into(), changed).await.is_err();
                    if silent && self.is_silent() {
                        self.shared.ledger().no_sign_of_life(self.request_timeout);
                    }
                }
            }
        }
    }
}

impl TransactionalSink {
    fn admit(&mut self, begun: Begun) {
        self.dry = false;
        if self.taken_back > 0 {
            let answer = Answer::failed(Failure::Again, TAKEN_BACK);
            return self.answer_later(begun.request.id, answer);
        }
        self.waiting.push_back(begun);
        self.advance(Instant::now());
    }

    /// Whether nothing was reported for a request timeout.
    fn is_silent(&self) -> bool {
        let ledger = self.shared.ledger();
        ledger.pending() > 0
            && ledger.moves() == self.alive.1
            && self.alive.0.elapsed() >= self.request_timeout
    }
}

#[cfg(test)]
mod tests;
