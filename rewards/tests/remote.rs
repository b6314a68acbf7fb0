//! A reward behind HTTP against a server that misbehaves in every way a server can.
//!
//! The server of these tests is written on a bare socket and reads questions by itself, so that client and server
//! cannot share a mistake.

#![cfg(feature = "http")]
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test's helpers may fail the test")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::num::NonZeroUsize;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use grpo::testing::check_reward;
use grpo::{BoxError, Prompt, Reward, RewardSet};
use grpo_rewards::exchange::Encoding;
use grpo_rewards::geneval::{Detection, Detector};
use grpo_rewards::remote::{HttpConfig, HttpDetector, HttpReward, ServerConfig, serve};
use grpo_rewards::{Brightness, JpegCompressibility};
use image::{Rgb, RgbImage};
use serde_json::{Value, json};

/// A question as it came over the wire.
struct Asked {
    head: String,
    header: Value,
    /// Each picture's first red value, which is what the server scores by.
    reds: Vec<u8>,
}

impl Asked {
    fn scores(&self) -> Vec<Value> {
        self.reds.iter().map(|red| json!(score_of(*red))).collect()
    }

    fn answer(&self) -> Reply {
        Reply::ok(&json!({ "scores": self.scores(), "model": "reds", "version": 1 }))
    }
}

/// Not a whole number of tenths, so that only exact transport gives it back.
fn score_of(red: u8) -> f32 {
    f32::from(red) / 7.0 - 3.0
}

enum Reply {
    /// The status line and further headers, and the body.
    Whole(String, Vec<u8>),
    /// These bytes, and the end of the connection.
    Raw(Vec<u8>),
    /// Nothing, until the client goes.
    Hang,
}

impl Reply {
    fn ok(body: &Value) -> Self {
        Self::Whole("200 OK".into(), body.to_string().into_bytes())
    }

    fn status(status: &str, body: &str) -> Self {
        Self::Whole(status.into(), body.as_bytes().to_vec())
    }
}

fn read_request(stream: &TcpStream) -> Option<Asked> {
    let mut reader = BufReader::new(stream);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head).ok()? == 0 {
            return None;
        }
    }
    let length = head.to_lowercase().split("content-length: ").nth(1)?.split("\r\n").next()?.parse().ok()?;
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    let line = body.iter().position(|byte| *byte == b'\n')?;
    let header: Value = serde_json::from_slice(&body[..line]).ok()?;
    let mut rest = &body[line + 1..];
    let mut reds = Vec::new();
    for n_bytes in header["images"].as_array()? {
        let (picture, behind) = rest.split_at(usize::try_from(n_bytes.as_u64()?).ok()?);
        reds.push(image::load_from_memory(picture).ok()?.to_rgb8().get_pixel(0, 0)[0]);
        rest = behind;
    }
    rest.is_empty().then_some(Asked { head, header, reds })
}

fn write_reply(mut stream: &TcpStream, reply: Reply) -> std::io::Result<()> {
    match reply {
        Reply::Whole(status, body) => {
            write!(stream, "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len())?;
            stream.write_all(&body)
        }
        Reply::Raw(bytes) => stream.write_all(&bytes),
        Reply::Hang => stream.read(&mut [0]).map(drop),
    }
}

/// Serves on a thread of its own for the rest of the test; `respond` is given the question and how many came before.
fn server(respond: impl Fn(&Asked, usize) -> Reply + Send + Sync + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/score", listener.local_addr().unwrap());
    let respond = Arc::new(respond);
    let n_asked = Arc::new(AtomicUsize::new(0));
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let (respond, n_asked) = (Arc::clone(&respond), Arc::clone(&n_asked));
            std::thread::spawn(move || {
                let asked = read_request(&stream)?;
                let reply = respond(&asked, n_asked.fetch_add(1, Ordering::SeqCst));
                write_reply(&stream, reply).ok()
            });
        }
    });
    url
}

