//! The task that has sealed log files packed, one now and then: see [`storage::Packer`].
//!
//! Owns: when. Invariant: it holds nobody up; a file that is being packed when the gateway stops is left
//! as it is.

use std::time::Duration;

use storage::Store;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

/// One file at a time, with a pause: the processor and the disk are for the events that come.
const PACK_EVERY: Duration = Duration::from_secs(1);
/// A disk that gives no room, or fails, is left alone for a while.
const RETRY_EVERY: Duration = Duration::from_mins(1);

/// Packs until `stop` is cancelled.
pub(crate) async fn run(store: Store, stop: CancellationToken) {
    let mut packer = store.packer();
    let mut pause = PACK_EVERY;
    while stop.run_until_cancelled(sleep(pause)).await.is_some() {
        let stopping = stop.clone();
        let step = tokio::task::spawn_blocking(move || {
            let packed = packer.step(&|| !stopping.is_cancelled());
            (packer, packed)
        });
        let result = match step.await {
            Ok((same, result)) => {
                packer = same;
                result
            }
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        };
        pause = match result {
            Ok(_) => PACK_EVERY,
            Err(error) => {
                tracing::warn!(%error, "a log file could not be packed; it stays as it is");
                RETRY_EVERY
            }
        };
    }
}
