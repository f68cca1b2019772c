//! What was handed to the producer, and what became of it. Pure: librdkafka's threads report into
//! it, the sink takes answers out.
//!
//! Owns: the fate of every event in flight, and the sorting of Kafka's error codes ([`sort`]).
//! Invariant: once something went wrong that librdkafka does not mend, the ledger is *broken*: no
//! answer leaves until the producer is gone and nothing can be reported any more
//! ([`Ledger::settle`]). So what an answer calls not delivered is not delivered later, except by what
//! was on the wire already.

use std::collections::VecDeque;
use std::time::Duration;

use rdkafka::error::RDKafkaErrorCode;

use crate::sink::{Answer, Failed, Failure, RequestId, Which};

/// Number of an event, one after the other, wrapping. It travels through librdkafka as a pointer,
/// which has 32 bits on the smallest boards.
pub(super) type Ticket = u32;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// librdkafka has it.
    Pending,
    Delivered,
    /// It never left: librdkafka did not take this very event.
    Refused(RDKafkaErrorCode),
    /// Reported by librdkafka, with the batch that it was in.
    Failed(RDKafkaErrorCode),
}

#[derive(Debug)]
struct Flight {
    id: RequestId,
    first: Ticket,
    fates: Vec<Fate>,
    pending: usize,
    /// What each of its events counts for: their mean, rounded up.
    event_bytes: usize,
}

/// Why the producer must go.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Cause {
    failure: Failure,
    reason: String,
}

/// What is known of the way to the brokers since the producer was made.
#[derive(Debug, Default)]
struct Contact {
    /// Something may have got through.
    lived: bool,
    /// Somebody was to be connected to, and was not there.
    refused: bool,
    /// No broker can be reached, and nothing was delivered since librdkafka said so.
    cut_off: bool,
}

#[derive(Debug, Default)]
pub(super) struct Ledger {
    /// In the order in which they were begun.
    flights: VecDeque<Flight>,
    next: Ticket,
    moves: u64,
    cause: Option<Cause>,
    /// The producer is gone; nothing is reported any more.
    settled: bool,
    /// Events that librdkafka has.
    pending: usize,
    /// Their event bytes, about.
    pending_bytes: usize,
    contact: Contact,
    /// What librdkafka complained of last, for the watchdog to quote.
    complaint: Option<String>,
    /// The gateway is stopping: nobody waits for brokers that are away.
    hurried: bool,
}

impl Ledger {
    /// Opens the account of a request of so many events and event bytes; gives the ticket of its first
    /// event.
    pub(super) fn admit(&mut self, id: RequestId, events: usize, size_bytes: usize) -> Ticket {
        let first = self.next;
        self.next = first.wrapping_add(events as Ticket);
        let event_bytes = size_bytes.div_ceil(events);
        self.pending += events;
        self.pending_bytes += events * event_bytes;
        let fates = vec![Fate::Pending; events];
        self.flights.push_back(Flight { id, first, fates, pending: events, event_bytes });
        first
    }

    pub(super) fn is_empty(&self) -> bool {
        self.flights.is_empty()
    }

    /// Events that librdkafka has.
    pub(super) fn pending(&self) -> usize {
        self.pending
    }

    /// Their event bytes, about.
    pub(super) fn pending_bytes(&self) -> usize {
        self.pending_bytes
    }

    /// Counts reports: while it rises, the upstream lives.
    pub(super) fn moves(&self) -> u64 {
        self.moves
    }

    pub(super) fn is_broken(&self) -> bool {
        self.cause.is_some()
    }

    /// A delivery report; gives whether there is something to do about it.
    pub(super) fn report(&mut self, ticket: Ticket, result: Result<(), RDKafkaErrorCode>) -> bool {
        match result {
            Ok(()) => self.decide(ticket, Fate::Delivered),
            Err(code) => {
                let done = self.decide(ticket, Fate::Failed(code));
                self.breaks(sort(code), describe(code)) || done
            }
        }
    }

    /// librdkafka did not take an event.
    pub(super) fn refused(&mut self, ticket: Ticket, code: RDKafkaErrorCode) {
        self.decide(ticket, Fate::Refused(code));
        if sort(code) != Failure::Suspect {
            self.breaks(sort(code), describe(code));
        }
    }

