//! Recognising signal frames, and the context that a signal interrupted.
//!
//! A signal handler returns to a few bytes that call `sigreturn`. A stack word that is the address of such bytes is where the kernel built
//! a frame; in it lies the interrupted program counter and stack pointer, possibly of another stack. Debuggers and unwinders find these
//! frames the same way (libgcc's `MD_FALLBACK_FRAME_STATE_FOR`, gdb's `amd64_linux_sigtramp_start`).
//!
//! Everything here is computed from a [`Mode`] and a [`Memory`], so both widths are tested on either.
//! Sources: `asm/sigframe.h` and `uapi/asm/{ucontext,sigcontext}.h` in `arch/x86/include`.

use trapline_engine::{Addr, Mode};

use crate::sys::memory::Memory;

/// The three layouts of a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum FrameKind {
    /// x86-64's only one: `struct rt_sigframe`.
    Rt64,
    /// i386, for a handler with `SA_SIGINFO`: `struct rt_sigframe_ia32`.
    Rt32,
    /// i386, for a handler without: `struct sigframe_ia32`.
    Plain32,
}

/// The context that a signal interrupted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Interrupted {
    /// Where the thread goes on when the handler returns.
    pub(super) pc: Addr,
    /// Its stack pointer then.
    pub(super) sp: Addr,
}

/// The code that a handler returns to.
struct Stub {
    kind: FrameKind,
    code: &'static [u8],
    /// For each instruction: its offset in `code`, and how far the stack pointer is above the frame's first byte when it is next.
    boundaries: &'static [(u8, u8)],
}

const STUBS_64: &[Stub] = &[
    // mov rax, 15; syscall. glibc, musl, Go.
    Stub {
        kind: FrameKind::Rt64,
        code: &[0x48, 0xc7, 0xc0, 0x0f, 0x00, 0x00, 0x00, 0x0f, 0x05],
        boundaries: &[(0, 8), (7, 8)],
    },
    // mov eax, 15; syscall. The shorter encoding of the same.
    Stub { kind: FrameKind::Rt64, code: &[0xb8, 0x0f, 0x00, 0x00, 0x00, 0x0f, 0x05], boundaries: &[(0, 8), (5, 8)] },
];

const STUBS_32: &[Stub] = &[
    // mov eax, 173; int 0x80. The vDSO's __kernel_rt_sigreturn, glibc's and musl's restorers.
    Stub { kind: FrameKind::Rt32, code: &[0xb8, 0xad, 0x00, 0x00, 0x00, 0xcd, 0x80], boundaries: &[(0, 4), (5, 4)] },
    // pop eax; mov eax, 119; int 0x80. The vDSO's __kernel_sigreturn, glibc's and musl's restorers.
    Stub {
        kind: FrameKind::Plain32,
        code: &[0x58, 0xb8, 0x77, 0x00, 0x00, 0x00, 0xcd, 0x80],
        boundaries: &[(0, 4), (1, 8), (6, 8)],
    },
];

/// The longest of the stubs, in bytes.
const LONGEST_STUB: usize = 9;
/// The highest offset at which one of their instructions begins.
const LAST_BOUNDARY: u8 = 7;

const fn stubs(mode: Mode) -> &'static [Stub] {
    match mode {
        Mode::Bits32 => STUBS_32,
        Mode::Bits64 => STUBS_64,
    }
}

/// Where a frame keeps what we need, in bytes from its first, which holds the handler's return address.
struct Layout {
    word_bytes: usize,
    sp: i64,
    pc: i64,
    /// The interrupted code segment selector.
    cs: i64,
    /// The frame's address modulo 16: the kernel aligns it as if a call had pushed the return address.
    alignment: u64,
}

impl FrameKind {
    /// The kind of frame that a handler leaves by returning to `at`.
    pub(super) fn returned_to(mode: Mode, at: Addr, memory: &impl Memory) -> Option<Self> {
        let mut code = [0; LONGEST_STUB];
        let count = memory.read(at, &mut code);
        stubs(mode).iter().find(|stub| code[..count].starts_with(stub.code)).map(|stub| stub.kind)
    }

