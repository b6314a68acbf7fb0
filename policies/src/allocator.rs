//! What the machine's memory is to programs that run on mimalloc: the command, the examples and the benches.

#![expect(unsafe_code, reason = "the allocator's options are set by a foreign function")]

use std::ffi::{c_int, c_long};

/// `mi_option_purge_delay` of mimalloc 2 and 3.
const PURGE_DELAY: c_int = 15;

/// Lets mimalloc keep freed memory for the next use; otherwise it gives it back after a second.
///
/// A pass frees and asks for the same hundreds of megabytes again and again, and each page that comes back from the system
/// is cleared first and costs a fault: a fifth of a training pass of the miniature. Resident memory stays at its peak
/// instead of falling between phases. Where another allocator is in use this does nothing. `MIMALLOC_PURGE_DELAY`, in
/// milliseconds, has precedence.
pub fn keep_freed_memory() {
    if std::env::var_os("MIMALLOC_PURGE_DELAY").is_none() {
        set(PURGE_DELAY, -1);
    }
}

fn set(option: c_int, value: c_long) {
    // SAFETY: it writes a number into the allocator's table of options, at any time and from any thread.
    unsafe { libmimalloc_sys::mi_option_set(option, value) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_option_is_the_delay_in_milliseconds() {
        // SAFETY: it reads a number from the allocator's table of options.
        let get = || unsafe { libmimalloc_sys::mi_option_get(PURGE_DELAY) };
        assert_eq!(get(), 1000, "the default of another option would be another number");
        keep_freed_memory();
        assert_eq!(get(), -1);
    }
}