    /// An error of the client as a whole; gives whether there is something to do about it.
    pub(super) fn client_error(&mut self, code: RDKafkaErrorCode, reason: &str) -> bool {
        let text = format!("{}: {reason}", describe(code));
        match sort(code) {
            Failure::Hold => self.breaks(Failure::Hold, text),
            _ if code == RDKafkaErrorCode::Fatal => {
                self.breaks(Failure::Retry { after: None }, text)
            }
            Failure::Retry { .. } if code == RDKafkaErrorCode::AllBrokersDown => {
                self.contact.cut_off = true;
                // A producer that never got through has nothing to lose: say so at once.
                (self.hurried || self.contact.refused && !self.contact.lived) && self.cut()
            }
            // librdkafka goes on trying; the watchdog decides.
            _ => {
                let no_connection =
                    code == RDKafkaErrorCode::Resolve || reason.contains("Connect to ");
                self.contact.refused |= no_connection;
                // A connection that breaks has been one.
                self.contact.lived |=
                    code == RDKafkaErrorCode::BrokerTransportFailure && !no_connection;
                self.complaint = Some(text);
                false
            }
        }
    }

    /// Nobody waits any longer: if no broker can be reached, that is the answer.
    pub(super) fn hurry(&mut self) -> bool {
        self.hurried = true;
        self.contact.cut_off && self.cut()
    }

    /// Whether the gateway is stopping.
    pub(super) fn is_hurried(&self) -> bool {
        self.hurried
    }

    fn cut(&mut self) -> bool {
        let reason = self.with_complaint("no broker can be reached".to_owned());
        self.breaks(Failure::Retry { after: None }, reason)
    }

    /// Nothing can be sent as things are.
    pub(super) fn hold(&mut self, reason: String) {
        self.breaks(Failure::Hold, reason);
    }

    /// This holds, whatever was the cause so far: the producer's last word.
    pub(super) fn holds_after_all(&mut self, reason: String) {
        self.cause = Some(Cause { failure: Failure::Hold, reason });
    }

    /// The watchdog bites.
    pub(super) fn no_sign_of_life(&mut self, patience: Duration) {
        let reason = self.silence(patience);
        self.breaks(Failure::Retry { after: None }, reason);
    }

    /// What is said of brokers that let us wait for so long.
    pub(super) fn silence(&self, patience: Duration) -> String {
        self.with_complaint(format!("the brokers did not answer within {patience:?}"))
    }

    fn with_complaint(&self, reason: String) -> String {
        match &self.complaint {
            Some(complaint) => format!("{reason}: {complaint}"),
            None => reason,
        }
    }

    /// Ends the producer for this reason, unless it ends for another already; gives whether it is
    /// news.
    pub(super) fn breaks(&mut self, failure: Failure, reason: String) -> bool {
        let first = self.cause.is_none();
        if first {
            let failure = match failure {
                Failure::Hold | Failure::Again => failure,
                _ => Failure::Retry { after: None },
            };
            self.cause = Some(Cause { failure, reason });
        }
        first
    }

    /// Gives whether a request is complete with it.
    fn decide(&mut self, ticket: Ticket, fate: Fate) -> bool {
        self.moves += 1;
        if fate == Fate::Delivered {
            self.contact = Contact { lived: true, cut_off: false, ..self.contact };
        }
        let Some(oldest) = self.flights.front().map(|flight| flight.first) else { return false };
        // Tickets rise from flight to flight, seen from the oldest: they may wrap.
        let distance = ticket.wrapping_sub(oldest);
        let after =
            self.flights.partition_point(|flight| flight.first.wrapping_sub(oldest) <= distance);
        let flight = &mut self.flights[after - 1];
        let place = ticket.wrapping_sub(flight.first) as usize;
        let Some(open @ Fate::Pending) = flight.fates.get_mut(place) else { return false };
        *open = fate;
        flight.pending -= 1;
        self.pending -= 1;
        self.pending_bytes -= flight.event_bytes;
        flight.pending == 0
    }

    /// The transaction that carried everything here did not come to its end: what was delivered in
    /// it was not.
    pub(super) fn void(&mut self) {
        for flight in &mut self.flights {
            for fate in flight.fates.iter_mut().filter(|fate| **fate == Fate::Delivered) {
                *fate = Fate::Pending;
            }
        }
    }

