//! A reward behind HTTP, for a scorer that must run on another machine or in another process than the training.
//!
//! ```text
//! cargo run --release --example score_server -- clip 8000   # the reward and the port; brightness where none is given
//! ```
//!
//! A run scores by it with `HttpReward`; the same example, given `ask`, is such a run in one line:
//!
//! ```text
//! cargo run --release --example score_server -- ask 8000
//! ```

#![expect(clippy::print_stdout, reason = "an example speaks to a person")]

use std::net::{Ipv4Addr, TcpListener};

use anyhow::{Context, Result, bail};
use grpo::{Prompt, Reward};
use grpo_rewards::Brightness;
use grpo_rewards::clip::ClipReward;
use grpo_rewards::remote::{HttpConfig, HttpReward, ServerConfig, serve};
use image::{Rgb, RgbImage};

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let what = arguments.next().unwrap_or_else(|| "brightness".into());
    let port: u16 = arguments.next().map_or(Ok(8000), |port| port.parse()).context("the second argument is a port")?;
    if what == "ask" {
        return ask(port);
    }
    // Loopback only: there is no password. From another machine: ssh -N -L 8000:127.0.0.1:8000 this-machine
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).with_context(|| format!("port {port}"))?;
    println!("{what} at http://{}/score", listener.local_addr()?);
    // A run stops where model or version change, so both say what decides a score.
    match what.as_str() {
        "brightness" => serve(listener, Brightness, ServerConfig::new("brightness", "1"))?,
        "clip" => serve(listener, ClipReward::tiny()?, ServerConfig::new("clip", "tiny"))?,
        other => bail!("`{other}` is no reward of this example; name brightness, clip or ask"),
    }
    Ok(())
}

/// Two pictures' scores, as a run asks for them.
fn ask(port: u16) -> Result<()> {
    let reward = HttpReward::new(HttpConfig::new("far", format!("http://127.0.0.1:{port}/score")))?;
    let prompt = Prompt::new("a photo of a red circle");
    let pictures = [[220, 20, 20], [20, 20, 220]].map(|colour| RgbImage::from_pixel(64, 64, Rgb(colour)));
    for (score, colour) in
        reward.score_each(&pictures.each_ref().map(|picture| (&prompt, picture))).iter().zip(["red", "blue"])
    {
        println!("{colour:5} {score:?}");
    }
    Ok(())
}
