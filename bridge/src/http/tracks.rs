//! Which POST carries which events, and what the answers mean for their requests. Pure.
//!
//! Owns: the events of the requests that were begun, in their order, until each is taken or not.
//! They are cut into *pieces*; a piece is what one POST carries.
//!
//! Invariants:
//! - A partition is in one piece at a time, in offset order. So is each of its devices; and a
//!   receiver that keeps the last sequence number of each partition can skip what it has seen.
//! - Once an event is to be sent again, nothing that waits is sent any more until every request that
//!   was begun is answered.
//! - A piece that was refused as a whole is *on trial*: half of it is offered, then half of what is
//!   left to blame, until the bad event is alone and refused alone. Its halves are cut between
//!   partitions as long as there are several, so that what is not to blame goes on beside the trial.
//!
//! Trials are dear: what is good in a refused piece is sent again with every step. So pieces get
//! smaller where refusals are frequent: each halves the next ones, and each piece that is taken
//! doubles them again. Where one event in a hundred is bad that ends near seventy events. And a
//! device whose event was refused is *doubted*: its next event goes alone, and more of them the more
//! often that was right.
//!
//! Deliberately absent: sending, and what a status means (`answer`).

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use bytestring::ByteString;
use storage::StoredEvent;

use crate::sink::{Answer, Failed, Failure, Mark, Request, RequestId, Which};

/// Devices that are remembered for a refused event; further ones are not.
const DOUBTED_MAX: usize = 1_024;
/// Events of one device that go alone in a row at most.
const DOUBT_MAX: u8 = 63;

/// Bounds of a piece.
#[derive(Clone, Copy, Debug)]
pub(super) struct PieceLimits {
    pub(super) events_max: usize,
    /// A single larger event still goes, alone.
    pub(super) bytes_max: usize,
}

/// An event of a request.
#[derive(Clone, Debug)]
struct Place {
    request: RequestId,
    stream: Option<Mark>,
    events: Arc<Vec<StoredEvent>>,
    index: usize,
}

impl Place {
    fn stored(&self) -> &StoredEvent {
        &self.events[self.index]
    }
    fn partition(&self) -> u16 {
        self.stored().event.partition
    }
    fn size_bytes(&self) -> usize {
        self.stored().event.size_bytes()
    }
}

/// What one POST carries: events of one stream, at least one.
#[derive(Clone, Debug)]
pub(super) struct Piece {
    places: Vec<Place>,
}

impl Piece {
    /// Its events; those of a partition in offset order.
    pub(super) fn events(&self) -> impl Iterator<Item = &StoredEvent> + Clone {
        self.places.iter().map(Place::stored)
    }
    /// The first of them.
    pub(super) fn first(&self) -> &StoredEvent {
        self.places[0].stored()
    }
    /// How many.
    pub(super) fn len(&self) -> usize {
        self.places.len()
    }
    /// What they say of their stream.
    pub(super) fn stream(&self) -> Option<Mark> {
        self.places[0].stream
    }
}

/// Names a piece until it is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PieceId(u64);

#[derive(Debug)]
struct Flight {
    id: PieceId,
    piece: Arc<Piece>,
    /// It is on trial; if it is taken, one of these is bad.
    trial: Option<Vec<Place>>,
}

/// A request that is not answered yet.
#[derive(Debug)]
struct Open {
    id: RequestId,
    events: usize,
    /// Events whose fate is open.
    left: usize,
    failed: Vec<Failed>,
    /// Bad events that trials have found.
    found: usize,
}

impl Open {
    fn fail(&mut self, index: usize, failure: Failure, reason: &str) {
        match self.failed.last_mut() {
            Some(Failed { which: Which::These(indexes), failure: last, reason: said })
                if *last == failure && *said == reason =>
            {
                indexes.push(index);
            }
            _ => self.failed.push(Failed {
                which: Which::These(vec![index]),
                failure,
                reason: reason.to_owned(),
            }),
        }
    }

