//! Ptrace and wait.
//!
//! Owns the requests that the tracer makes, and [`Stop`], what a wait status says. All of them are for threads that the calling thread seized;
//! ptrace knows a tracer by its thread.

use std::{
    io, thread,
    time::{Duration, Instant},
};

use trapline_engine::Addr;
use trapline_process::quiesce::{ThreadRegisters, from_native, may_start_again, to_native};

use super::{Tid, check};

/// What became of a thread.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Stop {
    /// It ended by itself; for the leader: the whole process.
    Exited(i32),
    /// A signal ended it.
    Killed(i32),
    /// A signal is about to be delivered.
    Signal(i32),
    /// It entered or left a system call.
    Syscall,
    /// `fork`, or a clone that sends SIGCHLD at its end.
    Fork,
    /// `vfork`, or a clone whose caller waits likewise.
    Vfork,
    /// Any other clone.
    Clone,
    /// The child of a vfork has let go of the memory.
    VforkDone,
    /// A new program image.
    Exec,
    /// It stopped because of a stop signal, with the rest of its group.
    WithItsGroup,
    /// Its first stop, or the answer to [`interrupt`].
    Interrupted,
}

/// What [`Stop::Syscall`] was.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum SyscallStop {
    /// At the entry, of this system call.
    Entry(u64),
    /// At the exit.
    Exit,
    /// Something else.
    None,
}

const EVENT_STOP: i32 = 128;
const SYSCALL_BIT: i32 = 0x80;

/// What every thread of the tree is traced for. Without `EXITKILL`: if the recorder dies, the kernel lets all go on.
const OPTIONS: libc::c_int = libc::PTRACE_O_TRACESYSGOOD
    | libc::PTRACE_O_TRACEFORK
    | libc::PTRACE_O_TRACEVFORK
    | libc::PTRACE_O_TRACECLONE
    | libc::PTRACE_O_TRACEEXEC
    | libc::PTRACE_O_TRACEVFORKDONE;

fn request(request: libc::c_uint, tid: Tid, addr: usize, data: usize) -> io::Result<()> {
    // SAFETY: every request that is made below passes either plain numbers, or the address of memory that is as large as the request wants and
    // outlives the call.
    check(unsafe { libc::ptrace(request, tid, addr, data) }).map(drop)
}

/// Becomes the tracer of a thread without stopping it.
pub(crate) fn seize(tid: Tid) -> io::Result<()> {
    request(libc::PTRACE_SEIZE, tid, 0, OPTIONS.cast_unsigned() as usize)
}

/// Has the system calls of a stopped thread be told from signals.
pub(crate) fn tell_system_calls(tid: Tid) -> io::Result<()> {
    request(libc::PTRACE_SETOPTIONS, tid, 0, libc::PTRACE_O_TRACESYSGOOD.cast_unsigned() as usize)
}

/// Makes a thread stop soon, with [`Stop::Interrupted`].
pub(crate) fn interrupt(tid: Tid) -> io::Result<()> {
    request(libc::PTRACE_INTERRUPT, tid, 0, 0)
}

/// Lets a stopped thread go on; `signal` is delivered first, if it is not 0.
pub(crate) fn resume(tid: Tid, signal: i32) -> io::Result<()> {
    request(libc::PTRACE_CONT, tid, 0, signal.cast_unsigned() as usize)
}

/// The same, to the next entry or exit of a system call.
pub(crate) fn resume_to_syscall(tid: Tid, signal: i32) -> io::Result<()> {
    request(libc::PTRACE_SYSCALL, tid, 0, signal.cast_unsigned() as usize)
}

/// Lets a stopped thread go for good; `signal` is delivered first, if it is not 0. One that its group's stop signal stopped stays stopped.
pub(crate) fn detach(tid: Tid, signal: i32) -> io::Result<()> {
    request(libc::PTRACE_DETACH, tid, 0, signal.cast_unsigned() as usize)
}

/// Has the kernel start the system call again that a stopped thread was in, where it would return `EINTR` on our account. If a handler of the program
/// comes next, it returns that all the same.
pub(crate) fn hide_interruption(tid: Tid) -> io::Result<()> {
    const ERESTARTNOHAND: i64 = -514;
    let mut registers = registers(tid)?;
    if may_start_again(&registers) {
        registers.rax = ERESTARTNOHAND.cast_unsigned();
        set_registers(tid, &registers)?;
    }
    Ok(())
}

