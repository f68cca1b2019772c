//! `check`: every mistake of a configuration at once, and in the files that a start would read:
//! certificates, users, keys.

use std::path::Path;

use super::{DONE, WRONG_INPUT, load};
use crate::access::Access;
use crate::config::Config;
use crate::mqtt::Tls;

pub(super) fn check(path: &Path) -> u8 {
    match load(path) {
        Ok(config) => {
            let problems = problems_of_files(&config);
            if !problems.is_empty() {
                for problem in problems {
                    eprintln!("{}: {problem}", path.display());
                }
                return WRONG_INPUT;
            }
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

fn problems_of_files(config: &Config) -> Vec<String> {
    let listeners = config.listeners.iter().filter_map(|listener| listener.tls.as_ref());
    let tls = listeners.filter_map(|tls| Tls::load(tls).err()).map(|error| error.to_string());
    let access = Access::load(&config.auth, &config.acl).err().map(|error| error.to_string());
    tls.chain(access).collect()
}
