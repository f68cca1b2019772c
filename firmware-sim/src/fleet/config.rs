//! What a fleet is like: read from a file, overridden by flags, validated once.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{payload::Payload, sensor::Kind};

/// A fleet and how it behaves. The defaults are those of `configs/fleet.toml`, which explains
/// each key.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FleetConfig {
    /// Number of devices, 1 to 100,000.
    pub devices: u32,
    /// Number of the first device; two fleets on one broker need different ones.
    pub first_device: u32,
    /// Events per second of the whole fleet, above 0.
    pub rate: f64,
    /// Spread of the time between two events of a device, as a share of its mean, 0 to 1.
    pub jitter: f64,
    /// Seed of everything random, other than boot ids.
    pub seed: u64,
    /// How long `firmware-sim run` produces, in seconds.
    pub seconds: f64,
    /// How long `firmware-sim run` waits after that for the last acks, in seconds.
    pub drain_seconds_max: f64,
    /// Form of the payloads.
    pub payload: Payload,
    /// Topics are `<topic_prefix>/<device>/telemetry` and `<topic_prefix>/<device>/alarm`.
    pub topic_prefix: String,
    /// Share of the devices that speak MQTT 5, 0 to 1; the others speak 3.1.1.
    pub v5_share: f64,
    /// Share of the devices that know the time of day, 0 to 1; the others count from boot.
    pub wall_clock_share: f64,
    /// Publishes in flight per device, at most; 1 to 1,000. MQTT 5 brokers may ask for fewer.
    pub in_flight_max: u16,
    /// Events that a device keeps unacked, at most: 64, 256, 1024 or 4096. When full, the device
    /// drops what it measures, and counts it.
    pub outbox_events_max: usize,
    /// MQTT keep-alive in seconds, 5 to 65,535.
    pub keep_alive_s: u16,
    /// Shortest wait before a reconnect, in milliseconds, at least 1.
    pub backoff_ms_min: u64,
    /// Longest wait before a reconnect, in milliseconds.
    pub backoff_ms_max: u64,
    /// Bursts.
    pub burst: Burst,
    /// How many devices of each kind, as weights.
    pub mix: Mix,
}

/// Now and then a device sends several events at once. The rate of the fleet stays as configured:
/// the times between are longer.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Burst {
    /// Share of the moments at which a device sends a burst instead of one event, 0 to 1.
    pub share: f64,
    /// Events in a burst, at least 1.
    pub events: u32,
}

/// Weights of the kinds of sensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Mix {
    /// Temperature and humidity.
    pub temperature: u32,
    /// Machine vibration.
    pub vibration: u32,
    /// Power meters.
    pub power: u32,
    /// Door contacts; they publish on the alarm topic.
    pub door: u32,
    /// Vehicles.
    pub gps: u32,
}

impl Default for FleetConfig {
    fn default() -> Self {
        Self {
            devices: 100,
            first_device: 1,
            rate: 1000.0,
            jitter: 0.3,
            seed: 1,
            seconds: 10.0,
            drain_seconds_max: 30.0,
            payload: Payload::Json,
            topic_prefix: "devices".to_owned(),
            v5_share: 0.25,
            wall_clock_share: 0.75,
            in_flight_max: 20,
            outbox_events_max: 1024,
            keep_alive_s: 30,
            backoff_ms_min: 50,
            backoff_ms_max: 2000,
            burst: Burst::default(),
            mix: Mix::default(),
        }
    }
}

impl Default for Burst {
    fn default() -> Self {
        Self { share: 0.02, events: 10 }
    }
}

impl Default for Mix {
    fn default() -> Self {
        Self { temperature: 4, vibration: 2, power: 2, door: 1, gps: 1 }
    }
}

impl Mix {
    /// Each kind with its weight.
    pub fn weights(self) -> [(Kind, u32); Kind::ALL.len()] {
        let Self { temperature, vibration, power, door, gps } = self;
        [
            (Kind::Temperature, temperature),
            (Kind::Vibration, vibration),
            (Kind::Power, power),
            (Kind::Door, door),
            (Kind::Gps, gps),
        ]
    }
}

/// Everything that is wrong with a configuration, one line each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError(pub Vec<String>);

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("\n"))
    }
}

impl std::error::Error for ConfigError {}

impl FleetConfig {
    /// Sizes of outbox that a fleet can be built with.
    pub const OUTBOX_SIZES: [usize; 4] = [64, 256, 1024, 4096];

