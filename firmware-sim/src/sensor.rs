//! Sensors with believable signals, in integers and `f32` without a math library.
//!
//! Invariant: what a sensor gives depends only on its seed, the times and the random words it was
//! given, so that a run can be repeated. Deliberately absent: clocks and random generators.

use crate::frame::{READINGS_MAX, Readings};

/// What a device measures. The number is the one in the frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// Air temperature and humidity over the day.
    Temperature = 1,
    /// Bearing of a machine that starts and stops.
    Vibration = 2,
    /// Power meter with an energy counter that only rises.
    Power = 3,
    /// Door contact: an alarm when it opens.
    Door = 4,
    /// Vehicle on its round.
    Gps = 5,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 5] =
        [Self::Temperature, Self::Vibration, Self::Power, Self::Door, Self::Gps];

    /// The kind with this number in the frame.
    pub fn from_u8(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u8 == number)
    }

    /// Its name, in lower case.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Temperature => "temperature",
            Self::Vibration => "vibration",
            Self::Power => "power",
            Self::Door => "door",
            Self::Gps => "gps",
        }
    }

    /// What each reading is, with its unit.
    pub const fn reading_names(self) -> &'static [&'static str] {
        match self {
            Self::Temperature => &["celsius", "humidity_percent"],
            Self::Vibration => &["rms_mm_s", "peak_mm_s", "hertz"],
            Self::Power => &["watts", "volts", "kwh"],
            Self::Door => &["open", "battery_volts"],
            Self::Gps => &["latitude", "longitude", "km_h", "satellites"],
        }
    }
}

/// One sensor and what it remembers between samples.
#[derive(Clone, Debug)]
pub struct Sensor {
    kind: Kind,
    /// What makes this sensor differ from the next of its kind.
    seed: u32,
    /// Slow random walk, in thousandths of the kind's own unit.
    drift: i32,
    /// Power: watt-microseconds. Door: openings. Others unused.
    counter: u64,
    last_us: Option<u64>,
}

const DAY_US: u64 = 86_400_000_000;
const WATT_US_PER_KWH: f32 = 3.6e12;

impl Sensor {
    /// A sensor; two with the same kind and seed give the same signal.
    pub const fn new(kind: Kind, seed: u32) -> Self {
        Self { kind, seed, drift: 0, counter: 0, last_us: None }
    }

    /// Which kind.
    pub const fn kind(&self) -> Kind {
        self.kind
    }

    /// Measures at `now_us` (rising microseconds on any clock) with 64 fresh random bits.
    pub fn read(&mut self, now_us: u64, random: u64) -> Readings {
        let noise = Noise::new(random);
        let elapsed_us = self.last_us.map_or(0, |last_us| now_us.saturating_sub(last_us));
        self.last_us = Some(now_us);
        // Pulled back to zero a little at each step, so that it wanders but does not run away.
        self.drift += (noise.0[3] * 40.0) as i32 - self.drift / 64;
        let drift = self.drift as f32 / 1000.0;
        let own = (self.seed % 1000) as f32 / 1000.0;
        match self.kind {
            Kind::Temperature => {
                let day = sine(turn(now_us, DAY_US, self.seed));
                let celsius = 18.0 + 6.0 * own + 5.0 * day + drift + 0.05 * noise.0[0];
                let humidity = 55.0 - 2.0 * (celsius - 20.0) + 0.5 * noise.0[1];
                readings(&[(celsius, 100), (humidity.clamp(0.0, 100.0), 10)])
            }
            Kind::Vibration => {
                // Runs for two thirds of each ten-minute cycle.
                let running = turn(now_us, 600_000_000, self.seed) < u32::MAX / 3 * 2;
                let level = if running { 2.0 + own + drift } else { 0.1 };
                let rms = (level * (1.0 + 0.1 * noise.0[0])).max(0.0);
                let peak = rms * (2.8 + 0.4 * noise.0[1].abs());
                let hertz = if running { 24.7 + 0.05 * noise.0[2] } else { 0.0 };
                readings(&[(rms, 1000), (peak, 1000), (hertz, 100)])
            }
            Kind::Power => {
                let day = 1.0 + sine(turn(now_us, DAY_US, self.seed));
                let watts = (150.0 + 900.0 * own * day) * (1.0 + 0.05 * noise.0[0]);
                let used = u64::from((watts as i32).unsigned_abs()).saturating_mul(elapsed_us);
                self.counter = self.counter.saturating_add(used);
                let volts = 230.0 + 1.5 * noise.0[1] + drift;
                let kwh = self.counter as f32 / WATT_US_PER_KWH;
                readings(&[(watts, 10), (volts, 10), (kwh, 100_000)])
            }
            Kind::Door => {
                self.counter += 1;
                let open = (self.counter + u64::from(self.seed)) % 2;
                readings(&[(open as f32, 1), (3.6 + 0.02 * noise.0[0], 100)])
            }
            Kind::Gps => {
                let round = turn(now_us, 1_800_000_000, self.seed);
                let latitude = 48.1 + own / 10.0 + 0.01 * sine(round);
                let longitude = 11.5 + own / 10.0 + 0.01 * sine(round.wrapping_add(QUARTER));
                let speed = (38.0 + 10.0 * noise.0[0] + drift).max(0.0);
                let satellites = 9.0 + 3.0 * noise.0[1];
                readings(&[(latitude, 100_000), (longitude, 100_000), (speed, 10), (satellites, 1)])
            }
        }
    }
}

