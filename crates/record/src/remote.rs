//! System calls that a stopped target makes for us, and calls of its functions.
//!
//! Owns [`Remote`]: a thread that is stopped, its registers as they are to be when it goes on, and a `syscall` instruction in its memory.
//! Invariants: when it is [finished](Remote::finish), the thread's registers are as they were, or as the caller changed them; a system call that was
//! interrupted by our stop is restarted, as the kernel would have done; if the recorder dies in between, the thread goes on as it was. Signals that come to
//! a thread on an errand wait, with all that the kernel knows of them, and a process that is told to stop stops when we are done.

use std::{
    io,
    mem::offset_of,
    time::{Duration, Instant},
};

use trapline_abi::agent::{Call, Config, ErrandRegisters};
use trapline_engine::{Addr, Mode};
use trapline_process::quiesce::ThreadRegisters;

use crate::{
    frame,
    inject::Gadgets,
    narrow_frame,
    sys::{
        Tid,
        memory::Memory,
        ptrace::{self, Stop, SyscallStop},
        spawn, width,
    },
};

/// A stopped thread that does as it is told.
#[derive(Debug)]
pub(crate) struct Remote {
    tid: Tid,
    mode: Mode,
    /// What the thread goes on with.
    pub(crate) registers: ThreadRegisters,
    syscall_insn: Addr,
    /// Where the stack pointer is during a system call, from where it was.
    stack_offset: i64,
    /// What is taken off the stack between a system call and the `ret`.
    popped_bytes: i64,
    created: Option<Tid>,
    /// The registers of the x87 and of vectors, where a function may have been called meanwhile.
    extended_state: Option<Vec<u8>>,
    /// The same, once a function was called.
    disturbed_state: Option<Vec<u8>>,
    /// The signals that it blocks when it goes on, if it blocks all during system calls.
    signal_mask: Option<u64>,
    is_blocking: bool,
    /// Signals that arrived meanwhile and could not be blocked.
    signals: Vec<i32>,
    /// Whether its process was stopped meanwhile.
    is_with_its_group: bool,
    is_restored: bool,
}

/// What became of a call.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum CallOutcome {
    /// What it answered: an `int`.
    Returned(i32),
    /// It failed by a signal, which the process never gets.
    Failed {
        /// The signal.
        signal: i32,
        /// Where.
        at: Addr,
    },
    /// Its time was over.
    StillRuns,
}

/// Where a thread of the target runs system calls for the recorder: see [`trapline_abi::agent::symbol::ERRAND`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Errand {
    /// The `syscall`.
    pub(crate) syscall_insn: Addr,
    /// What the thread takes its registers from: an [`ErrandRegisters`].
    pub(crate) registers: Addr,
    /// The agent's [`Config`].
    pub(crate) config: Addr,
}

/// The kernel's codes for a system call that is to be started again (include/linux/errno.h).
const ERESTARTSYS: i64 = -512;
const ERESTARTNOINTR: i64 = -513;
const ERESTARTNOHAND: i64 = -514;
const ERESTART_RESTARTBLOCK: i64 = -516;

/// The largest error number of a system call.
const MAX_ERRNO: i64 = 4095;

impl Remote {
    /// Takes over a stopped thread that never goes on; `syscall_insn` is the address of a `syscall` instruction that it can execute.
    pub(crate) fn new(tid: Tid, syscall_insn: Addr) -> io::Result<Self> {
        let mut registers = ptrace::registers(tid)?;
        restart(&mut registers);
        Ok(Self {
            tid,
            mode: width::mode_of(&registers),
            registers,
            syscall_insn,
            stack_offset: 0,
            popped_bytes: 0,
            created: None,
            extended_state: None,
            disturbed_state: None,
            signal_mask: None,
            is_blocking: false,
            signals: Vec::new(),
            is_with_its_group: false,
            is_restored: false,
        })
    }

