//! Who is let in, and what they may do.
//!
//! Owns: users, tokens and rules ([`Access`]), replaced as a whole when the configuration is read
//! again, and what one connection was granted ([`Grant`]).
//! Invariant: a password is checked on a thread of low priority, [`Access::checks_max`] at once at
//! most, and is never kept or logged. What was granted holds only as long as the same log-in would still give
//! it: [`Grant::is_upheld`].
//! Deliberately absent: MQTT. Reason codes are `mqtt::auth`'s business.
//!
//! # Code map
//! - [`users`]: the users file and argon2id. [`jwt`]: tokens. [`acl`]: topics (pure).
//! - `recent`: passwords checked of late (pure). `penalty`: who waits after failures (pure).
//! - [`gatehouse`]: the threads for whoever is not let in yet.
//!
//! # How a log-in goes
//! A certificate that the listener has checked decides, and what else CONNECT says is not looked at.
//! Else, where users or tokens are configured, a user name or a password is checked, and never taken
//! for anonymous. Whoever has just been let in with the same password is let in at once. Others wait
//! while their address has failed of late, then for a free thread, where an address has
//! [`NEXT_MAX`] places: one that tries a thousand passwords at once does not keep others waiting.
//! Past [`WAITING_MAX`] of one address they are told to come again.

pub mod acl;
pub mod gatehouse;
pub mod jwt;
mod penalty;
mod recent;
pub mod users;

use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use bytestring::ByteString;
use tokio::sync::{Semaphore, watch};

use self::acl::{Acl, Permissions};
use self::gatehouse::Gatehouse;
use self::jwt::{KeyPrint, TokenError, Verifier};
pub(crate) use self::penalty::network_of;
use self::penalty::{Networks, Penalties};
use self::recent::{Digest, Digester, Recent};
use self::users::{NAME_BYTES_MAX, PASSWORD_BYTES_MAX, Users};
use crate::config::{AclConfig, AuthConfig};
use crate::ingest::clock;

/// Log-ins of one address that may wait; more are turned away.
pub const WAITING_MAX: usize = 1024;

/// Log-ins of one address that may stand in the one queue for a thread; more wait until one of them
/// is through.
pub const NEXT_MAX: usize = 4;

/// Addresses share so many queues of their own by chance.
const QUEUES: usize = 256;

/// Passwords that are remembered as right: more than a listener has connections by default. A fleet
/// that is larger than this memory and comes back in turn would find none of its own in it.
const RIGHT_MAX: usize = 16_384;

/// Passwords that are remembered as wrong, and for how long: a device with a wrong one asks again
/// and again.
const WRONG_MAX: usize = 1024;
const WRONG_KEPT: Duration = Duration::from_mins(1);

