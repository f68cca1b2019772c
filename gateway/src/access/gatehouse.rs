//! Where work is done for clients that are not let in yet: accepting them, handshakes of TLS and WebSocket,
//! checks of passwords. All cost far more than a publish, and anybody can ask for them.
//!
//! Invariant: devices that are at work go before. The threads here have `NICENESS`: while others
//! want the processors they get about a tenth of what one of those gets, and whatever is idle
//! otherwise. A storm of reconnects takes longer by that, and nobody else notices it.
//! Nothing is locked here that a connection at work waits for.

use std::io;

use tokio::runtime::{Builder, Runtime};
use tokio_util::task::AbortOnDropHandle;

/// Added to the niceness of the process.
const NICENESS: i32 = 10;

/// Threads of low priority, one for what waits for the network and as many as are asked for for what
/// does not.
#[derive(Debug)]
pub struct Gatehouse(Option<Runtime>);

impl Gatehouse {
    /// Starts it. At most `checks_max` calls of [`Gatehouse::check`] run at once; others wait.
    ///
    /// # Errors
    /// When the system gives no threads.
    pub fn start(checks_max: usize) -> io::Result<Self> {
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .max_blocking_threads(checks_max)
            .thread_name("gatehouse")
            .on_thread_start(|| {
                // A thread's own. Where the system forbids it, all are equal, as without it.
                if let Err(error) = rustix::process::nice(NICENESS) {
                    tracing::debug!(%error, "log-ins have the same priority as everything else");
                }
            })
            .enable_time()
            .build()?;
        Ok(Self(Some(runtime)))
    }

    /// Works on what waits for the network now and then; dropped, it is given up. `None` if it has
    /// panicked.
    pub async fn work<F>(&self, future: F) -> Option<F::Output>
    where
        F: Future<Output: Send> + Send + 'static,
    {
        let task = AbortOnDropHandle::new(self.runtime().spawn(future));
        task.await.inspect_err(|error| tracing::error!(%error, "a handshake panicked")).ok()
    }

    /// Works on what only computes; it goes on when this is dropped. `None` if it has panicked.
    pub async fn check<T: Send + 'static>(
        &self,
        check: impl FnOnce() -> T + Send + 'static,
    ) -> Option<T> {
        let checked = self.runtime().spawn_blocking(check).await;
        checked.inspect_err(|error| tracing::error!(%error, "a log-in panicked")).ok()
    }

    fn runtime(&self) -> &Runtime {
        self.0.as_ref().expect("it is there until it is dropped")
    }
}

impl Drop for Gatehouse {
    fn drop(&mut self) {
        // Whoever drops it may be a task, and must not wait.
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The niceness of the calling thread.
    fn niceness() -> i32 {
        rustix::process::getpriority_process(None).unwrap()
    }

    #[tokio::test]
    async fn strangers_work_is_nice_to_everybody_else() {
        let own = niceness();
        let gatehouse = Gatehouse::start(2).unwrap();
        let expected = (own + NICENESS).min(19);
        assert_eq!(gatehouse.work(async { niceness() }).await, Some(expected));
        assert_eq!(gatehouse.check(niceness).await, Some(expected));
        assert_eq!(niceness(), own, "a thread's niceness is its own");
    }

    #[tokio::test]
    async fn what_nobody_waits_for_is_given_up_and_a_panic_stays_inside() {
        let gatehouse = Gatehouse::start(1).unwrap();
        let (given_up, seen) = tokio::sync::oneshot::channel::<()>();
        let (begun, began) = tokio::sync::oneshot::channel();
        let endless = gatehouse.work(async move {
            let _given_up = given_up;
            begun.send(()).unwrap();
            std::future::pending::<()>().await;
        });
        tokio::select! {
            _ = endless => panic!("it never ends"),
            began = began => began.unwrap(),
        }
        assert!(seen.await.is_err(), "dropped with whoever waited");
        assert_eq!(gatehouse.work(async { panic!("injected") }).await, None::<()>);
        assert_eq!(gatehouse.check(|| panic!("injected")).await, None::<()>);
        assert_eq!(gatehouse.check(|| 7).await, Some(7), "and the next one is served");
    }
}
