//! What a signal does: a value that handlers can read while others replace it.
//!
//! Owns [`Action`], the program's view of a `struct sigaction`, and [`ActionCell`], one such value behind a sequence lock. Neighbours: the SIGTRAP
//! handler reads the chain, [`interpose`](crate::interpose) stores and shows what the program asked for. Invariant: a reader gets one
//! value whole and waits for nobody; writers block all signals meanwhile, so that no handler of theirs can wait for them, and a forked child finds no
//! write half done.

use std::{
    io, mem,
    sync::atomic::{AtomicU64, AtomicUsize, Ordering},
};

use crate::sys::{
    signal::{SignalSet, replace_mask},
    task::ProcessLock,
};

unsafe extern "C" {
    /// glibc's sigaction by the name under which it is not interposed.
    #[link_name = "__sigaction"]
    pub(crate) fn libc_sigaction(
        signal: libc::c_int,
        new: *const libc::sigaction,
        old: *mut libc::sigaction,
    ) -> libc::c_int;
}

/// What kind of thing a signal does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Disposition {
    /// `SIG_DFL`.
    Default,
    /// `SIG_IGN`.
    Ignore,
    /// A function.
    Handler,
}

/// What a signal does, with its flags and mask.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Action {
    handler: usize,
    flags: libc::c_int,
    mask: SignalSet,
}

impl Action {
    pub(crate) const DEFAULT: Self = Self { handler: libc::SIG_DFL, flags: 0, mask: SignalSet::EMPTY };

    /// A handler during which every signal is blocked.
    pub(crate) fn handler(handler: usize, flags: libc::c_int) -> Self {
        Self { handler, flags, mask: SignalSet::ALL }
    }

    /// What signal(3) sets: the handler stays, system calls are restarted, and `own` (the signal itself) is blocked meanwhile.
    pub(crate) fn bsd(handler: usize, own: SignalSet) -> Self {
        Self { handler, flags: libc::SA_RESTART, mask: own }
    }

    /// What the kernel does for `signal` now.
    pub(crate) fn of_kernel(signal: libc::c_int) -> io::Result<Self> {
        // SAFETY: all zero is a valid sigaction.
        let mut old: libc::sigaction = unsafe { mem::zeroed() };
        // SAFETY: a null `new` changes nothing; `old` is a live local.
        if unsafe { libc_sigaction(signal, std::ptr::null(), &raw mut old) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self::from_libc(&old))
    }

