//! A gateway as a whole: started, run, and stopped in the order in which data flows.

use std::fmt::Display;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bridge::Forwarder;
use bridge::Origin;
use storage::Store;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio::time::timeout_at;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::access::{Access, AccessError};
use crate::addresses::Addresses;
use crate::admin;
use crate::config::{Bind, Config, ListenerConfig};
use crate::ingest::clock::MachineClock;
use crate::ingest::dedup::Dedup;
use crate::ingest::device_key::RouteFilterError;
use crate::ingest::{CommitterError, CommitterHandle, Ingest, Known, Routes, clock};
use crate::mqtt::{self, Downlink, Front, Tls, TlsError};
use crate::packing;

/// Why a gateway did not start. Each text is one line that says what and what to do.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The store cannot be opened.
    #[error(transparent)]
    Store(#[from] storage::OpenError),
    /// The state of the front cannot be read.
    #[error("{0}; move the data folder away to begin anew")]
    State(#[from] storage::StateError),
    /// An address cannot be bound.
    #[error("cannot listen on {address} ({key}): {source}; {}", bind_remedy(source))]
    Bind {
        /// Key of the configuration.
        key: &'static str,
        /// The address.
        address: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// A listener's certificates cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Users or tokens' keys cannot be used.
    #[error(transparent)]
    Access(#[from] AccessError),
    /// A route's filter is none; a configuration that was read from TOML has no such route.
    #[error("route.filter {0}")]
    Route(#[from] RouteFilterError),
    /// The system has no thread for the committer, or a worker panicked.
    #[error("cannot start: {0}")]
    System(#[from] std::io::Error),
}

/// Why a gateway ended although nobody asked it to.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// Events cannot be made durable any more.
    #[error(transparent)]
    Committer(#[from] CommitterError),
    /// A listener, or what serves subscribers, is gone: devices would wait for ever.
    #[error("the MQTT front ended by itself: {why}; what was acked is safe, restart the gateway")]
    Front {
        /// What the panic said, if it was one.
        why: String,
    },
}

/// What of a running gateway follows its configuration without a restart: certificates, users,
/// tokens' keys and rules.
#[derive(Clone)]
pub struct Reload {
    front: Arc<mqtt::Shared>,
    listeners: Vec<(Bind, Option<Arc<Tls>>)>,
}

impl Reload {
    /// Takes over what can be taken over from a configuration that was read again. What cannot be
    /// used is logged and stays as it was. Connections stay, but for those whose log-in would not give
    /// the same rights any more. Reads files.
    pub fn apply(&self, config: &Config) {
        match self.front.access.reload(&config.auth, &config.acl) {
            Ok(()) => info!("users and rules read again"),
            Err(error) => error!(%error, "the users and rules in use stay in use"),
        }
        for (bind, tls) in &self.listeners {
            let now = config.listeners.iter().find(|listener| listener.bind == *bind);
            match (tls, now.and_then(|listener| listener.tls.as_ref())) {
                (None, None) => {}
                (Some(tls), Some(files)) => match tls.reload(files) {
                    Ok(()) => info!(listener = %bind, "certificates read again"),
                    Err(error) => {
                        error!(listener = %bind, %error, "the certificates in use stay in use");
                    }
                },
                _ => warn!(listener = %bind, "[listener.tls] came or went: that needs a restart"),
            }
        }
    }
}

/// A gateway that is ready: its store is open and its addresses are bound.
pub struct Gateway {
    addresses: Addresses,
    reload: Reload,
    fronts: Vec<Front>,
    forwarders: Vec<Forwarder>,
    front: Arc<mqtt::Shared>,
    ingest: Ingest,
    downlink: Downlink,
    store: Store,
    committer: CommitterHandle,
    admin: (TcpListener, Arc<admin::Parts>),
    grace: Duration,
}

impl Gateway {
    /// Opens the store, binds every address and connects the parts. Devices can connect from here
    /// on; they are served by [`Gateway::run`].
    ///
    /// # Errors
    /// See [`StartError`].
    pub async fn start(config: Config) -> Result<Self, StartError> {
        let started = Instant::now();
        let routes = Routes::new(&config.routes)?;
        // Before the store: when these fail there is nothing to undo.
        let tls: Vec<_> = config
            .listeners
            .iter()
            .map(|listener| listener.tls.as_ref().map(Tls::load).transpose())
            .map(|tls| tls.map(|tls| tls.map(Arc::new)))
            .collect::<Result<_, _>>()?;
        let admin = TcpListener::bind(config.admin.bind)
            .await
            .map_err(|source| bind_error("admin.bind", &config.admin.bind, source))?;
        let access = Access::load(&config.auth, &config.acl)?;
        let (store, writer) = open_store(&config).await?;
        let (ingest, committer) = start_ingest(&config, &routes, &store, writer).await?;
        let links_max = config.listeners.iter().map(|l| l.connections_max).sum();
        let downlink = Downlink::new(ingest.watermark(), links_max);
        let rows = store.clone();
        let retained = mqtt::Retained::new(
            config.retained.messages_max,
            config.retained.bytes_max,
            // A message that cannot be read now is missed by one subscriber.
            move |namespace, key| rows.state(namespace, key).ok().flatten(),
        );
        let front = Arc::new(mqtt::Shared::new(
            ingest.clone(),
            routes,
            access,
            downlink.clone(),
            retained,
            mqtt::Bounds {
                sessions: &config.sessions,
                has_sinks: !config.sinks.is_empty(),
                held_bytes_max: config.ingest.held_bytes_max,
                shutdown_grace: config.gateway.shutdown_grace,
            },
        ));
        let fronts = match open_fronts(&config.listeners, &tls, &front, &store).await {
            Ok(fronts) => fronts,
            Err(error) => {
                // The store was opened: close it in good order before saying why.
                committer.stop().await.ok();
                return Err(error);
            }
        };
        let origin = Origin { gateway: config.gateway.id.clone(), epoch: store.epoch() };
        let lags: Vec<u64> = config.sinks.iter().map(|sink| sink.lag_bytes_max).collect();
        let forwarders: Vec<_> = config
            .sinks
            .into_iter()
            .map(|sink| {
                let (store, watermark) = (store.clone(), ingest.watermark());
                Forwarder::new(sink, origin.clone(), store, watermark, ingest.move_cursor())
            })
            .collect();
        let mut addresses =
            Addresses { mqtt: Vec::new(), unix: Vec::new(), admin: admin.local_addr()? };
        for front in &fronts {
            match front.bound().clone() {
                Bind::Tcp(address) => addresses.mqtt.push(address),
                Bind::Unix(path) => addresses.unix.push(path),
            }
        }
        let binds = config.listeners.iter().map(|listener| listener.bind.clone());
        let reload = Reload { front: Arc::clone(&front), listeners: binds.zip(tls).collect() };
        let parts = admin::Parts {
            gateway_id: config.gateway.id,
            started,
            front: Arc::clone(&front),
            ingest: ingest.clone(),
            store: store.clone(),
            sinks: forwarders
                .iter()
                .zip(lags)
                .map(|(sink, lag_bytes_max)| admin::Sink {
                    status: sink.status(),
                    wake: sink.wake(),
                    replays: sink.replays(),
                    lag_bytes_max,
                })
                .collect(),
            rates: Mutex::new(admin::Rates::new(forwarders.len())),
        };
        let grace = config.gateway.shutdown_grace;
        let admin = (admin, Arc::new(parts));
        Ok(Self {
            addresses,
            reload,
            fronts,
            forwarders,
            front,
            ingest,
            downlink,
            store,
            committer,
            admin,
            grace,
        })
    }

    /// Where it listens.
    pub fn addresses(&self) -> &Addresses {
        &self.addresses
    }

    /// What follows the configuration while it runs.
    pub fn reload(&self) -> Reload {
        self.reload.clone()
    }

    /// Serves until `shutdown` is cancelled; then drains within the grace time: the front acks what
    /// it took, the sinks end their requests, the last batch and the last cursors are committed.
    ///
    /// # Errors
    /// See [`RunError`]: the committer or a listener has ended by itself.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), RunError> {
        self.spawn().until(shutdown).await
    }

    /// Starts every part.
    fn spawn(self) -> Running {
        info!("listening: {}", self.addresses);
        let [front_stop, sinks_stop, admin_stop] = [(); 3].map(|()| CancellationToken::new());
        let mut admin = JoinSet::new();
        let (listener, parts) = self.admin;
        admin.spawn(admin::serve(listener, parts, admin_stop.clone()));
        let mut fronts = JoinSet::new();
        for front in self.fronts {
            fronts.spawn(front.run(front_stop.clone()));
        }
        fronts.spawn(packing::run(self.store.clone(), front_stop.clone()));
        let follow = self.downlink.follow(self.store, self.ingest, front_stop.clone());
        fronts.spawn(follow);
        fronts.spawn(self.front.sessions.clone().keep(front_stop.clone()));
        let mut sinks = JoinSet::new();
        for forwarder in self.forwarders {
            sinks.spawn(forwarder.run(sinks_stop.clone()));
        }
        Running {
            fronts: (fronts, front_stop),
            sinks: (sinks, sinks_stop),
            admin: (admin, admin_stop),
            committer: self.committer,
            grace: self.grace,
        }
    }
}

/// A gateway at work: its tasks, each kind with what stops it.
struct Running {
    fronts: (JoinSet<()>, CancellationToken),
    sinks: (JoinSet<()>, CancellationToken),
    admin: (JoinSet<std::io::Result<()>>, CancellationToken),
    committer: CommitterHandle,
    grace: Duration,
}

impl Running {
    /// See [`Gateway::run`].
    async fn until(self, shutdown: CancellationToken) -> Result<(), RunError> {
        let (mut fronts, front_stop) = self.fronts;
        let (mut sinks, sinks_stop) = self.sinks;
        let (mut admin, admin_stop) = self.admin;
        let mut failed = None;
        loop {
            tokio::select! {
                () = shutdown.cancelled() => break,
                // It says why when it is stopped, below.
                () = self.committer.ended() => break,
                // A listener and the downlink run until they are told to stop. Without one of them
                // devices hang on an address that nobody serves: a supervisor can mend that.
                Some(ended) = fronts.join_next() => {
                    let why = ended.err().map_or("no reason was given".into(), |e| e.to_string());
                    error!("the MQTT front ended by itself, and the gateway with it: {why}");
                    failed = Some(RunError::Front { why });
                    break;
                }
                // A sink runs until it is told to stop: one that ended has panicked.
                Some(Err(panicked)) = sinks.join_next() => {
                    error!("a sink panicked and stands still until a restart: {panicked}");
                }
                // Events go on without it.
                Some(ended) = admin.join_next() => {
                    let why = match ended {
                        Ok(served) => served.err().map(|error| error.to_string()),
                        Err(panicked) => Some(panicked.to_string()),
                    };
                    let why = why.unwrap_or_default();
                    error!("the admin endpoint ended and is gone until a restart: {why}");
                }
            }
        }

        let deadline = tokio::time::Instant::now() + self.grace;
        front_stop.cancel();
        end_by(deadline, "a listener", fronts).await;
        sinks_stop.cancel();
        end_by(deadline, "a sink", sinks).await;
        let stopped = self.committer.stop().await;
        admin_stop.cancel();
        end_by(deadline, "the admin endpoint", admin).await;
        failed.map_or(Ok(()), Err)?;
        Ok(stopped?)
    }
}

/// Waits until every task has ended, or until the deadline: then they are cut short.
async fn end_by<T: 'static>(deadline: tokio::time::Instant, what: &str, mut tasks: JoinSet<T>) {
    while let Ok(Some(ended)) = timeout_at(deadline, tasks.join_next()).await {
        if let Err(panicked) = ended {
            error!("{what} panicked: {panicked}");
        }
    }
    if !tasks.is_empty() {
        warn!("{what} did not end within the grace time; what is not acked will be sent again");
    }
}

fn bind_remedy(source: &std::io::Error) -> &'static str {
    match source.kind() {
        std::io::ErrorKind::AddrNotAvailable => {
            "this machine has no such address; 0.0.0.0 stands for all that it has"
        }
        std::io::ErrorKind::PermissionDenied => {
            "ports below 1024 take a privilege (CAP_NET_BIND_SERVICE); choose a higher one"
        }
        std::io::ErrorKind::NotFound => "create the folder of the socket first",
        std::io::ErrorKind::AlreadyExists => "move it away, or name another file",
        _ => "is another process listening there? choose another port, or 0 for a free one",
    }
}

fn bind_error(key: &'static str, address: &dyn Display, source: std::io::Error) -> StartError {
    StartError::Bind { key, address: address.to_string(), source }
}

/// Restores what the store has for clients, then binds: who connects finds it.
async fn open_fronts(
    listeners: &[ListenerConfig],
    tls: &[Option<Arc<Tls>>],
    front: &Arc<mqtt::Shared>,
    store: &Store,
) -> Result<Vec<Front>, StartError> {
    load(front, store).await?;
    let mut fronts = Vec::new();
    for (listener, tls) in listeners.iter().zip(tls) {
        let bound = Front::bind(listener, tls.clone(), Arc::clone(front)).await;
        fronts.push(bound.map_err(|source| bind_error("listener.bind", &listener.bind, source))?);
    }
    Ok(fronts)
}

/// Reading the state of the front reads the disk, too.
async fn load(front: &Arc<mqtt::Shared>, store: &Store) -> Result<(), StartError> {
    let (front, store) = (Arc::clone(front), store.clone());
    let loaded = tokio::task::spawn_blocking(move || {
        front.retained.load(&store)?;
        front.sessions.load(&store, Instant::now(), clock::now_us())
    });
    Ok(loaded.await.map_err(std::io::Error::other)??)
}

async fn start_ingest(
    config: &Config,
    routes: &Routes,
    store: &Store,
    writer: storage::Writer,
) -> Result<(Ingest, CommitterHandle), StartError> {
    let known = known(config, routes, store).await?;
    let (watermark, storage) = (store.mark().watermark, &config.storage);
    let (at_quota, failing_max) = (storage.at_quota, storage.failing_max);
    Ok(Ingest::start_with(writer, watermark, &config.ingest, at_quota, failing_max, known)?)
}

/// What ingest has to know. Reading the ids of the last events reads the disk, too.
async fn known(config: &Config, routes: &Routes, store: &Store) -> Result<Known, StartError> {
    let clock = MachineClock::new(config.time.synchronised_file.clone());
    if !routes.knows_ids() {
        return Ok(Known { clock, dedup: None });
    }
    let (config, routes, store) = (config.dedup.clone(), routes.clone(), store.clone());
    let loaded = tokio::task::spawn_blocking(move || {
        Dedup::load(&config, &store, |event| routes.event_id(&event.topic))
    });
    let dedup = loaded.await.map_err(std::io::Error::other)??;
    Ok(Known { clock, dedup: Some(dedup) })
}

/// Opening reads the disk, and repairs after a kill: off the async workers.
async fn open_store(config: &Config) -> Result<(Store, storage::Writer), StartError> {
    let options = config.store_options();
    let opened = tokio::task::spawn_blocking(move || Store::open(options, clock::now_us())).await;
    Ok(opened.map_err(std::io::Error::other)??)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A panicked listener was once noticed only at the shutdown: until then devices were turned
    /// away by a gateway that called itself ready.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_front_that_panics_ends_the_gateway_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let text = format!(
            "[gateway]\nid = \"g\"\ndata_dir = '{}'\n[[listener]]\nbind = \"127.0.0.1:0\"\n\
             [admin]\nbind = \"127.0.0.1:0\"\n",
            dir.path().join("data").display()
        );
        let config = Config::parse("test", &text, &|_| None).unwrap();
        let mut running = Gateway::start(config.clone()).await.unwrap().spawn();
        running.fronts.0.spawn(async { panic!("a bug in a listener") });
        // Nobody ever asks it to stop.
        let ended = running.until(CancellationToken::new()).await;
        let error = ended.expect_err("it was not asked to end").to_string();
        assert!(error.contains("a bug in a listener"), "{error}");
        // The store was closed in good order all the same, and its lock is free.
        let gateway = Gateway::start(config).await.unwrap();
        let shutdown = CancellationToken::new();
        shutdown.cancel();
        gateway.run(shutdown).await.unwrap();
    }
}
