//! Core synchronisation by membarrier(2).
//!
//! Owns the registration and the barrier. Source: membarrier(2), `MEMBARRIER_CMD_PRIVATE_EXPEDITED_SYNC_CORE` (Linux 4.16): every CPU that runs a
//! thread of this process has executed a core serialising instruction when it returns; a thread that is not running executes one before it
//! returns to user mode.

use std::io;

use crate::{
    error::HostError,
    sys::{errno::Errno, syscall::syscall},
};

const PRIVATE_EXPEDITED_SYNC_CORE: usize = 1 << 5;
const REGISTER_PRIVATE_EXPEDITED_SYNC_CORE: usize = 1 << 6;

fn membarrier(command: usize) -> Result<(), Errno> {
    // SAFETY: membarrier has no memory arguments.
    unsafe { syscall(libc::SYS_membarrier, [command, 0, 0]) }.map(drop)
}

fn unsupported(error: Errno) -> HostError {
    HostError::NoSyncCore { source: io::Error::from_raw_os_error(error.0) }
}

/// Tells the kernel that this process is going to synchronise.
pub(super) fn register() -> Result<(), HostError> {
    membarrier(REGISTER_PRIVATE_EXPEDITED_SYNC_CORE).map_err(unsupported)
}

/// Makes every CPU that runs a thread of this process execute a serialising instruction.
pub(super) fn sync_cores() -> Result<(), HostError> {
    match membarrier(PRIVATE_EXPEDITED_SYNC_CORE) {
        // Not registered: a forked child that does not inherit it.
        Err(Errno(libc::EPERM)) => {
            register()?;
            membarrier(PRIVATE_EXPEDITED_SYNC_CORE).map_err(unsupported)
        }
        other => other.map_err(unsupported),
    }
}
