//! Races against other programs: each contender is a process of its own, and laps are run in turns.
//!
//! A machine's speed drifts by more than what is to be told apart, so no two times of different minutes are compared: a
//! ratio is the median over rounds of what two contenders took within the same round. Processes of their own have
//! threads and peak memory of their own, ours as well, for which a bench starts itself as a worker.

pub mod arguments;
pub mod contender;
pub mod machine;
pub mod report;
pub mod shapes;

use std::time::Instant;

use anyhow::Result;

use contender::{Contender, Lap};

/// Threads of every contender.
pub const THREADS: usize = 2;

/// Lets each contender run a lap, in turns; a first round that nothing counts, which warms up, and then `rounds` more.
///
/// The laps of each contender, in order.
pub fn race(contenders: &mut [Contender], rounds: usize) -> Result<Vec<Vec<Lap>>> {
    let mut laps = vec![Vec::new(); contenders.len()];
    for round in 0..=rounds {
        for (contender, laps) in contenders.iter_mut().zip(&mut laps) {
            let lap = contender.lap()?;
            if round > 0 {
                laps.push(lap);
            }
        }
    }
    Ok(laps)
}

/// The median; of an even number the upper one, and not a number where there is none.
pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// The median of the laps' seconds.
pub fn seconds(laps: &[Lap]) -> f64 {
    median(laps.iter().map(|lap| lap.seconds))
}

/// How many times as long the peer takes: the median over rounds.
pub fn ratio(ours: &[Lap], peers: &[Lap]) -> f64 {
    median(ours.iter().zip(peers).map(|(ours, peer)| peer.seconds / ours.seconds))
}

/// What work gives, and the seconds that it takes.
pub fn timed<T>(work: impl FnOnce() -> Result<T>) -> Result<(T, f64)> {
    let clock = Instant::now();
    let done = work()?;
    Ok((done, clock.elapsed().as_secs_f64()))
}
