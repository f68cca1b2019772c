//! What goes wrong before or beside the events: configuration, addresses, folders, stores, disks.
//! Each is one line that says what and what to do, with a fitting exit code, and nothing is lost.

mod harness;

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use harness::{Bench, Ended, eventually, http_sink, run_to_end, skip};
use redb::{ReadableTable, TableDefinition};

/// Exit codes of the command line.
const FAILED: i32 = 1;
const WRONG_INPUT: i32 = 2;

/// The one line that is for the user, wherever the log stands. It names each of `parts`.
fn assert_one_line(ended: &Ended, code: i32, parts: &[&str]) {
    assert_eq!(ended.code, Some(code), "{ended:?}");
    assert_eq!(ended.stdout, "", "it was never ready");
    let lines: Vec<&str> =
        ended.stderr.lines().filter(|line| line.starts_with("edge-gateway: ")).collect();
    let [line] = lines[..] else { panic!("one line for the user, not {lines:?}: {ended:?}") };
    for part in parts {
        assert!(line.contains(part), "{part:?} is not in {line:?}");
    }
}

#[tokio::test]
async fn a_wrong_configuration_is_told_whole_with_its_keys() {
    let bench = Bench::new(41);
    let config = bench.path("wrong.toml");
    let text = r#"
[gateway]
id = "edge 01"
data_dir = "/nonexistent/never-created"
[ingest]
partitons = 8
[storage]
quota_bytes = "much"
[[sink]]
name = "cloud"
type = "htpp"
"#;
    std::fs::write(&config, text).unwrap();
    for verb in ["check", "run"] {
        let ended = run_to_end(verb, &config).await;
        assert_eq!(ended.code, Some(WRONG_INPUT), "{ended:?}");
        // The place, the key, and where one can guess it, what would be right.
        for part in [
            "wrong.toml:3: gateway.id:",
            "wrong.toml:6: ingest.partitons:",
            "partitions",
            "wrong.toml:8: storage.quota_bytes:",
            "wrong.toml:11: sink.type:",
            "http",
        ] {
            assert!(ended.stderr.contains(part), "{verb}: {part:?} is not in {}", ended.stderr);
        }
    }
    assert!(!Path::new("/nonexistent").exists(), "a wrong configuration touches nothing");
}

#[tokio::test]
async fn a_missing_configuration_and_wrong_arguments_end_with_2() {
    let bench = Bench::new(42);
    let missing = bench.path("missing.toml");
    let ended = run_to_end("run", &missing).await;
    assert_eq!(ended.code, Some(WRONG_INPUT), "{ended:?}");
    assert!(ended.stderr.contains("missing.toml"), "{ended:?}");
    let ended = run_to_end("rum", &missing).await;
    assert_eq!(ended.code, Some(WRONG_INPUT), "{ended:?}");
    assert!(ended.stderr.contains("run"), "it suggests the verb: {ended:?}");
}

#[tokio::test]
async fn a_port_in_use_is_named_and_the_store_is_left_alone() {
    let bench = Bench::new(43);
    let config = bench.configure("");
    for (key, address) in [("listener.bind", bench.mqtt), ("admin.bind", bench.admin)] {
        let holder = TcpListener::bind(address).unwrap();
        let ended = run_to_end("run", &config).await;
        assert_one_line(&ended, FAILED, &[key, &address.to_string(), "another port"]);
        drop(holder);
    }
    // Free again, it starts.
    assert_eq!(bench.start().await.terminate().await, Some(0));
}

