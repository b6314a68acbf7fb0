//! A batch as several questions at once, and what they share.

use std::panic::resume_unwind;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};

use grpo::Prompt;
use image::RgbImage;

use super::{MAX_DECODED_BYTES, Verdict};

/// What one question's pictures take together at most, unless there is one alone: half of what a scorer written with
/// this crate decodes for a request, so that none is refused for its neighbours.
const QUESTION_BYTES: u64 = MAX_DECODED_BYTES / 2;

/// A picture, and what it was drawn for.
type Row<'a> = (&'a Prompt, &'a RgbImage);

/// How a batch is divided.
pub(crate) struct Plan {
    /// The most rows of one question; large pictures make it fewer.
    pub rows_per_question: usize,
    /// The most questions of one batch at a time.
    pub n_at_once: usize,
    /// How far the batch is asked about.
    pub until: Until,
}

/// How far a batch is asked about.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Until {
    /// To its end, whatever fails.
    End,
    /// Until something has failed.
    Failure,
}

/// Every row's verdict in the batch's order; with [`Until::Failure`] perhaps only of its first rows, up to a failed one.
///
/// Questions start in order and those started are waited for, so the first failed row is the same whatever the timing.
pub(crate) fn scatter<T: Send>(
    batch: &[Row<'_>],
    plan: &Plan,
    ask: impl Fn(&[Row<'_>]) -> Vec<Verdict<T>> + Sync,
) -> Vec<Verdict<T>> {
    let questions = questions(batch, plan.rows_per_question, QUESTION_BYTES);
    let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let work = || {
        let mut answered = Vec::new();
        // Looked at before a question is taken: one that is taken is always asked.
        while !(plan.until == Until::Failure && failed.load(Ordering::SeqCst)) {
            let turn = next.fetch_add(1, Ordering::SeqCst);
            let Some(rows) = questions.get(turn) else { break };
            let verdicts = ask(rows);
            failed.fetch_or(verdicts.iter().any(Result::is_err), Ordering::SeqCst);
            answered.push((turn, verdicts));
        }
        answered
    };
    let mut answered: Vec<(usize, Vec<Verdict<T>>)> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..plan.n_at_once.min(questions.len())).map(|_| scope.spawn(work)).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
    });
    answered.sort_by_key(|(turn, _)| *turn);
    answered.into_iter().flat_map(|(_, verdicts)| verdicts).collect()
}

/// The batch in pieces of at most so many rows and bytes; a picture of more bytes has a piece of its own, and fails by
/// itself where it is too large.
fn questions<'a, 'b>(mut batch: &'a [Row<'b>], max_rows: usize, max_bytes: u64) -> Vec<&'a [Row<'b>]> {
    let mut questions = Vec::new();
    while !batch.is_empty() {
        let mut n_bytes = 0;
        let fits = batch.iter().take(max_rows).take_while(|(_, image)| {
            n_bytes += image.as_raw().len() as u64;
            n_bytes <= max_bytes
        });
        let (question, rest) = batch.split_at(fits.count().max(1));
        questions.push(question);
        batch = rest;
    }
    questions
}

/// Things of which each serves one question at a time; whoever finds none idle waits.
#[derive(Debug)]
pub(crate) struct Pool<T> {
    things: Vec<Mutex<T>>,
    idle: Mutex<Vec<usize>>,
    returned: Condvar,
}

impl<T> Pool<T> {
    /// At least one thing, or whoever asks for one waits for ever.
    pub(crate) fn new(things: Vec<T>) -> Self {
        let idle = Mutex::new((0..things.len()).collect());
        Self { things: things.into_iter().map(Mutex::new).collect(), idle, returned: Condvar::new() }
    }

    /// What `work` makes of one of them.
    pub(crate) fn lend<R>(&self, work: impl FnOnce(&mut T) -> R) -> R {
        let turn = Turn { pool: self, index: self.wait() };
        let mut thing = self.things[turn.index].lock().unwrap_or_else(PoisonError::into_inner);
        work(&mut thing)
    }

    fn wait(&self) -> usize {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match idle.pop() {
                Some(index) => return index,
                None => idle = self.returned.wait(idle).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }
}

/// Gives its thing back when dropped, after a panic as well.
struct Turn<'a, T> {
    pool: &'a Pool<T>,
    index: usize,
}