/// Two pictures a request, quick to retry and to lose patience.
fn config(url: &str) -> HttpConfig {
    let mut config = HttpConfig::new("far", url);
    config.limits.images_per_request = NonZeroUsize::new(2).unwrap();
    config.retry.first_wait_ms = 2;
    config.retry.times = 1;
    config
}

fn reward(url: &str) -> HttpReward {
    HttpReward::new(config(url)).unwrap()
}

const N_ROWS: usize = 6;

/// Prompts and pictures whose first red is `10 * row`.
fn rows(n_rows: usize) -> Vec<(Prompt, RgbImage)> {
    let picture = |row| RgbImage::from_fn(9, 5, |x, y| Rgb([if x + y == 0 { 10 * row } else { 200 }, y as u8, 3]));
    (0..n_rows as u8).map(|row| (Prompt::new(format!("prompt {row}")).with("row", row), picture(row))).collect()
}

fn batch(rows: &[(Prompt, RgbImage)]) -> Vec<(&Prompt, &RgbImage)> {
    rows.iter().map(|(prompt, image)| (prompt, image)).collect()
}

fn expected(row: usize) -> f32 {
    score_of(10 * row as u8)
}

/// Exactly `failed` rows fail with `message`; every other score is right to the last bit.
fn check_failures(reward: &impl Reward<RgbImage>, failed: &[usize], message: &str) {
    let rows = rows(N_ROWS);
    let each = reward.score_each(&batch(&rows));
    assert_eq!(each.len(), N_ROWS);
    for (row, verdict) in each.iter().enumerate() {
        match (failed.contains(&row), verdict) {
            (true, Err(error)) => assert!(error.to_string().contains(message), "row {row}: {error} lacks {message}"),
            (false, Ok(score)) => assert_eq!(*score, expected(row), "row {row}"),
            (_, verdict) => panic!("row {row}, where {failed:?} should fail: {verdict:?}"),
        }
    }
    let error = reward.score_batch(&batch(&rows)).unwrap_err().to_string();
    assert!(error.starts_with(&format!("row {}: ", failed[0])), "{error}");
    assert!(error.contains(message), "{error} lacks {message}");
}

/// One kind of failure, done to the answer that holds the bad row.
type Spoil = fn(&Asked, usize) -> Reply;