    /// Takes over a stopped thread of a process that has the agent. If the recorder dies, the thread goes on where it was.
    pub(crate) fn on_errand(tid: Tid, memory: &Memory, errand: Errand) -> io::Result<Self> {
        let mut remote = Self::new(tid, errand.syscall_insn)?;
        let forbidden = memory.read_word(errand.config.after(offset_of!(Config, forbidden)))?;
        let signal_mask = ptrace::signal_mask(tid)?;
        // Without us, the thread itself would have to set it back.
        remote.signal_mask = (forbidden & Call::Sigprocmask.bit() == 0).then_some(signal_mask);
        memory.write_word(errand.registers.after(offset_of!(ErrandRegisters, signal_mask)), signal_mask)?;
        let now = &remote.registers;
        let general = [
            now.r15, now.r14, now.r13, now.r12, now.rbp, now.rbx, now.r11, now.r10, now.r9, now.r8, now.rax, now.rcx,
            now.rdx, now.rsi, now.rdi,
        ];
        let words = general.into_iter().chain([now.eflags, now.rsp, now.rip]);
        let bytes: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
        memory.write(errand.registers, &bytes)?;
        Ok(remote)
    }

    /// Takes over a thread that is stopped at the first instruction of a new image: no register counts yet but the stack pointer. `syscall_ret` is the
    /// address of a `syscall` and a `ret`. If the recorder dies, the thread returns to where it is.
    pub(crate) fn at_start(tid: Tid, memory: &Memory, syscall_ret: Addr) -> io::Result<Self> {
        let mut remote = Self::new(tid, syscall_ret)?;
        remote.stack_offset = -8;
        let return_at = Addr::new(remote.registers.rsp).offset(remote.stack_offset);
        memory.write_word(return_at, remote.registers.rip)?;
        Ok(remote)
    }

    /// Takes over a stopped thread of a process that has no agent, by code of the process's own: a system call and a `ret`. If the recorder dies, the thread
    /// goes on where it was.
    pub(crate) fn by_gadgets(tid: Tid, memory: &Memory, gadgets: Gadgets) -> io::Result<Self> {
        let mut remote = Self::new(tid, gadgets.syscall_ret)?;
        let signal_mask = ptrace::signal_mask(tid)?;
        let xstate = ptrace::extended_state(tid)?;
        let state_bytes = frame::state_bytes(&xstate);
        let frame = match remote.mode {
            Mode::Bits32 => {
                narrow_frame::signal_frame(&remote.registers, signal_mask, gadgets.sigreturn, &xstate, state_bytes)
            }
            Mode::Bits64 => {
                frame::signal_frame(&remote.registers, signal_mask, gadgets.sigreturn, &xstate, state_bytes)
            }
        };
        memory.write(frame.at, &frame.bytes)?;
        remote.extended_state = Some(xstate);
        remote.signal_mask = Some(signal_mask);
        remote.popped_bytes = gadgets.popped_words() * i64::from(remote.mode.word_bytes());
        remote.stack_offset = frame.at.offset(-remote.popped_bytes).distance_from(Addr::new(remote.registers.rsp));
        Ok(remote)
    }

    /// The thread.
    pub(crate) fn tid(&self) -> Tid {
        self.tid
    }

    /// Its width.
    pub(crate) fn mode(&self) -> Mode {
        self.mode
    }

    /// The stack pointer while it works.
    pub(crate) fn stack_pointer(&self) -> Addr {
        Addr::new(self.registers.rsp).offset(self.stack_offset)
    }

    /// The task that a system call has created last, as the recorder sees it.
    pub(crate) fn created(&self) -> Option<Tid> {
        self.created
    }

