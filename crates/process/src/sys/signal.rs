//! Signal sets and masks, in the kernel's layout.
//!
//! glibc's `sigset_t` has 1024 bits and its functions hide signals 32 and 33 (cancellation, set*id). The kernel's has 64 and hides none:
//! whoever wants a thread to handle *nothing* must ask the kernel.

use std::{fmt, time::Duration};

use super::{clock::KernelTimespec, errno::Errno, syscall::syscall};

/// The size that the kernel expects of a signal set, in bytes (`_NSIG / 8`).
pub(crate) const SET_BYTES: usize = size_of::<SignalSet>();

/// A set of the signals 1 to 64, one bit each, as the kernel lays it out.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct SignalSet(u64);

impl SignalSet {
    /// No signal.
    pub const EMPTY: Self = Self(0);
    /// Every signal, those that glibc keeps to itself included.
    pub const ALL: Self = Self(u64::MAX);

    /// The set whose bit `n - 1` stands for signal `n`.
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// One bit a signal; bit `n - 1` is signal `n`.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Whether `signal` is in the set. A number that is no signal's never is.
    pub const fn contains(self, signal: i32) -> bool {
        self.0 & Self::bit(signal) != 0
    }

    /// The set and `signal`.
    #[must_use]
    pub const fn with(self, signal: i32) -> Self {
        Self(self.0 | Self::bit(signal))
    }

    /// The set but `signal`.
    #[must_use]
    pub const fn without(self, signal: i32) -> Self {
        Self(self.0 & !Self::bit(signal))
    }

    const fn bit(signal: i32) -> u64 {
        if signal >= 1 && signal <= 64 { 1 << (signal - 1) } else { 0 }
    }
}

impl fmt::Debug for SignalSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries((1..=64).filter(|signal| self.contains(*signal))).finish()
    }
}

/// Replaces the calling thread's mask by `mask` and returns the one it had. SIGKILL and SIGSTOP stay unblocked whatever it says.
pub(crate) fn replace_mask(mask: SignalSet) -> SignalSet {
    let mut before = SignalSet::EMPTY;
    let how = libc::SIG_SETMASK.cast_unsigned() as usize;
    // SAFETY: one set is read and one stored, both live locals. With valid arguments the call cannot fail.
    let _ = unsafe {
        syscall(libc::SYS_rt_sigprocmask, [how, &raw const mask as usize, &raw mut before as usize, SET_BYTES])
    };
    before
}

/// Gives `signal` its default action in the calling process, and returns why not, if not.
///
/// # Safety
/// No code of the process may rely on the action that `signal` has.
pub(crate) unsafe fn reset_action(signal: i32) -> Result<(), Errno> {
    // The kernel's `struct sigaction` is handler, flags, restorer, mask: 32 bytes at most. All zero means SIG_DFL, no flags.
    let default_action = [0_u64; 4];
    let arguments = [signal.cast_unsigned() as usize, default_action.as_ptr() as usize, 0, SET_BYTES];
    // SAFETY: the kernel reads at most 32 bytes of a live local; the caller vouches for the effect.
    unsafe { syscall(libc::SYS_rt_sigaction, arguments) }.map(drop)
}

/// Sleeps until one of the blocked signals in `set` is pending, takes it, and returns whether there was one within `timeout`.
pub(crate) fn await_pending(set: SignalSet, timeout: Duration) -> bool {
    let timeout = KernelTimespec::from(timeout);
    let arguments = [&raw const set as usize, 0, &raw const timeout as usize, SET_BYTES];
    // SAFETY: the kernel reads a set and a timespec from live locals; the null pointer asks for no details.
    unsafe { syscall(libc::SYS_rt_sigtimedwait, arguments) }.is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_hold_what_was_put_in() {
        let set = SignalSet::EMPTY.with(libc::SIGTRAP).with(64);
        assert!(set.contains(libc::SIGTRAP) && set.contains(64) && !set.contains(libc::SIGUSR1));
        assert_eq!(set.without(64).bits(), 1 << (libc::SIGTRAP - 1));
        assert_eq!(format!("{set:?}"), "{5, 64}");
    }

    #[test]
    fn numbers_that_are_no_signals_change_nothing() {
        for number in [0, -1, 65, i32::MIN, i32::MAX] {
            assert_eq!(SignalSet::EMPTY.with(number), SignalSet::EMPTY);
            assert_eq!(SignalSet::ALL.without(number), SignalSet::ALL);
            assert!(!SignalSet::ALL.contains(number));
        }
    }

    #[test]
    fn the_mask_of_this_thread_can_be_exchanged() {
        let before = replace_mask(SignalSet::ALL);
        let full = replace_mask(before);
        assert_eq!(full, SignalSet::ALL.without(libc::SIGKILL).without(libc::SIGSTOP));
        assert_eq!(replace_mask(before), before);
    }

    #[test]
    fn a_pending_signal_is_taken_and_a_missing_one_times_out() {
        let signals = SignalSet::EMPTY.with(libc::SIGUSR2);
        let before = replace_mask(SignalSet::ALL);
        assert!(!await_pending(signals, Duration::from_millis(1)));
        // SAFETY: SIGUSR2 is blocked in this thread, so it stays pending until it is taken.
        assert_eq!(unsafe { libc::raise(libc::SIGUSR2) }, 0);
        assert!(await_pending(signals, Duration::from_secs(10)));
        replace_mask(before);
    }
}