    /// The producer is gone: what was not reported was not delivered, and every request can be
    /// answered.
    pub(super) fn settle(&mut self) {
        if std::mem::replace(&mut self.settled, true) {
            return;
        }
        // A batch may carry events of several requests, so a refusal is only one if there was only
        // one request; else the oldest is tried again, alone.
        if self.flights.len() > 1 {
            for fate in self.flights.iter_mut().flat_map(|flight| &mut flight.fates) {
                if matches!(fate, Fate::Failed(code) if sort(*code) == Failure::Suspect) {
                    *fate = Fate::Pending;
                }
            }
        }
    }

    /// The answer to a request that is complete.
    pub(super) fn take_answer(&mut self) -> Option<(RequestId, Answer)> {
        let answered = if self.settled {
            self.flights.pop_front()
        } else {
            let place = self.flights.iter().position(|flight| flight.pending == 0);
            place.and_then(|place| self.flights.remove(place))
        };
        let answered = answered.map(|flight| (flight.id, flight.answer(self.cause.as_ref())));
        if self.settled && self.flights.is_empty() {
            // Ready for the next producer; which tickets were given stays known.
            let Self { next, moves, hurried, .. } = *self;
            *self = Self { next, moves, hurried, ..Self::default() };
        }
        answered
    }
}

impl Flight {
    fn answer(&self, cause: Option<&Cause>) -> Answer {
        let mut failed: Vec<Failed> = Vec::new();
        for (place, &fate) in self.fates.iter().enumerate() {
            let (failure, reason) = match fate {
                Fate::Delivered => continue,
                Fate::Refused(code) if sort(code) == Failure::Suspect => {
                    (Failure::Reject, describe(code))
                }
                Fate::Failed(code) | Fate::Refused(code) if !is_purge(code) => {
                    (sort(code), describe(code))
                }
                _ => {
                    let cause = cause.expect("only a broken ledger answers for what is pending");
                    (cause.failure, cause.reason.clone())
                }
            };
            match failed.iter_mut().find(|f| f.failure == failure && f.reason == reason) {
                Some(Failed { which: Which::These(places), .. }) => places.push(place),
                _ => failed.push(Failed { which: Which::These(vec![place]), failure, reason }),
            }
        }
        Answer { failed }
    }
}

/// The producer was dropped before the event was delivered.
fn is_purge(code: RDKafkaErrorCode) -> bool {
    matches!(code, RDKafkaErrorCode::PurgeQueue | RDKafkaErrorCode::PurgeInflight)
}

/// What to do once somebody else writes under our name.
pub(super) const FENCED: &str = "another gateway with the same id and sink name has taken over: \
    give one of them another id, then restart this one";

/// Somebody else writes under our name, or the brokers believe so.
pub(super) fn is_fenced(code: RDKafkaErrorCode) -> bool {
    use RDKafkaErrorCode as Code;
    matches!(code, Code::Fenced | Code::ProducerFenced | Code::InvalidProducerEpoch)
}

/// What an error means for the events that it came with. What is not named here is worth a try.
pub(super) fn sort(code: RDKafkaErrorCode) -> Failure {
    use RDKafkaErrorCode as Code;
    match code {
        Code::MessageSizeTooLarge
        | Code::MessageBatchTooLarge
        | Code::InvalidMessageSize
        | Code::InvalidRecord
        | Code::InvalidTimestamp => Failure::Suspect,
        Code::Authentication
        | Code::GroupAuthorizationFailed
        | Code::InvalidTransactionTimeout
        | Code::SaslAuthenticationFailed
        | Code::UnsupportedSASLMechanism
        | Code::IllegalSASLState
        | Code::SecurityDisabled
        | Code::SSL
        | Code::TopicAuthorizationFailed
        | Code::ClusterAuthorizationFailed
        | Code::TransactionalIdAuthorizationFailed
        | Code::UnknownTopic
        | Code::UnknownTopicOrPartition
        | Code::UnknownPartition
        | Code::InvalidTopic
        | Code::InvalidConfig
        | Code::InvalidRequiredAcks
        | Code::UnsupportedVersion
        | Code::UnsupportedFeature
        | Code::UnsupportedForMessageFormat
        | Code::UnsupportedCompressionType
        | Code::Fenced
        | Code::ProducerFenced
        | Code::InvalidProducerEpoch => Failure::Hold,
        _ => Failure::Retry { after: None },
    }
}

