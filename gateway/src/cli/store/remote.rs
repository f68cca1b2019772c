//! The gateway that has the store, asked through its admin endpoint.
//!
//! Owns: finding it, and reading its answers. Memory does not grow with an answer: lines are read as
//! they come, an export is passed on as it comes.

use std::fmt::Write as _;
use std::io::Write;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use storage::Progress;
use tokio::runtime::Runtime;

use super::super::{small_runtime, status};
use super::progress::Bar;
use crate::admin::replay::ReplayQuery;
use crate::admin::store::ExportQuery;
use crate::config::Config;
use crate::inspection::report::{Line, StatsReport};

/// A walk says something every second; an export goes on as long as its reader does.
const SILENCE_MAX: Duration = Duration::from_mins(1);
/// The longest line that makes sense: a report with every finding.
const LINE_BYTES_MAX: usize = 64 << 20;

/// A running gateway.
pub(super) struct Remote {
    runtime: Runtime,
    client: reqwest::Client,
    base: String,
}

/// What became of an export.
pub(super) enum Passed {
    /// It came whole.
    Whole,
    /// The bounds name no place in this store.
    WrongInput(String),
    /// It broke off.
    Broken(String),
}

impl Remote {
    /// The gateway with this admin address.
    pub(super) fn at(admin: &str) -> Result<Self, String> {
        let runtime = small_runtime().map_err(|error| format!("cannot start: {error}"))?;
        let client = reqwest::Client::builder().read_timeout(SILENCE_MAX).no_proxy().build();
        let client = client.map_err(|error| format!("cannot start: {error}"))?;
        Ok(Self { runtime, client, base: format!("http://{admin}/api/v1") })
    }

    /// The gateway that the configuration says has the store, or why it cannot be asked.
    pub(super) fn find(config: &Config) -> Result<Self, String> {
        let bind = config.admin.bind;
        if bind.port() == 0 {
            return Err(
                "the gateway's [admin] bind has port 0: give it a port of its own, or stop \
                        the gateway"
                    .into(),
            );
        }
        let remote = Self::at(&bind.to_string())?;
        let asked = remote.runtime.block_on(status::fetch(bind)).map_err(|error| {
            format!(
                "no answer from {bind}: {}; if no gateway has the store, another tool does",
                error.root_cause()
            )
        })?;
        if asked.gateway.id != config.gateway.id {
            return Err(format!(
                "the gateway at {bind} is {:?}, not {:?}: is this the right configuration?",
                asked.gateway.id, config.gateway.id
            ));
        }
        Ok(remote)
    }

    pub(super) fn stats(&self) -> Result<StatsReport, String> {
        let get = async {
            let answer = self.get("store/stats").await?;
            let text = answer.bytes().await.map_err(|error| broken(&error))?;
            serde_json::from_slice(&text).map_err(|error| format!("not an answer: {error}"))
        };
        self.runtime.block_on(get)
    }

    /// Follows a walk to its report.
    pub(super) fn walk<T: DeserializeOwned>(
        &self,
        path: &str,
        what: &'static str,
    ) -> Result<T, String> {
        self.runtime.block_on(async { follow(self.get(path).await?, what).await })
    }

    /// Begins a replay and follows it to its report. Ctrl-C ends it, which cancels the replay.
    /// Never [`Passed::Whole`].
    pub(super) fn replay<T: DeserializeOwned>(&self, query: &ReplayQuery) -> Result<T, Passed> {
        let replay = async {
            let url = format!("{}/{}", self.base, with_query("replay", &query.pairs()));
            let answer = taken(self.client.post(url).send().await).await?;
            follow(answer, "replay").await.map_err(Passed::Broken)
        };
        self.runtime.block_on(async {
            tokio::select! {
                followed = replay => followed,
                _ = tokio::signal::ctrl_c() => {
                    Err(Passed::Broken("cancelled; what was replayed so far stays".to_owned()))
                }
            }
        })
    }

    /// Asks with a query, and reads the answer as JSON.
    pub(super) fn get_json<T: DeserializeOwned>(
        &self,
        path: &str,
        pairs: &[(&str, Option<String>)],
    ) -> Result<T, String> {
        let get = async {
            let answer = self.get(&with_query(path, pairs)).await?;
            let text = answer.bytes().await.map_err(|error| broken(&error))?;
            serde_json::from_slice(&text).map_err(|error| format!("not an answer: {error}"))
        };
        self.runtime.block_on(get)
    }

