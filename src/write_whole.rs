//! Files that are whole or not there, whenever the process or the machine stops.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use crate::{Error, Result};

/// Writes a file so that, after a crash, it is the new one or the one before: under another name beside it, synced, renamed.
///
/// Where that fails, what was half written is removed, so that it fills no full disk.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = Path::new(&partial);
    let write = || -> std::io::Result<()> {
        let mut file = File::create(partial)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(partial, path)
    };
    let synced = write().and_then(|()| {
        // The name itself is on disk once its folder is; a system that opens no folders has other means.
        match path.parent().map(|folder| if folder.as_os_str().is_empty() { Path::new(".") } else { folder }) {
            Some(folder) => File::open(folder).map_or(Ok(()), |folder| folder.sync_all()),
            None => Ok(()),
        }
    });
    synced.map_err(|error| {
        fs::remove_file(partial).ok();
        Error::file(path, error)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_whole_and_leaves_nothing_beside_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        write_whole(&path, b"one").unwrap();
        write_whole(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        // A folder of that name cannot be replaced by a file.
        fs::create_dir(folder.path().join("b")).unwrap();
        fs::write(folder.path().join("b/inside"), "").unwrap();
        assert!(write_whole(&folder.path().join("b"), b"three").is_err());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2, "half a file stays behind");
    }
}
