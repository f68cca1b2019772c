//! The binary as scripts use it: what it prints, what it writes, and its exit codes.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    path::Path,
    process::{Command, Output, Stdio},
};

const BINARY: &str = env!("CARGO_BIN_EXE_firmware-sim");

fn firmware_sim(arguments: &[&str], folder: &Path) -> Output {
    Command::new(BINARY).args(arguments).current_dir(folder).output().unwrap()
}

fn code(output: &Output) -> Option<i32> {
    output.status.code()
}

fn error(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn the_audit_tells_clean_from_lost_by_its_exit_code() {
    let folder = tempfile::tempdir().unwrap();
    let sent = "device,boot,seq,sent_us,acked_us\ndev-000001,1,1,10,20\ndev-000001,1,2,11,21\n";
    let header = "arrival,received_us,device,boot,seq,partition,gateway_seq,id\n";
    let first = "0,30,dev-000001,1,1,0,1,edge/0/0/1\n";
    let second = "1,31,dev-000001,1,2,0,2,edge/0/0/2\n";
    fs::write(folder.path().join("sent"), sent).unwrap();
    let audit = |received: &str| {
        fs::write(folder.path().join("received"), received).unwrap();
        let arguments = ["audit", "--sent", "sent", "--received", "received", "--json"];
        let output = firmware_sim(&arguments, folder.path());
        let report = serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap();
        (code(&output), report["lost"].as_u64().unwrap(), report["out_of_order"].as_u64().unwrap())
    };
    assert_eq!(audit(&format!("{header}{first}{second}{first}")), (Some(0), 0, 0));
    assert_eq!(audit(&format!("{header}{first}")), (Some(3), 1, 0));
    assert_eq!(audit(&format!("{header}{second}{first}")), (Some(3), 0, 1));
}

#[test]
fn a_ledger_that_cannot_be_read_is_a_failure_that_names_it() {
    let folder = tempfile::tempdir().unwrap();
    let arguments = ["audit", "--sent", "nothing.csv", "--received", "nothing.csv"];
    let output = firmware_sim(&arguments, folder.path());
    assert_eq!(code(&output), Some(1));
    assert!(error(&output).contains("nothing.csv"), "{}", error(&output));
}

#[test]
fn wrong_arguments_and_configuration_are_told_apart_from_failures() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("fleet.toml"), "devices = 5\nrates = 3\n").unwrap();
    for (arguments, told) in [
        (&["run"][..], "--ledger"),
        (&["run", "--ledger", "x", "--broker", "nowhere"], "host:port"),
        (&["run", "--ledger", "x", "--devices", "0", "--rate", "0"], "rate: above 0"),
        (&["run", "--ledger", "x", "--fleet", "fleet.toml"], "rates"),
        (&["run", "--ledger", "x", "--fleet", "none.toml"], "none.toml"),
        (&["collect", "--ledger", "x"], "--http"),
        (
            &["collect", "--ledger", "x", "--http", "127.0.0.1:0", "--idle-seconds", "soon"],
            "seconds",
        ),
    ] {
        let output = firmware_sim(arguments, folder.path());
        assert_eq!(code(&output), Some(2), "{arguments:?}: {}", error(&output));
        assert!(error(&output).contains(told), "{arguments:?}: {}", error(&output));
    }
    assert!(!folder.path().join("x").exists());
}

#[test]
fn a_run_without_a_broker_fails_and_says_why() {
    let folder = tempfile::tempdir().unwrap();
    // Bound and given back: nothing listens there.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let broker = listener.local_addr().unwrap().to_string();
    drop(listener);
    let output = firmware_sim(
        &[
            "run",
            "--broker",
            &broker,
            "--devices",
            "3",
            "--rate",
            "1000",
            "--seconds",
            "0.1",
            "--drain-seconds-max",
            "0.1",
            "--ledger",
            "sent.csv",
            "--quiet",
            "--json",
        ],
        folder.path(),
    );
    assert_eq!(code(&output), Some(1), "{}", error(&output));
    let report = serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap();
    assert_eq!(report["drained"], false);
    assert_eq!(report["sent"], 0);
    assert!(report["last_error"].as_str().unwrap().contains("refused"), "{report}");
    let ledger = fs::read_to_string(folder.path().join("sent.csv")).unwrap();
    assert_eq!(ledger.lines().count(), 1);
}

#[test]
fn a_collector_says_where_it_listens_and_ends_on_sigterm() {
    let folder = tempfile::tempdir().unwrap();
    let mut collector = Command::new(BINARY)
        .args(["collect", "--http", "127.0.0.1:0", "--ledger", "received.csv", "--json"])
        .current_dir(folder.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut output = BufReader::new(collector.stdout.take().unwrap());
    let mut line = String::new();
    output.read_line(&mut line).unwrap();
    let addr = line.trim_end().strip_prefix("listening on ").unwrap();

    let body = r#"[{"specversion":"1.0","id":"e/0/3/9","type":"t","source":"s",
        "data":{"device":"dev-000001","boot":4,"seq":2}}]"#;
    let mut stream = TcpStream::connect(addr).unwrap();
    write!(
        stream,
        "POST / HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\
         content-type: application/cloudevents-batch+json\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 204"), "{answer}");

    let killed =
        Command::new("kill").args(["-TERM", &collector.id().to_string()]).status().unwrap();
    assert!(killed.success());
    assert_eq!(collector.wait().unwrap().code(), Some(0));
    let mut summary = String::new();
    output.read_to_string(&mut summary).unwrap();
    let summary = serde_json::from_str::<serde_json::Value>(&summary).unwrap();
    assert_eq!(summary["received"], 1);
    let ledger = fs::read_to_string(folder.path().join("received.csv")).unwrap();
    let row = ledger.lines().nth(1).unwrap();
    assert!(row.starts_with("0,") && row.ends_with(",dev-000001,4,2,3,9,e/0/3/9"), "{row}");
}
