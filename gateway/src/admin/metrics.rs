//! `/metrics`: the status in the OpenMetrics text format.
//!
//! Invariant: names are `edge_gateway_<component>_<thing>` with the unit or `_total` at the end;
//! sink and partition are labels, a device never is. Everything shown comes from one [`Status`], so
//! that metrics and status cannot disagree.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeGaugeValue, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

use super::status::{Quantiles, SinkStatus, Status};

/// Every state a sink can be in, in the words of [`SinkStatus::state`].
pub(super) const SINK_STATES: [&str; 7] =
    ["starting", "idle", "sending", "retrying", "held", "waiting", "stopped"];

/// Every state of a sink's circuit, in the words of [`SinkStatus::circuit`].
pub(super) const CIRCUIT_STATES: [&str; 3] = ["closed", "open", "half_open"];

/// Every state of commits, in the words of [`IngestStatus::health`](super::status::IngestStatus).
pub(super) const HEALTH_STATES: [&str; 4] = ["storing", "at_quota", "disk_full", "failing"];

/// Media type of [`render`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Renders one look at the gateway.
pub fn render(status: Status) -> String {
    let mut registry = Registry::with_prefix("edge_gateway");
    registry.register_collector(Box::new(Snapshot(status)));
    let mut out = String::new();
    // Writing to a String cannot fail.
    prometheus_client::encoding::text::encode(&mut out, &registry).ok();
    out
}

#[derive(Debug)]
struct Snapshot(Status);

impl Collector for Snapshot {
    fn encode(&self, mut out: DescriptorEncoder<'_>) -> fmt::Result {
        let status = &self.0;
        let gateway = &status.gateway;
        let build = [("version", gateway.version.as_str()), ("gateway", gateway.id.as_str())];
        family(
            &mut out,
            "build",
            "Version of the program and id of the gateway",
            MetricType::Info,
        )?
        .encode_info(&build)?;
        gauge(&mut out, "uptime_seconds", "Since the start", gateway.uptime_seconds)?;
        if let Some(rss) = gateway.rss_bytes {
            gauge(&mut out, "resident_memory_bytes", "Resident memory", rss)?;
        }
        gauge(&mut out, "ready", "1 if events can be made durable", u64::from(status.ready))?;
        front(&mut out, status)?;
        ingest(&mut out, status)?;
        store(&mut out, status)?;
        sinks(&mut out, &status.sinks)
    }
}

fn front(out: &mut DescriptorEncoder<'_>, status: &Status) -> fmt::Result {
    let mqtt = &status.mqtt;
    gauge(out, "mqtt_connections", "Open connections", mqtt.connections)?;
    counter(out, "mqtt_accepted", "Connections taken", mqtt.connections_total)?;
    counter(out, "mqtt_refused", "Connections turned away", mqtt.refused_total)?;
    counter(out, "mqtt_publishes", "Publishes read", mqtt.publishes_total)?;
    let help = "Publishes refused: no route, reserved topic, full store";
    counter(out, "mqtt_publishes_refused", help, mqtt.publishes_refused_total)?;
    let help = "QoS 0 publishes and wills without room at the end of their connection";
    counter(out, "mqtt_publishes_dropped", help, mqtt.publishes_dropped_total)?;
    let help = "Log-ins that failed";
    counter(out, "mqtt_logins_failed", help, mqtt.logins_failed_total)?;
    let help = "Publishes, wills, subscriptions and waiting messages that the rules did not allow";
    counter(out, "mqtt_denied", help, mqtt.denied_total)?;
    let help = "Publishes without the id that their route looks for";
    counter(out, "mqtt_publishes_without_id", help, mqtt.publishes_without_id_total)?;
    let help = "Times that a client was not read for a while: it was over its rate";
    counter(out, "mqtt_paced", help, mqtt.paced_total)?;
    let help = "Connections closed for a breach of the protocol";
    counter(out, "mqtt_protocol_errors", help, mqtt.protocol_errors_total)?;
    counter(out, "mqtt_panics", "Connections that ended in a panic", mqtt.panics_total)?;
    counter(out, "mqtt_deliveries", "Messages to subscribers", mqtt.deliveries_total)?;
    let help = "Messages that a subscriber did not get: too slow, expired, or too large for it";
    counter(out, "mqtt_deliveries_missed", help, mqtt.deliveries_missed_total)?;
    gauge(out, "mqtt_sessions", "Sessions that are kept", mqtt.sessions)?;
    let help = "Bytes of messages that wait for their clients";
    gauge(out, "mqtt_queued_bytes", help, mqtt.queued_bytes)?;
    let help = "Messages not kept for a client at a bound of its queue";
    counter(out, "mqtt_queued_dropped", help, mqtt.queued_dropped_total)?;
    gauge(out, "mqtt_retained", "Topics with a retained message", mqtt.retained)?;
    let help = "Messages not retained at a bound";
    counter(out, "mqtt_retained_refused", help, mqtt.retained_refused_total)
}

