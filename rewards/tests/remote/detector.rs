//! A detector behind HTTP.

use grpo_rewards::geneval::{Detection, Detector};
use grpo_rewards::remote::HttpDetector;
use serde_json::json;

use crate::asked::rows;
use crate::config;
use crate::wire::{Reply, Spoil, server};

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