    /// The frame that a thread is about to leave which has already returned from the handler: it executes the stub itself, and nothing on
    /// its stack says so any more.
    pub(super) fn being_left(mode: Mode, pc: Addr, sp: Addr, memory: &impl Memory) -> Option<(Self, Addr)> {
        let mut code = [0; LAST_BOUNDARY as usize + LONGEST_STUB];
        let mut first = pc.offset(-i64::from(LAST_BOUNDARY));
        let mut count = memory.read(first, &mut code);
        if count == 0 {
            // The page before this one cannot be read: then the stub begins here, or it is none.
            first = pc;
            count = memory.read(first, &mut code);
        }
        let code = &code[..count];
        stubs(mode).iter().find_map(|stub| {
            let (_, above_frame) = stub.boundaries.iter().find(|(offset, _)| {
                let start = pc.offset(-i64::from(*offset)).distance_from(first);
                usize::try_from(start)
                    .is_ok_and(|start| code.get(start..).is_some_and(|code| code.starts_with(stub.code)))
            })?;
            Some((stub.kind, sp.offset(-i64::from(*above_frame))))
        })
    }

    /// The context that was interrupted when the kernel built a frame of this kind at `frame`, or `None` if it built none there.
    ///
    /// A word that happens to hold a stub's address is told apart by the frame's alignment, and by the code segment, which the kernel
    /// accepts at privilege level 3 only.
    pub(super) fn interrupted(self, frame: Addr, memory: &impl Memory) -> Option<Interrupted> {
        let layout = self.layout();
        if frame.value() % 16 != layout.alignment {
            return None;
        }
        let word = |offset: i64| {
            let mut bytes = [0; 8];
            let bytes_read = memory.read(frame.offset(offset), &mut bytes[..layout.word_bytes]);
            (bytes_read == layout.word_bytes).then(|| u64::from_le_bytes(bytes))
        };
        let privilege_level = word(layout.cs)? & 3;
        if privilege_level != 3 {
            return None;
        }
        Some(Interrupted { pc: Addr::new(word(layout.pc)?), sp: Addr::new(word(layout.sp)?) })
    }

    const fn layout(self) -> Layout {
        match self {
            // pretcode (8), then struct ucontext: flags and link (16), stack (24), then the 8-byte registers r8-r15, rdi, rsi, rbp, rbx, rdx,
            // rax, rcx, rsp, rip, eflags, cs.
            Self::Rt64 => {
                const REGISTERS: i64 = 8 + 16 + 24;
                Layout {
                    word_bytes: 8,
                    sp: REGISTERS + 15 * 8,
                    pc: REGISTERS + 16 * 8,
                    cs: REGISTERS + 18 * 8,
                    alignment: 8,
                }
            }
            // pretcode, sig, pinfo, puc (16), siginfo (128), then struct ucontext: flags and link (8), stack (12), then the registers.
            Self::Rt32 => Self::layout_32(16 + 128 + 8 + 12),
            // pretcode, sig (8), then the registers.
            Self::Plain32 => Self::layout_32(8),
        }
    }

    /// The 4-byte registers gs, fs, es, ds, edi, esi, ebp, esp, ebx, edx, ecx, eax, trapno, err, eip, cs.
    const fn layout_32(registers: i64) -> Layout {
        Layout { word_bytes: 4, sp: registers + 7 * 4, pc: registers + 14 * 4, cs: registers + 15 * 4, alignment: 12 }
    }
}

/// What the tests build frames from, here and in the search that follows them.
#[cfg(test)]
impl FrameKind {
    pub(super) const ALL: [(Mode, Self); 3] =
        [(Mode::Bits64, Self::Rt64), (Mode::Bits32, Self::Rt32), (Mode::Bits32, Self::Plain32)];

