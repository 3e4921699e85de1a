//! The signal frame of a breakpoint, as the engine's [`TrapFrame`].
//!
//! Owns [`SignalFrame`]: access to the interrupted registers, and the push of a word to the interrupted stack. Invariant: a push never overwrites
//! a byte of the signal frame.
//!
//! In a 64-bit process nothing lies in the 128 bytes below the interrupted stack pointer (x86-64 psABI, section 3.2.2), so a push is a
//! store. In a 32-bit process there is no red zone: unless the handler runs on an alternate stack, the frame's last bytes, `FP_XSTATE_MAGIC2` among
//! them, lie where the word has to go, and a kernel that does not find them restores x87 and SSE state only. There the frame is moved down
//! before the handler returns from it.

use trapline_engine::{Addr, Mode, trap::TrapFrame};

use crate::{sys::signal::SignalSet, thread::Interrupted};

#[cfg(target_arch = "x86")]
use libc::{REG_EFL, REG_EIP as REG_IP, REG_ESP as REG_SP};
#[cfg(target_arch = "x86_64")]
use libc::{REG_EFL, REG_R11, REG_RIP as REG_IP, REG_RSP as REG_SP};

/// Code of a signal that the kernel raised for an instruction: what `int3` gives (arch/x86/kernel/traps.c, `do_int3_user`).
const SI_KERNEL: libc::c_int = 0x80;
/// What it gives under some hypervisors and tracers.
const TRAP_BRKPT: libc::c_int = 1;

/// What a signal has interrupted.
///
/// # Safety
/// `context` is what the kernel passed to a handler that is still running.
pub(crate) unsafe fn interrupted(context: *const libc::ucontext_t) -> Interrupted {
    // SAFETY: the caller vouches for the pointer; handlers may change the context, but not while this reads it.
    let context = unsafe { &*context };
    let stack = context.uc_stack;
    let sp = usize::from_ne_bytes(context.uc_mcontext.gregs[place(REG_SP)].to_ne_bytes());
    Interrupted { sp, alternate_stack: (stack.ss_sp.addr(), stack.ss_size) }
}

/// The frame of the signal that is being handled.
pub(super) struct SignalFrame {
    info: *mut libc::siginfo_t,
    context: *mut libc::ucontext_t,
    /// A word that has to be pushed where the frame itself lies.
    #[cfg(target_arch = "x86")]
    pending_push: Option<usize>,
}

impl SignalFrame {
    /// Wraps the arguments of a handler.
    ///
    /// # Safety
    /// They are those that the kernel passed to a handler with `SA_SIGINFO` that is still running, and nobody else accesses them.
    pub(super) unsafe fn new(info: *mut libc::siginfo_t, context: *mut libc::ucontext_t) -> Self {
        Self {
            info,
            context,
            #[cfg(target_arch = "x86")]
            pending_push: None,
        }
    }

    fn code(&self) -> libc::c_int {
        // SAFETY: `new`'s caller vouches for the pointer.
        unsafe { (*self.info).si_code }
    }

    /// Whether an int3 may have raised the signal.
    pub(super) fn is_breakpoint(&self) -> bool {
        matches!(self.code(), SI_KERNEL | TRAP_BRKPT)
    }

    /// Whether a process sent the signal.
    pub(super) fn was_sent(&self) -> bool {
        self.code() <= 0
    }

    /// The interrupted instruction pointer.
    pub(super) fn ip(&self) -> Addr {
        Addr::new(self.register(REG_IP) as u64)
    }

    /// What was blocked when the signal arrived.
    pub(super) fn mask(&self) -> SignalSet {
        // SAFETY: `new`'s caller vouches for the pointer.
        let mask = unsafe { &raw const (*self.context).uc_sigmask };
        // SAFETY: the kernel stores 64 bits there, at either width.
        SignalSet::from_bits(unsafe { mask.cast::<u64>().read_unaligned() })
    }

    fn register(&self, index: libc::c_int) -> usize {
        // SAFETY: `new`'s caller vouches for the pointer.
        let registers = unsafe { &(*self.context).uc_mcontext.gregs };
        // The kernel's words are signed, and as wide as a usize.
        usize::from_ne_bytes(registers[place(index)].to_ne_bytes())
    }

    fn set_register(&mut self, index: libc::c_int, value: usize) {
        // SAFETY: `new`'s caller vouches for the pointer, and that nobody else accesses it.
        let registers = unsafe { &mut (*self.context).uc_mcontext.gregs };
        registers[place(index)] = libc::greg_t::from_ne_bytes(value.to_ne_bytes());
    }

    /// Ends the handler: nothing is left to do but to return from the signal.
    #[cfg(target_arch = "x86_64")]
    #[expect(clippy::unused_self, reason = "the 32-bit one needs it")]
    pub(super) fn leave(self) {}

    /// Ends the handler: returns, or moves the frame and does not return.
    #[cfg(target_arch = "x86")]
    pub(super) fn leave(self) {
        if let Some(word) = self.pending_push {
            i386::Extent::of(self.info, self.context).push_below(self.context, stack_word(self.sp()), word);
        }
    }
}

/// Register numbers of ucontext.h count from 0.
fn place(index: libc::c_int) -> usize {
    index.cast_unsigned() as usize
}

fn stack_word(at: Addr) -> *mut usize {
    std::ptr::with_exposed_provenance_mut(native(at))
}

#[expect(clippy::cast_possible_truncation, reason = "an address of the own process")]
fn native(addr: Addr) -> usize {
    addr.value() as usize
}

impl TrapFrame for SignalFrame {
    fn sp(&self) -> Addr {
        Addr::new(self.register(REG_SP) as u64)
    }