/// Four values in -1..1 out of one random word, bell-shaped enough: each the mean of two.
struct Noise([f32; 4]);

impl Noise {
    fn new(random: u64) -> Self {
        let bytes = random.to_le_bytes();
        let unit = |byte: u8| f32::from(byte) / 127.5 - 1.0;
        Self(core::array::from_fn(|i| f32::midpoint(unit(bytes[2 * i]), unit(bytes[2 * i + 1]))))
    }
}

/// Rounds each value to a fraction of one over its scale: a sensor does not give nine digits.
fn readings(values: &[(f32, u32)]) -> Readings {
    debug_assert!(values.len() <= READINGS_MAX);
    values
        .iter()
        .map(|&(value, scale)| {
            let scaled = value * scale as f32;
            let rounded = if scaled < 0.0 { scaled - 0.5 } else { scaled + 0.5 } as i32;
            rounded as f32 / scale as f32
        })
        .collect()
}

/// A quarter turn, as [`turn`] counts.
const QUARTER: u32 = 1 << 30;

/// Where `now_us` stands in a period, as a fraction of 2^32; each seed starts elsewhere.
fn turn(now_us: u64, period_us: u64, seed: u32) -> u32 {
    let fraction = (u128::from(now_us % period_us) << 32) / u128::from(period_us);
    (fraction as u32).wrapping_add(seed.wrapping_mul(0x9E37_79B9))
}

/// Sine of a turn, within 0.002: a parabola and one correction.
fn sine(turn: u32) -> f32 {
    let x = turn.cast_signed() as f32 / 2_147_483_648.0;
    let y = 4.0 * x * (1.0 - x.abs());
    0.225 * (y * y.abs() - y) + y
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_sine_is_a_sine() {
        for step in 0..1000_u32 {
            let turn = step * (u32::MAX / 1000);
            let exact = (f64::from(turn) / 4_294_967_296.0 * std::f64::consts::TAU).sin();
            assert!((f64::from(sine(turn)) - exact).abs() < 0.002, "at {step}");
        }
    }

    proptest! {
        #[test]
        fn every_kind_names_its_readings_and_keeps_them_finite(
            kind in 0..Kind::ALL.len(),
            seed in any::<u32>(),
            steps in proptest::collection::vec((0..DAY_US, any::<u64>()), 1..50),
        ) {
            let kind = Kind::ALL[kind];
            let (mut one, mut two) = (Sensor::new(kind, seed), Sensor::new(kind, seed));
            let mut now_us = 0;
            for (elapsed_us, random) in steps {
                now_us += elapsed_us;
                let readings = one.read(now_us, random);
                prop_assert_eq!(readings.len(), kind.reading_names().len());
                prop_assert!(readings.iter().all(|reading| reading.is_finite()));
                prop_assert_eq!(readings, two.read(now_us, random));
            }
        }

        #[test]
        fn an_energy_counter_only_rises(
            seed in any::<u32>(),
            start_us in 0..u64::MAX / 2,
            steps in proptest::collection::vec((0..DAY_US, any::<u64>()), 1..50),
        ) {
            let mut meter = Sensor::new(Kind::Power, seed);
            let (mut now_us, mut last) = (start_us, 0.0);
            for (elapsed_us, random) in steps {
                now_us += elapsed_us;
                let kwh = meter.read(now_us, random)[2];
                prop_assert!((last..1e6).contains(&kwh), "{} after {}", kwh, last);
                last = kwh;
            }
        }
    }

    #[test]
    fn numbers_on_the_wire_do_not_change() {
        assert_eq!(Kind::ALL.map(|kind| kind as u8), [1, 2, 3, 4, 5]);
        assert!(Kind::ALL.iter().all(|kind| Kind::from_u8(*kind as u8) == Some(*kind)));
        assert_eq!(Kind::from_u8(0), None);
    }
}
