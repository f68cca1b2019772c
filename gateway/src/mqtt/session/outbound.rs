//! Messages on their way to one client: packet ids, and where each exchange stands.
//!
//! Owns: the window, which is the client's Receive Maximum or less [MQTT-3.3.4-9].
//! Invariant: a packet id is in use for one message at a time [MQTT-2.2.1-3].
//! Deliberately absent: the messages. A session that outlives its connection keeps them (see
//! `sessions`), with the packet ids; for one that does not, they end with it.

/// What the client has to say next about a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// PUBACK: QoS 1.
    Ack,
    /// PUBREC: QoS 2.
    Rec,
    /// PUBCOMP: QoS 2, released.
    Comp,
}

/// What a PUBACK or PUBCOMP means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// The message has reached the client for good.
    Now,
    /// There is no such message, or not any more.
    Unknown,
    /// The message waits for another answer: the client breaks the protocol.
    Wrong,
}

/// What a PUBREC means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Received {
    /// The message has arrived: release it.
    Now,
    /// It was released before: say so again.
    Again,
    /// The client has refused it: that was all.
    Refused,
    /// There is no such message.
    Unknown,
    /// The message is of QoS 1, which has no PUBREC: the client breaks the protocol.
    Wrong,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Window {
    max: usize,
    last_id: u16,
    in_flight: Vec<(u16, Stage)>,
}

impl Window {
    pub(crate) fn new(max: u16) -> Self {
        Self { max: usize::from(max), last_id: 0, in_flight: Vec::new() }
    }

    /// Whether another message may leave.
    pub(crate) fn has_room(&self) -> bool {
        self.in_flight.len() < self.max
    }

    /// Messages that may leave.
    pub(crate) fn room(&self) -> usize {
        self.max.saturating_sub(self.in_flight.len())
    }

    /// The next id that is not in use: the window is far smaller than the range of ids.
    pub(crate) fn next_id(&self) -> u16 {
        let mut id = self.last_id;
        loop {
            id = id.checked_add(1).unwrap_or(1);
            if !self.in_flight.iter().any(|&(used, _)| used == id) {
                return id;
            }
        }
    }

    /// A message has left, or its PUBREL.
    pub(crate) fn sent(&mut self, id: u16, stage: Stage) {
        self.last_id = id;
        self.in_flight.push((id, stage));
    }

    /// A PUBACK or PUBCOMP.
    pub(crate) fn ended(&mut self, id: u16, stage: Stage) -> Ended {
        match self.in_flight.iter().position(|&(used, _)| used == id) {
            None => Ended::Unknown,
            Some(at) if self.in_flight[at].1 == stage => {
                self.in_flight.swap_remove(at);
                Ended::Now
            }
            Some(_) => Ended::Wrong,
        }
    }

    /// A PUBREC; a code from 0x80 on refuses the message.
    pub(crate) fn received(&mut self, id: u16, code: u8) -> Received {
        let Some(at) = self.in_flight.iter().position(|&(used, _)| used == id) else {
            return Received::Unknown;
        };
        match self.in_flight[at].1 {
            Stage::Ack => Received::Wrong,
            Stage::Comp => Received::Again,
            Stage::Rec if code >= 0x80 => {
                self.in_flight.swap_remove(at);
                Received::Refused
            }
            Stage::Rec => {
                self.in_flight[at].1 = Stage::Comp;
                Received::Now
            }
        }
    }
}