/// Why access cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    /// The users file.
    #[error("auth.users_file: {0}")]
    Users(#[from] users::UsersError),
    /// The keys of tokens.
    #[error(transparent)]
    Keys(#[from] jwt::KeyError),
    /// The system has no randomness, or gives no threads.
    #[error("cannot set up log-ins: {0}")]
    System(#[from] std::io::Error),
}

/// Who wants in. Holds a secret, and so has no text.
pub struct Request<'a> {
    /// Where from; `None` over a Unix socket.
    pub address: Option<IpAddr>,
    /// The user in a client's certificate.
    pub certified: Option<&'a ByteString>,
    /// Whether clients without credentials are let in there.
    pub allow_anonymous: bool,
    /// The client id, empty if it said none.
    pub client_id: &'a str,
    /// User name and password.
    pub user: Option<&'a str>,
    /// See `user`.
    pub password: Option<&'a Bytes>,
}

/// Why a client is not let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It said nothing of itself, and has to.
    #[error("this listener does not let in anonymous clients")]
    Anonymous,
    /// User name and password.
    #[error("unknown user or wrong password")]
    Credentials,
    /// A token.
    #[error("{0}")]
    Token(#[from] TokenError),
    /// A token that names another user or another client.
    #[error("the token is for another user or client")]
    OtherClient,
    /// Too many log-ins wait.
    #[error("too many log-ins at once: try again")]
    Busy,
}

/// Users, tokens and rules.
pub struct Access {
    policy: watch::Sender<Arc<Policy>>,
    digester: Digester,
    memory: Mutex<Memory>,
    gatehouse: Gatehouse,
    checks: Arc<Semaphore>,
    networks: Networks,
    /// The last one is for Unix sockets.
    queues: Box<[Queue]>,
    failures: AtomicU64,
}

/// Where the log-ins of an address wait.
struct Queue {
    waiting: Semaphore,
    next: Semaphore,
}

impl Queue {
    fn new() -> Self {
        Self { waiting: Semaphore::new(WAITING_MAX), next: Semaphore::new(NEXT_MAX) }
    }
}

/// What a configuration says, read and checked.
struct Policy {
    users: Option<Users>,
    tokens: Option<Verifier>,
    acl: Acl,
}

struct Memory {
    right: Recent,
    wrong: Recent,
    penalties: Penalties,
}

/// By what a client was let in.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Standing {
    Anonymous,
    Certificate,
    /// Its hash in the users file.
    Password(String),
    Token(KeyPrint),
}

/// What one connection was granted.
pub struct Grant {
    client_id: ByteString,
    user: Option<ByteString>,
    standing: Standing,
    permissions: Permissions,
    until: Option<Instant>,
    policy: watch::Receiver<Arc<Policy>>,
}

impl Policy {
    fn load(auth: &AuthConfig, acl: &[AclConfig]) -> Result<Self, AccessError> {
        Ok(Self {
            users: auth.users_file.as_deref().map(Users::read).transpose()?,
            tokens: auth.jwt.as_ref().map(Verifier::load).transpose()?,
            acl: Acl::new(acl.to_vec()),
        })
    }

    fn hash_of(&self, user: &str) -> Option<&str> {
        self.users.as_ref()?.hash_of(user)
    }

    /// Whether somebody who was let in so would be again.
    fn upholds(&self, standing: &Standing, user: Option<&str>) -> bool {
        match standing {
            Standing::Anonymous | Standing::Certificate => true,
            Standing::Password(hash) => user.and_then(|u| self.hash_of(u)) == Some(hash),
            Standing::Token(key) => self.tokens.as_ref().is_some_and(|t| t.has_key(key)),
        }
    }
}

impl Memory {
    fn new(keep: Duration) -> Self {
        Self {
            right: Recent::new(keep, RIGHT_MAX),
            wrong: Recent::new(WRONG_KEPT, WRONG_MAX),
            penalties: Penalties::default(),
        }
    }
}

impl Access {
    /// Reads the files that the configuration names.
    ///
    /// # Errors
    /// See [`AccessError`].
    pub fn load(auth: &AuthConfig, acl: &[AclConfig]) -> Result<Self, AccessError> {
        Ok(Self {
            policy: watch::Sender::new(Arc::new(Policy::load(auth, acl)?)),
            digester: Digester::new()?,
            memory: Mutex::new(Memory::new(auth.credential_cache)),
            gatehouse: Gatehouse::start(Self::checks_max())?,
            checks: Arc::new(Semaphore::new(Self::checks_max())),
            networks: Networks::default(),
            queues: std::iter::repeat_with(Queue::new).take(QUEUES + 1).collect(),
            failures: AtomicU64::new(0),
        })
    }

    /// Reads the files again. Clients that were let in stay as long as they would be let in again with
    /// the same rights: see [`Grant::is_upheld`].
    ///
    /// # Errors
    /// See [`AccessError`]; then everything stays as it was.
    pub fn reload(&self, auth: &AuthConfig, acl: &[AclConfig]) -> Result<(), AccessError> {
        let policy = Policy::load(auth, acl)?;
        // What was right or wrong may be neither now. Both at once: see `verify`.
        let mut memory = self.lock();
        memory.right = Recent::new(auth.credential_cache, RIGHT_MAX);
        memory.wrong = Recent::new(WRONG_KEPT, WRONG_MAX);
        self.policy.send_replace(Arc::new(policy));
        Ok(())
    }