    /// Reads a TOML file's text and validates it.
    ///
    /// # Errors
    /// Unknown keys, wrong types, and values out of range.
    pub fn from_toml(text: &str) -> Result<Self, ConfigError> {
        let config: Self =
            toml::from_str(text).map_err(|error| ConfigError(vec![error.to_string()]))?;
        config.validate()?;
        Ok(config)
    }

    /// Checks every value.
    ///
    /// # Errors
    /// Names every key that is out of range, with its range.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let share = |value: f64| (0.0..=1.0).contains(&value);
        let seconds = |value: f64| (0.0..=1e9).contains(&value);
        let devices_end = self.first_device.checked_add(self.devices);
        let segment_ok = |text: &str| !text.is_empty() && !text.contains(['+', '#', '\0']);
        let rules = [
            ((1..=100_000).contains(&self.devices), "devices: from 1 to 100000"),
            (devices_end.is_some(), "first_device: first_device + devices must fit 32 bits"),
            (self.rate > 0.0 && self.rate <= 1e7, "rate: above 0, at most 10000000"),
            (share(self.jitter), "jitter: from 0 to 1"),
            (seconds(self.seconds), "seconds: from 0 to 1e9"),
            (seconds(self.drain_seconds_max), "drain_seconds_max: from 0 to 1e9"),
            (share(self.v5_share), "v5_share: from 0 to 1"),
            (share(self.wall_clock_share), "wall_clock_share: from 0 to 1"),
            ((1..=1000).contains(&self.in_flight_max), "in_flight_max: from 1 to 1000"),
            (
                Self::OUTBOX_SIZES.contains(&self.outbox_events_max),
                "outbox_events_max: 64, 256, 1024 or 4096",
            ),
            (self.keep_alive_s >= 5, "keep_alive_s: from 5 to 65535"),
            (self.backoff_ms_min >= 1, "backoff_ms_min: at least 1"),
            (
                (self.backoff_ms_min..=3_600_000).contains(&self.backoff_ms_max),
                "backoff_ms_max: from backoff_ms_min to 3600000",
            ),
            (segment_ok(&self.topic_prefix), "topic_prefix: not empty, without + and #"),
            (share(self.burst.share), "burst.share: from 0 to 1"),
            ((1..=10_000).contains(&self.burst.events), "burst.events: from 1 to 10000"),
            (
                (1..=1_000_000)
                    .contains(&self.mix.weights().iter().map(|(_, w)| u64::from(*w)).sum::<u64>()),
                "mix: weights must sum up to 1 to 1000000",
            ),
        ];
        let problems: Vec<_> =
            rules.iter().filter(|(ok, _)| !ok).map(|(_, rule)| (*rule).to_owned()).collect();
        if problems.is_empty() { Ok(()) } else { Err(ConfigError(problems)) }
    }

    /// Mean time in seconds between two moments at which one device sends.
    pub(super) fn interval_mean_s(&self) -> f64 {
        let events_per_moment = 1.0 + self.burst.share * f64::from(self.burst.events - 1);
        f64::from(self.devices) * events_per_moment / self.rate
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANNOTATED: &str = include_str!("../../../configs/fleet.toml");

    #[test]
    fn the_annotated_file_holds_every_key_with_its_default() {
        assert_eq!(FleetConfig::from_toml(ANNOTATED).unwrap(), FleetConfig::default());
        let written: toml::Table = toml::from_str(ANNOTATED).unwrap();
        let all = toml::Table::try_from(FleetConfig::default()).unwrap();
        let keys = |table: &toml::Table| -> Vec<String> {
            let mut keys: Vec<_> = table
                .iter()
                .flat_map(|(key, value)| match value.as_table() {
                    Some(inner) => inner.keys().map(|i| format!("{key}.{i}")).collect(),
                    None => vec![key.clone()],
                })
                .collect();
            keys.sort();
            keys
        };
        assert_eq!(keys(&written), keys(&all));
    }

    #[test]
    fn unknown_keys_are_errors() {
        let error = FleetConfig::from_toml("devicess = 3").unwrap_err();
        assert!(error.to_string().contains("devicess"), "{error}");
        assert!(FleetConfig::from_toml("[burst]\nevent = 3").is_err());
    }

    #[test]
    fn every_problem_is_named_at_once() {
        let text = "devices = 0\nrate = 0.0\njitter = 2.0\noutbox_events_max = 100\n[mix]\ndoor = 0\n\
                    gps = 0\npower = 0\nvibration = 0\ntemperature = 0";
        let ConfigError(problems) = FleetConfig::from_toml(text).unwrap_err();
        assert_eq!(problems.len(), 5, "{problems:?}");
        assert!(FleetConfig::from_toml("rate = nan").is_err());
    }
}
