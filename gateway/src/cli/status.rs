//! `status`: what a running gateway is doing, from its admin endpoint.

use std::fmt::{Display, Write as _};
use std::io::Write as _;
use std::time::Duration;

use clap::Args;

use super::{DONE, FAILED, small_runtime};
use crate::admin::status::{SinkStatus, Status};
use crate::text::{bytes, count, duration, table};

#[derive(Args)]
pub(super) struct StatusArgs {
    /// Admin address of the gateway
    #[arg(long, value_name = "ADDR", env = "EDGE_GATEWAY_ADMIN", default_value = "127.0.0.1:9641")]
    admin: String,
    /// Print the JSON of /api/v1/status
    #[arg(long)]
    json: bool,
}

pub(super) fn status(args: &StatusArgs) -> u8 {
    match small_runtime().map_err(Into::into).and_then(|rt| rt.block_on(fetch(&args.admin))) {
        Ok(status) => {
            let text = if args.json {
                serde_json::to_string_pretty(&status).unwrap_or_default() + "\n"
            } else {
                render(&status)
            };
            // A reader that has seen enough and closed the pipe is no failure.
            std::io::stdout().write_all(text.as_bytes()).ok();
            DONE
        }
        Err(wrong) => {
            eprintln!(
                "edge-gateway: no answer from {}: {}; is the gateway running, and is this its \
                 [admin] bind?",
                args.admin,
                wrong.root_cause()
            );
            FAILED
        }
    }
}

/// Asks a gateway for its status, within a few seconds.
pub(super) async fn fetch(admin: impl Display) -> anyhow::Result<Status> {
    ask(&client()?, admin).await
}

/// What asks gateways, with a few seconds' patience.
pub(super) fn client() -> reqwest::Result<reqwest::Client> {
    reqwest::Client::builder().timeout(Duration::from_secs(5)).no_proxy().build()
}

/// Asks a gateway for its status.
pub(super) async fn ask(client: &reqwest::Client, admin: impl Display) -> anyhow::Result<Status> {
    let answer = client.get(format!("http://{admin}/api/v1/status")).send().await?;
    Ok(serde_json::from_slice(&answer.error_for_status()?.bytes().await?)?)
}

/// The state of a sink, and that of its circuit where that says more.
fn state(sink: &SinkStatus) -> String {
    match sink.circuit.as_str() {
        "open" => format!("{} (open)", sink.state),
        "half_open" => format!("{} (half-open)", sink.state),
        _ => sink.state.clone(),
    }
}

/// An estimated time; a dash where it cannot be told.
pub(super) fn estimate(seconds: Option<f64>) -> String {
    seconds.map_or("-".to_owned(), duration)
}

fn render(status: &Status) -> String {
    let gateway = &status.gateway;
    let ready = match &status.not_ready {
        None if status.ingest.health == "at_quota" => {
            "AT QUOTA: new events are not acked until there is room".to_owned()
        }
        None => "ready".to_owned(),
        Some(why) => format!("NOT READY: {why}"),
    };
    let up = duration(gateway.uptime_seconds);
    let rss = gateway.rss_bytes.map_or(String::new(), |rss| format!(", {} resident", bytes(rss)));
    let mut out = format!(
        "{} {} (epoch {}): {ready}, up {up}{rss}\n\n",
        gateway.id, gateway.version, gateway.epoch
    );
    let (mqtt, ingest, store) = (&status.mqtt, &status.ingest, &status.store);
    out += &table(&[
        vec![
            "devices".into(),
            format!(
                "{} connected, {} turned away, {} broke the protocol",
                count(mqtt.connections),
                count(mqtt.refused_total),
                count(mqtt.protocol_errors_total)
            ),
        ],
        vec![
            "publishes".into(),
            format!(
                "{} read, {} refused, {} dropped",
                count(mqtt.publishes_total),
                count(mqtt.publishes_refused_total),
                count(mqtt.publishes_dropped_total)
            ),
        ],
        vec![
            "subscribers".into(),
            format!(
                "{} messages delivered, {} missed",
                count(mqtt.deliveries_total),
                count(mqtt.deliveries_missed_total)
            ),
        ],
        vec![
            "acks".into(),
            format!(
                "{} events durable, {}/s; publish to ack {:.1} ms median, {:.1} ms p99",
                count(ingest.committed_events_total),
                count(ingest.events_per_second.round() as u64),
                ingest.ack_latency_ms.p50,
                ingest.ack_latency_ms.p99
            ),
        ],
        vec![
            "store".into(),
            format!(
                "{} of {} in {} file(s), offsets {} to {}, {} losses in the ledger; room for {}",
                bytes(store.log_bytes),
                bytes(store.quota_bytes),
                store.files,
                store.first_offset,
                store.watermark,
                count(store.losses),
                estimate(store.left_seconds)
            ),
        ],
    ]);
    out.push('\n');
    out + &sinks(status)
}

fn sinks(status: &Status) -> String {
    if status.sinks.is_empty() {
        return "no sinks: a durable local broker, trimmed by retention alone\n".to_owned();
    }
    let mut rows = vec![
        [
            "sink",
            "type",
            "state",
            "lag",
            "",
            "oldest",
            "rate",
            "gone in",
            "room for",
            "delivered",
            "dead letters",
            "retries",
        ]
        .map(str::to_owned)
        .to_vec(),
    ];
    for sink in &status.sinks {
        rows.push(vec![
            sink.name.clone(),
            sink.kind.clone(),
            state(sink),
            count(sink.lag_events),
            bytes(sink.lag_bytes),
            duration(sink.lag_seconds),
            format!("{}/s", count(sink.drain_events_per_second.round() as u64)),
            estimate(sink.eta_seconds),
            estimate(sink.left_seconds),
            count(sink.delivered_events_total),
            count(sink.dead_letters),
            count(sink.retries_total),
        ]);
    }
    let mut out = table(&rows);
    status.sinks.iter().for_each(|sink| render_streams(&mut out, sink));
    for sink in &status.sinks {
        if let Some(error) = &sink.error {
            // Writing to a String cannot fail.
            writeln!(out, "\n{}: {error}", sink.name).ok();
        }
    }
    out
}

/// What goes ahead of what.
fn render_streams(out: &mut String, sink: &SinkStatus) {
    for stream in &sink.streams {
        let end = stream.end.map_or("the end".to_owned(), |end| format!("offset {end}"));
        // Writing to a String cannot fail.
        writeln!(out, "{}: {} at offset {} of {end}", sink.name, stream.name, stream.cursor).ok();
    }
}
