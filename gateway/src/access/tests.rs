//! Log-ins as a whole, over real files.

use std::pin::pin;
use std::task::{Context, Waker};

use super::*;

const PASSWORD: &str = "correct horse";

struct Rig {
    dir: tempfile::TempDir,
    auth: AuthConfig,
}

impl Rig {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let users_file = Some(dir.path().join("users"));
        let rig =
            Self { dir, auth: AuthConfig { users_file, credential_cache: 60 * SECOND, jwt: None } };
        rig.set("alice", PASSWORD);
        rig
    }

    fn set(&self, user: &str, password: &str) {
        let hash = users::hash(password.as_bytes()).unwrap();
        users::set(&self.dir.path().join("users"), user, Some(&hash)).unwrap();
    }

    fn access(&self, acl: &[AclConfig]) -> Access {
        Access::load(&self.auth, acl).unwrap()
    }
}

const SECOND: Duration = Duration::from_secs(1);

/// From nowhere: nobody is slowed.
async fn log_in(access: &Access, user: &str, password: &str) -> Result<Grant, Refusal> {
    log_in_from(None, access, user, password).await
}

async fn log_in_from(
    address: Option<IpAddr>,
    access: &Access,
    user: &str,
    password: &str,
) -> Result<Grant, Refusal> {
    let password = Bytes::copy_from_slice(password.as_bytes());
    let request = Request {
        address,
        certified: None,
        allow_anonymous: true,
        client_id: "c",
        user: Some(user),
        password: Some(&password),
    };
    access.admit(&request).await
}

fn rule(publish: &str) -> AclConfig {
    AclConfig {
        users: Vec::new(),
        publish: vec![publish.to_owned()],
        subscribe: Vec::new(),
        deny_subscribe: Vec::new(),
    }
}

#[tokio::test]
async fn who_gives_credentials_is_never_taken_for_anonymous() {
    let access = Rig::new().access(&[]);
    let grant = log_in(&access, "alice", PASSWORD).await.unwrap();
    assert_eq!(grant.user().map(|user| &**user), Some("alice"));
    for (user, password) in [("alice", "wrong"), ("bob", PASSWORD), ("", PASSWORD), ("alice", "")] {
        let refused = log_in(&access, user, password).await.err();
        assert_eq!(refused, Some(Refusal::Credentials), "{user}");
    }
    assert_eq!(access.failures(), 4);
    let nobody = Request {
        address: None,
        certified: None,
        allow_anonymous: true,
        client_id: "c",
        user: None,
        password: None,
    };
    assert_eq!(access.admit(&nobody).await.unwrap().user(), None);
    let closed = Request { allow_anonymous: false, ..nobody };
    assert_eq!(access.admit(&closed).await.err(), Some(Refusal::Anonymous));
    let certified = ByteString::from_static("dev-7");
    let grant = access.admit(&Request { certified: Some(&certified), ..closed }).await.unwrap();
    assert_eq!(grant.user(), Some(&certified));
}

#[tokio::test]
async fn failures_slow_their_address_but_not_who_was_right_of_late() {
    let (rig, address) = (Rig::new(), Some([192, 0, 2, 1].into()));
    let access = rig.access(&[]);
    let mut cx = Context::from_waker(Waker::noop());
    log_in(&access, "alice", PASSWORD).await.unwrap();
    assert!(log_in_from(address, &access, "alice", "wrong").await.is_err());
    // Both are known by now, so that only a wait keeps an answer back.
    let mut wrong = pin!(log_in_from(address, &access, "alice", "wrong"));
    assert!(wrong.as_mut().poll(&mut cx).is_pending());
    let mut right = pin!(log_in_from(address, &access, "alice", PASSWORD));
    assert!(right.as_mut().poll(&mut cx).is_ready());
    let mut elsewhere = pin!(log_in_from(Some([192, 0, 2, 2].into()), &access, "alice", "wrong"));
    assert!(elsewhere.as_mut().poll(&mut cx).is_ready());
    assert_eq!(wrong.await.err(), Some(Refusal::Credentials));
    assert_eq!(access.failures(), 3);
}

#[tokio::test]
async fn a_grant_is_upheld_only_while_the_same_log_in_gives_the_same() {
    let rig = Rig::new();
    rig.set("bob", "b");
    let access = rig.access(&[rule("devices/%u/#")]);
    let mut alice = log_in(&access, "alice", PASSWORD).await.unwrap();
    let mut bob = log_in(&access, "bob", "b").await.unwrap();
    assert!(alice.may_publish("devices/alice/t") && !alice.may_publish("devices/bob/t"));
    rig.set("bob", "another");
    access.reload(&rig.auth, &[rule("devices/%u/#")]).unwrap();
    assert!(alice.is_upheld() && !bob.is_upheld(), "a new password is a new log-in");
    assert!(log_in(&access, "bob", "b").await.is_err(), "what was right is forgotten");

    let mut bob = log_in(&access, "bob", "another").await.unwrap();
    let narrower = [AclConfig { users: vec!["bob".to_owned()], ..rule("devices/%u/#") }];
    access.reload(&rig.auth, &narrower).unwrap();
    assert!(!alice.is_upheld() && bob.is_upheld());

    users::set(&rig.dir.path().join("users"), "bob", None).unwrap();
    access.reload(&rig.auth, &narrower).unwrap();
    assert!(!bob.is_upheld());
    std::fs::write(rig.dir.path().join("users"), "broken").unwrap();
    let mut alice = log_in(&access, "alice", PASSWORD).await.unwrap();
    assert!(access.reload(&rig.auth, &[]).is_err());
    assert!(alice.is_upheld(), "nothing has changed for anybody");
    log_in(&access, "alice", PASSWORD).await.unwrap();
}