    /// Asks for a change, and reads the answer as JSON. Never [`Passed::Whole`].
    pub(super) fn post_json<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, Passed> {
        let post = async {
            let body = serde_json::to_vec(body).unwrap_or_default();
            let post = self.client.post(format!("{}/{path}", self.base)).body(body);
            let answer = post.header("content-type", "application/json").send().await;
            let answer = taken(answer).await?;
            let text = answer.bytes().await.map_err(|error| Passed::Broken(broken(&error)))?;
            serde_json::from_slice(&text)
                .map_err(|error| Passed::Broken(format!("not an answer: {error}")))
        };
        self.runtime.block_on(post)
    }

    /// Passes an export on.
    pub(super) fn export(&self, query: &ExportQuery, out: &mut dyn Write) -> Passed {
        let pairs: Vec<_> =
            query.pairs().map(|(key, value)| (key, Some(value.to_owned()))).collect();
        self.pass_on("store/export", &pairs, out)
    }

    /// Passes an answer on as it comes.
    pub(super) fn pass_on(
        &self,
        path: &str,
        pairs: &[(&str, Option<String>)],
        out: &mut dyn Write,
    ) -> Passed {
        let follow = async {
            let url = format!("{}/{}", self.base, with_query(path, pairs));
            let mut answer = match taken(self.client.get(url).send().await).await {
                Ok(answer) => answer,
                Err(passed) => return passed,
            };
            loop {
                match answer.chunk().await {
                    Ok(Some(piece)) => {
                        if let Err(error) = out.write_all(&piece) {
                            return closed(&error);
                        }
                    }
                    Ok(None) => return Passed::Whole,
                    Err(_) => {
                        return Passed::Broken(
                            "the export broke off: the gateway stopped, or events cannot be read; \
                             its log says which, and so does `store verify`"
                                .into(),
                        );
                    }
                }
            }
        };
        self.runtime.block_on(follow)
    }

    async fn get(&self, path: &str) -> Result<reqwest::Response, String> {
        let answer = self.client.get(format!("{}/{path}", self.base)).send().await;
        let answer = answer.map_err(|error| broken(&error))?;
        if answer.status().is_success() {
            return Ok(answer);
        }
        Err(answer.text().await.unwrap_or_default().trim_end().to_owned())
    }
}

/// Follows an answer in lines to its report.
async fn follow<T: DeserializeOwned>(
    mut answer: reqwest::Response,
    what: &'static str,
) -> Result<T, String> {
    let mut bar = Bar::new(what);
    let mut text = Vec::new();
    while let Some(piece) = answer.chunk().await.map_err(|error| broken(&error))? {
        text.extend_from_slice(&piece);
        while let Some(end) = text.iter().position(|byte| *byte == b'\n') {
            let line = serde_json::from_slice(&text[..end]);
            text.drain(..=end);
            match line.map_err(|error| format!("not an answer: {error}"))? {
                Line::Progress { done, total } => bar.show(Progress { done, total }),
                Line::Report(report) => return Ok(report),
                Line::Failed(why) => return Err(why),
            }
        }
        if text.len() > LINE_BYTES_MAX {
            break;
        }
    }
    Err("the gateway stopped before the end".to_owned())
}

/// An answer that is one, or why not.
async fn taken(
    answer: Result<reqwest::Response, reqwest::Error>,
) -> Result<reqwest::Response, Passed> {
    let answer = answer.map_err(|error| Passed::Broken(broken(&error)))?;
    if answer.status().is_success() {
        return Ok(answer);
    }
    let wrong = answer.status().is_client_error()
        && answer.status() != reqwest::StatusCode::TOO_MANY_REQUESTS;
    let why = answer.text().await.unwrap_or_default().trim_end().to_owned();
    Err(if wrong { Passed::WrongInput(why) } else { Passed::Broken(why) })
}

/// A path with what is set of a query.
fn with_query(path: &str, pairs: &[(&str, Option<String>)]) -> String {
    let mut url = path.to_owned();
    for (key, value) in pairs {
        if let Some(value) = value {
            let before = if url.contains('?') { '&' } else { '?' };
            // Writing to a String cannot fail.
            write!(url, "{before}{key}={}", percent_encoded(value)).ok();
        }
    }
    url
}

/// Keeps the unreserved characters of RFC 3986.
fn percent_encoded(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            // Writing to a String cannot fail.
            write!(out, "%{byte:02X}").ok();
        }
    }
    out
}

/// A reader that has seen enough is no failure.
fn closed(error: &std::io::Error) -> Passed {
    match error.kind() {
        std::io::ErrorKind::BrokenPipe => Passed::Whole,
        _ => Passed::Broken(format!("cannot write the export: {error}")),
    }
}

fn broken(error: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    format!("the gateway's admin endpoint broke off: {cause}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_key_passes_through_a_query() {
        assert_eq!(percent_encoded("pump-7"), "pump-7");
        assert_eq!(percent_encoded("a&b=c d/\u{e9}"), "a%26b%3Dc%20d%2F%C3%A9");
    }
}