    /// Makes it what the kernel does for `signal`.
    pub(crate) fn give_to_kernel(self, signal: libc::c_int) -> io::Result<()> {
        let new = self.to_libc();
        // SAFETY: `new` is a live local; its handler is one of ours, or one that the program registered for this signal.
        if unsafe { libc_sigaction(signal, &raw const new, std::ptr::null_mut()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    pub(crate) fn from_libc(action: &libc::sigaction) -> Self {
        // SAFETY: a sigset_t begins with the kernel's 64 bits, at either width, and any bits are a valid set.
        let mask = unsafe { (&raw const action.sa_mask).cast::<u64>().read_unaligned() };
        Self { handler: action.sa_sigaction, flags: action.sa_flags, mask: SignalSet::from_bits(mask) }
    }

    pub(crate) fn to_libc(self) -> libc::sigaction {
        // SAFETY: all zero is a valid sigaction.
        let mut action: libc::sigaction = unsafe { mem::zeroed() };
        action.sa_sigaction = self.handler;
        action.sa_flags = self.flags;
        // SAFETY: as in `from_libc`; the set is a live local.
        unsafe { (&raw mut action.sa_mask).cast::<u64>().write_unaligned(self.mask.bits()) };
        action
    }

    pub(crate) fn is_handler(self, handler: usize) -> bool {
        self.handler == handler
    }

    pub(crate) fn disposition(self) -> Disposition {
        match self.handler {
            libc::SIG_DFL => Disposition::Default,
            libc::SIG_IGN => Disposition::Ignore,
            _ => Disposition::Handler,
        }
    }

    /// Whether the handler wants `siginfo_t` and context.
    #[cfg(target_arch = "x86")]
    fn wants_info(self) -> bool {
        self.flags & libc::SA_SIGINFO != 0
    }

    /// Whether system calls that the signal interrupts fail with `EINTR`.
    pub(crate) fn interrupts_calls(self) -> bool {
        self.disposition() == Disposition::Handler && self.flags & libc::SA_RESTART == 0
    }

    /// Whether the action is the default one again once its handler has been called.
    pub(crate) fn resets(self) -> bool {
        self.flags & libc::SA_RESETHAND != 0
    }

    /// The same with another handler, which wants `siginfo_t` and context.
    pub(crate) fn with_handler(self, handler: usize) -> Self {
        Self { handler, flags: self.flags | libc::SA_SIGINFO, ..self }
    }

    /// The same without a signal in its mask.
    pub(crate) fn without_blocking(self, signal: libc::c_int) -> Self {
        Self { mask: self.mask.without(signal), ..self }
    }

    /// What is blocked while the handler runs for SIGTRAP, interrupting code with this mask (kernel/signal.c, `signal_delivered`).
    pub(crate) fn mask_on_top_of(self, interrupted: SignalSet) -> SignalSet {
        let blocked = SignalSet::from_bits(interrupted.bits() | self.mask.bits());
        if self.flags & libc::SA_NODEFER == 0 { blocked.with(libc::SIGTRAP) } else { blocked }
    }

    /// Calls the handler.
    ///
    /// # Safety
    /// (1) It is a handler, not `SIG_DFL` or `SIG_IGN`; (2) the arguments are those of a signal frame of `signal`.
    pub(crate) unsafe fn call(self, signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
        let handler = std::ptr::with_exposed_provenance::<()>(self.handler);
        #[cfg(target_arch = "x86")]
        if !self.wants_info() {
            // SAFETY: by (2) the pointer is to the context of a signal frame.
            let registers = unsafe { &raw mut (*context.cast::<libc::ucontext_t>()).uc_mcontext };
            // SAFETY: by (1) this is the address of a function; the registers are those of (2).
            return unsafe { i386::call_plain(handler, signal, registers) };
        }
        // SAFETY: by (1) this is the address of a function, which takes one argument or, with SA_SIGINFO, three; the x86-64 kernel passes three in
        // either case, and the convention lets a function ignore those behind its own.
        let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
            unsafe { mem::transmute(handler) };
        handler(signal, info, context);
    }
}

/// Handlers of the kind that i386 had first.
#[cfg(target_arch = "x86")]
mod i386 {
    use libc::mcontext_t;

    /// `struct sigcontext` (arch/x86/include/uapi/asm/sigcontext.h, `struct sigcontext_32`), of which `mcontext_t` is glibc's name.
    const SIGCONTEXT_BYTES: usize = size_of::<mcontext_t>();
    const _: () = assert!(SIGCONTEXT_BYTES == 22 * 4);

    /// Calls a handler without `SA_SIGINFO` as the kernel does: the registers follow the signal's number on the stack, by value, and what the handler
    /// changes in them takes effect.
    ///
    /// ```text
    /// ebp+16   registers
    /// ebp+12   signal
    /// ebp+8    handler
    /// ebp      saved ebp, then esi, edi
    /// esp+4    copy of the registers
    /// esp      signal
    /// ```
    ///
    /// # Safety
    /// `handler` is such a handler, and `registers` are those of a signal frame.
    #[unsafe(naked)]
    pub(super) unsafe extern "C" fn call_plain(handler: *const (), signal: libc::c_int, registers: *mut mcontext_t) {
        core::arch::naked_asm!(
            ".cfi_startproc",
            "push ebp",
            ".cfi_adjust_cfa_offset 4",
            ".cfi_rel_offset ebp, 0",
            "mov ebp, esp",
            ".cfi_def_cfa_register ebp",
            "push esi",
            ".cfi_offset esi, -12",
            "push edi",
            ".cfi_offset edi, -16",
            "sub esp, {room}",
            "and esp, -16",
            // The registers in.
            "mov esi, [ebp + 16]",
            "lea edi, [esp + 4]",
            "mov ecx, {words}",
            "cld",
            "rep movsd",
            "mov eax, [ebp + 12]",
            "mov [esp], eax",
            "call [ebp + 8]",
            // And out again.
            "lea esi, [esp + 4]",
            "mov edi, [ebp + 16]",
            "mov ecx, {words}",
            "cld",
            "rep movsd",
            "lea esp, [ebp - 8]",
            "pop edi",
            "pop esi",
            "pop ebp",
            ".cfi_def_cfa esp, 4",
            "ret",
            ".cfi_endproc",
            room = const SIGCONTEXT_BYTES + 4,
            words = const SIGCONTEXT_BYTES / 4,
        )
    }
}

/// An [`Action`] that signal handlers read without waiting for a lock that they themselves might hold.
pub(crate) struct ActionCell {
    /// Counts writes. The parity tells which of the two is valid; a writer fills the other one.
    version: AtomicUsize,
    actions: [Fields; 2],
}

struct Fields {
    handler: AtomicUsize,
    flags: AtomicUsize,
    mask: AtomicU64,
}

/// One writer at a time, whichever cell it writes. A forked child does not inherit a write that another thread had begun.
static WRITER: ProcessLock = ProcessLock::new();

impl Fields {
    const fn new() -> Self {
        Self { handler: AtomicUsize::new(libc::SIG_DFL), flags: AtomicUsize::new(0), mask: AtomicU64::new(0) }
    }

    fn load(&self) -> Action {
        #[expect(clippy::cast_possible_truncation, clippy::cast_possible_wrap, reason = "stored from a c_int")]
        // Acquire on each: none of them may sink below the second look at the version.
        Action {
            handler: self.handler.load(Ordering::Acquire),
            flags: self.flags.load(Ordering::Acquire) as libc::c_int,
            mask: SignalSet::from_bits(self.mask.load(Ordering::Acquire)),
        }
    }

    fn store(&self, action: Action) {
        // Release on each: a reader that sees one of them sees that the version has changed since these fields were valid.
        self.handler.store(action.handler, Ordering::Release);
        self.flags.store(action.flags.cast_unsigned() as usize, Ordering::Release);
        self.mask.store(action.mask.bits(), Ordering::Release);
    }
}

impl ActionCell {
    pub(crate) const fn new() -> Self {
        Self { version: AtomicUsize::new(0), actions: [const { Fields::new() }; 2] }
    }

    pub(crate) fn load(&self) -> Action {
        loop {
            // Acquire: pairs with the Release of a writer's end; the fields are at least as new as this version.
            let version = self.version.load(Ordering::Acquire);
            let action = self.actions[version % 2].load();
            if self.version.load(Ordering::Relaxed) == version {
                return action;
            }
        }
    }

    /// Replaces the value and returns the previous one.
    pub(crate) fn store(&self, action: Action) -> Action {
        // With all signals blocked no handler of this thread can wait for the writer that it interrupted.
        let mask = replace_mask(SignalSet::ALL.without(libc::SIGTRAP));
        let writer = WRITER.acquire();
        let version = self.version.load(Ordering::Relaxed);
        let previous = self.actions[version % 2].load();
        self.actions[(version + 1) % 2].store(action);
        // Release: pairs with the Acquire of readers.
        self.version.store(version.wrapping_add(1), Ordering::Release);
        drop(writer);
        replace_mask(mask);
        previous
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_action_survives_the_way_through_libc() {
        let action = Action {
            handler: 0x1234,
            flags: libc::SA_SIGINFO | libc::SA_NODEFER,
            mask: SignalSet::EMPTY.with(libc::SIGTRAP).with(64),
        };
        assert_eq!(Action::from_libc(&action.to_libc()), action);
    }

    #[test]
    fn the_mask_of_a_handler_is_the_kernels() {
        let action = Action { mask: SignalSet::EMPTY.with(1), ..Action::DEFAULT };
        let interrupted = SignalSet::EMPTY.with(2);
        assert_eq!(action.mask_on_top_of(interrupted), SignalSet::EMPTY.with(1).with(2).with(libc::SIGTRAP));
        let nodefer = Action { flags: libc::SA_NODEFER, ..action };
        assert_eq!(nodefer.mask_on_top_of(interrupted), SignalSet::EMPTY.with(1).with(2));
    }

    #[test]
    fn readers_never_see_a_mixture() {
        let cell = ActionCell::new();
        let action =
            |n: usize| Action { handler: n, flags: i32::try_from(n).unwrap(), mask: SignalSet::from_bits(n as u64) };
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !done.load(Ordering::Relaxed) {
                        let Action { handler, flags, mask } = cell.load();
                        assert_eq!((handler, handler as u64), (flags.cast_unsigned() as usize, mask.bits()));
                    }
                });
            }
            for n in 1..20_000 {
                assert_eq!(cell.store(action(n)), action(n - 1));
            }
            done.store(true, Ordering::Relaxed);
        });
    }
}
