//! The thread that hands a sink's events to librdkafka.
//!
//! Owns: a producer, and that thread, which makes a record of each event while the sink's task goes on
//! with what comes next.
//! Invariants:
//! - Requests go in the order in which they came, and nothing goes any more once the ledger is broken.
//! - Its queue is never full: what is in there is in flight, which the sink's window bounds.
//!
//! Deliberately absent: what becomes of the events (`ledger`).
//!
//! librdkafka copies what it is given. From a task that would be on whichever thread runs it, and the
//! allocator keeps memory for each of them as if it had all of the copies.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{self, JoinHandle};

use super::client::{Producer, Shared};
use super::ledger::Ticket;
use super::record::Recorder;
use crate::sink::{Failure, Request};

/// A request on its way to librdkafka.
pub(super) struct Batch {
    pub(super) request: Request,
    /// Ticket of its first event; those of the others follow.
    pub(super) first: Ticket,
    /// Places of the events that do not go: they are answered for already.
    pub(super) done: Vec<usize>,
}

/// What goes with an event that librdkafka does not take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// Nothing else.
    Alone,
    /// The transaction that it was to be in.
    Transaction,
}

/// A producer, and the thread that feeds it. Dropping it ends both, which takes them a moment.
pub(super) struct Feeder {
    producer: Arc<Producer>,
    /// Always there, but while it is dropped.
    thread: Option<(SyncSender<Batch>, JoinHandle<()>)>,
}

impl Feeder {
    /// Takes a producer over. `requests_max` is what the sink may have in flight.
    ///
    /// # Errors
    /// The system gives no thread: one line.
    pub(super) fn start(
        producer: Producer,
        recorder: Recorder,
        shared: &Arc<Shared>,
        requests_max: usize,
        refusal: Refusal,
    ) -> Result<Self, String> {
        let producer = Arc::new(producer);
        let (batches, queue) = sync_channel(requests_max);
        let shared = Arc::clone(shared);
        let feed = Feed { producer: Arc::clone(&producer), recorder, shared, refusal };
        let thread = thread::Builder::new().name("kafka-feeder".to_owned());
        let thread = thread.spawn(move || feed.run(&queue));
        let thread = thread.map_err(|error| format!("no thread to feed the producer: {error}"))?;
        Ok(Self { producer, thread: Some((batches, thread)) })
    }

    /// The producer.
    pub(super) fn producer(&self) -> &Producer {
        &self.producer
    }

    /// Hands a request on; its events are in the ledger.
    ///
    /// # Panics
    /// The thread has panicked.
    pub(super) fn feed(&self, batch: Batch) {
        let (batches, _) = self.thread.as_ref().expect("there until it is dropped");
        batches.send(batch).map_err(drop).expect("it lives as long as its queue");
    }
}

impl Drop for Feeder {
    fn drop(&mut self) {
        let (batches, thread) = self.thread.take().expect("dropped once");
        drop(batches);
        // Its panic was told of, and whoever waits for its events does not wait for ever.
        thread.join().ok();
    }
}

/// What the thread has.
struct Feed {
    producer: Arc<Producer>,
    recorder: Recorder,
    shared: Arc<Shared>,
    refusal: Refusal,
}

impl Feed {
    fn run(mut self, queue: &Receiver<Batch>) {
        while let Ok(batch) = queue.recv() {
            if !self.shared.ledger().is_broken() {
                self.feed(&batch);
            }
        }
    }

    fn feed(&mut self, Batch { request, first, done }: &Batch) {
        let mut done = done.iter().copied().peekable();
        for (stored, place) in request.events.iter().zip(0..) {
            if done.next_if_eq(&place).is_some() {
                continue;
            }
            let ticket = first.wrapping_add(place as Ticket);
            let sent = self.recorder.send(&self.producer, stored, request.stream, ticket);
            let Err(code) = sent else { continue };
            let mut ledger = self.shared.ledger();
            ledger.refused(ticket, code);
            if self.refusal == Refusal::Transaction {
                // What else is in the transaction is as good as new.
                let reason = format!("taken back with event {}: {code}", stored.offset);
                ledger.breaks(Failure::Again, reason);
            }
            self.shared.changed.notify_one();
            if ledger.is_broken() {
                return;
            }
        }
    }
}
