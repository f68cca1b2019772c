//! Every committed input, and some that are near it: what libFuzzer does for minutes, in a second.

use std::path::Path;

/// Inputs made of each file: itself, and so many that differ from it in a few bytes.
const MUTATIONS: usize = 100;

fn run(target: &str, body: fn(&[u8])) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target);
    let mut files: Vec<_> = dir.read_dir().unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(files.len() >= 10, "{} is no corpus", dir.display());
    let mut random = fastrand::Rng::with_seed(1);
    for file in files {
        let input = std::fs::read(&file).unwrap();
        let checked = |input: &[u8], what: &str| {
            let result = std::panic::catch_unwind(|| body(input));
            assert!(result.is_ok(), "{}, {what}: {input:?}", file.display());
        };
        checked(&input, "as it is");
        for n in 0..MUTATIONS {
            checked(&mutated(&input, &mut random), &format!("mutation {n}"));
        }
    }
}

fn mutated(input: &[u8], random: &mut fastrand::Rng) -> Vec<u8> {
    let mut bytes = input.to_vec();
    for _ in 0..random.usize(1..4) {
        let at = random.usize(..=bytes.len());
        match random.u8(..4) {
            0 => bytes.insert(at, random.u8(..)),
            1 if at < bytes.len() => drop(bytes.remove(at)),
            2 => bytes.truncate(at),
            _ if at < bytes.len() => bytes[at] = random.u8(..),
            _ => bytes.push(random.u8(..)),
        }
    }
    bytes
}

#[test]
fn the_codec_stands_the_corpus() {
    run("codec", super::codec);
}

#[test]
fn the_session_stands_the_corpus() {
    run("session", super::session);
}

#[test]
fn the_configuration_stands_the_corpus() {
    run("configuration", super::configuration);
}
