//! Threads under ptrace: seize, interrupt, look, change, let go.
//!
//! Only `PTRACE_SEIZE` is used. Unlike `PTRACE_ATTACH` it sends no SIGSTOP, which the target could see, and its threads can be interrupted
//! at any time. Source: ptrace(2).
//!
//! [`Registers`] is where the width shows: it is the tracer's own. A 64-bit tracer sees the registers of 32-bit threads in the lower halves of its own.

use std::mem::offset_of;

use trapline_engine::{Addr, Mode};

use super::{
    errno::Errno,
    procfs::Tid,
    signal::{SET_BYTES, SignalSet},
    syscall::syscall,
};

/// The event of a stop that is neither a signal's nor a system call's (linux/ptrace.h). `libc` lacks it for glibc.
const PTRACE_EVENT_STOP: i32 = 128;

/// Start the call again, unless a signal handler runs; then it fails with `EINTR`.
pub(crate) const ERESTARTNOHAND: i32 = 514;

/// Error values that tell the kernel to start an interrupted system call again on the way back to user mode (`include/linux/errno.h`). A
/// process never sees them; a tracer does.
const RESTARTS: [i32; 4] = [512, 513, ERESTARTNOHAND, 516];

/// `syscall`, `sysenter` and `int 0x80` are two bytes each: by that much the kernel winds the program counter back for a restart.
const SYSCALL_INSN_BYTES: i64 = 2;

/// Why a thread is not running any more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Event {
    /// It stands still. The signal (0 for none) was about to be delivered, and has to be passed on when the thread is let go.
    Stopped {
        /// The signal to pass to [`detach`].
        signal: i32,
    },
    /// It has ended, and has been reaped.
    Ended,
}

/// Makes the caller the tracer of a thread, which runs on.
pub(crate) fn seize(tid: Tid) -> Result<(), Errno> {
    request(libc::PTRACE_SEIZE, tid, 0, 0)
}

/// Asks a seized thread to stop. It has stopped once [`poll`] says so.
pub(crate) fn interrupt(tid: Tid) -> Result<(), Errno> {
    request(libc::PTRACE_INTERRUPT, tid, 0, 0)
}

/// Lets a stopped thread go, delivering `signal` unless it is 0.
///
/// A thread that was stopped by a job-control signal goes back to that stop.
pub(crate) fn detach(tid: Tid, signal: i32) -> Result<(), Errno> {
    request(libc::PTRACE_DETACH, tid, 0, signal.cast_unsigned() as usize)
}

/// Asks without waiting whether a seized thread has stopped or ended.
///
/// # Errors
/// `ECHILD` if the thread is not, or no longer, traced by the caller.
pub(crate) fn poll(tid: Tid) -> Result<Option<Event>, Errno> {
    let mut status = 0_i32;
    let options = (libc::__WALL | libc::WNOHANG).cast_unsigned() as usize;
    let arguments = [tid.cast_unsigned() as usize, &raw mut status as usize, options, 0];
    // SAFETY: the kernel stores one `int` into a live local.
    let found = unsafe { syscall(libc::SYS_wait4, arguments) }?;
    Ok((found != 0).then(|| event_of(status)))
}

/// What a wait status of a seized thread means.
fn event_of(status: i32) -> Event {
    if !libc::WIFSTOPPED(status) {
        return Event::Ended;
    }
    // An event stop reports SIGTRAP for an interrupt, or the stopping signal of a group stop; neither is pending delivery. Everything
    // else is a signal-delivery-stop, because no other option was asked for.
    let signal = if status >> 16 == PTRACE_EVENT_STOP { 0 } else { libc::WSTOPSIG(status) };
    Event::Stopped { signal }
}

/// The signals that a stopped thread blocks: its lasting mask, even within a call such as `ppoll` that installs another for a while.
pub(crate) fn signal_mask(tid: Tid) -> Result<SignalSet, Errno> {
    let mut mask = SignalSet::EMPTY;
    request(libc::PTRACE_GETSIGMASK, tid, SET_BYTES, &raw mut mask as usize)?;
    Ok(mask)
}

/// Replaces the signals that a stopped thread blocks.
pub(crate) fn set_signal_mask(tid: Tid, mask: SignalSet) -> Result<(), Errno> {
    request(libc::PTRACE_SETSIGMASK, tid, SET_BYTES, &raw const mask as usize)
}

/// The registers of a stopped thread.
pub(crate) fn registers(tid: Tid) -> Result<Registers, Errno> {
    // SAFETY: the structure consists of integers, for which zero is a value.
    let mut registers = Registers { raw: unsafe { std::mem::zeroed() } };
    request(libc::PTRACE_GETREGS, tid, 0, &raw mut registers.raw as usize)?;
    Ok(registers)
}

