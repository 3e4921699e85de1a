//! Time, as the kernel counts it.

use std::time::Duration;

use super::syscall::syscall;

/// `struct timespec` of the system calls whose numbers we use: two machine words at either width.
///
/// At 32 bit these are the older calls, whose seconds end in 2038. Here they carry time since boot and timeouts only, never dates.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct KernelTimespec {
    seconds: libc::c_long,
    nanoseconds: libc::c_long,
}

impl From<Duration> for KernelTimespec {
    fn from(duration: Duration) -> Self {
        Self {
            seconds: libc::c_long::try_from(duration.as_secs()).unwrap_or(libc::c_long::MAX),
            // Below 10^9, so the sign bit stays clear.
            nanoseconds: libc::c_long::from(duration.subsec_nanos().cast_signed()),
        }
    }
}

/// A moment of `CLOCK_MONOTONIC`.
///
/// `std::time::Instant` reads the same clock, but through libc, which may set `errno`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Moment {
    since_boot: Duration,
}

impl Moment {
    /// The present.
    pub(crate) fn now() -> Self {
        let mut time = KernelTimespec { seconds: 0, nanoseconds: 0 };
        let clock = libc::CLOCK_MONOTONIC.cast_unsigned() as usize;
        // SAFETY: the kernel stores one timespec into a live local. The call cannot fail: every kernel has this clock.
        let _ = unsafe { syscall(libc::SYS_clock_gettime, [clock, &raw mut time as usize]) };
        let seconds = u64::try_from(time.seconds).unwrap_or(0);
        let nanoseconds = u32::try_from(time.nanoseconds).unwrap_or(0);
        Self { since_boot: Duration::from_secs(seconds) + Duration::from_nanos(u64::from(nanoseconds)) }
    }

    /// The moment `duration` later; the end of time where that overflows.
    #[must_use]
    pub(crate) fn after(self, duration: Duration) -> Self {
        Self { since_boot: self.since_boot.saturating_add(duration) }
    }

    /// How long until this moment, or nothing when it has come.
    pub(crate) fn time_left(self) -> Option<Duration> {
        self.since_boot.checked_sub(Self::now().since_boot).filter(|left| !left.is_zero())
    }

    /// Nanoseconds from `earlier` to this moment.
    pub(crate) fn nanos_since(self, earlier: Self) -> u64 {
        u64::try_from(self.since_boot.saturating_sub(earlier.since_boot).as_nanos()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_passes_and_deadlines_come() {
        let start = Moment::now();
        assert!(start.after(Duration::from_hours(1)).time_left().is_some());
        assert_eq!(start.time_left(), None);
        assert!(Moment::now() >= start);
        assert_eq!(start.after(Duration::from_nanos(7)).nanos_since(start), 7);
        assert_eq!(start.nanos_since(start.after(Duration::from_nanos(7))), 0);
    }

    #[test]
    fn an_endless_duration_does_not_overflow() {
        assert!(Moment::now().after(Duration::MAX).time_left().is_some());
        let timespec = KernelTimespec::from(Duration::MAX);
        assert_eq!(timespec.nanoseconds, 999_999_999);
        assert!(timespec.seconds > 0);
    }
}