/// With `at` where the bad row is among those asked about.
fn with_scores(asked: &Asked, at: usize, score: &str) -> Reply {
    let mut scores: Vec<String> = asked.scores().iter().map(Value::to_string).collect();
    scores[at] = score.into();
    let body = format!(r#"{{"scores":[{}],"model":"reds","version":1}}"#, scores.join(","));
    Reply::Whole("200 OK".into(), body.into_bytes())
}

#[test]
fn every_failure_at_every_place_fails_what_it_must_and_nothing_else() {
    let of_sample: [(&str, Spoil); 4] = [
        ("was given no score (null)", |asked, at| with_scores(asked, at, "null")),
        ("scored NaN", |asked, at| with_scores(asked, at, "NaN")),
        ("scored Infinity", |asked, at| with_scores(asked, at, "Infinity")),
        ("ValueError: no face", |asked, at| {
            let mut errors = vec![Value::Null; asked.reds.len()];
            errors[at] = json!("ValueError: no face");
            Reply::ok(&json!({ "scores": asked.scores(), "errors": errors, "model": "reds", "version": 1 }))
        }),
    ];
    let of_refused: [(&str, Spoil); 4] = [
        ("returned 0 scores for 1 images", |asked, _| {
            Reply::ok(&json!({ "scores": asked.scores()[1..], "model": "reds", "version": 1 }))
        }),
        ("status 500 Internal Server Error: out of memory; gave up after 2 attempts", |_, _| {
            Reply::status("500 Internal Server Error", "out of memory\nat line 3")
        }),
        ("its answer is not what the protocol asks for", |_, _| Reply::status("200 OK", "<html>hello</html>")),
        ("status 400 Bad Request: no such column", |_, _| Reply::status("400 Bad Request", "no such column")),
    ];
    let of_request: [(&str, Spoil); 3] = [
        ("no answer within 200 ms (raise timeout_ms); gave up after 2 attempts", |_, _| Reply::Hang),
        ("connection closed before message completed; gave up after 2 attempts", |_, _| Reply::Raw(Vec::new())),
        ("its answer broke off", |_, _| Reply::Raw(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{\"sco".to_vec())),
    ];
    for bad in [0, 2, 5] {
        for (message, spoil) in of_sample.iter().chain(&of_refused) {
            check_failures(&spoilt(bad, *spoil, 60_000), &[bad], message);
        }
        let of_its_request = [bad / 2 * 2, bad / 2 * 2 + 1];
        for (message, spoil) in &of_request {
            // Only a server that hangs is not waited for.
            let timeout_ms = if message.starts_with("no answer") { 200 } else { 60_000 };
            check_failures(&spoilt(bad, *spoil, timeout_ms), &of_its_request, message);
        }
    }
}

/// Sixteen pictures a request, refused where `refused` says so of their reds; the verdicts, and how often it was asked.
fn asked_in_halves(refused: impl Fn(&[u8]) -> bool + Send + Sync + 'static) -> (Vec<Option<f32>>, usize) {
    let n_asked = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&n_asked);
    let url = server(move |asked, n_before| {
        counted.store(n_before + 1, Ordering::SeqCst);
        if refused(&asked.reds) { Reply::status("422 Unprocessable Entity", "no") } else { asked.answer() }
    });
    let mut config = config(&url);
    config.limits.images_per_request = NonZeroUsize::new(16).unwrap();
    let rows = rows(16);
    let scores = HttpReward::new(config).unwrap().score_each(&batch(&rows)).into_iter().map(Result::ok).collect();
    (scores, n_asked.load(Ordering::SeqCst))
}

#[test]
fn the_picture_that_a_server_refuses_is_found_by_halves() {
    let all = |failed: fn(usize) -> bool| -> Vec<Option<f32>> {
        (0..16).map(|row| (!failed(row)).then(|| expected(row))).collect()
    };
    for (red, failed) in [(0, (|row| row == 0) as fn(usize) -> bool), (70, |row| row == 7), (150, |row| row == 15)] {
        assert_eq!(asked_in_halves(move |reds| reds.contains(&red)), (all(failed), 1 + 2 * 4));
    }
    // Two at fault in one half of a half; what stands between them falls with them.
    let pair = |reds: &[u8]| reds.contains(&80) || reds.contains(&100);
    assert_eq!(asked_in_halves(pair), (all(|row| (8..12).contains(&row)), 1 + 2 * 3));
    assert_eq!(asked_in_halves(|_| true), (all(|_| true), 3));
    assert_eq!(asked_in_halves(|reds| reds.len() > 8), (all(|_| false), 3));
}

/// A reward whose server spoils each answer about row `bad`.
fn spoilt(bad: usize, spoil: Spoil, timeout_ms: u64) -> HttpReward {
    let url = server(move |asked, _| match asked.reds.iter().position(|red| usize::from(*red) == 10 * bad) {
        Some(at) => spoil(asked, at),
        None => asked.answer(),
    });
    let mut config = config(&url);
    config.limits.timeout_ms = timeout_ms;
    HttpReward::new(config).unwrap()
}

#[test]
fn the_message_names_reward_row_and_server() {
    let url = server(|_, _| Reply::status("422 Unprocessable Entity", "\n  pictures must be square \nmore"));
    let set = RewardSet::new().with(reward(&url), 1.0).unwrap();
    let rows = rows(3);
    let error = set.score(&batch(&rows)).unwrap_err().to_string();
    let said = "status 422 Unprocessable Entity: pictures must be square";
    assert_eq!(error, format!("reward `far`: row 0: {url}: {said}"));
}

#[test]
fn passing_troubles_are_retried_and_counted_and_lasting_ones_are_not() {
    let troubles: [fn() -> Reply; 5] = [
        || Reply::status("500 Internal Server Error", ""),
        || Reply::status("429 Too Many Requests", "wait"),
        || Reply::status("408 Request Timeout", "the body took too long"),
        || Reply::Raw(Vec::new()),
        || Reply::status("503 Service Unavailable", "loading"),
    ];
    for trouble in troubles {
        let url = server(move |asked, n_before| if n_before < 2 { trouble() } else { asked.answer() });
        let mut config = config(&url);
        config.retry.times = 3;
        let reward = HttpReward::new(config).unwrap();
        let rows = rows(2);
        assert_eq!(reward.score_batch(&batch(&rows)).unwrap(), [expected(0), expected(1)]);
        assert_eq!(reward.n_retries(), 2);
    }
    for status in ["400 Bad Request", "401 Unauthorized", "404 Not Found", "204 No Content"] {
        let n_asked = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&n_asked);
        let url = server(move |_, n_before| {
            counted.store(n_before + 1, Ordering::SeqCst);
            Reply::status(status, "")
        });
        let (reward, rows) = (reward(&url), rows(1));
        let error = reward.score_batch(&batch(&rows)).unwrap_err().to_string();
        assert!(error.ends_with(&format!("status {status}")), "{error}");
        assert_eq!((n_asked.load(Ordering::SeqCst), reward.n_retries()), (1, 0), "{status}");
    }
}