/// The thread pointer of a stopped thread: where its thread-local storage ends, and the thread library's own record begins (ELF TLS,
/// variant II). `None` if it has none.
pub(crate) fn thread_pointer(tid: Tid, registers: &Registers) -> Option<Addr> {
    #[cfg(target_arch = "x86_64")]
    let base = {
        let _ = tid;
        registers.raw.fs_base
    };
    #[cfg(target_arch = "x86")]
    let base = {
        /// The bit of a selector that means the local descriptor table, where no thread library keeps it.
        const LOCAL: usize = 1 << 2;
        /// `PTRACE_GET_THREAD_AREA` (uapi/asm/ptrace-abi.h), which `libc` lacks.
        const PTRACE_GET_THREAD_AREA: libc::c_uint = 25;
        let selector = registers.raw.xgs.cast_unsigned() as usize & 0xffff;
        // `struct user_desc`: entry number, base, limit, flags.
        let mut descriptor = [0_u32; 4];
        if selector & LOCAL != 0 {
            return None;
        }
        request(PTRACE_GET_THREAD_AREA, tid, selector >> 3, descriptor.as_mut_ptr() as usize).ok()?;
        u64::from(descriptor[1])
    };
    (base != 0).then_some(Addr::new(base))
}

/// Moves a stopped thread to `pc`.
pub(crate) fn set_pc(tid: Tid, pc: Addr) -> Result<(), Errno> {
    // The target is as wide as this code.
    let pc = usize::try_from(pc.value()).map_err(|_| Errno(libc::EINVAL))?;
    request(libc::PTRACE_POKEUSER, tid, PC_AT, pc)
}

/// The system call's number, if a stopped thread is on its way out of one that is about to fail with `errno`.
pub(crate) fn failing_call(tid: Tid, errno: i32) -> Result<Option<isize>, Errno> {
    if peek(tid, RESULT_AT)? != -(errno as isize) {
        return Ok(None);
    }
    let number = peek(tid, NUMBER_AT)?;
    Ok((number >= 0).then_some(number))
}

/// What code a stopped thread executes.
#[cfg(target_arch = "x86_64")]
pub(crate) fn mode(tid: Tid) -> Result<Mode, Errno> {
    peek(tid, offset_of!(libc::user_regs_struct, cs)).map(|segment| mode_of_segment(segment.cast_unsigned() as u64))
}

/// A 32-bit tracer traces nothing else.
#[cfg(target_arch = "x86")]
#[expect(clippy::unnecessary_wraps, reason = "as at 64 bit")]
pub(crate) fn mode(_tid: Tid) -> Result<Mode, Errno> {
    Ok(Mode::Bits32)
}

/// What code a thread with this code segment executes: 32-bit programs have one of their own (`__USER32_CS`).
pub(crate) fn mode_of_segment(segment: u64) -> Mode {
    const CODE_32: u64 = 0x23;
    if segment == CODE_32 { Mode::Bits32 } else { Mode::Bits64 }
}

/// Replaces the error with which the system call that a stopped thread is in will fail.
pub(crate) fn set_failure(tid: Tid, errno: i32) -> Result<(), Errno> {
    request(libc::PTRACE_POKEUSER, tid, RESULT_AT, (-(errno as isize)).cast_unsigned())
}

fn peek(tid: Tid, offset: usize) -> Result<isize, Errno> {
    let mut word = 0_usize;
    // The system call stores the word; only libc's wrapper returns it.
    request(libc::PTRACE_PEEKUSER, tid, offset, &raw mut word as usize)?;
    Ok(word.cast_signed())
}

/// `data` is a value, or the address of a live object of the request's type; the callers are all above.
fn request(request: libc::c_uint, tid: Tid, addr: usize, data: usize) -> Result<(), Errno> {
    let arguments = [request as usize, tid.cast_unsigned() as usize, addr, data];
    // SAFETY: every caller passes as `data` a value or the address of a live local of the size that the request stores or reads.
    unsafe { syscall(libc::SYS_ptrace, arguments) }.map(drop)
}

#[cfg(target_arch = "x86_64")]
const PC_AT: usize = offset_of!(libc::user_regs_struct, rip);
#[cfg(target_arch = "x86_64")]
const RESULT_AT: usize = offset_of!(libc::user_regs_struct, rax);
#[cfg(target_arch = "x86_64")]
const NUMBER_AT: usize = offset_of!(libc::user_regs_struct, orig_rax);

#[cfg(target_arch = "x86")]
const PC_AT: usize = offset_of!(libc::user_regs_struct, eip);
#[cfg(target_arch = "x86")]
const RESULT_AT: usize = offset_of!(libc::user_regs_struct, eax);
#[cfg(target_arch = "x86")]
const NUMBER_AT: usize = offset_of!(libc::user_regs_struct, orig_eax);

