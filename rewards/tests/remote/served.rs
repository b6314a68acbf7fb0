//! The servers of this repository: `serve`, and the Python one of `examples/`.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::num::NonZeroUsize;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use grpo::testing::check_reward;
use grpo::{BoxError, Prompt, Reward};
use grpo_rewards::geneval::{Detection, Detector};
use grpo_rewards::remote::{HttpDetector, HttpReward, ServerConfig, serve};
use grpo_rewards::{Brightness, JpegCompressibility};
use image::{Rgb, RgbImage};

use crate::asked::{N_ROWS, batch, rows};
use crate::wire::score_of;
use crate::{config, expected, reward};

/// Serves a reward of this crate; its address.
fn served(reward: impl Reward<RgbImage> + 'static, config: ServerConfig) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/score", listener.local_addr().unwrap());
    std::thread::spawn(move || serve(listener, reward, config));
    url
}

#[test]
fn a_served_reward_scores_as_it_does_here() {
    let rows = rows(N_ROWS);
    let rows = batch(&rows);
    let light = reward(&served(Brightness, ServerConfig::new("brightness", "1")));
    assert_eq!(light.score_batch(&rows).unwrap(), Brightness.score_batch(&rows).unwrap());
    check_reward(&light, &rows).unwrap();
    let small = reward(&served(JpegCompressibility, ServerConfig::new("compressibility", "1")));
    assert_eq!(small.score_batch(&rows).unwrap(), JpegCompressibility.score_batch(&rows).unwrap());
}

#[cfg(feature = "onnx")]
#[test]
fn a_served_network_scores_as_it_does_here() {
    use grpo_rewards::clip::ClipReward;
    let rows = rows(N_ROWS);
    let here = ClipReward::tiny().unwrap();
    let mut config = config(&served(ClipReward::tiny().unwrap(), ServerConfig::new("clip", "tiny")));
    config.limits.images_per_request = NonZeroUsize::new(N_ROWS).unwrap();
    let far = HttpReward::new(config).unwrap();
    assert_eq!(far.score_batch(&batch(&rows)).unwrap(), here.score_batch(&batch(&rows)).unwrap());
}

/// Judges nothing before its gate is open, and counts what it is asked at a time.
struct Gated(Arc<Gate>);

#[derive(Default)]
struct Gate {
    open: Mutex<bool>,
    opened: Condvar,
    n_inside: AtomicUsize,
    most_inside: AtomicUsize,
}

impl Reward<RgbImage> for Gated {
    fn name(&self) -> &str {
        "gated"
    }
    fn score(&self, _: &Prompt, image: &RgbImage) -> Result<f32, BoxError> {
        let n_inside = self.0.n_inside.fetch_add(1, Ordering::SeqCst) + 1;
        self.0.most_inside.fetch_max(n_inside, Ordering::SeqCst);
        drop(self.0.opened.wait_while(self.0.open.lock().unwrap(), |open| !*open).unwrap());
        self.0.n_inside.fetch_sub(1, Ordering::SeqCst);
        Ok(score_of(image.get_pixel(0, 0)[0]))
    }
}

/// What a client no longer waits for is still being judged, and has its place until it is.
#[test]
fn clients_that_lose_patience_make_no_room_for_more() {
    let gate = Arc::new(Gate::default());
    let server = ServerConfig { max_connections: 2, ..ServerConfig::new("gated", "1") };
    let mut config = config(&served(Gated(Arc::clone(&gate)), server));
    config.limits.images_per_request = NonZeroUsize::MIN;
    config.limits.max_in_flight = NonZeroUsize::new(N_ROWS).unwrap();
    (config.limits.timeout_ms, config.retry.times) = (150, 2);
    let rows = rows(N_ROWS);
    for score in HttpReward::new(config.clone()).unwrap().score_each(&batch(&rows)) {
        let error = score.unwrap_err().to_string();
        assert!(error.contains("no answer within 150 ms (raise timeout_ms); gave up after 3 attempts"), "{error}");
    }
    *gate.open.lock().unwrap() = true;
    gate.opened.notify_all();
    config.limits.timeout_ms = 60_000;
    let scores = HttpReward::new(config).unwrap().score_batch(&batch(&rows)).unwrap();
    assert_eq!(scores, (0..N_ROWS).map(expected).collect::<Vec<f32>>(), "each place was given back");
    let most_inside = gate.most_inside.load(Ordering::SeqCst);
    assert!((1..=2).contains(&most_inside), "{most_inside} batches were judged at a time");
}