#[test]
fn a_server_that_is_not_there_is_named_with_the_systems_words() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let error = reward(&format!("http://{free}/score")).score_batch(&batch(&rows(1))).unwrap_err().to_string();
    assert!(error.contains(&free.to_string()) && error.contains("Connection refused"), "{error}");
    assert!(error.ends_with("gave up after 2 attempts"), "{error}");
}

#[test]
fn an_answer_that_is_too_long_is_refused() {
    let url = server(|asked, _| {
        let errors = vec!["x".repeat(1200); asked.reds.len()];
        Reply::ok(&json!({ "scores": asked.scores(), "errors": errors, "model": "reds", "version": 1 }))
    });
    let mut config = config(&url);
    config.limits.max_response_bytes = 1000;
    let reward = HttpReward::new(config).unwrap();
    check_failures(&reward, &[0, 1, 2, 3, 4, 5], "its answer has more than 1000 bytes (max_response_bytes)");
    assert_eq!(reward.n_retries(), 0);
}

#[test]
fn a_redirect_is_refused_and_not_followed() {
    let n_followed = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&n_followed);
    let other = server(move |asked, _| {
        counted.fetch_add(1, Ordering::SeqCst);
        asked.answer()
    });
    for status in ["301 Moved Permanently", "302 Found", "307 Temporary Redirect", "308 Permanent Redirect"] {
        let target = other.clone();
        let url = server(move |_, _| Reply::Whole(format!("{status}\r\nLocation: {target}"), Vec::new()));
        let message = format!("redirects to `{other}` ({status}), which is not followed");
        check_failures(&reward(&url), &[0, 1, 2, 3, 4, 5], &message);
    }
    assert_eq!(n_followed.load(Ordering::SeqCst), 0);
}