    fn answer(mut self) -> (RequestId, Answer) {
        if let [Failed { which, .. }] = &mut *self.failed
            && matches!(which, Which::These(indexes) if indexes.len() == self.events)
        {
            *which = Which::All;
        }
        (self.id, Answer { failed: self.failed })
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Tracks {
    posts_max: usize,
    limits: PieceLimits,
    /// Bad events that are found in one request before all that waits is given back.
    found_max: usize,
    /// Events that the next piece takes: fewer than the limit after refusals.
    piece_events: usize,
    open: VecDeque<Open>,
    answered: VecDeque<(RequestId, Answer)>,
    /// In the order of their requests, and within one in offset order.
    waiting: VecDeque<Place>,
    /// Suspects, one of which is bad. They come before all else of their partitions.
    trials: VecDeque<Vec<Place>>,
    flights: Vec<Flight>,
    next_id: u64,
    /// Why nothing is sent until every request is answered.
    broken: Option<(Failure, String)>,
    /// By device key, how many of its next events go alone.
    doubted: HashMap<ByteString, u8>,
}

impl Tracks {
    /// Spreads what is begun over up to `posts_max` POSTs at a time. After `found_max` bad events in
    /// one request, what waits is given back first.
    pub(super) fn new(posts_max: usize, limits: PieceLimits, found_max: usize) -> Self {
        Self {
            posts_max,
            limits,
            found_max,
            piece_events: limits.events_max,
            open: VecDeque::new(),
            answered: VecDeque::new(),
            waiting: VecDeque::new(),
            trials: VecDeque::new(),
            flights: Vec::new(),
            next_id: 0,
            broken: None,
            doubted: HashMap::new(),
        }
    }

    /// Takes a request.
    pub(super) fn begin(&mut self, request: Request) {
        let Request { id, stream, events } = request;
        let count = events.len();
        self.open.push_back(Open { id, events: count, left: count, failed: Vec::new(), found: 0 });
        let place = |index| Place { request: id, stream, events: Arc::clone(&events), index };
        self.waiting.extend((0..count).map(place));
        self.finish();
    }

    /// The answer to a request, once there is one.
    pub(super) fn take_answer(&mut self) -> Option<(RequestId, Answer)> {
        let answered = self.answered.pop_front()?;
        if self.answered.is_empty() && self.open.is_empty() {
            // Whoever begins another request knows of the failure now.
            self.broken = None;
        }
        Some(answered)
    }

    /// Nothing that waits is sent any more.
    pub(super) fn stop(&mut self) {
        self.broken.get_or_insert((Failure::Again, "the gateway is stopping".to_owned()));
        self.finish();
    }

    /// The next piece to send now, if there is one.
    pub(super) fn next_piece(&mut self) -> Option<(PieceId, Arc<Piece>)> {
        if self.flights.len() >= self.posts_max {
            return None;
        }
        let (places, trial) = match self.trials.pop_front() {
            Some(mut suspects) => {
                let rest = suspects.split_off(suspects.len().div_ceil(2));
                (suspects, Some(rest))
            }
            None => (self.cut()?, None),
        };
        let (id, piece) = (PieceId(self.next_id), Arc::new(Piece { places }));
        self.next_id += 1;
        self.flights.push(Flight { id, piece: Arc::clone(&piece), trial });
        Some((id, piece))
    }

    /// Takes a piece's events from those that wait.
    fn cut(&mut self) -> Option<Vec<Place>> {
        let mut taken = Partitions::default();
        for Flight { piece, trial, .. } in &self.flights {
            let places = piece.places.iter().chain(trial.iter().flatten());
            places.for_each(|place| taken.insert(place.partition()));
        }
        self.trials.iter().flatten().for_each(|place| taken.insert(place.partition()));
        // The doubted go first, each alone: then a piece has all that is between them.
        if let Some(at) = self.doubted_head(&taken) {
            return self.waiting.remove(at).map(|place| vec![place]);
        }
        let first = self.waiting.iter().find(|place| !taken.contains(place.partition()))?;
        let stream = first.stream;
        let partitions_max = self.fair_share(&taken);
        let (mut own, mut own_count, mut size_bytes) = (Partitions::default(), 0, 0);
        let (mut piece, mut kept) = (Vec::new(), VecDeque::new());
        while piece.len() < self.piece_events
            && let Some(place) = self.waiting.pop_front()
        {
            let partition = place.partition();
            let is_new = !own.contains(partition);
            let fits = piece.is_empty() || size_bytes + place.size_bytes() <= self.limits.bytes_max;
            let goes = !taken.contains(partition)
                && place.stream == stream
                && (!is_new || own_count < partitions_max)
                && fits
                && !self.is_doubted(&place);
            if goes {
                own_count += usize::from(is_new);
                own.insert(partition);
                size_bytes += place.size_bytes();
                piece.push(place);
            } else {
                // What is behind it in its partition stays behind it.
                taken.insert(partition);
                kept.push_back(place);
                if !fits {
                    break;
                }
            }
        }
        while let Some(place) = kept.pop_back() {
            self.waiting.push_front(place);
        }
        Some(piece)
    }

    /// Where an event of a doubted device waits behind nothing else of its partition.
    fn doubted_head(&self, taken: &Partitions) -> Option<usize> {
        if self.doubted.is_empty() {
            return None;
        }
        let mut seen = taken.clone();
        self.waiting.iter().position(|place| {
            let is_head = !seen.contains(place.partition());
            seen.insert(place.partition());
            is_head && self.is_doubted(place)
        })
    }

    /// Partitions of those that wait that the next piece may have, so that the other POSTs have
    /// something, too.
    fn fair_share(&self, taken: &Partitions) -> usize {
        let free = self.posts_max - self.flights.len();
        if free == 1 {
            return usize::MAX;
        }
        let (mut seen, mut count) = (taken.clone(), 0_usize);
        for partition in self.waiting.iter().map(Place::partition) {
            if !seen.contains(partition) {
                seen.insert(partition);
                count += 1;
            }
        }
        count.div_ceil(free)
    }

    fn is_doubted(&self, place: &Place) -> bool {
        !self.doubted.is_empty() && self.doubted.contains_key(&place.stored().event.device_key)
    }

    /// Takes the answer to a piece; its indexes are places in the piece.
    pub(super) fn posted(&mut self, id: PieceId, answer: &Answer) {
        let at = self.flights.iter().position(|flight| flight.id == id);
        let at = at.expect("an answer belongs to a piece that was sent");
        let Flight { piece, trial, .. } = self.flights.swap_remove(at);
        let first_refusal = trial.is_none();
        let behind = trial.unwrap_or_default();
        if answer.failed.is_empty() {
            piece.places.iter().for_each(|place| self.open(place.request).left -= 1);
            self.was_taken(&piece, first_refusal);
            self.put_on_trial(behind);
        } else {
            // Who was behind a suspect may be as good as anybody.
            behind.into_iter().rev().for_each(|place| self.waiting.push_front(place));
            self.take_apart(&piece, answer, first_refusal);
        }
        self.finish();
    }

    /// A piece was taken as a whole.
    fn was_taken(&mut self, piece: &Piece, outside_trials: bool) {
        if !outside_trials {
            return;
        }
        if let [place] = &*piece.places
            && let Some(doubt) = self.doubted.get_mut(&place.stored().event.device_key)
        {
            *doubt -= 1;
            if *doubt == 0 {
                self.doubted.remove(&place.stored().event.device_key);
            }
            return;
        }
        self.piece_events = self.piece_events.saturating_mul(2).min(self.limits.events_max);
    }

    /// A piece was not taken as a whole.
    fn take_apart(&mut self, piece: &Piece, answer: &Answer, first_refusal: bool) {
        let mut open = vec![true; piece.len()];
        for Failed { which, failure, reason } in &answer.failed {
            let indexes = match which {
                Which::All => (0..piece.len()).collect(),
                Which::These(indexes) => indexes.clone(),
            };
            for &index in &indexes {
                open[index] = false;
            }
            let places = indexes.iter().map(|&index| &piece.places[index]);
            match failure {
                // Refused alone it is guilty.
                Failure::Suspect if indexes.len() == 1 => self.is_found(places, reason),
                Failure::Suspect => {
                    if first_refusal {
                        self.piece_events = (self.piece_events.min(indexes.len()) / 2).max(1);
                    }
                    let suspects = places.cloned().collect();
                    self.put_on_trial(suspects);
                }
                Failure::Reject => {
                    places.for_each(|place| self.fail(place, *failure, reason));
                }
                Failure::Again | Failure::Retry { .. } | Failure::Hold => {
                    places.for_each(|place| self.fail(place, *failure, reason));
                    self.broken.get_or_insert((*failure, reason.clone()));
                }
            }
        }
        let taken = piece.places.iter().zip(open).filter(|&(_, open)| open);
        taken.for_each(|(place, _)| self.open(place.request).left -= 1);
    }

    /// The bad event of a trial, or of a device that was doubted.
    fn is_found<'a>(&mut self, places: impl Iterator<Item = &'a Place>, reason: &str) {
        for place in places {
            self.fail(place, Failure::Reject, reason);
            let found_max = self.found_max;
            let open = self.open(place.request);
            open.found += 1;
            if open.found >= found_max {
                let why = "dead letters are written first";
                self.broken.get_or_insert((Failure::Again, why.to_owned()));
            }
            let device = &place.stored().event.device_key;
            if let Some(doubt) = self.doubted.get_mut(device) {
                *doubt = (*doubt * 2 + 1).min(DOUBT_MAX);
            } else if self.doubted.len() < DOUBTED_MAX {
                self.doubted.insert(device.clone(), 1);
            }
        }
    }

    /// One of these, at least, is bad.
    fn put_on_trial(&mut self, mut suspects: Vec<Place>) {
        if !suspects.is_empty() {
            suspects.sort_by_key(Place::partition);
            self.trials.push_back(suspects);
        }
    }

    fn open(&mut self, request: RequestId) -> &mut Open {
        let open = self.open.iter_mut().find(|open| open.id == request);
        open.expect("a request is open until the last of its events is settled")
    }

    fn fail(&mut self, place: &Place, failure: Failure, reason: &str) {
        let open = self.open(place.request);
        open.left -= 1;
        open.fail(place.index, failure, reason);
    }

    /// Nothing that waits is sent behind what is to be sent again: it shares the fate of its request,
    /// or goes again with no failure of its own. Requests that have nothing left are answered.
    fn finish(&mut self) {
        if let Some((failure, reason)) = self.broken.clone() {
            let waiting = std::mem::take(&mut self.waiting);
            let trials = std::mem::take(&mut self.trials);
            for place in trials.into_iter().flatten().chain(waiting) {
                let shares = self.open(place.request).failed.iter().any(|f| f.failure == failure);
                self.fail(&place, if shares { failure } else { Failure::Again }, &reason);
            }
        }
        while let Some(at) = self.open.iter().position(|open| open.left == 0) {
            self.answered.extend(self.open.remove(at).map(Open::answer));
        }
    }
}

/// A set of partitions.
#[derive(Clone, Debug, Default)]
struct Partitions(Vec<u64>);

impl Partitions {
    fn insert(&mut self, partition: u16) {
        let word = usize::from(partition / 64);
        if word >= self.0.len() {
            self.0.resize(word + 1, 0);
        }
        self.0[word] |= 1 << (partition % 64);
    }

    fn contains(&self, partition: u16) -> bool {
        self.0
            .get(usize::from(partition / 64))
            .is_some_and(|word| word >> (partition % 64) & 1 == 1)
    }
}

#[cfg(test)]
mod tests;
