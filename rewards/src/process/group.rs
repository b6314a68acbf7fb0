//! A scorer and what it starts, ended together, also where this process can end nothing any more.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

/// Waits for the end of its standard input, whatever signals come, and then ends its process group, itself included.
const LEADER: &str = "trap '' HUP INT QUIT TERM; while read -r _; do :; done; kill -s KILL 0";

/// A process group that ends with this value, and with this process however it ends.
///
/// Its leader is a shell at a pipe whose other end is here and nowhere else: the pipe is closed by the drop, or by the
/// system when this process is gone. While the leader is not waited for, no other process can have the group's number.
#[derive(Debug)]
pub(super) struct Group(Child);

impl Group {
    pub(super) fn new() -> io::Result<Self> {
        let mut leader = Command::new("/bin/sh");
        leader.args(["-c", LEADER]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        leader.process_group(0).spawn().map(Self)
    }

    /// The command starts in this group.
    pub(super) fn admit(&self, command: &mut Command) -> io::Result<()> {
        command.process_group(i32::try_from(self.0.id()).map_err(io::Error::other)?);
        Ok(())
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        // One signal goes to the whole group: once the leader has ended, the others have theirs.
        let _ = self.0.wait();
    }
}