    fn set_sp(&mut self, sp: Addr) {
        self.set_register(REG_SP, native(sp));
    }

    fn set_ip(&mut self, ip: Addr) {
        self.set_register(REG_IP, native(ip));
    }

    fn flags(&self) -> u64 {
        self.register(REG_EFL) as u64
    }

    #[cfg(target_arch = "x86_64")]
    fn set_r11(&mut self, value: Addr) {
        self.set_register(REG_R11, native(value));
    }

    /// The builder refuses the strategy that would need it.
    #[cfg(target_arch = "x86")]
    fn set_r11(&mut self, _value: Addr) {}

    fn top_of_stack(&self) -> Addr {
        // SAFETY: asked only for a site that holds a `ret`, so a return address is there.
        Addr::new(unsafe { stack_word(self.sp()).read() } as u64)
    }

    fn push(&mut self, word: Addr) {
        let sp = self.sp().offset(-self.word_bytes());
        self.set_sp(sp);
        let place = stack_word(sp);
        #[cfg(target_arch = "x86")]
        if i386::Extent::of(self.info, self.context).contains(place.addr()) {
            self.pending_push = Some(native(word));
            return;
        }
        // SAFETY: (1) the interrupted code is at a call, which would write just there; (2) nothing of the signal frame lies there: the red zone
        // keeps it away at 64 bit, and the check above at 32 bit.
        unsafe { place.write(native(word)) };
    }

    fn word_bytes(&self) -> i64 {
        i64::from(Mode::NATIVE.word_bytes())
    }
}

/// Moving a 32-bit signal frame.
#[cfg(target_arch = "x86")]
mod i386 {
    /// Where the parts of the frame lie (`struct rt_sigframe` in `arch/x86/kernel/signal_32.c`): return address, signal number, two pointers, then
    /// the siginfo.
    const INFO_OFFSET: usize = 16;
    /// Of `sw_reserved` in the legacy region, behind the 112 bytes of the FSAVE image (arch/x86/include/uapi/asm/sigcontext.h, `struct _fpstate_32`).
    const MAGIC1_OFFSET: usize = 112 + 464;
    const EXTENDED_SIZE_OFFSET: usize = 112 + 468;
    const FP_XSTATE_MAGIC1: u32 = 0x4650_5853;
    /// FSAVE image and FXSAVE image: the frame of a CPU without XSAVE.
    const PLAIN_BYTES: usize = 112 + 512;
    /// How far the frame is moved: XRSTOR wants it aligned to this.
    const SHIFT: usize = 64;

    /// The bytes that `rt_sigreturn` reads.
    #[derive(Clone, Copy)]
    pub(super) struct Extent {
        start: usize,
        end: usize,
    }

    impl Extent {
        pub(super) fn of(info: *const libc::siginfo_t, context: *const libc::ucontext_t) -> Self {
            // SAFETY: the caller has both from the kernel.
            let fpregs = unsafe { (*context).uc_mcontext.fpregs }.cast::<u8>();
            let word_at = |offset: usize| {
                let word = fpregs.wrapping_add(offset).cast::<[u8; 4]>();
                // SAFETY: the kernel stores at least the legacy region, in whose reserved part these words lie.
                u32::from_ne_bytes(unsafe { word.read() })
            };
            let (magic, extended_bytes) = (word_at(MAGIC1_OFFSET), word_at(EXTENDED_SIZE_OFFSET));
            let len = if magic == FP_XSTATE_MAGIC1 { extended_bytes as usize } else { PLAIN_BYTES };
            Self { start: info.addr() - INFO_OFFSET, end: fpregs.addr() + len }
        }

        pub(super) fn contains(self, address: usize) -> bool {
            (self.start..self.end).contains(&address)
        }

        /// Moves the frame down, stores `word` at `place`, which it covered, and returns from the signal with the frame at its new place.
        pub(super) fn push_below(self, context: *mut libc::ucontext_t, place: *mut usize, word: usize) -> ! {
            // SAFETY: the caller has it from the kernel; the state that it points to moves with the frame.
            let mcontext = unsafe { &mut (*context).uc_mcontext };
            mcontext.fpregs = mcontext.fpregs.wrapping_byte_sub(SHIFT);
            let len = self.end - self.start;
            // SAFETY: the frame and the room below it belong to this handler, which ends here; see the routine.
            unsafe { move_frame_and_return(self.start, self.start - SHIFT, len, place, word) }
        }
    }

    /// Copies `len` bytes from `from` down to `to`, stores `word` at `place`, and makes the kernel restore the frame at `to`.
    ///
    /// The copy overwrites the stack that this runs on, so after the arguments are loaded only registers are used. All signals are blocked.
    #[unsafe(naked)]
    unsafe extern "C" fn move_frame_and_return(
        from: usize,
        to: usize,
        len: usize,
        place: *mut usize,
        word: usize,
    ) -> ! {
        core::arch::naked_asm!(
            "mov esi, [esp + 4]",
            "mov edi, [esp + 8]",
            "mov ecx, [esp + 12]",
            "mov ebx, [esp + 16]",
            "mov edx, [esp + 20]",
            // rt_sigreturn finds the frame a word below the stack pointer: its return address has been popped.
            "lea esp, [edi + 4]",
            "cld",
            // Downwards and ascending: no byte is overwritten before it is copied.
            "rep movsb",
            "mov [ebx], edx",
            "mov eax, {rt_sigreturn}",
            "int 0x80",
            "ud2",
            rt_sigreturn = const libc::SYS_rt_sigreturn,
        )
    }
}
