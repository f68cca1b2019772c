//! What was handed to the MQTT client, and what became of it. Pure: the connection reports into it,
//! the sink takes answers out.
//!
//! Owns: our own list of the unacked, from a request's event to its packet id and its PUBACK.
//! Invariant: once the connection is of no more use the flights are *broken*: no answer leaves until
//! it is gone and nothing can be reported any more ([`Flights::settle`]). So what an answer calls not
//! delivered is not delivered later, except by what was on the wire already.
//! Deliberately absent: what codes mean (`reasons`), and sending anything again.

use std::collections::{HashMap, VecDeque};

use crate::sink::{Answer, Failed, Failure, RequestId, Which};

/// An event of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) request: RequestId,
    pub(super) index: usize,
}

/// Why something was not delivered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Cause {
    pub(super) failure: Failure,
    pub(super) reason: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Fate {
    /// The client has it, or is to get it.
    Waiting,
    /// On the wire, not acked.
    Sent,
    Delivered,
    Refused(Cause),
}

#[derive(Debug)]
struct Flight {
    id: RequestId,
    fates: Vec<Fate>,
    open: usize,
}

#[derive(Debug, Default)]
pub(super) struct Flights {
    /// In the order in which they were begun.
    requests: VecDeque<Flight>,
    /// Handed to the client, not on the wire: in order.
    handed: VecDeque<Place>,
    /// On the wire, by packet id.
    sent: HashMap<u16, Place>,
    moves: u64,
    cause: Option<Cause>,
    /// The connection is gone; nothing is reported any more.
    settled: bool,
}

impl Flights {
    /// Opens the account of a request.
    pub(super) fn admit(&mut self, id: RequestId, events: usize) {
        self.requests.push_back(Flight { id, fates: vec![Fate::Waiting; events], open: events });
    }

    pub(super) fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }

    pub(super) fn is_broken(&self) -> bool {
        self.cause.is_some()
    }

    /// Counts reports: while it rises, the upstream lives.
    pub(super) fn moves(&self) -> u64 {
        self.moves
    }

    /// The client took an event, to send it after those that it has.
    pub(super) fn handed(&mut self, place: Place) {
        self.handed.push_back(place);
    }

    /// The client has put the next one on the wire.
    pub(super) fn sent(&mut self, packet_id: u16) {
        self.moves += 1;
        if let Some(place) = self.handed.pop_front() {
            self.sent.insert(packet_id, place);
            if let Some(fate) = self.fate(place) {
                *fate = Fate::Sent;
            }
        }
    }

    /// A PUBACK that takes the event, or refuses it for the given cause. Gives whether there is
    /// something to do about it.
    pub(super) fn acked(&mut self, packet_id: u16, refused: Option<Cause>) -> bool {
        self.moves += 1;
        let Some(place) = self.sent.remove(&packet_id) else {
            return false;
        };
        match refused {
            None => self.decide(place, Fate::Delivered),
            Some(cause) if cause.failure == Failure::Reject => {
                self.decide(place, Fate::Refused(cause))
            }
            // Nothing behind it may be taken before it: this connection sends no more.
            Some(cause) => {
                self.decide(place, Fate::Refused(cause.clone()));
                self.broke(cause);
                true
            }
        }
    }

    /// An event that no broker would take, or not this one. Gives whether its request is complete.
    pub(super) fn refused(&mut self, place: Place, reason: String) -> bool {
        self.decide(place, Fate::Refused(Cause { failure: Failure::Reject, reason }))
    }

    /// The next event that was to go on the wire is one that the broker does not take.
    pub(super) fn next_refused(&mut self, reason: String) {
        if let Some(place) = self.handed.pop_front() {
            self.refused(place, reason);
        }
    }

    /// The connection is of no more use; the first cause counts.
    pub(super) fn broke(&mut self, cause: Cause) {
        self.cause.get_or_insert(cause);
    }

    fn fate(&mut self, place: Place) -> Option<&mut Fate> {
        let flight = self.requests.iter_mut().find(|flight| flight.id == place.request)?;
        flight.fates.get_mut(place.index)
    }

    fn decide(&mut self, place: Place, fate: Fate) -> bool {
        let Some(flight) = self.requests.iter_mut().find(|flight| flight.id == place.request)
        else {
            return false;
        };
        flight.fates[place.index] = fate;
        flight.open -= 1;
        flight.open == 0
    }

    /// The connection is gone: what was not acked was not delivered, and every request can be
    /// answered.
    pub(super) fn settle(&mut self) {
        self.settled = true;
        self.handed.clear();
        self.sent.clear();
        // Whose fault a lost connection is can be asked only of one request: else the oldest is tried
        // again, alone.
        if self.requests.len() > 1
            && let Some(cause) = &mut self.cause
            && cause.failure == Failure::Suspect
        {
            cause.failure = Failure::Retry { after: None };
        }
        if self.requests.is_empty() {
            self.begin_anew();
        }
    }

    /// The answer to a request that is complete.
    pub(super) fn take_answer(&mut self) -> Option<(RequestId, Answer)> {
        if self.is_broken() && !self.settled {
            return None;
        }
        let flight = if self.settled {
            self.requests.pop_front()?
        } else {
            let place = self.requests.iter().position(|flight| flight.open == 0)?;
            self.requests.remove(place)?
        };
        let answered = (flight.id, flight.answer(self.cause.as_ref()));
        if self.settled && self.requests.is_empty() {
            self.begin_anew();
        }
        Some(answered)
    }

    fn begin_anew(&mut self) {
        self.settled = false;
        self.cause = None;
    }
}