/// The number of that state among a thread's sets of registers (elf.h).
const NT_X86_XSTATE: usize = 0x202;

/// The state of a thread's floating-point and vector registers, as XSAVE would write it.
pub(crate) fn extended_state(tid: Tid) -> io::Result<Vec<u8>> {
    /// More than any processor has.
    const LARGEST_BYTES: usize = 32 << 10;
    let mut state = vec![0_u8; LARGEST_BYTES];
    let mut place = libc::iovec { iov_base: state.as_mut_ptr().cast(), iov_len: state.len() };
    request(libc::PTRACE_GETREGSET, tid, NT_X86_XSTATE, &raw mut place as usize)?;
    state.truncate(place.iov_len);
    Ok(state)
}

/// Sets it, from all that [`extended_state`] gave.
pub(crate) fn set_extended_state(tid: Tid, state: &[u8]) -> io::Result<()> {
    // The kernel only reads it.
    let mut place = libc::iovec { iov_base: state.as_ptr().cast_mut().cast(), iov_len: state.len() };
    request(libc::PTRACE_SETREGSET, tid, NT_X86_XSTATE, &raw mut place as usize)
}

/// Leaves a thread stopped that its group's stop signal stopped, and hears of SIGCONT.
pub(crate) fn listen(tid: Tid) -> io::Result<()> {
    request(libc::PTRACE_LISTEN, tid, 0, 0)
}

/// What an event is about: the new thread's id; for an exec the id that the thread had before.
pub(crate) fn event_message(tid: Tid) -> io::Result<u64> {
    let mut message = 0_usize;
    request(libc::PTRACE_GETEVENTMSG, tid, 0, &raw mut message as usize)?;
    Ok(message as u64)
}

/// The general registers.
pub(crate) fn registers(tid: Tid) -> io::Result<ThreadRegisters> {
    // SAFETY: plain numbers, for which zero is a value.
    let mut registers: libc::user_regs_struct = unsafe { std::mem::zeroed() };
    request(libc::PTRACE_GETREGS, tid, 0, &raw mut registers as usize)?;
    Ok(from_native(registers))
}

/// Sets the general registers.
pub(crate) fn set_registers(tid: Tid, registers: &ThreadRegisters) -> io::Result<()> {
    let registers = to_native(registers);
    request(libc::PTRACE_SETREGS, tid, 0, &raw const registers as usize)
}

/// Sets an entry of the table of descriptors that a thread has for itself to a segment that begins at an address and has no end, or to nothing.
pub(crate) fn set_thread_area(tid: Tid, entry: u32, base: Option<Addr>) -> io::Result<()> {
    const SET_THREAD_AREA: libc::c_uint = 26;
    /// Of `struct user_desc` (asm/ldt.h): 32-bit, limit in pages, usable; for none: read and execute only, not present.
    const DATA: u32 = 1 | 1 << 4 | 1 << 6;
    const EMPTY: u32 = 1 << 3 | 1 << 5;
    let address = base.map_or(0, |base| u32::try_from(base.value()).unwrap_or(0));
    let (limit, flags) = if base.is_some() { (0xf_ffff, DATA) } else { (0, EMPTY) };
    let descriptor = [entry, address, limit, flags];
    request(SET_THREAD_AREA, tid, entry as usize, &raw const descriptor as usize)
}

/// Bytes of a signal set, as the kernel counts them.
const SET_BYTES: usize = 8;

/// The signals that a thread blocks: signal n is bit n - 1.
pub(crate) fn signal_mask(tid: Tid) -> io::Result<u64> {
    let mut mask = 0_u64;
    request(libc::PTRACE_GETSIGMASK, tid, SET_BYTES, &raw mut mask as usize)?;
    Ok(mask)
}

/// Sets the signals that a thread blocks.
pub(crate) fn set_signal_mask(tid: Tid, mask: u64) -> io::Result<()> {
    request(libc::PTRACE_SETSIGMASK, tid, SET_BYTES, &raw const mask as usize)
}