fn ingest(out: &mut DescriptorEncoder<'_>, status: &Status) -> fmt::Result {
    let ingest = &status.ingest;
    counter(out, "ingest_events", "Events made durable", ingest.committed_events_total)?;
    counter(out, "ingest_bytes", "Event bytes made durable", ingest.committed_bytes_total)?;
    counter(out, "ingest_commits", "Commits", ingest.commits_total)?;
    let help = "Commits that failed: nothing of them was acked";
    counter(out, "ingest_commit_failures", help, ingest.commit_failures_total)?;
    let help = "Resends recognised by their ids: acked and not stored again";
    counter(out, "ingest_duplicates", help, ingest.duplicates_total)?;
    let mut health = family(out, "ingest_health", "1 for the state of commits", MetricType::Gauge)?;
    for state in HEALTH_STATES {
        let value = u64::from(ingest.health == state);
        health.encode_family(&[("state", state)])?.encode_gauge(&value)?;
    }
    gauge(out, "ingest_ring_bytes", "Event bytes in the rings", ingest.ring_bytes)?;
    let help = "Events made durable per second, of late";
    gauge(out, "ingest_events_per_second", help, ingest.events_per_second)?;
    let help = "Event bytes made durable per second, over a day";
    gauge(out, "ingest_today_bytes_per_second", help, ingest.bytes_per_second_today)?;
    quantiles(out, "ingest_ack_latency_seconds", "From publish to ack", &ingest.ack_latency_ms)?;
    let help = "From the start of a commit to its durable end";
    quantiles(out, "ingest_commit_latency_seconds", help, &ingest.commit_latency_ms)?;
    let mut rings =
        family(out, "ingest_ring_events", "Events in the partition's ring", MetricType::Gauge)?;
    for p in &status.partitions {
        rings.encode_family(&[("partition", p.partition)])?.encode_gauge(&p.ring_events)?;
    }
    Ok(())
}

fn store(out: &mut DescriptorEncoder<'_>, status: &Status) -> fmt::Result {
    let store = &status.store;
    gauge(out, "store_first_offset", "First stored offset", store.first_offset)?;
    gauge(out, "store_watermark", "End-exclusive durable offset", store.watermark)?;
    gauge(out, "store_files", "Log files", store.files)?;
    gauge(out, "store_log_bytes", "Bytes of the log on disk", store.log_bytes)?;
    gauge(out, "store_state_bytes", "Bytes of the state database", store.state_bytes)?;
    gauge(out, "store_quota_bytes", "Bytes that the log may take", store.quota_bytes)?;
    gauge(out, "store_losses", "Rows in the loss ledger", store.losses)?;
    let help = "Events found unreadable since the start; the loss ledger has their ranges";
    counter(out, "store_quarantined_events", help, store.quarantined_events_total)?;
    gauge(out, "store_room_bytes", "Bytes that the log may still grow by", store.room_bytes)?;
    if let Some(left) = store.left_seconds {
        let help = "Estimate: how long the room lasts at today's rate if nothing is trimmed";
        gauge(out, "store_left_seconds", help, left)?;
    }
    Ok(())
}

type OfSink = fn(&SinkStatus) -> u64;
type Estimate = fn(&SinkStatus) -> Option<f64>;

