//! What a connection does for its client as a subscriber: subscriptions, retained messages, deliveries.
//!
//! Invariant: a SUBACK of a session that is kept leaves only after its subscriptions are durable; a
//! message leaves within the client's window and packet size, or is counted as dropped.
//! Deliberately absent: who gets what (`downlink`), and what is kept for whom (`sessions`).

use std::sync::Arc;

use bytestring::ByteString;
use rmqtt_codec::v5;
use storage::{Attribute, Control};

use super::super::codec::{Delivery, Version};
use super::super::downlink::{Interrupted, SUBSCRIPTIONS_MAX};
use super::super::reason::{self, Violation};
use super::super::rows::{Message, Queued};
use super::super::session::{self, Delivered, Turn};
use super::super::sessions::Kept;
use super::super::stats::FrontStats;
use super::super::subscriptions::{Full, Manner, Options};
use super::super::topic;
use super::{Conn, End, OUT_BYTES_MAX};
use crate::ingest::clock;

/// Retained messages read for one client at once.
const RETAINED_AT_ONCE: usize = 32;

/// Retained messages that wait for one client, at most: who subscribes again and again to everything
/// before it has taken them gets no more.
const RETAINED_DUE_MAX: usize = 64 * 1024;

impl Conn<'_> {
    /// Does what has its turn: everything that came before it is durable.
    pub(super) async fn take(&mut self, turn: Turn) -> Result<(), End> {
        match turn {
            Turn::Subscribe(subscribe) => self.subscribe(subscribe).await?,
            Turn::Unsubscribe(unsubscribe) => self.unsubscribe(&unsubscribe)?,
            Turn::SubAck { packet_id, codes, retained } => {
                self.session.subscribed(packet_id, &codes, &mut self.out)?;
                self.look_up(retained);
            }
            Turn::UnsubAck { packet_id, codes } => {
                self.session.unsubscribed(packet_id, &codes, &mut self.out)?;
            }
            Turn::Settled(places) => {
                if let Some(kept) = &self.kept {
                    for place in places {
                        kept.settled(place);
                    }
                }
            }
        }
        Ok(())
    }

    async fn subscribe(&mut self, subscribe: v5::Subscribe) -> Result<(), End> {
        let id = subscribe.id.map(std::num::NonZeroU32::get);
        let (mut filters, mut retained) = (Vec::new(), Vec::new());
        for (filter, asked) in subscribe.topic_filters {
            // A copy: it may live longer than the read buffer that it came in.
            let filter = ByteString::from(&*filter);
            if asked.no_local && topic::is_shared(&filter) {
                // [MQTT-3.8.3-4]
                return Err(Violation::protocol("no local on a shared subscription").into());
            }
            if self.session.version() == Version::V5
                && topic::is_shared(&filter)
                && topic::shared(&filter).is_none()
            {
                // [MQTT-4.8.2-1], [MQTT-4.8.2-2]. In 3.1.1 it is a filter as any other, which the
                // SUBACK refuses.
                let why = "a shared subscription without a group or without a filter";
                return Err(Violation::protocol(why).into());
            }
            let options = Options {
                qos: asked.qos.value(),
                no_local: asked.no_local,
                retain_as_published: asked.retain_as_published,
                id,
            };
            let known = match &self.kept {
                Some(kept) => kept.subscription(&filter).is_some(),
                None => self.inbox.has(&filter),
            };
            // [MQTT-3.3.1-9 to -11]
            let wants = match asked.retain_handling {
                v5::RetainHandling::AtSubscribe => true,
                v5::RetainHandling::AtSubscribeNew => !known,
                v5::RetainHandling::NoAtSubscribe => false,
            };
            retained.push(wants && !topic::is_shared(&filter));
            filters.push((filter, options));
        }
        let allowed: Vec<bool> =
            filters.iter().map(|(filter, _)| self.grant.may_subscribe(filter)).collect();
        let filters = only(filters, &allowed);
        let retained = only(retained, &allowed);
        FrontStats::add(&self.shared.stats.denied, (allowed.len() - filters.len()) as u64);
        let (codes, controls) = match &self.kept {
            Some(kept) => self.subscribe_kept(kept, &filters),
            None => (self.inbox.subscribe(&filters).await?, Vec::new()),
        };
        let granted = filters.into_iter().zip(&codes).zip(retained);
        let retained = granted
            .filter(|((_, code), wants)| **code < 0x80 && *wants)
            .map(|(((filter, options), _), _)| session::Retained { filter, options })
            .collect();
        // Each filter's code in its place [MQTT-3.9.3-1].
        let mut codes = codes.into_iter();
        let code = |allowed: &bool| if *allowed { codes.next() } else { None };
        let codes: Vec<u8> =
            allowed.iter().map(code).map(|code| code.unwrap_or(reason::NOT_AUTHORIZED)).collect();
        self.marks_publisher = self.has_no_local();
        if controls.is_empty() {
            self.session.subscribed(subscribe.packet_id, &codes, &mut self.out)?;
            self.look_up(retained);
        } else {
            let number = self.session.await_suback(subscribe.packet_id, codes, retained);
            self.submit_for(number, controls);
        }
        Ok(())
    }

    /// Subscribes a session that is kept: gives the SUBACK codes, and what has to be durable before.
    fn subscribe_kept(
        &self,
        kept: &Arc<Kept>,
        filters: &[(ByteString, Options)],
    ) -> (Vec<u8>, Vec<Control>) {
        let (mut codes, mut controls) = (Vec::new(), Vec::new());
        for (filter, options) in filters {
            let new = kept.subscription(filter).is_none();
            let code = if topic::is_shared(filter) && topic::shared(filter).is_none() {
                reason::FILTER_INVALID
            } else if new && kept.subscriptions() >= SUBSCRIPTIONS_MAX {
                reason::QUOTA_EXCEEDED
            } else {
                let from = self.shared.downlink.watermark();
                match self.shared.downlink.watch(filter, kept, *options, from) {
                    Ok(from) => {
                        controls.push(kept.subscribe(filter, *options, from));
                        options.qos
                    }
                    Err(Full) => reason::QUOTA_EXCEEDED,
                }
            };
            codes.push(code);
        }
        (codes, controls)
    }

    fn unsubscribe(&mut self, unsubscribe: &v5::Unsubscribe) -> Result<(), End> {
        let (mut codes, mut controls) = (Vec::new(), Vec::new());
        match &self.kept {
            Some(kept) => {
                for filter in &unsubscribe.topic_filters {
                    self.shared.downlink.unwatch(filter, kept);
                    let row = kept.unsubscribe(filter);
                    codes.push(match row {
                        Some(_) => reason::SUCCESS,
                        None => reason::NO_SUBSCRIPTION_EXISTED,
                    });
                    controls.extend(row);
                }
            }
            None => codes = self.inbox.unsubscribe(&unsubscribe.topic_filters),
        }
        self.marks_publisher = self.has_no_local();
        if controls.is_empty() {
            self.session.unsubscribed(unsubscribe.packet_id, &codes, &mut self.out)?;
        } else {
            let number = self.session.await_unsuback(unsubscribe.packet_id, codes);
            self.submit_for(number, controls);
        }
        Ok(())
    }

    fn has_no_local(&self) -> bool {
        match &self.kept {
            Some(kept) => kept.has_no_local(),
            None => self.inbox.has_no_local(),
        }
    }

    /// Notes the retained messages that new subscriptions are to get.
    fn look_up(&mut self, retained: Vec<session::Retained>) {
        for session::Retained { filter, options } in retained {
            let topics = self.shared.retained.matching(&filter);
            let room = RETAINED_DUE_MAX.saturating_sub(self.retained_due.len());
            let lost = topics.len().saturating_sub(room);
            FrontStats::add(&self.shared.stats.deliveries_dropped, lost as u64);
            self.retained_due.extend(topics.into_iter().take(room).map(|topic| (topic, options)));
        }
    }

    /// Delivers retained messages that are due, and what waits for a session that is kept, as far as
    /// bounds allow.
    pub(super) async fn deliver_waiting(&mut self) -> Result<(), End> {
        self.deliver_retained().await?;
        self.check_grant()?;
        self.deliver_kept();
        Ok(())
    }

    async fn deliver_retained(&mut self) -> Result<(), End> {
        while !self.retained_due.is_empty() {
            let at_once = self.retained_due.len().min(self.retained_at_once());
            if at_once == 0 {
                break;
            }
            let due: Vec<_> = self.retained_due.drain(..at_once).collect();
            let retained = self.shared.retained.clone();
            let read = tokio::task::spawn_blocking(move || {
                let read = |(topic, options): (ByteString, _)| {
                    retained.get(&topic).map(|message| (message, options))
                };
                due.into_iter().filter_map(read).collect::<Vec<_>>()
            });
            let read = read.await.unwrap_or_default();
            self.check_grant()?;
            let (mut controls, mut places) = (Vec::new(), Vec::new());
            for (message, options) in read {
                let client_id = self.session.client_id();
                let manner = Manner::of_retained(&message.attributes, options, client_id);
                match (&self.kept, manner) {
                    (_, None) => {}
                    (Some(kept), Some(manner)) if manner.qos > 0 => {
                        let queued = Queued { packet_id: 0, manner, message: Some(message) };
                        places.extend(kept.offer(queued, &mut controls));
                    }
                    (_, Some(manner)) => self.deliver_message(&message, &manner),
                }
            }
            if !controls.is_empty() {
                let number = self.session.await_settled(places);
                self.submit_for(number, controls);
            }
        }
        Ok(())
    }

    /// How many of the retained messages that are due may be looked up now.
    fn retained_at_once(&self) -> usize {
        let room = match &self.kept {
            _ if self.out.len() >= OUT_BYTES_MAX => 0,
            Some(kept) if self.session.takes_publishes() => kept.room(),
            Some(_) => 0,
            None => self.session.room_for_deliveries(),
        };
        room.min(RETAINED_AT_ONCE)
    }

    /// Ends the subscriptions of an earlier connection that the rules do not allow any more.
    pub(super) fn drop_denied(&mut self) {
        let Some(kept) = &self.kept else { return };
        let filters = kept.filters().into_iter();
        let denied: Vec<_> = filters.filter(|filter| !self.grant.may_subscribe(filter)).collect();
        if denied.is_empty() {
            return;
        }
        for filter in &denied {
            self.shared.downlink.unwatch(filter, kept);
        }
        self.submit(denied.iter().filter_map(|filter| kept.unsubscribe(filter)));
        FrontStats::add(&self.shared.stats.denied, denied.len() as u64);
        self.marks_publisher = self.has_no_local();
    }

    /// Messages that an earlier connection took for the client, and whose end it has not seen, are made
    /// durable by this one.
    pub(super) fn settle_kept(&mut self) {
        let Some(kept) = &self.kept else { return };
        let (places, controls) = kept.unsettled();
        if !places.is_empty() {
            let number = self.session.await_settled(places);
            self.submit_for(number, controls);
        }
    }

    /// Delivers what waits for a session that is kept, as far as bounds allow. What came for it under
    /// other rules may not be the client's to read any more.
    fn deliver_kept(&mut self) {
        let Some(kept) = self.kept.clone() else { return };
        while self.out.len() < OUT_BYTES_MAX {
            if let Some(Queued { manner, message: Some(message), .. }) = kept.next_passing() {
                if self.grant.may_subscribe(&message.topic) {
                    let delivered = self.put(&message, &manner, None, false);
                    self.count(delivered);
                } else {
                    self.count_denied();
                }
                continue;
            }
            let next = if self.session.takes_delivery() { kept.next() } else { None };
            let Some(next) = next else { return };
            let Queued { packet_id, manner, message } = next.queued;
            let Some(message) = message else {
                let number = self.session.release_again(packet_id);
                self.keep(number, |kept| kept.received(packet_id));
                kept.sent(next.place);
                continue;
            };
            if !self.grant.may_subscribe(&message.topic) {
                self.submit([kept.drop_at(next.place)]);
                self.count_denied();
                continue;
            }
            let delivered = self.put(&message, &manner, Some(packet_id), next.dup);
            match delivered {
                Delivered::Sent => kept.sent(next.place),
                Delivered::TooLarge => self.submit([kept.drop_at(next.place)]),
            }
            self.count(delivered);
        }
    }

    fn count_denied(&self) {
        FrontStats::add(&self.shared.stats.denied, 1);
        FrontStats::add(&self.shared.stats.deliveries_dropped, 1);
    }

    fn count(&self, delivered: Delivered) {
        let stats = &self.shared.stats;
        match delivered {
            Delivered::Sent => FrontStats::add(&stats.deliveries, 1),
            Delivered::TooLarge => FrontStats::add(&stats.deliveries_dropped, 1),
        }
    }

    /// Delivers a message, and those that are there already.
    pub(super) fn deliver(
        &mut self,
        first: Result<(Message, Manner), Interrupted>,
    ) -> Result<(), End> {
        self.check_grant()?;
        let mut next = Some(first);
        while let Some(message) = next {
            let (message, manner) = message?;
            self.deliver_message(&message, &manner);
            next = if self.takes_delivery() { self.inbox.try_next() } else { None };
        }
        Ok(())
    }

    /// Delivers a message, if the rules do not keep it back.
    fn deliver_message(&mut self, message: &Message, manner: &Manner) {
        if self.grant.keeps_back(&message.topic) {
            return self.count_denied();
        }
        let delivered = self.put(message, manner, None, false);
        self.count(delivered);
    }

    /// Appends a message, unless it has expired. One that may have been sent before is sent again
    /// whatever its age [MQTT-4.3.3-7], [MQTT-4.4.0-1].
    fn put(
        &mut self,
        message: &Message,
        manner: &Manner,
        packet_id: Option<u16>,
        dup: bool,
    ) -> Delivered {
        let expiry = message.attributes.iter().find_map(|attribute| match attribute {
            Attribute::MessageExpiry(seconds) => Some(seconds),
            _ => None,
        });
        // [MQTT-3.3.2-5], [MQTT-3.3.2-6]
        let expiry_s = match expiry {
            None => None,
            Some(seconds) => {
                let now_us = self.shared.ingest.now_us();
                let waited_s = clock::waited_s(message.received_us, now_us);
                match u64::from(seconds).saturating_sub(waited_s) {
                    0 if !dup => return Delivered::TooLarge,
                    left => Some(left as u32),
                }
            }
        };
        let delivery = Delivery {
            topic: &message.topic,
            payload: &message.payload,
            attributes: &message.attributes,
            qos: manner.qos,
            packet_id,
            dup,
            retain: manner.retain,
            expiry_s,
            subscription_ids: &manner.ids,
            topic_alias: None,
        };
        self.session.deliver(delivery, &mut self.out)
    }
}

/// Those of `all` that are allowed.
fn only<T>(all: Vec<T>, allowed: &[bool]) -> Vec<T> {
    all.into_iter().zip(allowed).filter_map(|(one, allowed)| allowed.then_some(one)).collect()
}