/// The code of a signal that the kernel sends for a processor's exception.
const SI_KERNEL: i32 = 0x80;

/// Whether the signal that stopped a thread is the work of a breakpoint instruction.
pub(crate) fn is_breakpoint(tid: Tid) -> io::Result<bool> {
    // SAFETY: plain numbers, for which zero is a value.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    request(libc::PTRACE_GETSIGINFO, tid, 0, &raw mut info as usize)?;
    Ok(matches!(info.si_code, SI_KERNEL | libc::TRAP_BRKPT))
}

/// Whether the signal that stopped a thread says that its instruction cannot be executed.
pub(crate) fn is_fault(tid: Tid) -> io::Result<bool> {
    // SAFETY: plain numbers, for which zero is a value.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    request(libc::PTRACE_GETSIGINFO, tid, 0, &raw mut info as usize)?;
    Ok(matches!(info.si_signo, libc::SIGSEGV | libc::SIGBUS | libc::SIGILL | libc::SIGTRAP) && info.si_code > 0)
}

/// Which side of which system call a thread is at.
pub(crate) fn syscall_stop(tid: Tid) -> io::Result<SyscallStop> {
    const GET_SYSCALL_INFO: libc::c_uint = 0x420e;
    const NUMBER_AT: usize = 24;
    let mut info = [0_u8; 88];
    request(GET_SYSCALL_INFO, tid, info.len(), info.as_mut_ptr() as usize)?;
    let number = info[NUMBER_AT..].first_chunk().map_or(0, |bytes| u64::from_ne_bytes(*bytes));
    Ok(match info[0] {
        1 => SyscallStop::Entry(number),
        2 => SyscallStop::Exit,
        _ => SyscallStop::None,
    })
}

/// The next thing that happened to any traced thread or child, without waiting.
///
/// # Errors
/// `ECHILD` when there is none left.
pub(crate) fn poll_any() -> io::Result<Option<(Tid, Stop)>> {
    wait(-1, libc::WNOHANG)
}

/// Waits for one thread's next stop.
pub(crate) fn wait_for(tid: Tid) -> io::Result<Stop> {
    loop {
        if let Some((_, stop)) = wait(tid, 0)? {
            return Ok(stop);
        }
    }
}

/// Why a thread stands still.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Standing {
    /// It is about to receive a signal, which is lost if it goes on without.
    Signal(i32),
    /// Its group's stop signal has stopped it.
    WithItsGroup,
    /// It was interrupted.
    Interrupted,
}

/// Why a stopped thread stands still (ptrace(2), "Group-stop").
pub(crate) fn standing(tid: Tid) -> io::Result<Standing> {
    // SAFETY: plain numbers, for which zero is a value.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    request(libc::PTRACE_GETSIGINFO, tid, 0, &raw mut info as usize)?;
    Ok(match (info.si_code >> 8 == EVENT_STOP, info.si_signo) {
        (true, libc::SIGTRAP) => Standing::Interrupted,
        (true, _) => Standing::WithItsGroup,
        (false, signal) => Standing::Signal(signal),
    })
}

/// What became of a thread that was to stop.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Stopped {
    /// It stands still.
    Yes,
    /// It has ended.
    Ended,
    /// It did not in time, and still may.
    NotYet,
}

/// Stops a running thread. Signals that come before are delivered at once, so that none waits for us. System calls do not fail on our account.
pub(crate) fn stop(tid: Tid, until: Instant) -> io::Result<Stopped> {
    unless_it_ended(interrupt(tid))?;
    loop {
        match wait_until(tid, until)? {
            None => return Ok(Stopped::NotYet),
            // A handler may want to know all about it, and only the kernel does.
            Some(Stop::Signal(signal)) => unless_it_ended(resume(tid, signal))?,
            Some(Stop::Exited(_) | Stop::Killed(_)) => return Ok(Stopped::Ended),
            Some(_) => break,
        }
    }
    unless_it_ended(hide_interruption(tid))?;
    Ok(Stopped::Yes)
}

/// A thread that was killed needs nothing: its end is what comes next.
pub(crate) fn unless_it_ended(done: io::Result<()>) -> io::Result<()> {
    done.or_else(|error| if error.raw_os_error() == Some(libc::ESRCH) { Ok(()) } else { Err(error) })
}

