//! Logs: to stderr, as text or JSON.

use std::io::IsTerminal;

use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::config::{LogConfig, LogFormat};

/// Starts logging for the life of the process. `RUST_LOG` overrides the level.
pub(super) fn start(config: &LogConfig) {
    let level = std::env::var("RUST_LOG").ok().and_then(|l| l.parse::<Targets>().ok());
    // The configuration was validated: its level parses. The local bus formats a span per message
    // while its target is on; who wants to see it names it in RUST_LOG.
    let configured = || config.level.parse().unwrap_or_else(|_| Targets::new());
    let level = level.unwrap_or_else(|| configured().with_target("rumqttd", LevelFilter::OFF));
    let fmt = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    let registry = tracing_subscriber::registry().with(level);
    // A second start in one process (tests) keeps the first.
    let started = match config.format {
        LogFormat::Text => registry.with(fmt).try_init(),
        LogFormat::Json => registry.with(fmt.json()).try_init(),
    };
    started.ok();
}
