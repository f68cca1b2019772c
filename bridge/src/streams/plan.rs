//! What a sink is to have, and the priority of what it has.
//!
//! Owns: the [`Plan`] of a sink, as configured, and the [`Class`] of a stream, from which follows
//! whose turn it is.
//! Deliberately absent: how far anything is.

use std::time::Duration;

use storage::{Lane, Lanes};

use super::turns::Party;
use crate::filter::Filter;
use crate::shaper::Shaping;

/// What a sink is to have, and in which order.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// What it is to have.
    pub(crate) filter: Filter,
    /// CloudEvents type of events whose route names none.
    pub(crate) event_type: String,
    /// Lanes besides `live` that get a stream of their own.
    pub(crate) lanes: Lanes,
    /// Later events go ahead of one that has waited for so long.
    pub(crate) live_first: Option<Duration>,
    /// Share of the requests, by bytes, that what can wait gets beside live events: 0.0 to 1.0,
    /// both excluded.
    pub(crate) backlog_share: f64,
    /// When it may send, and how much.
    pub(crate) shaping: Shaping,
    /// An event that is refused for good parks its device.
    pub(crate) parks: bool,
}

impl Plan {
    /// Lanes that share a stream, in order of priority.
    pub(super) fn groups(&self) -> Vec<(Class, Lanes)> {
        let alone = |lane| Lanes::NONE.with(lane);
        let mut groups = Vec::new();
        if self.lanes.contains(Lane::Alarm) {
            groups.push((Class::Alarm, alone(Lane::Alarm)));
        }
        let own = groups.iter().fold(Lanes::ALL, |rest, (_, lanes)| rest.without(*lanes));
        if self.lanes.contains(Lane::Backfill) {
            groups.push((Class::Live, own.without(alone(Lane::Backfill))));
            groups.push((Class::Backfill, alone(Lane::Backfill)));
        } else {
            groups.push((Class::Live, own));
        }
        groups
    }
}

/// Why a stream has its priority.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// The lane `alarm`.
    Alarm,
    /// From some offset on.
    Live,
    /// Up to where another stream begins.
    Backlog,
    /// The lane `backfill`.
    Backfill,
    /// Again.
    Replay,
}

impl Class {
    /// It has a share beside live events, and no more.
    pub(super) fn can_wait(self) -> bool {
        matches!(self, Self::Backlog | Self::Backfill | Self::Replay)
    }

    /// Alarms are nobody's party: they go first.
    pub(super) fn party(self) -> Option<Party> {
        match self {
            Self::Alarm => None,
            Self::Live => Some(Party::Live),
            Self::Backlog | Self::Backfill => Some(Party::CanWait),
            Self::Replay => Some(Party::Replay),
        }
    }
}