fn sinks(out: &mut DescriptorEncoder<'_>, sinks: &[SinkStatus]) -> fmt::Result {
    let gauges: [(&str, &str, OfSink); 7] = [
        ("sink_cursor", "Next offset that the sink needs", |s| s.cursor),
        ("sink_lag_events", "Durable events that it needs", |s| s.lag_events),
        ("sink_lag_bytes", "Their event bytes", |s| s.lag_bytes),
        ("sink_dead_letters", "Dead letters stored", |s| s.dead_letters),
        ("sink_dead_letter_bytes", "Bytes that they take", |s| s.dead_letter_bytes),
        ("sink_requeued", "Dead letters that are to be delivered again", |s| s.requeued),
        ("sink_parked_devices", "Devices behind a refused event", |s| s.parked_devices),
    ];
    for (name, help, value) in gauges {
        let mut metric = family(out, name, help, MetricType::Gauge)?;
        for sink in sinks {
            metric.encode_family(&of(sink))?.encode_gauge(&value(sink))?;
        }
    }
    let totals: [(&str, &str, OfSink); 7] = [
        ("sink_delivered_events", "Events acknowledged", |s| s.delivered_events_total),
        ("sink_delivered_bytes", "Event bytes acknowledged", |s| s.delivered_bytes_total),
        ("sink_filtered_events", "Events kept from it by its filters", |s| s.filtered_events_total),
        ("sink_dead_lettered_events", "Events refused for good", |s| s.dead_lettered_events_total),
        ("sink_requeued_events", "Dead letters delivered", |s| s.requeued_events_total),
        ("sink_retries", "Requests tried again", |s| s.retries_total),
        ("sink_circuit_opened", "Times that its circuit opened", |s| s.circuit_opened_total),
    ];
    for (name, help, value) in totals {
        let mut metric = family(out, name, help, MetricType::Counter)?;
        for sink in sinks {
            let value = value(sink);
            metric.encode_family(&of(sink))?.encode_counter::<NoLabelSet, _, u64>(&value, None)?;
        }
    }
    let mut lag = family(out, "sink_lag_seconds", "Age of the oldest", MetricType::Gauge)?;
    for sink in sinks {
        lag.encode_family(&of(sink))?.encode_gauge(&sink.lag_seconds)?;
    }
    let estimates: [(&str, &str, Estimate); 4] = [
        ("sink_drain_events_per_second", "Events that leave per second, of late", |s| {
            Some(s.drain_events_per_second)
        }),
        ("sink_drain_bytes_per_second", "Event bytes that leave per second, of late", |s| {
            Some(s.drain_bytes_per_second)
        }),
        ("sink_eta_seconds", "Estimate: until its lag is gone", |s| s.eta_seconds),
        ("sink_left_seconds", "Estimate: until there is no room for its lag", |s| s.left_seconds),
    ];
    for (name, help, value) in estimates {
        // One that cannot be told is not there, and not 0.
        let mut metric = family(out, name, help, MetricType::Gauge)?;
        for sink in sinks {
            if let Some(value) = value(sink) {
                metric.encode_family(&of(sink))?.encode_gauge(&value)?;
            }
        }
    }
    let mut circuit = family(out, "sink_circuit", "1 for the state it is in", MetricType::Gauge)?;
    for sink in sinks {
        for name in CIRCUIT_STATES {
            let labels = [("sink", sink.name.as_str()), ("state", name)];
            circuit.encode_family(&labels)?.encode_gauge(&u64::from(sink.circuit == name))?;
        }
    }
    let mut state = family(out, "sink_state", "1 for the state it is in", MetricType::Gauge)?;
    for sink in sinks {
        for name in SINK_STATES {
            let labels = [("sink", sink.name.as_str()), ("state", name)];
            state.encode_family(&labels)?.encode_gauge(&u64::from(sink.state == name))?;
        }
    }
    Ok(())
}

fn of(sink: &SinkStatus) -> [(&'static str, &str); 1] {
    [("sink", sink.name.as_str())]
}

fn family<'o>(
    out: &'o mut DescriptorEncoder<'_>,
    name: &'o str,
    help: &'o str,
    kind: MetricType,
) -> Result<MetricEncoder<'o>, fmt::Error> {
    out.encode_descriptor(name, help, None, kind)
}

fn gauge(
    out: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    value: impl EncodeGaugeValue + Copy,
) -> fmt::Result {
    family(out, name, help, MetricType::Gauge)?.encode_gauge(&value)
}

/// The format adds `_total` to the name.
fn counter(out: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: u64) -> fmt::Result {
    family(out, name, help, MetricType::Counter)?.encode_counter::<NoLabelSet, _, u64>(&value, None)
}