    fn stub(self) -> &'static Stub {
        STUBS_64.iter().chain(STUBS_32).find(|stub| stub.kind == self).unwrap()
    }

    pub(super) fn stub_code(self) -> &'static [u8] {
        self.stub().code
    }

    pub(super) fn boundaries(self) -> &'static [(u8, u8)] {
        self.stub().boundaries
    }

    /// What the kernel adds to a multiple of 16.
    pub(super) fn alignment(self) -> i64 {
        self.layout().alignment.cast_signed()
    }

    /// The words of a frame that matter, by their offsets.
    pub(super) fn context(self, interrupted: Interrupted) -> [(i64, Addr); 3] {
        const USER_CODE_SEGMENT: Addr = Addr::new(0x33);
        let Layout { sp, pc, cs, .. } = self.layout();
        [(sp, interrupted.sp), (pc, interrupted.pc), (cs, USER_CODE_SEGMENT)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::memory::fake::FakeMemory;

    const CODE: Addr = Addr::new(0x1000);

    /// The offsets that libc's own headers give for the width these tests run at.
    #[test]
    fn the_layout_agrees_with_libc() {
        use std::mem::offset_of;
        let in_context = |register: i32| {
            let registers = offset_of!(libc::ucontext_t, uc_mcontext) + offset_of!(libc::mcontext_t, gregs);
            registers + register.cast_unsigned() as usize * size_of::<usize>()
        };
        #[cfg(target_arch = "x86_64")]
        let (kind, context, sp, pc) = (FrameKind::Rt64, 8, libc::REG_RSP, libc::REG_RIP);
        #[cfg(target_arch = "x86")]
        let (kind, context, sp, pc) =
            (FrameKind::Rt32, 16 + size_of::<libc::siginfo_t>(), libc::REG_ESP, libc::REG_EIP);
        let layout = kind.layout();
        assert_eq!(usize::try_from(layout.sp), Ok(context + in_context(sp)));
        assert_eq!(usize::try_from(layout.pc), Ok(context + in_context(pc)));
    }

    #[test]
    fn stubs_are_recognised_in_their_own_mode_only() {
        for stub in STUBS_64.iter().chain(STUBS_32) {
            let mut memory = FakeMemory::default();
            memory.add(CODE, stub.code.to_vec());
            for mode in [Mode::Bits32, Mode::Bits64] {
                let expected = FrameKind::ALL.contains(&(mode, stub.kind)).then_some(stub.kind);
                assert_eq!(FrameKind::returned_to(mode, CODE, &memory), expected);
                assert_eq!(FrameKind::returned_to(mode, CODE.offset(1), &memory), None);
            }
        }
    }

    #[test]
    fn a_stub_that_is_cut_off_is_none() {
        for (mode, kind) in FrameKind::ALL {
            let mut memory = FakeMemory::default();
            let code = kind.stub_code();
            memory.add(CODE, code[..code.len() - 1].to_vec());
            assert_eq!(FrameKind::returned_to(mode, CODE, &memory), None);
            assert_eq!(FrameKind::being_left(mode, CODE, Addr::new(0x2000), &memory), None);
        }
    }

    #[test]
    fn the_frame_of_each_instruction_of_a_stub_is_found() {
        for (mode, kind) in FrameKind::ALL {
            let mut memory = FakeMemory::default();
            memory.add(Addr::new(0xf00), vec![0x90; 0x200]);
            memory.write(CODE, kind.stub_code());
            let frame = Addr::new(0x2000);
            for offset in 0..i64::try_from(kind.stub_code().len()).unwrap() {
                let boundary = kind.boundaries().iter().find(|(at, _)| i64::from(*at) == offset);
                let sp = frame.offset(boundary.map_or(0, |(_, above_frame)| i64::from(*above_frame)));
                let found = FrameKind::being_left(mode, CODE.offset(offset), sp, &memory);
                assert_eq!(found, boundary.map(|_| (kind, frame)), "{kind:?} + {offset}");
            }
        }
    }

    #[test]
    fn a_frame_without_a_user_code_segment_is_none() {
        for (_, kind) in FrameKind::ALL {
            let frame = Addr::new(0x2000).offset(kind.alignment());
            let interrupted = Interrupted { pc: Addr::new(0x11), sp: Addr::new(0x22) };
            let mut memory = FakeMemory::default();
            memory.add(Addr::new(0x2000), vec![0; 0x200]);
            for (offset, word) in kind.context(interrupted) {
                memory.write(frame.offset(offset), &word.value().to_le_bytes()[..4]);
            }
            assert_eq!(kind.interrupted(frame, &memory), Some(interrupted));
            assert_eq!(kind.interrupted(frame.offset(4), &memory), None, "misaligned");
            memory.write(frame.offset(kind.layout().cs), &[0x10, 0, 0, 0]);
            assert_eq!(kind.interrupted(frame, &memory), None, "a kernel's segment");
        }
    }
}
