//! The task of one device: samples on time, keeps a link up, sends, and notes every ack.
//!
//! Invariant: every event that was published stands in the ledger exactly once: with its ack when
//! it arrives, or without when the task ends. Sampling goes on while the link is down, as on a
//! real device. Deliberately absent: order and resends (the core's outbox), MQTT (the link).

use std::{
    collections::VecDeque,
    future::Future,
    pin::{Pin, pin},
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::BytesMut;
use tokio::{
    select,
    sync::{mpsc, watch},
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    FleetConfig,
    counters::Counters,
    link::{Answer, Link, LinkError, LinkOptions, Publish, Version},
};
use crate::{device::Device, frame::Clock, ledger::QueuedRow, payload::Payload};

/// How long a link may take over a write before it is given up.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a good-bye may take.
const DISCONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// What all devices of a fleet share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) config: FleetConfig,
    pub(super) counters: Counters,
    pub(super) broker: watch::Receiver<String>,
    /// Cancelled when the devices are to sample no more.
    pub(super) stop: CancellationToken,
    /// Cancelled when the devices are to leave at once.
    pub(super) cancel: CancellationToken,
    pub(super) started: Instant,
}

/// One device and what its task needs.
pub(super) struct Node<const N: usize> {
    pub(super) shared: Arc<Shared>,
    pub(super) device: Box<Device<N>>,
    pub(super) version: Version,
    pub(super) clock: Clock,
    pub(super) topic: String,
    pub(super) rng: fastrand::Rng,
    pub(super) ledger: mpsc::Sender<QueuedRow>,
    /// When to sample next.
    pub(super) next_at: Instant,
    /// Published and unacked, oldest first.
    pub(super) published: VecDeque<Published>,
    pub(super) connected_time: ConnectedTime,
    pub(super) had_link: bool,
    pub(super) payloads: BytesMut,
}

/// An event on its way.
#[derive(Debug)]
pub(super) struct Published {
    seq: u64,
    sent_us: u64,
    /// When it was sent, by the device's connected time.
    sent_at: Duration,
}

/// A clock that stands still while a device is disconnected.
#[derive(Debug, Default)]
pub(super) struct ConnectedTime {
    before: Duration,
    since: Option<Instant>,
}

impl ConnectedTime {
    fn start(&mut self, now: Instant) {
        self.since.get_or_insert(now);
    }

    fn stop(&mut self, now: Instant) {
        self.before = self.at(now);
        self.since = None;
    }

    fn at(&self, now: Instant) -> Duration {
        self.before + self.since.map_or(Duration::ZERO, |since| now.duration_since(since))
    }
}

type Connecting = Pin<Box<dyn Future<Output = Result<(Link, u16), LinkError>> + Send>>;

enum State {
    Connecting(Connecting),
    Up(Box<Link>),
}

enum Step {
    Up(Link, u16),
    Answer(Answer),
    Down(LinkError),
}

impl State {
    /// Cancel safe.
    async fn step(&mut self) -> Step {
        match self {
            Self::Connecting(connecting) => match connecting.await {
                Ok((link, window)) => Step::Up(link, window),
                Err(error) => Step::Down(error),
            },
            Self::Up(link) => match link.next().await {
                Ok(answer) => Step::Answer(answer),
                Err(error) => Step::Down(error),
            },
        }
    }
}