/// The error, and what to do about it where somebody must.
pub(super) fn describe(code: RDKafkaErrorCode) -> String {
    use RDKafkaErrorCode as Code;
    let advice = match code {
        _ if sort(code) != Failure::Hold => return code.to_string(),
        Code::UnknownTopic
        | Code::UnknownTopicOrPartition
        | Code::UnknownPartition
        | Code::InvalidTopic => "create the topic, or check its name",
        Code::TopicAuthorizationFailed | Code::ClusterAuthorizationFailed => {
            "allow this user to write to the topic"
        }
        Code::TransactionalIdAuthorizationFailed => {
            "allow this user to write with the transactional id gw-<gateway>-<sink>, with ~ for each \
             hyphen in the sink's name"
        }
        Code::GroupAuthorizationFailed => {
            "allow this user to read the group gw-<gateway>-<sink>, with ~ for each hyphen in the \
             sink's name"
        }
        Code::InvalidTransactionTimeout => {
            "raise transaction.max.timeout.ms of the brokers, or lower request_timeout"
        }
        Code::UnsupportedCompressionType => "choose another compression",
        code if is_fenced(code) => FENCED,
        _ => "check the sink's settings and credentials",
    };
    format!("{code}; {advice}")
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOO_LARGE: RDKafkaErrorCode = RDKafkaErrorCode::MessageSizeTooLarge;
    const PURGED: RDKafkaErrorCode = RDKafkaErrorCode::PurgeQueue;

    /// A broken ledger's answers, in order.
    fn settled(mut ledger: Ledger) -> Vec<Answer> {
        assert!(ledger.is_broken());
        ledger.settle();
        let answers = std::iter::from_fn(|| ledger.take_answer()).map(|(_, answer)| answer);
        let answers = answers.collect();
        assert!(ledger.is_empty() && !ledger.is_broken(), "ready for the next producer");
        answers
    }

    #[test]
    fn requests_are_answered_as_they_complete_and_tickets_may_wrap() {
        let mut ledger = Ledger { next: Ticket::MAX - 1, ..Ledger::default() };
        let first = ledger.admit(0, 3, 0);
        let second = ledger.admit(1, 2, 0);
        assert_eq!(second, 1);
        assert!(!ledger.report(second, Ok(())));
        assert!(ledger.report(second.wrapping_add(1), Ok(())));
        assert_eq!(ledger.take_answer(), Some((1, Answer::delivered())));
        assert_eq!(ledger.take_answer(), None);
        for place in 0..3 {
            ledger.report(first.wrapping_add(place), Ok(()));
        }
        assert_eq!(ledger.take_answer(), Some((0, Answer::delivered())));
    }

    #[test]
    fn what_librdkafka_has_is_counted_in_events_and_in_bytes() {
        let mut ledger = Ledger::default();
        let first = ledger.admit(0, 3, 100);
        ledger.admit(1, 1, 1_000);
        assert_eq!((ledger.pending(), ledger.pending_bytes()), (4, 1_102));
        for ticket in [first, first, first + 3] {
            ledger.report(ticket, Ok(()));
        }
        assert_eq!((ledger.pending(), ledger.pending_bytes()), (2, 68));
        for place in 1..3 {
            ledger.report(first + place, Ok(()));
        }
        assert_eq!((ledger.pending(), ledger.pending_bytes()), (0, 0));
    }

    #[test]
    fn nothing_is_answered_while_the_producer_may_still_deliver() {
        let mut ledger = Ledger::default();
        let first = ledger.admit(0, 3, 0);
        assert!(ledger.report(first, Err(RDKafkaErrorCode::TopicAuthorizationFailed)));
        assert_eq!(ledger.take_answer(), None);
        // Delivered while the producer was on its way out.
        ledger.report(first + 1, Ok(()));
        ledger.report(first + 2, Err(PURGED));
        let answers = settled(ledger);
        assert_eq!(answers[0].failed.len(), 1);
        assert_eq!(answers[0].failed[0].which, Which::These(vec![0, 2]));
        assert_eq!(answers[0].failed[0].failure, Failure::Hold);
        assert!(answers[0].failed[0].reason.contains("allow this user"), "{answers:?}");
    }

    #[test]
    fn a_refused_batch_blames_its_own_events_only_if_it_was_alone() {
        let mut alone = Ledger::default();
        let first = alone.admit(0, 2, 0);
        alone.report(first, Err(TOO_LARGE));
        alone.report(first + 1, Err(TOO_LARGE));
        assert_eq!(settled(alone)[0].failed[0].failure, Failure::Suspect);

        // At a low rate requests of one event share a batch: neither may be called guilty.
        let mut together = Ledger::default();
        for id in 0..2 {
            let ticket = together.admit(id, 1, 0);
            together.report(ticket, Err(TOO_LARGE));
        }
        for answer in settled(together) {
            assert_eq!(answer.failed[0].failure, Failure::Retry { after: None });
        }
    }

    #[test]
    fn an_event_that_librdkafka_itself_refuses_is_guilty_and_harms_nobody() {
        let mut ledger = Ledger::default();
        let first = ledger.admit(0, 2, 0);
        ledger.refused(first, TOO_LARGE);
        ledger.report(first + 1, Ok(()));
        assert!(!ledger.is_broken());
        let (_, answer) = ledger.take_answer().expect("complete");
        assert_eq!(answer.failed[0].failure, Failure::Reject);
        assert_eq!(answer.failed[0].which, Which::These(vec![0]));
    }

    #[test]
    fn what_librdkafka_mends_is_only_remembered_for_the_watchdog() {
        let mut ledger = Ledger::default();
        ledger.admit(0, 1, 0);
        let timed_out = RDKafkaErrorCode::OperationTimedOut;
        assert!(!ledger.client_error(timed_out, "1 request(s) timed out"));
        assert!(!ledger.is_broken());
        ledger.no_sign_of_life(Duration::from_secs(30));
        let answers = settled(ledger);
        assert_eq!(answers[0].failed[0].failure, Failure::Retry { after: None });
        let reason = &answers[0].failed[0].reason;
        assert!(reason.contains("30s") && reason.contains("1 request(s) timed out"), "{reason}");
    }

    #[test]
    fn a_producer_that_never_got_through_says_so_at_once_and_another_when_nobody_waits() {
        let (refused, down) =
            (RDKafkaErrorCode::BrokerTransportFailure, RDKafkaErrorCode::AllBrokersDown);
        let mut never = Ledger::default();
        never.admit(0, 1, 0);
        assert!(
            !never.client_error(refused, "b:1: Connect to ipv4#b:1 failed: Connection refused")
        );
        assert!(never.client_error(down, "1/1 brokers are down"));
        let reason = settled(never)[0].failed[0].reason.clone();
        assert!(reason.contains("Connection refused"), "{reason}");

        let mut broken = Ledger::default();
        broken.admit(0, 1, 0);
        assert!(!broken.client_error(refused, "b:1: Disconnected (after 9ms in state UP)"));
        assert!(!broken.client_error(down, "1/1 brokers are down"), "its answer may be lost");

        let mut lived = Ledger::default();
        let first = lived.admit(0, 2, 0);
        lived.report(first, Ok(()));
        assert!(!lived.client_error(down, "1/1 brokers are down"));
        assert!(!lived.is_broken(), "librdkafka may know that a broker has it, and tries on");
        assert!(lived.hurry());
        assert_eq!(settled(lived)[0].failed[0].which, Which::These(vec![1]));

        let mut back = Ledger::default();
        let first = back.admit(0, 3, 0);
        back.report(first, Ok(()));
        back.client_error(down, "1/1 brokers are down");
        back.report(first + 1, Ok(()));
        assert!(!back.hurry());
    }

    #[test]
    fn what_was_delivered_in_a_transaction_that_failed_was_not() {
        let mut ledger = Ledger::default();
        let first = ledger.admit(0, 2, 0);
        ledger.report(first, Ok(()));
        ledger.report(first + 1, Ok(()));
        ledger.breaks(Failure::Retry { after: None }, "the commit failed".to_owned());
        ledger.void();
        let answers = settled(ledger);
        assert_eq!(answers[0].failed[0].which, Which::These(vec![0, 1]));
    }

    #[test]
    fn a_wrong_password_holds_whatever_is_in_flight() {
        let mut ledger = Ledger::default();
        ledger.admit(0, 5, 0);
        ledger.admit(1, 5, 0);
        assert!(ledger.client_error(RDKafkaErrorCode::Authentication, "wrong password"));
        for answer in settled(ledger) {
            assert_eq!(answer.failed[0].failure, Failure::Hold);
            assert!(answer.failed[0].reason.contains("wrong password"));
        }
    }

    #[test]
    fn a_broken_ledger_without_requests_is_mended_by_settling() {
        let mut ledger = Ledger::default();
        ledger.client_error(RDKafkaErrorCode::Fatal, "fenced");
        assert!(settled(ledger).is_empty());
    }
}