/// Waits for one thread's next stop, but not longer than until then.
pub(crate) fn wait_until(tid: Tid, until: Instant) -> io::Result<Option<Stop>> {
    const INTERVAL: Duration = Duration::from_micros(50);
    loop {
        if let Some((_, stop)) = wait(tid, libc::WNOHANG)? {
            return Ok(Some(stop));
        }
        if Instant::now() >= until {
            return Ok(None);
        }
        thread::sleep(INTERVAL);
    }
}

/// Waits for a child's end, and lets it go on until then.
pub(crate) fn wait_for_end(pid: Tid) -> io::Result<()> {
    while !matches!(wait_for(pid)?, Stop::Exited(_) | Stop::Killed(_)) {
        // An error means that it was killed: its end is next.
        let _ = resume(pid, 0);
    }
    Ok(())
}

/// Waits for one thread's next stop. Its end is left to [`poll_any`].
///
/// # Errors
/// `ESRCH` if it has ended.
pub(crate) fn wait_for_stop(tid: Tid) -> io::Result<Stop> {
    // SAFETY: plain numbers, for which zero is a value.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let options = libc::WEXITED | libc::WSTOPPED | libc::WNOWAIT | libc::__WALL;
    loop {
        // SAFETY: the information outlives the call.
        match check(unsafe { libc::waitid(libc::P_PID, tid.cast_unsigned(), &raw mut info, options) }.into()) {
            Ok(_) => break,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    if matches!(info.si_code, libc::CLD_EXITED | libc::CLD_KILLED | libc::CLD_DUMPED) {
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    wait_for(tid)
}

fn wait(tid: Tid, options: i32) -> io::Result<Option<(Tid, Stop)>> {
    let mut status = 0;
    loop {
        // SAFETY: the status outlives the call.
        let found = unsafe { libc::waitpid(tid, &raw mut status, libc::__WALL | options) };
        match check(found.into()) {
            Ok(0) => return Ok(None),
            Ok(_) => return Ok(Some((found, classify(status)))),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn classify(status: i32) -> Stop {
    if libc::WIFEXITED(status) {
        return Stop::Exited(libc::WEXITSTATUS(status));
    }
    if libc::WIFSIGNALED(status) {
        return Stop::Killed(libc::WTERMSIG(status));
    }
    let signal = libc::WSTOPSIG(status);
    match status >> 16 {
        0 if signal == libc::SIGTRAP | SYSCALL_BIT => Stop::Syscall,
        libc::PTRACE_EVENT_FORK => Stop::Fork,
        libc::PTRACE_EVENT_VFORK => Stop::Vfork,
        libc::PTRACE_EVENT_CLONE => Stop::Clone,
        libc::PTRACE_EVENT_VFORK_DONE => Stop::VforkDone,
        libc::PTRACE_EVENT_EXEC => Stop::Exec,
        EVENT_STOP if signal == libc::SIGTRAP => Stop::Interrupted,
        EVENT_STOP => Stop::WithItsGroup,
        _ => Stop::Signal(signal),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stops_are_told_apart() {
        let stopped = |event: i32, signal: i32| classify(event << 16 | signal << 8 | 0x7f);
        assert_eq!(stopped(0, libc::SIGUSR1), Stop::Signal(libc::SIGUSR1));
        assert_eq!(stopped(0, 40), Stop::Signal(40), "a real-time signal");
        assert_eq!(stopped(0, libc::SIGTRAP), Stop::Signal(libc::SIGTRAP));
        assert_eq!(stopped(0, libc::SIGTRAP | 0x80), Stop::Syscall);
        assert_eq!(stopped(libc::PTRACE_EVENT_EXEC, libc::SIGTRAP), Stop::Exec);
        assert_eq!(stopped(EVENT_STOP, libc::SIGTRAP), Stop::Interrupted);
        assert_eq!(stopped(EVENT_STOP, libc::SIGTSTP), Stop::WithItsGroup);
        assert_eq!(classify(7 << 8), Stop::Exited(7));
        assert_eq!(classify(libc::SIGKILL), Stop::Killed(libc::SIGKILL));
    }
}