    /// Makes a system call.
    pub(crate) fn syscall(&mut self, number: libc::c_long, arguments: [u64; 6]) -> io::Result<u64> {
        let number = width::call_number(self.mode, number).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOSYS))?;
        let mut call = self.registers;
        call.rip = self.syscall_insn.value();
        call.rsp = call.rsp.wrapping_add_signed(self.stack_offset);
        call.rax = number;
        call.orig_rax = u64::MAX;
        width::set_arguments(self.mode, &mut call, arguments);
        loop {
            ptrace::set_registers(self.tid, &call)?;
            if self.signal_mask.is_some() && !self.is_blocking {
                // From here on the thread is on its way to set the mask back if we die.
                ptrace::set_signal_mask(self.tid, u64::MAX)?;
                self.is_blocking = true;
            }
            self.run_to_syscall()?;
            match ptrace::syscall_stop(self.tid)? {
                SyscallStop::Entry(entered) if entered == number => break,
                // Of the system call that the thread was stopped in the middle of, one that makes a child: its result is known only now.
                SyscallStop::Exit => self.registers.rax = ptrace::registers(self.tid)?.rax,
                _ => {}
            }
        }
        self.run_to_syscall()?;
        let result = width::result_of(&ptrace::registers(self.tid)?);
        if (-MAX_ERRNO..0).contains(&result) {
            let errno = i32::try_from(-result).unwrap_or(libc::EIO);
            return Err(io::Error::from_raw_os_error(errno));
        }
        Ok(result.cast_unsigned())
    }

    fn run_to_syscall(&mut self) -> io::Result<()> {
        loop {
            ptrace::resume_to_syscall(self.tid, 0)?;
            match ptrace::wait_for_stop(self.tid)? {
                Stop::Syscall => return Ok(()),
                // It does not get any further: the memory that it executes is gone.
                Stop::Signal(_) if ptrace::is_fault(self.tid)? => {
                    return Err(io::Error::from_raw_os_error(libc::EFAULT));
                }
                Stop::Signal(signal) => self.signals.push(signal),
                Stop::WithItsGroup => self.is_with_its_group = true,
                Stop::Clone => self.created = Tid::try_from(ptrace::event_message(self.tid)?).ok(),
                _ => {}
            }
        }
    }

    /// Calls a function of the process: `stub` is `live::code::call` there. Other threads run on meanwhile.
    pub(crate) fn call(&mut self, stub: Addr, function: Addr, deadline: Duration) -> io::Result<CallOutcome> {
        /// Direction and trap: off at a function's entry (System V psABI).
        const FLAGS_OFF: u64 = 0x500;
        /// What a function that fails is told by: if it were blocked, the kernel would forget the process's handler.
        const FAULTS: [i32; 5] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP];
        let until = Instant::now() + deadline;
        // What the gadget takes off the stack besides, the stub does not.
        let frame = self.stack_pointer().offset(self.popped_bytes);
        let mut call = self.registers;
        (call.rip, call.rsp) = (stub.value(), frame.value());
        match self.mode {
            Mode::Bits32 => call.rdx = function.value(),
            Mode::Bits64 => call.r11 = function.value(),
        }
        (call.rax, call.orig_rax, call.eflags) = (0, u64::MAX, call.eflags & !FLAGS_OFF);
        ptrace::set_registers(self.tid, &call)?;
        if let Some(state) = &self.extended_state {
            ptrace::set_extended_state(self.tid, &frame::state_at_entry(state))?;
            self.disturbed_state = Some(state.clone());
        }
        let faults = FAULTS.iter().fold(0_u64, |mask, signal| mask | 1 << (signal - 1));
        ptrace::set_signal_mask(self.tid, !faults)?;
        self.is_blocking = true;
        loop {
            ptrace::resume_to_syscall(self.tid, 0)?;
            let Some(stop) = ptrace::wait_until(self.tid, until)? else {
                ptrace::interrupt(self.tid)?;
                let is_entering = ptrace::wait_for_stop(self.tid)? == Stop::Syscall
                    && matches!(ptrace::syscall_stop(self.tid)?, SyscallStop::Entry(_));
                if is_entering {
                    self.leave_out()?;
                }
                return Ok(CallOutcome::StillRuns);
            };
            match stop {
                Stop::Syscall if self.is_returning(frame)? => return self.returned(),
                Stop::Signal(signal) if ptrace::is_fault(self.tid)? => {
                    let at = Addr::new(ptrace::registers(self.tid)?.rip);
                    return Ok(CallOutcome::Failed { signal, at });
                }
                Stop::Signal(signal) => self.signals.push(signal),
                Stop::WithItsGroup => self.is_with_its_group = true,
                Stop::Exited(_) | Stop::Killed(_) => return Err(io::Error::from_raw_os_error(libc::ESRCH)),
                _ => {}
            }
        }
    }

    /// Whether the thread is about to leave the frame of [`call`](Self::call).
    fn is_returning(&self, frame: Addr) -> io::Result<bool> {
        let sigreturn = width::call_number(self.mode, libc::SYS_rt_sigreturn);
        let is_sigreturn = match ptrace::syscall_stop(self.tid)? {
            SyscallStop::Entry(entered) => Some(entered) == sigreturn,
            _ => false,
        };
        Ok(is_sigreturn && ptrace::registers(self.tid)?.rsp == frame.after(self.mode.word_bytes() as usize).value())
    }

    /// What the function said. Its frame is not returned from: registers are restored by us.
    fn returned(&mut self) -> io::Result<CallOutcome> {
        let low_half = ptrace::registers(self.tid)?.rbx & u64::from(u32::MAX);
        self.leave_out()?;
        Ok(CallOutcome::Returned(u32::try_from(low_half).unwrap_or(0).cast_signed()))
    }

    /// Leaves out the system call that the thread is about to make.
    fn leave_out(&mut self) -> io::Result<()> {
        let mut registers = ptrace::registers(self.tid)?;
        registers.orig_rax = u64::MAX;
        ptrace::set_registers(self.tid, &registers)?;
        self.run_to_syscall()
    }

    /// Maps memory: `flags` as of mmap(2).
    pub(crate) fn map(
        &mut self,
        at: Addr,
        len_bytes: u64,
        protection: i32,
        flags: i32,
        descriptor: i64,
    ) -> io::Result<Addr> {
        let [protection, flags] = [protection, flags].map(|bits| u64::from(bits.cast_unsigned()));
        let arguments = [at.value(), len_bytes, protection, flags, descriptor.cast_unsigned(), 0];
        self.syscall(libc::SYS_mmap, arguments).map(Addr::new)
    }

    /// Gives memory back.
    pub(crate) fn unmap(&mut self, at: Addr, len_bytes: u64) -> io::Result<()> {
        self.syscall(libc::SYS_munmap, [at.value(), len_bytes, 0, 0, 0, 0]).map(drop)
    }

    /// Restores registers and mask. The thread is still stopped; signals that came meanwhile and could not wait are returned, to be delivered.
    pub(crate) fn finish(mut self) -> io::Result<Vec<i32>> {
        self.restore()?;
        Ok(std::mem::take(&mut self.signals))
    }

    fn restore(&mut self) -> io::Result<()> {
        self.is_restored = true;
        // In this order: until its registers are back, the thread would set the mask itself.
        if let Some(mask) = self.signal_mask.filter(|_| self.is_blocking) {
            ptrace::set_signal_mask(self.tid, mask)?;
        }
        ptrace::set_registers(self.tid, &self.registers)?;
        if let Some(state) = &self.disturbed_state {
            ptrace::set_extended_state(self.tid, state)?;
        }
        if self.is_with_its_group {
            // It went on where the others of its group stood; the next stop says whether they still do.
            ptrace::interrupt(self.tid)?;
        }
        Ok(())
    }
}

