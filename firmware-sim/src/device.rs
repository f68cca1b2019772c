//! One device: a sensor, a sequence number and an outbox, as a pure state machine.
//!
//! Invariant: sequence numbers are dense over what the device keeps, so a gap upstream is a loss
//! on the way; and they leave in rising order, again from the oldest unacked after every lost
//! connection. Time and randomness are arguments. Deliberately absent: the network.

use crate::{
    frame::{Clock, DeviceId, Frame, Sample},
    outbox::{Outbox, Outgoing},
    sensor::{Kind, Sensor},
};

/// A device whose outbox holds at most `N` unacked samples.
#[derive(Debug)]
pub struct Device<const N: usize> {
    id: DeviceId,
    boot: u32,
    seq: u64,
    sensor: Sensor,
    outbox: Outbox<Sample, N>,
}

/// The outbox was full: the device did not keep the sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

impl<const N: usize> Device<N> {
    /// A device that has just booted.
    pub const fn new(id: DeviceId, boot: u32, sensor: Sensor) -> Self {
        Self { id, boot, seq: 0, sensor, outbox: Outbox::new() }
    }

    /// Takes a sample at `now_us` by `clock`, with 64 fresh random bits for its noise. Gives its
    /// sequence number.
    ///
    /// # Errors
    /// [`Full`]: the sample is dropped and counted, and uses no sequence number.
    pub fn sample(&mut self, now_us: u64, clock: Clock, random: u64) -> Result<u64, Full> {
        let sample = Sample {
            seq: self.seq + 1,
            time_us: now_us,
            clock,
            kind: self.sensor.kind(),
            readings: self.sensor.read(now_us, random),
        };
        self.outbox.enqueue(sample).map_err(|_| Full)?;
        self.seq += 1;
        Ok(self.seq)
    }

    /// A connection is up; the broker takes at most `window` unacked publishes.
    pub fn on_connect(&mut self, window: u16) {
        self.outbox.on_connect(window);
    }

    /// The connection is gone.
    pub fn on_disconnect(&mut self) {
        self.outbox.on_disconnect();
    }

    /// The next sample to publish, unless the window is full or nothing waits.
    pub fn next_to_send(&mut self) -> Option<Outgoing<'_, Sample>> {
        self.outbox.next_to_send()
    }

    /// The broker acked a packet id: gives the sample that is now safe, if the id was in flight.
    pub fn acked(&mut self, packet_id: u16) -> Option<Sample> {
        self.outbox.acked(packet_id)
    }

    /// Its number in the fleet.
    pub const fn id(&self) -> DeviceId {
        self.id
    }

    /// Which life of the device this is.
    pub const fn boot(&self) -> u32 {
        self.boot
    }

    /// What it measures.
    pub const fn kind(&self) -> Kind {
        self.sensor.kind()
    }

    /// A sample with its origin, ready to encode.
    pub const fn frame(&self, sample: Sample) -> Frame {
        Frame { device: self.id, boot: self.boot, sample }
    }

    /// What is not acked yet.
    pub const fn outbox(&self) -> &Outbox<Sample, N> {
        &self.outbox
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device<const N: usize>() -> Device<N> {
        Device::new(DeviceId(7), 1, Sensor::new(Kind::Temperature, 3))
    }

    #[test]
    fn a_refused_sample_uses_no_sequence_number() {
        let mut device = device::<2>();
        assert_eq!(device.sample(1, Clock::Boot, 0), Ok(1));
        assert_eq!(device.sample(2, Clock::Boot, 0), Ok(2));
        assert_eq!(device.sample(3, Clock::Boot, 0), Err(Full));
        device.on_connect(10);
        let id = device.next_to_send().map(|out| out.packet_id).unwrap();
        assert_eq!(device.acked(id).map(|sample| sample.seq), Some(1));
        assert_eq!(device.sample(4, Clock::Boot, 0), Ok(3));
        assert_eq!(device.outbox().refused(), 1);
    }

    #[test]
    fn what_was_in_flight_goes_first_after_a_reconnect() {
        let mut device = device::<8>();
        device.on_connect(2);
        for now_us in 0..4 {
            device.sample(now_us, Clock::Wall, 0).unwrap();
        }
        assert_eq!(device.next_to_send().map(|out| (out.item.seq, out.dup)), Some((1, false)));
        assert_eq!(device.next_to_send().map(|out| (out.item.seq, out.dup)), Some((2, false)));
        assert!(device.next_to_send().is_none());
        device.on_disconnect();
        device.on_connect(8);
        let again: Vec<_> =
            core::iter::from_fn(|| device.next_to_send().map(|out| (out.item.seq, out.dup)))
                .collect();
        assert_eq!(again, [(1, true), (2, true), (3, false), (4, false)]);
    }
}