fn quantiles(
    out: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    ms: &Quantiles,
) -> fmt::Result {
    let mut metric = family(out, name, help, MetricType::Gauge)?;
    for (quantile, ms) in [("0.5", ms.p50), ("0.99", ms.p99), ("0.999", ms.p999), ("1", ms.max)] {
        metric.encode_family(&[("quantile", quantile)])?.encode_gauge(&(ms / 1_000.0))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_carry_the_product_and_the_unit() {
        let status: Status = serde_json::from_value(serde_json::json!({
            "gateway": {"id": "g", "version": "1", "epoch": "0", "uptime_seconds": 1.5,
                        "rss_bytes": 7},
            "ready": true, "not_ready": null,
            "mqtt": {"connections": 3, "connections_total": 4, "refused_total": 0,
                     "publishes_total": 9, "publishes_refused_total": 1,
                     "publishes_dropped_total": 2, "sessions": 4, "queued_bytes": 5,
                     "queued_dropped_total": 6, "retained": 7, "retained_refused_total": 8, "protocol_errors_total": 0, "panics_total": 0,
                     "deliveries_total": 6, "deliveries_missed_total": 5},
            "ingest": {"committed_events_total": 9, "committed_bytes_total": 90,
                       "commits_total": 2, "commit_failures_total": 0, "health": "at_quota",
                       "ring_bytes": 0,
                       "ack_latency_ms": {"p50": 1.0, "p99": 2.0, "p999": 3.0, "max": 4.0},
                       "commit_latency_ms": {"p50": 1.0, "p99": 2.0, "p999": 3.0, "max": 4.0}},
            "store": {"first_offset": 0, "watermark": 9, "files": 1, "log_bytes": 4096,
                      "state_bytes": 1, "quota_bytes": 8, "losses": 0, "quarantined_events_total": 6,
                      "absent_sinks": []},
            "partitions": [{"partition": 0, "next_seq": 9, "ring_events": 0}],
            "sinks": [{"name": "up", "type": "http", "state": "held", "error": "401", "cursor": 4,
                       "lag_events": 5, "lag_bytes": 50, "lag_seconds": 0.5,
                       "delivered_events_total": 4, "delivered_bytes_total": 40,
                       "dead_lettered_events_total": 1, "dead_letters": 1, "retries_total": 2,
                       "circuit": "half_open", "circuit_opened_total": 3, "requeued": 1,
                       "drain_events_per_second": 2.5, "drain_bytes_per_second": 25.0,
                       "eta_seconds": null, "left_seconds": 3600.0}]
        }))
        .unwrap();
        let text = render(status);
        for line in [
            "edge_gateway_mqtt_publishes_total 9",
            "edge_gateway_ingest_ack_latency_seconds{quantile=\"0.99\"} 0.002",
            "edge_gateway_mqtt_publishes_dropped_total 2",
            "edge_gateway_mqtt_queued_dropped_total 6",
            "edge_gateway_mqtt_deliveries_missed_total 5",
            "edge_gateway_ingest_health{state=\"at_quota\"} 1",
            "edge_gateway_ingest_health{state=\"storing\"} 0",
            "edge_gateway_sink_lag_events{sink=\"up\"} 5",
            "edge_gateway_sink_state{sink=\"up\",state=\"held\"} 1",
            "edge_gateway_sink_state{sink=\"up\",state=\"idle\"} 0",
            "edge_gateway_sink_retries_total{sink=\"up\"} 2",
            "edge_gateway_sink_circuit{sink=\"up\",state=\"half_open\"} 1",
            "edge_gateway_sink_circuit_opened_total{sink=\"up\"} 3",
            "edge_gateway_sink_requeued{sink=\"up\"} 1",
            "edge_gateway_sink_drain_events_per_second{sink=\"up\"} 2.5",
            "edge_gateway_sink_left_seconds{sink=\"up\"} 3600.0",
            "edge_gateway_resident_memory_bytes 7",
            "edge_gateway_store_quarantined_events_total 6",
        ] {
            assert!(text.lines().any(|l| l == line), "no {line:?} in\n{text}");
        }
        let eta = text.lines().find(|line| line.starts_with("edge_gateway_sink_eta_seconds"));
        assert_eq!(eta, None, "what cannot be told is not told");
        assert!(text.ends_with("# EOF\n"));
    }
}
