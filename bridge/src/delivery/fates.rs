//! What an answer means for each event of its request.
//!
//! Owns: the sorting of an [`Answer`] into one [`Fate`] for each event, and where to cut what is
//! suspected: half of the suspects are on each side.
//! Deliberately absent: what is done about it (`delivery`).

use crate::sink::{Answer, Failure, Which};

/// What an answer means for one event.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    /// Taken.
    Delivered,
    /// To be sent again.
    Open,
    /// To be sent again in a smaller request.
    Suspect,
    /// Never to be sent again, because of this group of the answer.
    Bad(usize),
}

/// What an answer means for every event of a request.
pub(super) struct Fates {
    /// By the event's index.
    pub(super) of: Vec<Fate>,
    /// Where to cut, if there is something to bisect: half of the suspects are before it.
    pub(super) halfway: Option<usize>,
}

impl Fates {
    /// Sorts the events of a request of `len` by its answer.
    pub(super) fn sort(len: usize, answer: &Answer) -> Self {
        let mut of = vec![Fate::Delivered; len];
        for (group, failed) in answer.failed.iter().enumerate() {
            let count = match &failed.which {
                Which::All => len,
                Which::These(indexes) => indexes.len(),
            };
            let fate = match failed.failure {
                Failure::Again | Failure::Retry { .. } | Failure::Hold => Fate::Open,
                Failure::Suspect if count > 1 => Fate::Suspect,
                // Suspected alone is guilty.
                Failure::Suspect | Failure::Reject => Fate::Bad(group),
            };
            match &failed.which {
                Which::All => of.fill(fate),
                Which::These(indexes) => indexes.iter().for_each(|&index| of[index] = fate),
            }
        }
        let suspects = of.iter().filter(|&&fate| fate == Fate::Suspect).count();
        let halfway = of
            .iter()
            .enumerate()
            .filter(|&(_, &fate)| fate == Fate::Suspect)
            .nth(suspects / 2)
            .map(|(index, _)| index);
        Self { of, halfway }
    }

    /// Whether an event is to be sent again.
    pub(super) fn is_open(&self, index: usize) -> bool {
        matches!(self.of[index], Fate::Open | Fate::Suspect)
    }
}