impl<T> Drop for Turn<'_, T> {
    fn drop(&mut self) {
        self.pool.idle.lock().unwrap_or_else(PoisonError::into_inner).push(self.index);
        self.pool.returned.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exchange::asked::all_or_first_failure;

    /// Verdicts for rows whose prompts are their numbers; those in `failing` fail.
    fn verdicts(n_rows: usize, plan: &Plan, failing: &[usize]) -> (Vec<Verdict>, usize) {
        let prompts: Vec<Prompt> = (0..n_rows).map(|row| Prompt::new(row.to_string())).collect();
        let image = RgbImage::new(1, 1);
        let batch: Vec<_> = prompts.iter().map(|prompt| (prompt, &image)).collect();
        let n_asked = AtomicUsize::new(0);
        let verdicts = scatter(&batch, plan, |rows| {
            n_asked.fetch_add(1, Ordering::SeqCst);
            let row = |prompt: &Prompt| prompt.text.parse::<usize>().unwrap();
            let judge = |row| if failing.contains(&row) { Err(format!("bad {row}")) } else { Ok(row as f32) };
            rows.iter().map(|(prompt, _)| judge(row(prompt))).collect()
        });
        (verdicts, n_asked.into_inner())
    }

    #[test]
    fn rows_keep_their_places() {
        for (rows_per_question, n_at_once) in [(1, 1), (3, 4), (100, 2), (7, 50)] {
            let plan = Plan { rows_per_question, n_at_once, until: Until::End };
            let (verdicts, n_asked) = verdicts(50, &plan, &[0, 20, 49]);
            assert_eq!(n_asked, 50_usize.div_ceil(rows_per_question));
            let mut expected: Vec<Verdict> = (0..50).map(|row| Ok(row as f32)).collect();
            [0, 20, 49].into_iter().for_each(|row| expected[row] = Err(format!("bad {row}")));
            assert_eq!(verdicts, expected);
        }
        let plan = Plan { rows_per_question: 4, n_at_once: 4, until: Until::Failure };
        assert!(all_or_first_failure(verdicts(0, &plan, &[]).0).unwrap().is_empty());
    }

    #[test]
    fn large_pictures_are_asked_about_in_smaller_company() {
        let prompt = Prompt::new("x");
        let images = [1, 1, 4, 1, 2, 1, 9, 9, 1, 1, 1, 1].map(|width| RgbImage::new(width, 10));
        let batch: Vec<_> = images.iter().map(|image| (&prompt, image)).collect();
        let widths = |max_rows, max_bytes| -> Vec<Vec<u32>> {
            let pieces = questions(&batch, max_rows, max_bytes).into_iter();
            pieces.map(|piece| piece.iter().map(|(_, image)| image.width()).collect()).collect()
        };
        // A column of ten pixels is 30 bytes, so that four of them are just within the limit.
        let expected: [&[u32]; 7] = [&[1, 1], &[4], &[1, 2, 1], &[9], &[9], &[1, 1, 1], &[1]];
        assert_eq!(widths(3, 120), expected);
        assert_eq!(widths(100, u64::MAX).len(), 1);
        assert_eq!(widths(100, 0).len(), 12);
        assert!(questions(&[], 3, 120).is_empty());
    }

    #[test]
    fn the_first_failure_is_found_and_later_questions_are_spared() {
        for n_at_once in [1, 3, 8] {
            let plan = Plan { rows_per_question: 2, n_at_once, until: Until::Failure };
            assert_eq!(verdicts(200, &plan, &[]).0.len(), 200, "nothing failed, nothing is spared");
            for _ in 0..50 {
                let (verdicts, n_asked) = verdicts(200, &plan, &[5, 6, 150]);
                let message = all_or_first_failure(verdicts).unwrap_err().to_string();
                assert_eq!(message, "row 5: bad 5");
                assert!(n_at_once > 1 || n_asked == 3, "{n_asked} questions were asked");
            }
        }
    }

    #[test]
    fn a_panic_is_resumed_and_what_was_lent_is_back() {
        let pool = Pool::new(vec![1]);
        let plan = Plan { rows_per_question: 1, n_at_once: 2, until: Until::End };
        let prompt = Prompt::new("x");
        let image = RgbImage::new(1, 1);
        let panicked = std::panic::catch_unwind(|| {
            scatter::<f32>(&[(&prompt, &image)], &plan, |_| pool.lend(|_| panic!("on purpose")))
        });
        assert!(panicked.is_err());
        assert_eq!(pool.lend(|thing| *thing), 1);
    }
}
