//! The configuration: any text.

use crate::config::{Config, ConfigError};

/// A file that somebody has written, or that something has damaged.
///
/// Nothing panics; reading it twice gives the same; what is refused has at least one problem, and each
/// names a line of the file and says in one line what to do.
pub fn configuration(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let env = |name: &str| name.len().is_multiple_of(2).then(|| format!("value of {name}"));
    let read = || Config::parse("gateway.toml", &text, &env);
    match (read(), read()) {
        (Ok(config), Ok(_)) => {
            let options = config.store_options();
            assert!(options.partitions > 0, "what is taken is in range");
        }
        (Err(ConfigError::Invalid(problems)), Err(ConfigError::Invalid(again))) => {
            assert_eq!(problems, again);
            assert!(!problems.is_empty());
            let lines = text.split('\n').count();
            for problem in &problems {
                assert_eq!(problem.file, "gateway.toml");
                assert!((1..=lines).contains(&problem.line), "no such line: {problem}");
                assert!(!problem.message.is_empty());
            }
        }
        (first, second) => panic!("{first:?}, then {second:?}"),
    }
}