/// As root nothing is unwritable by its mode, so the folder is where none can be.
#[tokio::test]
async fn an_unwritable_data_folder_is_named() {
    let bench = Bench::new(44);
    let file = bench.path("file");
    std::fs::write(&file, "not a folder").unwrap();
    for data_dir in [file.join("data"), file.clone(), PathBuf::from("/proc/edge-gateway")] {
        let config = bench.configure_at(&data_dir, "");
        let ended = run_to_end("run", &config).await;
        assert_one_line(&ended, FAILED, &[&data_dir.display().to_string(), "writable"]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_in_use_is_refused_and_its_owner_goes_on() {
    let bench = Bench::new(45);
    let other = Bench::new(45);
    bench.configure("");
    let gateway = bench.start().await;
    let config = other.configure_at(&bench.path("data"), "");
    let ended = run_to_end("run", &config).await;
    let data_dir = bench.path("data").display().to_string();
    assert_one_line(&ended, FAILED, &[&data_dir, "in use by another process"]);

    let fleet = bench.fleet(5, 200.0);
    eventually("the owner goes on", async || (fleet.counters().acked > 100).then_some(())).await;
    bench.drain(fleet).await;
    assert_eq!(gateway.terminate().await, Some(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_number_of_partitions_is_refused_with_the_remedy() {
    let bench = Bench::new(46);
    bench.configure("[ingest]\npartitions = 4");
    assert_eq!(bench.start().await.terminate().await, Some(0));
    let config = bench.configure("[ingest]\npartitions = 8");
    let ended = run_to_end("run", &config).await;
    assert_one_line(&ended, WRONG_INPUT, &["ingest.partitions = 4", "8"]);
    bench.configure("[ingest]\npartitions = 4");
    assert_eq!(bench.start().await.terminate().await, Some(0));
}

/// A store that a later version wrote is refused, and the version that wrote it still finds
/// everything in it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_of_a_newer_format_is_refused_and_loses_nothing() {
    let bench = Bench::new(47);
    let config = bench.configure("");
    let gateway = bench.start().await;
    let fleet = bench.fleet(5, 200.0);
    eventually("events are acked", async || (fleet.counters().acked > 100).then_some(())).await;
    bench.drain(fleet).await;
    let stored = gateway.status().await.store.watermark;
    assert_eq!(gateway.terminate().await, Some(0));

    let state = bench.path("data/state.redb");
    let format = set_format(&state, u32::MAX);
    let ended = run_to_end("run", &config).await;
    let data_dir = bench.path("data").display().to_string();
    assert_one_line(
        &ended,
        FAILED,
        &[&data_dir, "format 4294967295", "install the version that wrote it"],
    );

    set_format(&state, format);
    let gateway = bench.start().await;
    assert_eq!(gateway.status().await.store.watermark, stored);
    assert_eq!(gateway.terminate().await, Some(0));
}

/// Changes the format number in the head row of a state database, as a version would have written it
/// whose row is the same otherwise. Magic, checksum and format stay where they are in every format to
/// come; the checksum covers what follows it. Gives the number that was there.
fn set_format(path: &Path, format: u32) -> u32 {
    const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");
    let database = redb::Database::open(path).unwrap();
    let transaction = database.begin_write().unwrap();
    let before = {
        let mut meta = transaction.open_table(META).unwrap();
        let mut row = meta.get("head").unwrap().expect("a head row").value().to_vec();
        assert_eq!(&row[..4], b"EGhd");
        let before = u32::from_le_bytes(row[8..12].try_into().unwrap());
        row[8..12].copy_from_slice(&format.to_le_bytes());
        let crc = crc32c::crc32c(&row[8..]);
        row[4..8].copy_from_slice(&crc.to_le_bytes());
        meta.insert("head", &row[..]).unwrap();
        before
    };
    transaction.commit().unwrap();
    before
}

/// A file system of a few megabytes, unmounted when dropped.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(at: PathBuf, size: &str) -> Result<Self, String> {
        std::fs::create_dir(&at).unwrap();
        let options = format!("size={size}");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &options, "none"]).arg(&at);
        let output = mount.output().map_err(|error| format!("cannot run mount: {error}"))?;
        if output.status.success() {
            return Ok(Self(at));
        }
        Err(format!("cannot mount a tmpfs: {}", String::from_utf8_lossy(&output.stderr).trim()))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        Command::new("umount").arg("-l").arg(&self.0).status().ok();
    }
}

/// Storage that takes what the disk has, with or without a journal.
fn to_the_last_byte(journal: &str) -> String {
    format!(
        r#"
[storage]
free_bytes_min = 0
file_bytes_max = "1MiB"
at_quota = "hold"
journal = "{journal}"
journal_bytes = "1MiB"
"#
    )
}

#[tokio::test]
async fn a_disk_that_is_full_from_the_start_is_named() {
    let bench = Bench::new(50);
    let disk = match SmallDisk::mount(bench.path("disk"), "4m") {
        Ok(disk) => disk,
        Err(why) => return skip("a full disk", &why),
    };
    let ballast = disk.0.join("ballast");
    // More than fits: what does fit stays.
    assert!(std::fs::write(&ballast, vec![1; 8 << 20]).is_err());
    let data_dir = disk.0.join("data");
    let config = bench.configure_at(&data_dir, "");
    let ended = run_to_end("run", &config).await;
    assert_one_line(&ended, FAILED, &[&data_dir.display().to_string(), "No space left"]);
    // The half that it wrote is no obstacle.
    std::fs::remove_file(&ballast).unwrap();
    assert_eq!(bench.start().await.terminate().await, Some(0));
}

/// A full disk: nothing is acked that is not stored, the gateway says so and lives; as soon as there
/// is room it acks again, and everything arrives.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_stops_the_acks_and_room_starts_them_again() {
    for journal in ["off", "on"] {
        fill_and_make_room(journal).await;
    }
}