impl<const N: usize> Node<N> {
    /// Runs until sampling has stopped and everything is acked, or until cancelled.
    pub(super) async fn run(mut self, first_connect_after: Duration) {
        let shared = Arc::clone(&self.shared);
        let mut cancelled = pin!(shared.cancel.cancelled());
        let mut stopped = pin!(shared.stop.cancelled());
        let mut sampling = pin!(sleep_until(self.next_at));
        let mut producing = true;
        let mut failures = 0;
        let mut state = self.connecting(first_connect_after);
        while producing || !self.device.outbox().is_empty() {
            select! {
                biased;
                () = &mut cancelled => break,
                () = &mut stopped, if producing => producing = false,
                () = &mut sampling, if producing => {
                    self.sample_what_is_due();
                    sampling.as_mut().reset(self.next_at);
                }
                step = state.step() => match step {
                    Step::Up(link, window) => {
                        self.on_up(window);
                        state = State::Up(Box::new(link));
                    }
                    Step::Answer(answer) => {
                        if let Err(error) = self.on_answers(answer, &mut state).await {
                            state = self.on_down(state, error, &mut failures).await;
                        } else {
                            failures = 0;
                        }
                    }
                    Step::Down(error) => state = self.on_down(state, error, &mut failures).await,
                },
            }
            if let State::Up(link) = &mut state {
                let sent = select! {
                    biased;
                    () = &mut cancelled => break,
                    sent = timeout(WRITE_TIMEOUT, self.send(link)) => sent,
                };
                let error = match sent {
                    Ok(Ok(())) => continue,
                    Ok(Err(error)) => error,
                    Err(_) => LinkError::new("the broker does not read"),
                };
                state = self.on_down(state, error, &mut failures).await;
            }
        }
        self.leave(state).await;
    }

    fn sample_what_is_due(&mut self) {
        let shared = Arc::clone(&self.shared);
        let (config, counters) = (&shared.config, &shared.counters);
        let now = Instant::now();
        let now_us = match self.clock {
            Clock::Boot => now.duration_since(shared.started).as_micros() as u64,
            Clock::Wall => unix_us(),
        };
        while self.next_at <= now {
            let burst = self.rng.f64() < config.burst.share;
            for _ in 0..if burst { config.burst.events } else { 1 } {
                match self.device.sample(now_us, self.clock, self.rng.u64(..)) {
                    Ok(_) => counters.produced.fetch_add(1, Relaxed),
                    Err(_) => counters.refused.fetch_add(1, Relaxed),
                };
            }
            let jitter = 1.0 + config.jitter * (2.0 * self.rng.f64() - 1.0);
            self.next_at += Duration::from_secs_f64(config.interval_mean_s() * jitter);
        }
    }

    fn on_up(&mut self, window: u16) {
        let counters = &self.shared.counters;
        self.device.on_connect(window);
        self.connected_time.start(Instant::now());
        counters.connected.fetch_add(1, Relaxed);
        if self.had_link {
            counters.reconnects.fetch_add(1, Relaxed);
        }
        self.had_link = true;
    }

    /// Takes an answer and all others that were read with it.
    async fn on_answers(&mut self, first: Answer, state: &mut State) -> Result<(), LinkError> {
        let mut next = Some(first);
        while let Some(answer) = next {
            match answer {
                Answer::Acked(packet_id) => self.on_ack(packet_id).await,
                Answer::Rejected => {
                    self.shared.counters.rejected.fetch_add(1, Relaxed);
                    return Err(LinkError::new("the broker refused an event"));
                }
            }
            next = match state {
                State::Up(link) => link.ready(),
                State::Connecting(_) => None,
            };
        }
        Ok(())
    }

    async fn on_ack(&mut self, packet_id: u16) {
        let Some(sample) = self.device.acked(packet_id) else {
            return;
        };
        // Acks come in the order of the publishes, so this is nearly always the first.
        let Some(at) = self.published.iter().position(|published| published.seq == sample.seq)
        else {
            return;
        };
        let Some(published) = self.published.remove(at) else {
            return;
        };
        let latency = self.connected_time.at(Instant::now()).saturating_sub(published.sent_at);
        self.shared.counters.acked(latency);
        self.record(&published, Some(unix_us())).await;
    }

    async fn record(&self, published: &Published, acked_us: Option<u64>) {
        let &Published { seq, sent_us, .. } = published;
        let (device, boot) = (self.device.id(), self.device.boot());
        // The ledger's thread is gone only after an I/O error, which it reports at the end.
        let _ = self.ledger.send(QueuedRow { device, boot, seq, sent_us, acked_us }).await;
    }

