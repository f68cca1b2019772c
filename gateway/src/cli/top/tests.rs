use serde_json::json;

use super::*;

fn status() -> Status {
    serde_json::from_value(json!({
        "gateway": {"id": "edge-01", "version": "1.2.3", "epoch": "0", "uptime_seconds": 7_380.0,
                    "rss_bytes": 40_000_000},
        "ready": true, "not_ready": null,
        "mqtt": {"connections": 200, "connections_total": 4, "refused_total": 0,
                 "publishes_total": 9, "publishes_refused_total": 1,
                 "publishes_dropped_total": 2, "protocol_errors_total": 0, "panics_total": 0,
                 "deliveries_total": 6, "deliveries_missed_total": 5},
        "ingest": {"committed_events_total": 9, "committed_bytes_total": 90,
                   "commits_total": 2, "commit_failures_total": 0, "health": "storing",
                   "ring_bytes": 0, "events_per_second": 12_345.0, "bytes_per_second": 2e6,
                   "ack_latency_ms": {"p50": 1.0, "p99": 2.0, "p999": 3.0, "max": 4.0},
                   "commit_latency_ms": {"p50": 1.0, "p99": 2.0, "p999": 3.0, "max": 4.0}},
        "store": {"first_offset": 0, "watermark": 9, "files": 1, "log_bytes": 4_u64 << 30,
                  "state_bytes": 1, "quota_bytes": 8_u64 << 30, "losses": 0, "absent_sinks": [],
                  "left_seconds": 183_600.0},
        "partitions": [],
        "sinks": [
            {"name": "a-very-long-name-of-a-sink", "type": "http", "state": "retrying",
             "error": "HTTP 503\nunavailable \u{1b}[2J", "cursor": 4, "lag_events": 123_456_789,
             "lag_bytes": 5_u64 << 30, "lag_seconds": 86_400.0, "delivered_events_total": 4,
             "delivered_bytes_total": 40, "dead_lettered_events_total": 1, "dead_letters": 1_234,
             "retries_total": 2, "circuit": "half_open", "drain_events_per_second": 54_321.0,
             "eta_seconds": null},
            {"name": "bus", "type": "kafka", "state": "idle", "error": null, "cursor": 9,
             "lag_events": 0, "lag_bytes": 0, "lag_seconds": 0.0, "delivered_events_total": 9,
             "delivered_bytes_total": 90, "dead_lettered_events_total": 0, "dead_letters": 0,
             "retries_total": 0, "circuit": "closed", "drain_events_per_second": 0.0,
             "eta_seconds": 0.0}]
    }))
    .unwrap()
}

/// The cells of a line: without what only styles it.
fn cells(line: &str) -> String {
    [BOLD, REVERSE, RED, PLAIN].iter().fold(line.to_owned(), |line, style| line.replace(style, ""))
}

fn drawn(view: &View<'_>, columns: usize, rows: usize) -> Vec<String> {
    let lines = frame(view, Instant::now(), columns, rows);
    assert_eq!(lines.len(), rows, "{lines:#?}");
    let lines: Vec<String> = lines.iter().map(|line| cells(line)).collect();
    for line in &lines {
        assert!(line.chars().count() <= columns, "{line:?} in {columns} columns");
        assert!(!line.chars().any(char::is_control), "{line:?}");
    }
    lines
}

#[test]
fn all_of_it_fits_the_smallest_usual_terminal() {
    let view = View { admin: "127.0.0.1:9641", status: Some(status()), silent: None };
    let lines = drawn(&view, 80, 24);
    let text = lines.join("\n");
    for part in [
        "edge-01   ready   up 2h 3m",
        "12,345/s",
        "200 connected",
        "[##########..........]   room for 2d 3h",
        "retrying",
        "circuit half-open: HTTP 503",
        "123,456,789",
        "54,321/s",
        "1,234",
        "503 unavailable",
        "q quits",
    ] {
        assert!(text.contains(part), "no {part:?} in\n{text}");
    }
}

#[test]
fn a_wide_terminal_has_room_for_names_and_for_how_long_there_is_room() {
    let mut status = status();
    status.sinks[0].left_seconds = Some(7_200.0);
    let view = View { admin: "127.0.0.1:9641", status: Some(status), silent: None };
    let lines = drawn(&view, 120, 24);
    let row = lines.iter().find(|line| line.starts_with("a-very")).expect("the sink's row");
    assert!(row.starts_with("a-very-long-name-of-a-sink ") && row.ends_with("2h 0m"), "{row:?}");
    assert!(lines.iter().any(|line| line.starts_with("SINK") && line.ends_with("FULL IN")));
    assert!(!drawn(&view, 80, 24).join("\n").contains("FULL IN"));
}

#[test]
fn any_size_is_borne() {
    let view = View { admin: "x", status: Some(status()), silent: None };
    for (columns, rows) in [(1, 1), (10, 3), (40, 12), (200, 60), (80, 9)] {
        drawn(&view, columns, rows);
    }
}

#[test]
fn a_gateway_that_is_silent_is_not_shown_as_ready() {
    let silent = || Some((Instant::now(), "connection refused".to_owned()));
    let never = View { admin: "127.0.0.1:9641", status: None, silent: silent() };
    let text = drawn(&never, 80, 24).join("\n");
    assert!(text.contains("NO ANSWER") && text.contains("connection refused"), "{text}");
    assert!(text.contains("[admin] bind"), "{text}");
    let before = View { admin: "127.0.0.1:9641", status: Some(status()), silent: silent() };
    let text = drawn(&before, 80, 24).join("\n");
    assert!(text.contains("SILENT") && !text.contains("ready"), "{text}");
    assert!(text.contains("what it said before") && text.contains("12,345/s"), "{text}");
}