async fn fill_and_make_room(journal: &str) {
    let bench = Bench::new(48);
    let disk = match SmallDisk::mount(bench.path("disk"), "24m") {
        Ok(disk) => disk,
        Err(why) => return skip("a full disk", &why),
    };
    // Room that will be given back.
    let ballast = disk.0.join("ballast");
    std::fs::write(&ballast, vec![1; 16 << 20]).unwrap();
    let mut collector = bench.collector("upstream");
    collector.take_down().await;
    let sinks = http_sink("upstream", collector.addr());
    let more = format!("{sinks}{}", to_the_last_byte(journal));
    bench.configure_at(&disk.0.join("data"), &more);
    let gateway = bench.start().await;
    let fleet = bench.fleet(30, 6_000.0);
    let full = gateway.until("the disk is full", |status| !status.ready).await;
    assert!(full.not_ready.as_deref().unwrap_or("").contains("space"), "{:?}", full.not_ready);
    // The first failure gives up what a file has reserved, which may do for a commit or two.
    let ready = async || gateway.get("/health/ready").await.0;
    eventually("readiness says so", async || (ready().await == 503).then_some(())).await;
    assert_eq!(gateway.get("/health/live").await.0, 200);

    std::fs::remove_file(&ballast).unwrap();
    gateway.until("ready again", |status| status.ready).await;
    let enough = fleet.counters().acked + 500;
    eventually("acks again", async || (fleet.counters().acked >= enough).then_some(())).await;
    bench.end_with_upstream(gateway, fleet, collector).await;
}

/// Nobody frees a full disk but the upstream, which comes back: the cursor has to move on a disk
/// without room, and trimming behind it makes the room.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_full_of_backlog_frees_itself_when_the_upstream_is_back() {
    for journal in ["off", "on"] {
        fill_and_deliver(journal).await;
    }
}

async fn fill_and_deliver(journal: &str) {
    let bench = Bench::new(49);
    let disk = match SmallDisk::mount(bench.path("disk"), "12m") {
        Ok(disk) => disk,
        Err(why) => return skip("a full disk", &why),
    };
    let mut collector = bench.collector("upstream");
    collector.take_down().await;
    let sinks = http_sink("upstream", collector.addr());
    let more = format!("{sinks}{}", to_the_last_byte(journal));
    bench.configure_at(&disk.0.join("data"), &more);
    let gateway = bench.start().await;
    let fleet = bench.fleet(30, 6_000.0);
    gateway.until("the disk is full", |status| !status.ready).await;
    collector.bring_back().unwrap();
    gateway.until("ready again", |status| status.ready).await;
    bench.drain(fleet).await;
    gateway.until_delivered("upstream").await;
    assert_eq!(gateway.terminate().await, Some(0));
    collector.finish().await;
    bench.assert_balanced("upstream");
}