    /// Publishes what the window allows. After an error, or when dropped half way, the link is of
    /// no more use.
    async fn send(&mut self, link: &mut Link) -> Result<(), LinkError> {
        let payload: Payload = self.shared.config.payload;
        let mut any = false;
        while let Some(out) = self.device.next_to_send() {
            let (packet_id, dup, sample) = (out.packet_id, out.dup, out.item.clone());
            if dup {
                self.shared.counters.resent.fetch_add(1, Relaxed);
            } else {
                self.shared.counters.sent.fetch_add(1, Relaxed);
                self.published.push_back(Published {
                    seq: sample.seq,
                    sent_us: unix_us(),
                    sent_at: self.connected_time.at(Instant::now()),
                });
            }
            let payload_bytes = payload.render(&self.device.frame(sample), &mut self.payloads);
            let topic = &self.topic;
            let content_type = payload.content_type();
            let publish = Publish { topic, packet_id, dup, payload: payload_bytes, content_type };
            link.publish(publish).await?;
            any = true;
        }
        if any { link.flush().await } else { Ok(()) }
    }

    /// Takes the answers that came before the end of the link, and begins the next attempt.
    async fn on_down(&mut self, mut state: State, error: LinkError, failures: &mut u32) -> State {
        tracing::debug!(device = %self.device.id(), %error, "no link");
        if let State::Up(link) = &mut state {
            while let Some(answer) = link.ready() {
                if let Answer::Acked(packet_id) = answer {
                    self.on_ack(packet_id).await;
                }
            }
            self.shared.counters.connected.fetch_sub(1, Relaxed);
            self.device.on_disconnect();
            self.connected_time.stop(Instant::now());
        }
        self.shared.counters.failed(error.to_string());
        let FleetConfig { backoff_ms_min, backoff_ms_max, .. } = self.shared.config;
        let doubled = backoff_ms_min.saturating_mul(1 << (*failures).min(20));
        let wait_ms = doubled.min(backoff_ms_max);
        let wait_ms = wait_ms - (wait_ms / 2).min(self.rng.u64(..=wait_ms / 2));
        *failures += 1;
        self.connecting(Duration::from_millis(wait_ms))
    }

    fn connecting(&self, wait: Duration) -> State {
        let shared = Arc::clone(&self.shared);
        let client_id = self.device.id().to_string();
        let version = self.version;
        State::Connecting(Box::pin(async move {
            sleep(wait).await;
            let broker = shared.broker.borrow().clone();
            let keep_alive = Duration::from_secs(u64::from(shared.config.keep_alive_s));
            let in_flight_max = shared.config.in_flight_max;
            Link::connect(LinkOptions { broker, client_id, version, keep_alive, in_flight_max })
                .await
        }))
    }

    /// Ends the task: what is unacked goes into the ledger without an ack.
    async fn leave(mut self, state: State) {
        if let State::Up(link) = state {
            self.shared.counters.connected.fetch_sub(1, Relaxed);
            let _ = timeout(DISCONNECT_TIMEOUT, link.disconnect()).await;
        }
        for published in std::mem::take(&mut self.published) {
            self.record(&published, None).await;
        }
    }
}

/// Now, in microseconds since the Unix epoch; 0 before it.
pub(crate) fn unix_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connected_time_stands_still_while_disconnected() {
        let started = Instant::now();
        let after = |seconds| started + Duration::from_secs(seconds);
        let mut time = ConnectedTime::default();
        assert_eq!(time.at(after(5)), Duration::ZERO);
        time.start(after(10));
        assert_eq!(time.at(after(12)), Duration::from_secs(2));
        time.stop(after(13));
        time.stop(after(20));
        assert_eq!(time.at(after(50)), Duration::from_secs(3));
        time.start(after(60));
        assert_eq!(time.at(after(61)), Duration::from_secs(4));
    }
}