#[test]
fn another_model_in_the_middle_of_a_run_is_an_error_that_names_both() {
    let url = server(|asked, n_before| {
        let version = if n_before == 0 { "2.0" } else { "2.1" };
        Reply::ok(&json!({ "scores": asked.scores(), "model": "hps", "version": version }))
    });
    let reward = reward(&url);
    let rows = rows(2);
    assert!(reward.score_batch(&batch(&rows)).is_ok());
    let error = reward.score_batch(&batch(&rows)).unwrap_err().to_string();
    assert!(error.contains(r#"was model "hps", version "2.0", and is now model "hps", version "2.1""#), "{error}");
    assert_eq!(reward.n_retries(), 0);
}

#[derive(Default)]
struct Traffic {
    n_arrived: usize,
    n_left: usize,
    most_at_once: usize,
}

#[test]
fn requests_overlap_within_their_limit_and_scores_keep_their_places() {
    let traffic = Arc::new((Mutex::new(Traffic::default()), Condvar::new()));
    let seen = Arc::clone(&traffic);
    // The first three wait for each other and leave last first; a client that sends one at a time waits out the limit.
    let url = server(move |asked, number| {
        let (traffic, changed) = &*seen;
        let mut now = traffic.lock().unwrap();
        now.n_arrived += 1;
        now.most_at_once = now.most_at_once.max(now.n_arrived - now.n_left);
        changed.notify_all();
        if number < 3 {
            let patience = Duration::from_secs(2);
            now = changed.wait_timeout_while(now, patience, |now| now.n_arrived < 3).unwrap().0;
            // Time for a fourth, which must not come before one of these is answered.
            now = changed.wait_timeout_while(now, Duration::from_millis(40), |now| now.n_arrived < 4).unwrap().0;
            now = changed.wait_timeout_while(now, patience, |now| now.n_left < 2 - number).unwrap().0;
        }
        now.n_left += 1;
        changed.notify_all();
        drop(now);
        asked.answer()
    });
    let mut config = config(&url);
    config.limits.max_in_flight = NonZeroUsize::new(3).unwrap();
    let reward = HttpReward::new(config).unwrap();
    let rows = rows(24);
    let wanted: Vec<f32> = (0..24).map(expected).collect();
    // Two threads share one limit.
    std::thread::scope(|scope| {
        let threads = [(); 2].map(|()| scope.spawn(|| reward.score_batch(&batch(&rows)).unwrap()));
        threads.into_iter().for_each(|thread| assert_eq!(thread.join().unwrap(), wanted));
    });
    assert_eq!(traffic.0.lock().unwrap().most_at_once, 3, "requests under way at most");
}

#[test]
fn a_thread_of_another_runtime_may_ask_and_drop() {
    let url = server(|asked, _| asked.answer());
    for runtime in [
        tokio::runtime::Builder::new_current_thread().build().unwrap(),
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap(),
    ] {
        runtime.block_on(async {
            let (reward, rows) = (reward(&url), rows(3));
            assert_eq!(reward.score_batch(&batch(&rows)).unwrap(), [expected(0), expected(1), expected(2)]);
            drop(reward);
        });
    }
}

#[test]
fn the_question_carries_columns_token_and_encoding() {
    // The variable is the build tool's own: setting one would be unsafe, and others are not everywhere.
    let token = std::env::var("CARGO_PKG_NAME").unwrap();
    let heads = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&heads);
    let url = server(move |asked, _| {
        seen.lock().unwrap().push((asked.head.to_lowercase(), asked.header.clone()));
        asked.answer()
    });
    let mut config = config(&url);
    config.token_env = Some("CARGO_PKG_NAME".into());
    config.encoding = Encoding::Jpeg { quality: 95 };
    let reward = HttpReward::new(config).unwrap();
    assert!(!format!("{reward:?}").contains(&format!("Bearer {token}")), "the token is in no message");
    let rows = rows(1);
    assert_eq!(reward.score_each(&batch(&rows)).len(), 1);
    assert!(reward.score_batch(&[]).unwrap().is_empty(), "nothing to judge is no request");
    let heads = heads.lock().unwrap();
    assert_eq!(heads.len(), 1);
    let (head, header) = &heads[0];
    assert!(head.contains(&format!("authorization: bearer {token}\r\n")), "{head}");
    assert!(head.starts_with("post /score http/1.1\r\n") && head.contains("application/octet-stream"), "{head}");
    assert_eq!(header["prompts"], json!([{ "text": "prompt 0", "columns": { "row": 0 } }]));
    assert_eq!((&header["encoding"], &header["protocol"]), (&json!("jpeg"), &json!(1)));
}

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

#[test]
fn a_detector_is_asked_as_a_reward_is() {
    let url = server(|asked, n_before| {
        assert_eq!(asked.header["prompts"], json!([{ "text": "", "columns": {} }]));
        let cat = json!({ "class": "cat", "score": 0.5, "bbox": [1, 2, 3, 4], "color": "red" });
        match (n_before, asked.reds[0]) {
            (0, _) => Reply::status("503 Service Unavailable", "loading"),
            (_, 0) => Reply::ok(&json!({ "detections": [[cat, cat]], "model": "cats", "version": 2 })),
            (_, 10) => Reply::ok(&json!({ "detections": [[]], "model": "cats", "version": 2 })),
            _ => Reply::ok(&json!({ "detections": [[]], "model": "cats", "version": 3 })),
        }
    });
    let detector = HttpDetector::new(config(&url)).unwrap();
    assert_eq!(detector.scorer(), None);
    let rows = rows(3);
    let cat = Detection::new("cat", 0.5, [1.0, 2.0, 3.0, 4.0]).with_color("red");
    assert_eq!(detector.detect(&rows[0].1).unwrap(), [cat.clone(), cat]);
    assert_eq!(detector.detect(&rows[1].1).unwrap(), []);
    assert_eq!(detector.scorer().unwrap(), "model \"cats\", version 2");
    let error = detector.detect(&rows[2].1).unwrap_err().to_string();
    assert!(error.starts_with(&url) && error.contains("is now model \"cats\", version 3"), "{error}");
}

#[test]
fn a_detector_that_fails_is_an_error_and_never_nothing_found() {
    let cases: [(Spoil, &str); 14] = [
        (|_, _| said_ok(r#"{"detections":[null]}"#), "has no detections (null)"),
        (|_, _| said_ok(r#"{"detections":[NaN]}"#), "\"NaN\""),
        (|_, _| said_ok(r#"{"detections":[[{"class":"cat","score":NaN,"bbox":[0,0,1,1]}]]}"#), "\"NaN\""),
        (|_, _| said_ok(r#"{"detections":[[{"class":"cat","score":2,"bbox":[0,0,1,1]}]]}"#), "score 2 of a cat"),
        (|_, _| said_ok(r#"{"detections":[[{"class":"cat","bbox":[0,0,1,1]}]]}"#), "missing field `score`"),
        (|_, _| said_ok(r#"{"detections":[[]],"errors":["late"]}"#), "late"),
        (|_, _| said_ok(r#"{"detections":[]}"#), "returned 0 detections for 1 images"),
        (|_, _| said_ok(r#"{"detections":[[],[]]}"#), "returned 2 detections for 1 images"),
        (|_, _| said_ok(r#"{"scores":[0.5]}"#), "answered without `detections`"),
        (|_, _| said_ok(r#"{"scores":[0.5],"detections":[[]]}"#), "answered with scores and detections"),
        (|_, _| said_ok(""), "its answer is not what the protocol asks for"),
        (|_, _| Reply::status("500 Internal Server Error", "out of memory"), "gave up after 2 attempts"),
        (|_, _| Reply::Raw(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{".to_vec()), "its answer broke off"),
        (|_, _| Reply::Hang, "no answer within 40 ms"),
    ];
    let rows = rows(1);
    for (reply, expected) in cases {
        let mut config = config(&server(reply));
        config.limits.timeout_ms = if expected.starts_with("no answer") { 40 } else { 60_000 };
        let error = HttpDetector::new(config).unwrap().detect(&rows[0].1).unwrap_err().to_string();
        assert!(error.contains(expected), "{error} lacks {expected}");
    }
}

fn said_ok(body: &str) -> Reply {
    Reply::status("200 OK", body)
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
