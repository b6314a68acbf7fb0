//! A reward behind HTTP against a server that misbehaves in every way a server can, and the servers of this crate.
//!
//! The misbehaving server is written on a bare socket and reads questions by itself, so that client and server cannot
//! share a mistake.

#![cfg(feature = "http")]
#![expect(clippy::unwrap_used, reason = "a test's helpers may fail the test")]

#[path = "../asked/mod.rs"]
mod asked;
mod client;
mod detector;
mod served;
mod step;
mod wire;

use std::num::NonZeroUsize;

use grpo_rewards::remote::{HttpConfig, HttpReward};

use wire::score_of;

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

fn expected(row: usize) -> f32 {
    score_of(10 * row as u8)
}
