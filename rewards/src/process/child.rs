//! One process of a scorer: asked, watched, and ended with everything it started.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{ChildStderr, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

#[cfg(unix)]
use super::group::Group;
use crate::exchange::excerpt;

/// Lines of standard error that are kept for messages.
const KEPT_LINES: usize = 20;
/// The longest line of standard error that is read as one.
const LONGEST_LINE: u64 = 1 << 16;
/// How long a process that closed its output is given to end by itself, so that its exit code can be told.
const FAREWELL: Duration = Duration::from_millis(500);

/// Why there is no answer.
pub(super) enum Silence {
    /// A new process may do better.
    Worthwhile(String),
    /// It would do the same.
    Final(String),
}

/// A running process and the threads at its three pipes.
///
/// The threads end with their pipes and are never joined: something that the process started, and that has left its
/// group, may hold a pipe open.
#[derive(Debug)]
pub(super) struct Child {
    process: std::process::Child,
    /// There until the drop.
    #[cfg(unix)]
    group: Option<Group>,
    questions: Sender<Arc<[u8]>>,
    lines: Receiver<Result<Vec<u8>, String>>,
    complaints: Arc<Mutex<VecDeque<String>>>,
    /// Disconnected once standard error is closed.
    stderr_open: Receiver<()>,
    has_answered: bool,
}

impl Child {
    pub(super) fn start(command: &[String], max_answer_bytes: usize) -> Result<Self, String> {
        let Some((program, arguments)) = command.split_first() else { return Err("the command is empty".into()) };
        let mut started = Command::new(program);
        started.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // A group of its own, so that what a wrapper like `conda run` starts ends as well.
        #[cfg(unix)]
        let group = Group::new().and_then(|group| group.admit(&mut started).map(|()| group));
        #[cfg(unix)]
        let group = Some(group.map_err(|error| format!("no process group for `{program}`: {error}"))?);
        let mut process = started
            .spawn()
            .map_err(|error| format!("cannot start `{program}`: {error}; name a program that is on the PATH"))?;
        let (Some(stdin), Some(stdout), Some(stderr)) =
            (process.stdin.take(), process.stdout.take(), process.stderr.take())
        else {
            return Err(format!("`{program}` was started without pipes"));
        };
        let (questions, asked) = channel();
        // One line may wait to be read: a program that prints without being asked stands still.
        let (answered, lines) = sync_channel(1);
        let (stderr_closed, stderr_open) = channel();
        let complaints = Arc::default();
        let kept = Arc::clone(&complaints);
        // From here on the process is ended by the drop, whatever follows.
        let child = Self {
            process,
            #[cfg(unix)]
            group,
            questions,
            lines,
            complaints,
            stderr_open,
            has_answered: false,
        };
        on_thread("stdin", move || write_questions(stdin, &asked))?;
        on_thread("stdout", move || read_answers(stdout, max_answer_bytes, &answered))?;
        on_thread("stderr", move || pass_on(stderr, &kept, stderr_closed))?;
        Ok(child)
    }

    /// The line that answers `question`; after any error this process is of no use.
    pub(super) fn ask(
        &mut self,
        question: &Arc<[u8]>,
        patience: Duration,
        first_patience: Duration,
    ) -> Result<Vec<u8>, Silence> {
        let waited = if self.has_answered { patience } else { patience.saturating_add(first_patience) };
        // Where the writer has ended, so has the process: the reader says so below.
        let _ = self.questions.send(Arc::clone(question));
        match self.lines.recv_timeout(waited) {
            Ok(Ok(line)) => {
                self.has_answered = true;
                Ok(line)
            }
            Ok(Err(message)) => Err(Silence::Final(message)),
            Err(RecvTimeoutError::Timeout) => {
                let remedy = if self.has_answered { "timeout_ms" } else { "start_timeout_ms" };
                let message = format!("did not answer within {} ms (raise {remedy})", waited.as_millis());
                Err(Silence::Worthwhile(message))
            }
            Err(RecvTimeoutError::Disconnected) => Err(Silence::Worthwhile(self.epitaph())),
        }
    }

    /// How the process ended, in the words of its exit status and of its last line.
    fn epitaph(&mut self) -> String {
        let until = Instant::now() + FAREWELL;
        let mut status = self.process.try_wait();
        while matches!(status, Ok(None)) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(2));
            status = self.process.try_wait();
        }
        let ending = match status {
            Ok(Some(status)) => format!("ended without an answer ({status})"),
            Ok(None) => "closed its standard output without an answer".into(),
            Err(error) => format!("ended without an answer ({error})"),
        };
        // The last line may still be on its way.
        let _ = self.stderr_open.recv_timeout(until.saturating_duration_since(Instant::now()));
        let complaints = self.complaints.lock().unwrap_or_else(PoisonError::into_inner);
        match complaints.iter().rev().find(|line| !line.trim().is_empty()) {
            Some(line) => format!("{ending}; the last it said: {line}"),
            None => format!("{ending} and said nothing on standard error"),
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        #[cfg(unix)]
        drop(self.group.take());
        // Ended already, unless it has left its group.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn on_thread(pipe: &str, work: impl FnOnce() + Send + 'static) -> Result<(), String> {
    let spawned = std::thread::Builder::new().name(format!("scorer {pipe}")).spawn(work);
    spawned.map(drop).map_err(|error| format!("no thread for its {pipe}: {error}"))
}

/// Writing waits for the process to read, so it has a thread of its own and the time limit covers it.
fn write_questions(mut stdin: ChildStdin, asked: &Receiver<Arc<[u8]>>) {
    for question in asked {
        if stdin.write_all(&question).and_then(|()| stdin.flush()).is_err() {
            return;
        }
    }
}

fn read_answers(stdout: ChildStdout, max_bytes: usize, answered: &SyncSender<Result<Vec<u8>, String>>) {
    let mut stdout = BufReader::new(stdout);
    let limit = u64::try_from(max_bytes).unwrap_or(u64::MAX).saturating_add(1);
    loop {
        let mut line = Vec::new();
        let read = stdout.by_ref().take(limit).read_until(b'\n', &mut line);
        let whole = line.last() == Some(&b'\n');
        let line = match read {
            Ok(_) if whole => Ok(line),
            Ok(_) if line.len() > max_bytes => Err(format!(
                "printed a line of more than {max_bytes} bytes (max_answer_bytes) that starts with `{}`",
                excerpt(&line)
            )),
            // The rest of a line at the end of the output is no answer, and the end is told by the exit status.
            _ => return,
        };
        let last = line.is_err();
        if answered.send(line).is_err() || last {
            return;
        }
    }
}

/// Passes standard error on, line by line, and keeps the last of it.
fn pass_on(stderr: ChildStderr, kept: &Mutex<VecDeque<String>>, _open: Sender<()>) {
    let mut stderr = BufReader::new(stderr);
    let mut line = Vec::new();
    while stderr.by_ref().take(LONGEST_LINE).read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
        // A closed standard error of our own is no reason to fail.
        let _ = std::io::stderr().write_all(&line);
        let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.push_back(excerpt(&line));
        let n_spare = kept.len().saturating_sub(KEPT_LINES);
        kept.drain(..n_spare);
        line.clear();
    }
}