/// The server of `examples/`, ended with the test.
struct Example(Child);

impl Drop for Example {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn the_python_server_of_the_examples_scores_and_detects() {
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/score_server.py");
    let mut python = Command::new("python3");
    python.arg("-B").arg(program).arg("0").stdout(Stdio::piped()).stderr(Stdio::null());
    let mut example = Example(python.spawn().unwrap());
    let mut url = String::new();
    BufReader::new(example.0.stdout.take().unwrap()).read_line(&mut url).unwrap();
    let url = url.trim();
    let (reward, rows) = (reward(url), rows(3));
    check_reward(&reward, &batch(&rows)).unwrap();
    assert!(reward.score_batch(&batch(&rows)).unwrap().iter().all(|score| *score < 0.0));
    assert_eq!(reward.scorer().unwrap(), "model \"picture_bytes\", version \"1\"");
    let detector = HttpDetector::new(config(&url.replace("/score", "/detect"))).unwrap();
    let picture = Detection::new("picture", 1.0, [0.0, 0.0, 9.0, 5.0]);
    assert_eq!(detector.detect(&rows[0].1).unwrap(), [picture]);
    let elsewhere = HttpDetector::new(config(&url.replace("/score", "/other"))).unwrap();
    let error = elsewhere.detect(&rows[0].1).unwrap_err().to_string();
    assert!(error.contains("status 404 Not Found: only /score and /detect are served"), "{error}");
    let wrong = HttpDetector::new(config(url)).unwrap().detect(&rows[0].1).unwrap_err().to_string();
    assert!(wrong.contains("answered without `detections`"), "{wrong}");
    let answer = said(url, b"POST /score HTTP/1.0\r\nContent-Length: 3\r\n\r\n{}\n");
    assert!(answer.starts_with("HTTP/1.0 400 ") && answer.contains("not a question: KeyError"), "{answer}");
}

#[test]
fn a_served_reward_tells_each_failure_apart() {
    struct Picky;
    impl Reward<RgbImage> for Picky {
        fn name(&self) -> &str {
            "picky"
        }
        fn score(&self, _: &Prompt, image: &RgbImage) -> Result<f32, BoxError> {
            match image.get_pixel(0, 0)[0] {
                20 => Err("no \"face\" found".into()),
                40 => Ok(f32::NAN),
                red => Ok(score_of(red)),
            }
        }
    }
    let far = reward(&served(Picky, ServerConfig::new("picky", "1")));
    let rows = rows(N_ROWS);
    let each = far.score_each(&batch(&rows));
    assert_eq!(each[2].as_ref().unwrap_err().to_string(), "no \"face\" found");
    assert_eq!(each[4].as_ref().unwrap_err().to_string(), "scored NaN");
    for row in [0, 1, 3, 5] {
        assert_eq!(*each[row].as_ref().unwrap(), expected(row));
    }
}

/// The whole answer to a request in a socket's own words.
fn said(url: &str, request: &[u8]) -> String {
    let address = url.trim_start_matches("http://").trim_end_matches("/score");
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(request).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn a_server_refuses_in_plain_words() {
    let config = ServerConfig { max_request_bytes: 2000, ..ServerConfig::new("brightness", "1") };
    let url = served(Brightness, config);
    let post = |path: &str, body: &str| {
        format!("POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{body}", body.len()).into_bytes()
    };
    let cases = [
        (post("/", ""), "404 Not Found", "only /score is served"),
        (b"GET /score HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(), "405 Method Not Allowed", "send a POST"),
        (post("/score", "{}"), "400 Bad Request", "its first line has no end"),
        (post("/score", &"x".repeat(2001)), "413 Payload Too Large", "the request has 2001 bytes; at most 2000"),
    ];
    for (request, status, text) in cases {
        let answer = said(&url, &request);
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}\r\n")) && answer.contains(text), "{answer}");
    }
    let noise = RgbImage::from_fn(60, 60, |x, y| Rgb([(x * y * 37 % 251) as u8, (x * 91 % 256) as u8, (y * 53) as u8]));
    let error = reward(&url).score_batch(&[(&Prompt::new("x"), &noise)]).unwrap_err().to_string();
    assert!(error.contains("status 413 Payload Too Large: the request has"), "{error}");
}