    /// Passwords that are checked at once, each with a thread and its memory: half of the processors,
    /// so that the other half goes on with what devices send.
    pub fn checks_max() -> usize {
        thread::available_parallelism().map_or(1, |n| (n.get() / 2).clamp(1, 4))
    }

    /// Where work is done for clients that are not let in yet.
    pub fn gatehouse(&self) -> &Gatehouse {
        &self.gatehouse
    }

    /// Log-ins that have failed.
    pub fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }

    /// Decides on a log-in. Takes its time: an address that has failed of late waits, and so does
    /// everybody for a thread that checks passwords.
    ///
    /// # Errors
    /// See [`Refusal`].
    pub async fn admit(&self, request: &Request<'_>) -> Result<Grant, Refusal> {
        // From before the check: if the policy changes meanwhile, the grant is looked at again.
        let policy = self.policy.subscribe();
        let now = policy.borrow().clone();
        let checks = now.users.is_some() || now.tokens.is_some();
        let said = request.user.is_some() || request.password.is_some();
        let (user, standing, until) = if let Some(user) = request.certified {
            (Some(user.clone()), Standing::Certificate, None)
        } else if said && checks {
            let checked = self.check(request, &now).await;
            if let Err(refusal) = checked
                && refusal != Refusal::Busy
            {
                self.failures.fetch_add(1, Ordering::Relaxed);
                if let Some(address) = request.address {
                    self.lock().penalties.failed(address, Instant::now());
                }
            }
            checked?
        } else if request.allow_anonymous {
            (None, Standing::Anonymous, None)
        } else {
            return Err(if said { Refusal::Credentials } else { Refusal::Anonymous });
        };
        // A copy: a slice of the read buffer would keep all of it.
        let client_id = ByteString::from(request.client_id);
        let permissions = now.acl.permissions(&client_id, user.as_deref());
        Ok(Grant { client_id, user, standing, permissions, until, policy })
    }

    /// Whether the rules of now let a client publish to a topic: for what it left to be published when
    /// it is gone. `client_id` and `user` as it was let in with.
    pub fn may_publish(&self, client_id: &str, user: Option<&str>, topic: &str) -> bool {
        self.policy.borrow().acl.permissions(client_id, user).may_publish(topic)
    }

    async fn check(
        &self,
        request: &Request<'_>,
        policy: &Arc<Policy>,
    ) -> Result<(Option<ByteString>, Standing, Option<Instant>), Refusal> {
        let user = request.user.unwrap_or_default();
        let Some(password) = request.password else { return Err(Refusal::Credentials) };
        let mut waited = false;
        if let Some(tokens) = &policy.tokens
            && policy.hash_of(user).is_none()
            && Verifier::is_token(password)
        {
            self.wait(request.address).await;
            waited = true;
            let now = clock::now_us() / 1_000_000;
            let token = match tokens.check(password, now) {
                // Where some users have passwords, neither the answer nor its time may tell who they
                // are to somebody who has no token of ours: as for them, it is a wrong password.
                Err(TokenError::Malformed | TokenError::Signature)
                    if policy.users.is_some() && !user.is_empty() =>
                {
                    None
                }
                token => Some(token?),
            };
            let is_for = |id: &String| id == request.client_id;
            if let Some(token) = token {
                if !(user.is_empty() || user == token.user)
                    || !token.client_id.as_ref().is_none_or(is_for)
                {
                    return Err(Refusal::OtherClient);
                }
                let until = Instant::now().checked_add(jwt::left(token.until, now));
                return Ok((Some(token.user.into()), Standing::Token(token.key), until));
            }
        }
        if user.len() > NAME_BYTES_MAX || password.len() > PASSWORD_BYTES_MAX {
            return Err(Refusal::Credentials);
        }
        let digest = self.digester.digest(user, password);
        let right = match self.recall(&digest) {
            Some(true) => true,
            known => {
                if !waited {
                    self.wait(request.address).await;
                }
                match known {
                    Some(right) => right,
                    None => self.verify(request.address, user, password, digest, policy).await?,
                }
            }
        };
        match policy.hash_of(user) {
            Some(hash) if right => {
                Ok((Some(ByteString::from(user)), Standing::Password(hash.to_owned()), None))
            }
            _ => Err(Refusal::Credentials),
        }
    }

    /// What is known of a password: that it is right, or wrong.
    fn recall(&self, digest: &Digest) -> Option<bool> {
        let (memory, now) = (self.lock(), Instant::now());
        let right = memory.right.knows(digest, now).then_some(true);
        right.or_else(|| memory.wrong.knows(digest, now).then_some(false))
    }

    async fn wait(&self, address: Option<IpAddr>) {
        let Some(address) = address else { return };
        let delay = self.lock().penalties.delay(address, Instant::now());
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
    }

    async fn verify(
        &self,
        address: Option<IpAddr>,
        user: &str,
        password: &Bytes,
        digest: Digest,
        policy: &Arc<Policy>,
    ) -> Result<bool, Refusal> {
        let queue = address.map_or(QUEUES, |address| self.networks.slot_of(address, QUEUES));
        let queue = &self.queues[queue];
        let _waits = queue.waiting.try_acquire().map_err(|_| Refusal::Busy)?;
        let _next = queue.next.acquire().await.map_err(|_| Refusal::Busy)?;
        let turn = self.checks.clone().acquire_owned().await.map_err(|_| Refusal::Busy)?;
        // Somebody before us may have had the same.
        if let Some(known) = self.recall(&digest) {
            return Ok(known);
        }
        let hash = policy.hash_of(user).map(str::to_owned);
        let password = password.clone();
        let check = move || {
            // Given back by the thread, also when nobody waits for it any more.
            let _turn = turn;
            users::is_password(hash.as_deref(), &password)
        };
        let right = self.gatehouse.check(check).await.unwrap_or(false);
        // What was found under a policy is not for the next one to know.
        let mut memory = self.lock();
        if Arc::ptr_eq(policy, &self.policy.borrow()) {
            let memory = &mut *memory;
            let kept = if right { &mut memory.right } else { &mut memory.wrong };
            kept.remember(digest, Instant::now());
        }
        Ok(right)
    }

    fn lock(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Grant {
    /// The user; `None` for an anonymous client.
    pub fn user(&self) -> Option<&ByteString> {
        self.user.as_ref()
    }

    /// The user, if its certificate says so.
    pub fn certified(&self) -> Option<&ByteString> {
        self.user().filter(|_| self.standing == Standing::Certificate)
    }

    /// When it ends by itself, with the token that it was given for.
    pub fn until(&self) -> Option<Instant> {
        self.until
    }

    /// See [`Permissions::may_publish`].
    pub fn may_publish(&self, topic: &str) -> bool {
        self.permissions.may_publish(topic)
    }

    /// See [`Permissions::may_subscribe`].
    pub fn may_subscribe(&self, filter: &str) -> bool {
        self.permissions.may_subscribe(filter)
    }

    /// See [`Permissions::keeps_back`].
    pub fn keeps_back(&self, topic: &str) -> bool {
        self.permissions.keeps_back(topic)
    }

    /// Whether the same log-in would give the same rights now. Costs one load while nothing changes.
    pub fn is_upheld(&mut self) -> bool {
        if !self.policy.has_changed().unwrap_or(false) {
            return true;
        }
        let policy = self.policy.borrow_and_update();
        let user = self.user.as_deref();
        policy.upholds(&self.standing, user)
            && policy.acl.permissions(&self.client_id, user) == self.permissions
    }
}

#[cfg(test)]
mod tests;