impl Drop for Remote {
    /// Something went wrong, and perhaps the thread is gone.
    fn drop(&mut self) {
        if !self.is_restored {
            let _ = self.restore();
        }
        for signal in &self.signals {
            spawn::kill(self.tid, *signal);
        }
    }
}

/// Winds an interrupted system call back, so that it starts again: what the kernel does itself where no handler runs
/// (`arch_do_signal_or_restart`). It would not know of it once the thread has made another one.
fn restart(registers: &mut ThreadRegisters) {
    if width::call_of(registers) < 0 {
        return;
    }
    let restart = width::call_number(width::mode_of(registers), libc::SYS_restart_syscall);
    let again = match width::result_of(registers) {
        ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND => registers.orig_rax,
        ERESTART_RESTARTBLOCK => restart.unwrap_or(0),
        _ => return,
    };
    registers.rax = again;
    registers.orig_rax = u64::MAX;
    registers.rip = registers.rip.wrapping_sub(width::SYSCALL_BYTES.cast_unsigned());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registers(number: i64, result: i64) -> ThreadRegisters {
        // SAFETY: plain numbers, for which zero is a value.
        let mut registers: ThreadRegisters = unsafe { std::mem::zeroed() };
        (registers.orig_rax, registers.rax, registers.rip) = (number.cast_unsigned(), result.cast_unsigned(), 0x1000);
        registers
    }

    #[test]
    fn an_interrupted_system_call_starts_again_and_no_other() {
        for (result, again) in [(-512, 7), (-513, 7), (-514, 7), (-516, 219)] {
            let mut interrupted = registers(7, result);
            restart(&mut interrupted);
            assert_eq!((interrupted.rip, interrupted.rax), (0xffe, again));
        }
        for (number, result) in [(7, 0), (7, -4), (-1, -512)] {
            let mut other = registers(number, result);
            restart(&mut other);
            assert_eq!((other.rip, other.rax), (0x1000, result.cast_unsigned()));
        }
    }
}
