//! The thread that reads the log for one sink.
//!
//! Owns: that thread, from the first read on, and the one read that it may have under way.
//! Invariant: there is one read at a time, so neither queue ever fills, and one that hangs on its disk
//! holds its own sink only.
//! Deliberately absent: what to read, and when (`streams`).
//!
//! It is no job of the blocking pool: that gives each read to another of its threads, and the allocator
//! keeps memory for each of them as if it had all of the reads. On one thread, what a read takes is what
//! an earlier one gave back.

use std::panic::resume_unwind;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::{future, io, thread};

use storage::{Read, ReadError, Store};
use tokio::sync::mpsc;

use crate::streams::ReadOrder;

/// What came of an order.
type Done = (ReadOrder, Result<Read, ReadError>);

/// Reads the log, away from where tasks run.
pub(super) struct Reader {
    store: Store,
    thread_name: String,
    thread: Option<Thread>,
    is_reading: bool,
}

struct Thread {
    orders: SyncSender<ReadOrder>,
    done: mpsc::Receiver<Done>,
    handle: thread::JoinHandle<()>,
}

impl Reader {
    /// For the sink of this name.
    pub(super) fn new(store: Store, sink: &str) -> Self {
        Self { store, thread_name: format!("read-{sink}"), thread: None, is_reading: false }
    }

    /// Whether a read is under way.
    pub(super) fn is_reading(&self) -> bool {
        self.is_reading
    }

    /// Begins a read; none may be under way.
    ///
    /// # Errors
    /// The system gives no thread.
    pub(super) fn begin(&mut self, order: ReadOrder) -> io::Result<()> {
        assert!(!self.is_reading, "one read at a time");
        let thread = match &self.thread {
            Some(thread) => thread,
            None => self.thread.insert(start(self.store.clone(), &self.thread_name)?),
        };
        thread.orders.try_send(order).expect("it has done all that was asked of it");
        self.is_reading = true;
        Ok(())
    }

    /// Waits for the read that is under way; pends while there is none. Cancel-safe. A panic of the
    /// thread goes on here.
    pub(super) async fn finished(&mut self) -> Done {
        let Some(thread) = self.thread.as_mut().filter(|_| self.is_reading) else {
            return future::pending().await;
        };
        let done = thread.done.recv().await;
        self.is_reading = false;
        done.unwrap_or_else(|| {
            let thread = self.thread.take().expect("it was there");
            resume_unwind(thread.handle.join().expect_err("it ends early by a panic only"))
        })
    }

    /// Ends the thread. Blocks until the read that is under way, if there is one, has come back.
    pub(super) fn end(self) {
        let Some(Thread { orders, done, handle }) = self.thread else { return };
        drop((orders, done));
        if let Err(panic) = handle.join() {
            resume_unwind(panic);
        }
    }
}

fn start(store: Store, name: &str) -> io::Result<Thread> {
    let (orders, ordered) = sync_channel::<ReadOrder>(1);
    let (tell, done) = mpsc::channel(1);
    let work = move || {
        while let Ok(order) = ordered.recv() {
            let read = store.read(order.from, order.events_max, order.bytes_max);
            if tell.try_send((order, read)).is_err() {
                // Nobody waits for it any more.
                return;
            }
        }
    };
    let handle = thread::Builder::new().name(name.to_owned()).spawn(work)?;
    Ok(Thread { orders, done, handle })
}