impl Flight {
    fn answer(self, cause: Option<&Cause>) -> Answer {
        let mut failed: Vec<Failed> = Vec::new();
        for (index, fate) in self.fates.into_iter().enumerate() {
            let Cause { failure, reason } = match (fate, cause) {
                (Fate::Delivered, _) => continue,
                (Fate::Refused(cause), _) => cause,
                // What never got onto the wire broke nothing.
                (Fate::Waiting, Some(cause)) if cause.failure == Failure::Suspect => {
                    Cause { failure: Failure::Retry { after: None }, reason: cause.reason.clone() }
                }
                (Fate::Waiting | Fate::Sent, cause) => {
                    cause.expect("only a broken connection leaves something open").clone()
                }
            };
            match failed.iter_mut().find(|f| f.failure == failure && f.reason == reason) {
                Some(Failed { which: Which::These(indexes), .. }) => indexes.push(index),
                _ => failed.push(Failed { which: Which::These(vec![index]), failure, reason }),
            }
        }
        Answer { failed }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RETRY: Failure = Failure::Retry { after: None };

    fn cause(failure: Failure) -> Cause {
        Cause { failure, reason: "why".into() }
    }

    /// A request of so many events, all handed over, the first of them on the wire as packet 1 ...
    fn flights(id: RequestId, events: usize, sent: u16) -> Flights {
        let mut flights = Flights::default();
        flights.admit(id, events);
        (0..events).for_each(|index| flights.handed(Place { request: id, index }));
        (1..=sent).for_each(|packet_id| flights.sent(packet_id));
        flights
    }

    fn fates(answer: &Answer) -> Vec<(Failure, Vec<usize>)> {
        let indexes = |which: &Which| match which {
            Which::All => panic!("each is named"),
            Which::These(indexes) => indexes.clone(),
        };
        answer.failed.iter().map(|failed| (failed.failure, indexes(&failed.which))).collect()
    }

    #[test]
    fn a_request_is_answered_once_all_of_it_is_acked_in_whatever_order() {
        let mut flights = flights(7, 3, 3);
        assert!(!flights.acked(2, None));
        assert!(!flights.acked(9, None), "an ack that nobody waits for");
        assert!(!flights.acked(3, None));
        assert_eq!(flights.take_answer(), None);
        assert!(flights.acked(1, None));
        assert_eq!(flights.take_answer(), Some((7, Answer::delivered())));
        assert!(flights.is_empty());
    }

    #[test]
    fn an_event_that_is_refused_for_good_stops_nobody() {
        let mut flights = flights(0, 2, 2);
        assert!(!flights.acked(1, Some(cause(Failure::Reject))));
        assert!(!flights.is_broken());
        assert!(flights.acked(2, None));
        let (_, answer) = flights.take_answer().expect("complete");
        assert_eq!(fates(&answer), [(Failure::Reject, vec![0])]);
    }

    #[test]
    fn nothing_is_answered_while_the_connection_may_still_deliver() {
        let mut flights = flights(0, 4, 3);
        flights.admit(1, 1);
        assert!(flights.acked(1, Some(cause(Failure::Hold))));
        assert_eq!(flights.take_answer(), None);
        // Delivered while the connection was on its way out.
        flights.acked(2, None);
        flights.settle();
        let (_, first) = flights.take_answer().expect("settled");
        assert_eq!(fates(&first), [(Failure::Hold, vec![0, 2, 3])]);
        let (_, second) = flights.take_answer().expect("settled");
        assert_eq!(fates(&second), [(Failure::Hold, vec![0])]);
        assert!(!flights.is_broken(), "ready for the next connection");
    }

    #[test]
    fn a_suspect_is_on_the_wire_and_in_the_only_request() {
        let mut alone = flights(0, 4, 3);
        alone.acked(1, None);
        alone.broke(cause(Failure::Suspect));
        alone.settle();
        let (_, answer) = alone.take_answer().expect("settled");
        assert_eq!(fates(&answer), [(Failure::Suspect, vec![1, 2]), (RETRY, vec![3])]);

        let mut together = flights(0, 1, 1);
        together.admit(1, 1);
        together.broke(cause(Failure::Suspect));
        together.settle();
        for _ in 0..2 {
            let (_, answer) = together.take_answer().expect("settled");
            assert_eq!(fates(&answer), [(RETRY, vec![0])]);
        }
    }

    #[test]
    fn what_the_client_cannot_send_is_the_next_in_its_row() {
        let mut flights = flights(0, 3, 1);
        flights.next_refused("too large".into());
        flights.broke(cause(RETRY));
        flights.settle();
        let (_, answer) = flights.take_answer().expect("settled");
        assert_eq!(fates(&answer), [(RETRY, vec![0, 2]), (Failure::Reject, vec![1])]);
    }

    #[test]
    fn a_connection_lost_in_peace_is_mended_by_settling() {
        let mut flights = Flights::default();
        flights.broke(cause(RETRY));
        flights.settle();
        assert!(!flights.is_broken());
    }
}