/// Ring's digests and argon2's threads are real here: a fleet with one password costs one check.
#[tokio::test]
async fn a_password_that_was_right_is_not_checked_again() {
    let rig = Rig::new();
    let access = rig.access(&[]);
    let logins: Vec<_> = (0..300).map(|_| log_in(&access, "alice", PASSWORD)).collect();
    let granted = futures_util::future::join_all(logins).await;
    assert!(granted.iter().all(Result::is_ok));
    // With every thread taken, only what is remembered gets an answer.
    let _all = access.checks.acquire_many(Access::checks_max() as u32).await.unwrap();
    log_in(&access, "alice", PASSWORD).await.unwrap();
    access.queues[QUEUES].waiting.forget_permits(WAITING_MAX);
    assert_eq!(log_in(&access, "alice", "wrong").await.err(), Some(Refusal::Busy));
    assert_eq!(access.failures(), 0, "busy is no failure of theirs");
}

/// Whoever tries many passwords at once waits for itself: somebody who comes behind is through before
/// most of them.
#[tokio::test]
async fn one_address_does_not_fill_the_queue_of_all() {
    const TRIES: usize = 24;
    let rig = Rig::new();
    let access = rig.access(&[]);
    let hostile = IpAddr::from([192, 0, 2, 1]);
    let queue_of = |address| access.networks.slot_of(address, QUEUES);
    let other =
        (2..=255).map(|n| IpAddr::from([192, 0, 2, n])).find(|a| queue_of(*a) != queue_of(hostile));
    let wrong: Vec<_> = (0..TRIES).map(|n| format!("wrong {n}")).collect();
    let through = std::cell::RefCell::new(Vec::new());
    let tries = futures_util::future::join_all(wrong.iter().map(async |password| {
        assert!(log_in_from(Some(hostile), &access, "alice", password).await.is_err());
        through.borrow_mut().push(hostile);
    }));
    let behind = async {
        log_in_from(other, &access, "alice", PASSWORD).await.unwrap();
        through.borrow_mut().extend(other);
    };
    // In this order: all of the others were there first.
    tokio::join!(biased; tries, behind);
    let place = through.borrow().iter().position(|address| Some(*address) == other).unwrap();
    assert!(place <= NEXT_MAX + Access::checks_max(), "{place} went before");
}

#[tokio::test]
async fn a_token_is_bound_to_its_user_its_client_and_its_end() {
    use base64::Engine as _;
    use base64::engine::general_purpose::URL_SAFE_NO_PAD;
    use ring::hmac;

    let rig = Rig::new();
    let key_file = rig.dir.path().join("key");
    let secret = [7; 32];
    std::fs::write(&key_file, secret).unwrap();
    let jwt = crate::config::JwtConfig {
        keys: crate::config::JwtKeys::Hmac(key_file.clone()),
        user_claim: "sub".to_owned(),
        issuer: None,
        audience: None,
        leeway: Duration::ZERO,
    };
    let auth = AuthConfig { jwt: Some(jwt), ..rig.auth.clone() };
    let access = Access::load(&auth, &[]).unwrap();
    let exp = clock::now_us() / 1_000_000 + 3_600;
    let token = |client: &str| {
        let claims = format!(r#"{{"sub":"dev-7","exp":{exp},"client_id":"{client}"}}"#);
        let parts = [r#"{"alg":"HS256"}"#, &claims].map(|part| URL_SAFE_NO_PAD.encode(part));
        let key = hmac::Key::new(hmac::HMAC_SHA256, &secret);
        let signature = hmac::sign(&key, parts.join(".").as_bytes());
        format!("{}.{}", parts.join("."), URL_SAFE_NO_PAD.encode(signature))
    };
    let mut grant = log_in(&access, "", &token("c")).await.unwrap();
    assert_eq!(grant.user().map(|user| &**user), Some("dev-7"));
    let left = grant.until().unwrap() - Instant::now();
    assert!(left <= Duration::from_hours(1) && left > Duration::from_mins(50));
    log_in(&access, "dev-7", &token("c")).await.unwrap();
    let other = Some(Refusal::OtherClient);
    assert_eq!(log_in(&access, "dev-8", &token("c")).await.err(), other);
    assert_eq!(log_in(&access, "", &token("d")).await.err(), other);
    // A user of the file has a password, whatever it looks like.
    assert_eq!(log_in(&access, "alice", &token("c")).await.err(), Some(Refusal::Credentials));
    // And who has no token of ours does not learn who is one: it takes a check of a password too.
    for forged in ["eyJ.a.b", &token("c")[..token("c").len() - 1]] {
        for user in ["alice", "nobody"] {
            let refused = log_in(&access, user, forged).await.err();
            assert_eq!(refused, Some(Refusal::Credentials), "{user}");
            let digest = access.digester.digest(user, forged.as_bytes());
            assert_eq!(access.recall(&digest), Some(false), "{user}");
        }
    }

    std::fs::write(&key_file, [8; 32]).unwrap();
    access.reload(&auth, &[]).unwrap();
    assert!(!grant.is_upheld(), "its key is gone");
    let refused = log_in(&access, "", &token("c")).await.err();
    assert_eq!(refused, Some(Refusal::Token(TokenError::Signature)));
}