/// The general registers of a stopped thread.
#[derive(Clone, Copy, Debug)]
pub struct Registers {
    raw: libc::user_regs_struct,
}

impl From<libc::user_regs_struct> for Registers {
    fn from(raw: libc::user_regs_struct) -> Self {
        Self { raw }
    }
}

impl Registers {
    /// All of them, as the kernel lays them out.
    pub const fn raw(&self) -> &libc::user_regs_struct {
        &self.raw
    }

    /// The program counter: the next instruction, unless a system call is going to be [restarted](Self::restarted_syscall).
    pub fn pc(&self) -> Addr {
        #[cfg(target_arch = "x86_64")]
        return Addr::new(self.raw.rip);
        #[cfg(target_arch = "x86")]
        return Addr::new(self.raw.eip.cast_unsigned().into());
    }

    /// The stack pointer.
    pub fn sp(&self) -> Addr {
        #[cfg(target_arch = "x86_64")]
        return Addr::new(self.raw.rsp);
        #[cfg(target_arch = "x86")]
        return Addr::new(self.raw.esp.cast_unsigned().into());
    }

    /// Where the system call instruction is that the kernel will run again when the thread goes on, if there is one.
    ///
    /// Such a thread continues there, two bytes before [`pc`](Self::pc), unless a signal handler comes first that forbids it.
    pub fn restarted_syscall(&self) -> Option<Addr> {
        #[cfg(target_arch = "x86_64")]
        let (number, result) = (self.raw.orig_rax.cast_signed(), self.raw.rax.cast_signed());
        #[cfg(target_arch = "x86")]
        let (number, result) = (self.raw.orig_eax, self.raw.eax);
        let restarts = RESTARTS.iter().any(|errno| result == libc::c_long::from(-errno));
        (number >= 0 && restarts).then(|| self.pc().offset(-SYSCALL_INSN_BYTES))
    }

    /// Whether the thread has no user-mode context at all: one of the kernel's own workers (`io_uring`, vhost), which the list of threads
    /// also holds. Linux starts them with cleared registers.
    pub fn is_kernel_worker(&self) -> bool {
        self.pc() == Addr::default() && self.sp() == Addr::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_signal_stops_carry_a_signal() {
        let stopped = |event: i32, signal: i32| event << 16 | signal << 8 | 0x7f;
        assert_eq!(event_of(stopped(PTRACE_EVENT_STOP, libc::SIGTRAP)), Event::Stopped { signal: 0 });
        assert_eq!(event_of(stopped(PTRACE_EVENT_STOP, libc::SIGTSTP)), Event::Stopped { signal: 0 });
        assert_eq!(event_of(stopped(0, libc::SIGUSR1)), Event::Stopped { signal: libc::SIGUSR1 });
        assert_eq!(event_of(stopped(0, libc::SIGTRAP)), Event::Stopped { signal: libc::SIGTRAP });
        assert_eq!(event_of(3 << 8), Event::Ended, "exited with 3");
        assert_eq!(event_of(libc::SIGKILL), Event::Ended, "killed");
    }

    /// Registers of a thread at 0x1000 in (or, with number -1, outside) a system call that returns `result`.
    fn in_syscall(number: i32, result: i32) -> Registers {
        // SAFETY: the structure consists of integers, for which zero is a value.
        let mut raw: libc::user_regs_struct = unsafe { std::mem::zeroed() };
        #[cfg(target_arch = "x86_64")]
        {
            raw.rip = 0x1000;
            raw.orig_rax = i64::from(number).cast_unsigned();
            raw.rax = i64::from(result).cast_unsigned();
        }
        #[cfg(target_arch = "x86")]
        {
            (raw.eip, raw.orig_eax, raw.eax) = (0x1000, number, result);
        }
        Registers { raw }
    }

    #[test]
    fn a_restart_winds_back_over_the_instruction() {
        for result in [-512, -513, -514, -516] {
            assert_eq!(in_syscall(7, result).restarted_syscall(), Some(Addr::new(0xffe)));
            assert_eq!(in_syscall(-1, result).restarted_syscall(), None, "the same value outside of a system call");
        }
        for result in [0, -libc::EINTR, -515, 512] {
            assert_eq!(in_syscall(7, result).restarted_syscall(), None);
        }
    }

    #[test]
    fn a_thread_without_user_context_is_the_kernels() {
        // SAFETY: the structure consists of integers, for which zero is a value.
        assert!(Registers { raw: unsafe { std::mem::zeroed() } }.is_kernel_worker());
        assert!(!in_syscall(-1, 0).is_kernel_worker());
    }
}
