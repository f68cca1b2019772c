//! `run`: the gateway until a signal ends it. SIGHUP reads the configuration and the certificates again.

use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::runtime::{self, Runtime};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::{DONE, FAILED, WRONG_INPUT, load, logging};
use crate::config::Config;
use crate::{Gateway, Reload, StartError};

/// Another signal within this time belongs to the first: wrappers that signal a child and then its
/// whole group, as `timeout` does, send two.
const ECHO: Duration = Duration::from_millis(500);

pub(super) fn run(path: &Path) -> u8 {
    let config = match load(path) {
        Ok(config) => config,
        Err(code) => return code,
    };
    logging::start(&config.log);
    allow_descriptors(&config);
    let runtime = runtime::Builder::new_multi_thread().enable_all().build();
    match runtime.map(|runtime| to_the_end(runtime, serve(path, config))) {
        Ok(Ok(())) => DONE,
        Ok(Err(failure)) => {
            eprintln!("edge-gateway: {failure}");
            match failure.downcast_ref() {
                Some(StartError::Store(storage::OpenError::Partitions { .. })) => WRONG_INPUT,
                _ => FAILED,
            }
        }
        Err(source) => {
            eprintln!("edge-gateway: cannot start the runtime: {source}");
            FAILED
        }
    }
}

/// Beside the connections: the log's files, the sinks' sockets, the admin endpoint.
const DESCRIPTORS_BESIDE: u64 = 256;

/// Raises the limit of open files as far as the connections need and the system allows: shells and
/// service managers give a process 1,024 and let it ask for more.
fn allow_descriptors(config: &Config) {
    let connections: usize = config.listeners.iter().map(|l| l.connections_max).sum();
    let needed = connections as u64 + DESCRIPTORS_BESIDE;
    let limit = getrlimit(Resource::Nofile);
    let allowed = limit.maximum.unwrap_or(u64::MAX).min(needed);
    if limit.current.is_some_and(|current| current < allowed) {
        let raised = Rlimit { current: Some(allowed), ..limit };
        if let Err(error) = setrlimit(Resource::Nofile, raised) {
            warn!(%error, "cannot raise the limit of open files");
        }
    }
    if allowed < needed {
        warn!(
            allowed,
            needed,
            "connections_max is more than the system allows open files: raise its limit \
             (LimitNOFILE= of the service)"
        );
    }
}

/// Runs a future, and waits for nothing else: a call that blocks beyond the grace time (a name server
/// that does not answer, a disk that hangs) must not keep the process.
fn to_the_end<T>(runtime: Runtime, future: impl Future<Output = T>) -> T {
    let output = runtime.block_on(future);
    runtime.shutdown_background();
    output
}

async fn serve(path: &Path, config: Config) -> anyhow::Result<()> {
    // Before the ready line: a signal that follows it must not kill us.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let gateway = Gateway::start(config).await?;
    // Scripts wait for this line, and read the ports from it.
    println!("{}", gateway.addresses().ready_line());
    let reload = gateway.reload();
    let shutdown = CancellationToken::new();
    let running = gateway.run(shutdown.clone());
    tokio::pin!(running);
    let name = loop {
        tokio::select! {
            ended = &mut running => return Ok(ended?),
            _ = terminate.recv() => break "SIGTERM",
            _ = interrupt.recv() => break "SIGINT",
            _ = hangup.recv() => read_again(path, &reload).await,
        }
    };
    info!("{name}: draining; a second signal ends at once");
    shutdown.cancel();
    let first = Instant::now();
    let second = async {
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if first.elapsed() > ECHO {
                return;
            }
        }
    };
    tokio::select! {
        ended = running => Ok(ended?),
        () = second => cut_short(),
    }
}

/// SIGHUP. Whatever is wrong with the files, the gateway goes on with what it has.
async fn read_again(path: &Path, reload: &Reload) {
    let file = path.display();
    info!("SIGHUP: reading {file} again; what is not named below needs a restart");
    let (path, reload) = (path.to_owned(), reload.clone());
    let read = move || match Config::load(&path) {
        Ok(config) => reload.apply(&config),
        Err(wrong) => error!("the configuration in use stays in use: {wrong}"),
    };
    if let Err(panicked) = tokio::task::spawn_blocking(read).await {
        error!("reading the configuration again panicked: {panicked}");
    }
}

fn cut_short() -> anyhow::Result<()> {
    warn!("a second signal: not waiting any longer; what is not acked will be sent again");
    anyhow::bail!("ended by a second signal before everything was flushed")
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn a_call_that_blocks_does_not_keep_the_process() {
        let (unblock, blocked) = mpsc::sync_channel::<()>(0);
        let runtime = runtime::Builder::new_multi_thread().build().expect("a runtime");
        to_the_end(runtime, async {
            tokio::task::spawn_blocking(move || blocked.recv());
        });
        drop(unblock);
    }
}
