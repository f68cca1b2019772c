//! `check`: every mistake of a configuration at once.

use std::path::Path;

use super::{DONE, load};

pub(super) fn check(path: &Path) -> u8 {
    match load(path) {
        Ok(config) => {
            let names: Vec<&str> = config.sinks.iter().map(|s| s.name.as_str()).collect();
            println!(
                "{}: ok: gateway {:?}, {} listener(s), {} route(s), sinks: {}",
                path.display(),
                config.gateway.id,
                config.listeners.len(),
                config.routes.len(),
                if names.is_empty() { "none".to_owned() } else { names.join(", ") },
            );
            DONE
        }
        Err(code) => code,
    }
}
