//! What the client makes of each failure, and what it sends.

use std::net::TcpListener;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use grpo::{Reward, RewardSet};
use grpo_rewards::exchange::Encoding;
use grpo_rewards::remote::HttpReward;
use serde_json::{Value, json};

use crate::asked::{batch, check_failures, rows};
use crate::wire::{Asked, Reply, Spoil, server};
use crate::{config, expected, reward};

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
            check_failures(&spoilt(bad, *spoil, 60_000), expected, &[bad], message);
        }
        let of_its_request = [bad / 2 * 2, bad / 2 * 2 + 1];
        for (message, spoil) in &of_request {
            // Only a server that hangs is not waited for.
            let timeout_ms = if message.starts_with("no answer") { 200 } else { 60_000 };
            check_failures(&spoilt(bad, *spoil, timeout_ms), expected, &of_its_request, message);
        }
    }
}

/// Sixteen pictures a request, answered with this status where `refused` says so of their reds; the verdicts, and how
/// often the server was asked.
fn asked_in_halves(
    status: &'static str,
    refused: impl Fn(&[u8]) -> bool + Send + Sync + 'static,
) -> (Vec<Option<f32>>, usize) {
    let n_asked = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&n_asked);
    let url = server(move |asked, n_before| {
        counted.store(n_before + 1, Ordering::SeqCst);
        if refused(&asked.reds) { Reply::status(status, "no") } else { asked.answer() }
    });
    let mut config = config(&url);
    config.limits.images_per_request = NonZeroUsize::new(16).unwrap();
    config.retry.times = 0;
    let rows = rows(16);
    let scores = HttpReward::new(config).unwrap().score_each(&batch(&rows)).into_iter().map(Result::ok).collect();
    (scores, n_asked.load(Ordering::SeqCst))
}

#[test]
fn the_picture_that_a_server_refuses_is_found_by_halves() {
    let bad = "422 Unprocessable Entity";
    let all = |failed: fn(usize) -> bool| -> Vec<Option<f32>> {
        (0..16).map(|row| (!failed(row)).then(|| expected(row))).collect()
    };
    for (red, failed) in [(0, (|row| row == 0) as fn(usize) -> bool), (70, |row| row == 7), (150, |row| row == 15)] {
        assert_eq!(asked_in_halves(bad, move |reds| reds.contains(&red)), (all(failed), 1 + 2 * 4));
    }
    // Two at fault in one half of a half; what stands between them falls with them.
    let pair = |reds: &[u8]| reds.contains(&80) || reds.contains(&100);
    assert_eq!(asked_in_halves(bad, pair), (all(|row| (8..12).contains(&row)), 1 + 2 * 3));
    assert_eq!(asked_in_halves(bad, |_| true), (all(|_| true), 3));
    assert_eq!(asked_in_halves(bad, |reds| reds.len() > 8), (all(|_| false), 3));
    for busy in ["429 Too Many Requests", "503 Service Unavailable"] {
        assert_eq!(asked_in_halves(busy, |reds| reds.len() > 8), (all(|_| true), 1), "{busy}");
    }
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
    check_failures(&reward, expected, &[0, 1, 2, 3, 4, 5], "its answer has more than 1000 bytes (max_response_bytes)");
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
        check_failures(&reward(&url), expected, &[0, 1, 2, 3, 4, 5], &message);
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
