//! The clients that people have: Eclipse Paho (Python), Mosquitto's command line and rumqttc each
//! connect, publish and subscribe at every QoS, in MQTT 3.1.1 and 5.

mod harness;

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use gateway::admin::status::Status;
use harness::{Bench, GatewayProcess, PATIENCE, skip};
use tokio::time::timeout;

async fn gateway(seed: u64) -> (Bench, GatewayProcess) {
    let bench = Bench::new(seed);
    bench.configure("");
    let gateway = bench.start().await;
    (bench, gateway)
}

/// Runs a client to its end: what it said, or why it did not end well.
async fn run(mut command: Command) -> Result<String, String> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut command = tokio::process::Command::from(command);
    let output = timeout(PATIENCE, command.kill_on_drop(true).output());
    let output = output.await.expect("the client ends").map_err(|error| error.to_string())?;
    let text = |bytes| String::from_utf8_lossy(bytes).trim().to_owned();
    if output.status.success() {
        Ok(text(&output.stdout))
    } else {
        Err(format!("{}: {} {}", output.status, text(&output.stdout), text(&output.stderr)))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mosquitto_clients_publish_and_subscribe_at_every_qos() {
    // It prints its help and ends with 1: what counts is that it can be run.
    if let Err(error) = Command::new("mosquitto_pub").arg("--help").output() {
        return skip("mosquitto_pub and mosquitto_sub", &error.to_string());
    }
    let (bench, gateway) = gateway(81).await;
    let port = bench.mqtt.port().to_string();
    let mut published = 0;
    for version in ["mqttv31", "mqttv311", "mqttv5"] {
        for qos in ["0", "1", "2"] {
            let topic = format!("devices/mosquitto/{version}/{qos}");
            let client = |program: &str| {
                let mut command = Command::new(program);
                command.args(["-h", "127.0.0.1", "-p", &port, "-V", version]);
                command.args(["-q", qos, "-t", &topic]);
                command
            };
            let mut publish = client("mosquitto_pub");
            publish.args(["-r", "-m", &topic]);
            run(publish).await.unwrap();
            // At QoS 0 nothing says when it is stored, and until then it is on its way, not retained.
            published += 1;
            let stored = |status: &Status| status.ingest.committed_events_total >= published;
            gateway.until("it is stored", stored).await;
            // Retained: it finds it whenever it comes.
            let mut subscribe = client("mosquitto_sub");
            subscribe.args(["-C", "1", "-F", "%q %r %p"]);
            assert_eq!(run(subscribe).await.unwrap(), format!("{qos} 1 {topic}"));
        }
    }
    assert_eq!(gateway.terminate().await, Some(0));
}

/// Connects, subscribes, publishes to itself, and says what came; ends with 3 without Paho.
const PAHO: &str = r#"
import sys, threading
try:
    import paho.mqtt.client as mqtt
except ImportError:
    sys.exit(3)
port, version, qos = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
topic = "devices/paho/%s/%d" % (version, qos)
protocol = {"3": mqtt.MQTTv311, "5": mqtt.MQTTv5}[version]
if hasattr(mqtt, "CallbackAPIVersion"):
    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION1, topic, protocol=protocol)
else:
    client = mqtt.Client(topic, protocol=protocol)
came = threading.Event()
said = []
client.on_connect = lambda c, *more: c.subscribe(topic, qos)
client.on_subscribe = lambda c, *more: c.publish(topic, "hello", qos)
def on_message(c, userdata, message):
    said.append("%d %s" % (message.qos, message.payload.decode()))
    came.set()
client.on_message = on_message
client.connect("127.0.0.1", port)
client.loop_start()
ok = came.wait(50)
client.disconnect()
client.loop_stop()
print("\n".join(said))
sys.exit(0 if ok else 1)
"#;

/// A Python that has Paho: that of the path, or the system's.
async fn python_with_paho() -> Option<PathBuf> {
    for python in ["python3", "/usr/bin/python3"] {
        let mut command = Command::new(python);
        command.args(["-c", "import paho.mqtt.client"]);
        if run(command).await.is_ok() {
            return Some(python.into());
        }
    }
    None
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn paho_publishes_and_subscribes_at_every_qos() {
    let Some(python) = python_with_paho().await else {
        return skip("Eclipse Paho", "no Python with paho-mqtt (Debian: python3-paho-mqtt)");
    };
    let (bench, gateway) = gateway(82).await;
    for version in ["3", "5"] {
        for qos in ["0", "1", "2"] {
            let mut command = Command::new(&python);
            command.args([
                "-W",
                "ignore",
                "-c",
                PAHO,
                &bench.mqtt.port().to_string(),
                version,
                qos,
            ]);
            assert_eq!(run(command).await.unwrap(), format!("{qos} hello"), "version {version}");
        }
    }
    assert_eq!(gateway.terminate().await, Some(0));
}

/// One client of one version: subscribes, publishes to itself at every QoS, and takes what comes.
macro_rules! rumqttc_at_every_qos {
    ($bench:ident, $client:ty, $options:ty, $event:path, $publish:path, $suback:path, $qos:path) => {{
        use $qos as QoS;
        let broker = $bench.mqtt;
        let mut options = <$options>::new("rumqttc", broker.ip().to_string(), broker.port());
        options.set_keep_alive(Duration::from_secs(30));
        let (client, mut events) = <$client>::new(options, 10);
        let levels = [QoS::AtMostOnce, QoS::AtLeastOnce, QoS::ExactlyOnce];
        client.subscribe("devices/rumqttc/#", QoS::ExactlyOnce).await.unwrap();
        let mut got = 0;
        while got < levels.len() {
            match timeout(PATIENCE, events.poll()).await.expect("something comes").unwrap() {
                $event($suback(_)) => {
                    client.publish("devices/rumqttc/0", levels[0], false, "0").await.unwrap();
                }
                $event($publish(publish)) => {
                    assert_eq!(publish.qos, levels[got]);
                    assert_eq!(&publish.payload[..], got.to_string().as_bytes());
                    got += 1;
                    if let Some(level) = levels.get(got) {
                        let (topic, payload) = (format!("devices/rumqttc/{got}"), got.to_string());
                        client.publish(topic, *level, false, payload).await.unwrap();
                    }
                }
                _ => {}
            }
        }
    }};
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rumqttc_publishes_and_subscribes_at_every_qos() {
    let (bench, gateway) = gateway(83).await;
    rumqttc_at_every_qos!(
        bench,
        rumqttc::AsyncClient,
        rumqttc::MqttOptions,
        rumqttc::Event::Incoming,
        rumqttc::Packet::Publish,
        rumqttc::Packet::SubAck,
        rumqttc::QoS
    );
    rumqttc_at_every_qos!(
        bench,
        rumqttc::v5::AsyncClient,
        rumqttc::v5::MqttOptions,
        rumqttc::v5::Event::Incoming,
        rumqttc::v5::mqttbytes::v5::Packet::Publish,
        rumqttc::v5::mqttbytes::v5::Packet::SubAck,
        rumqttc::v5::mqttbytes::QoS
    );
    assert_eq!(gateway.terminate().await, Some(0));
}
