//! What a callback sees of the interrupted call: the registers and the stack words that an ops trampoline saved.
//!
//! Owns the layout that trampolines write and callbacks read, [`CallFrame`] for the native width and [`FrameLayout`] for either. A
//! trampoline restores every register of the frame when its callbacks are done, so what they change takes effect.

use crate::{Addr, Mode, insn::Gpr};

/// Registers at a function's entry, as an ops trampoline hands them to its callbacks (64-bit layout).
///
/// `caller` trampolines fill only the argument registers, `bp`, `ip` and what lies above; `regs_caller` trampolines fill everything.
#[cfg(target_pointer_width = "64")]
#[repr(C)]
#[derive(Debug)]
#[expect(missing_docs, reason = "each field is the register of its name")]
pub struct CallFrame {
    pub sp: usize,
    pub r15: usize,
    pub r14: usize,
    pub r13: usize,
    pub r12: usize,
    pub bx: usize,
    pub r11: usize,
    pub r10: usize,
    pub r9: usize,
    pub r8: usize,
    pub di: usize,
    pub si: usize,
    pub dx: usize,
    pub cx: usize,
    pub flags: usize,
    pub ax: usize,
    pub bp: usize,
    /// Where the call resumes: behind the site. A callback of an IPMODIFY ops may change it.
    pub ip: usize,
    /// The return address of the traced function.
    pub parent: usize,
}

/// Registers at a function's entry, as an ops trampoline hands them to its callbacks (32-bit layout).
///
/// `caller` trampolines fill only `ax`, `dx`, `cx` (the arguments of regparm and fastcall functions), `bp`, `ip` and what lies above, with
/// the cdecl arguments behind `parent`; `regs_caller` trampolines fill everything.
#[cfg(target_pointer_width = "32")]
#[repr(C)]
#[derive(Debug)]
#[expect(missing_docs, reason = "each field is the register of its name")]
pub struct CallFrame {
    pub sp: usize,
    pub bx: usize,
    pub di: usize,
    pub si: usize,
    pub dx: usize,
    pub cx: usize,
    pub flags: usize,
    pub ax: usize,
    pub bp: usize,
    /// Where the call resumes: behind the site. A callback of an IPMODIFY ops may change it.
    pub ip: usize,
    /// The return address of the traced function.
    pub parent: usize,
}

impl CallFrame {
    /// The site that was called from.
    pub fn site(&self) -> Addr {
        crate::trap::call_site(Addr::new(self.ip as u64))
    }
}

/// Where a [`CallFrame`] of a target of either width keeps what, relative to the trampoline's frame pointer, in bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FrameLayout {
    mode: Mode,
}

/// The registers below the frame pointer, from it downwards; `Gpr::SP` stands for the interrupted stack pointer.
const SAVED_64: [Gpr; 15] = [
    Gpr::AX,
    FLAGS_PLACE,
    Gpr::CX,
    Gpr::DX,
    Gpr::SI,
    Gpr::DI,
    Gpr::R8,
    Gpr::R9,
    Gpr::R10,
    Gpr::R11,
    Gpr::BX,
    Gpr::R12,
    Gpr::R13,
    Gpr::R14,
    Gpr::R15,
];
const SAVED_32: [Gpr; 7] = [Gpr::AX, FLAGS_PLACE, Gpr::CX, Gpr::DX, Gpr::SI, Gpr::DI, Gpr::BX];

/// bp itself lies *at* the frame pointer, so its name is free to stand for the flags word in the tables.
const FLAGS_PLACE: Gpr = Gpr::BP;

impl FrameLayout {
    pub(crate) const fn new(mode: Mode) -> Self {
        Self { mode }
    }

    fn saved(self) -> &'static [Gpr] {
        match self.mode {
            Mode::Bits32 => &SAVED_32,
            Mode::Bits64 => &SAVED_64,
        }
    }

    fn place(self, index: usize) -> i64 {
        let words = i64::try_from(index).unwrap_or(i64::MAX) + 1;
        -words * i64::from(self.mode.word_bytes())
    }

    /// Of a saved register.
    pub(crate) fn register(self, register: Gpr) -> i64 {
        let index = self.saved().iter().position(|saved| *saved == register);
        self.place(index.expect("every register but sp and bp has a place"))
    }

    /// Of the flags word.
    pub(crate) fn flags(self) -> i64 {
        self.register(FLAGS_PLACE)
    }

    /// Of the interrupted stack pointer, the lowest word and so the start of the frame.
    pub(crate) fn start(self) -> i64 {
        self.place(self.saved().len())
    }

    /// Of the traced function's return address; the interrupted stack pointer points to it.
    pub(crate) fn parent(self) -> i64 {
        2 * i64::from(self.mode.word_bytes())
    }
}

#[cfg(test)]
mod tests {
    use core::mem::offset_of;

    use super::*;

    #[test]
    fn the_layout_for_machine_code_is_the_layout_of_the_type() {
        let layout = FrameLayout::new(Mode::NATIVE);
        let from_bp =
            |offset: usize| i64::try_from(offset).unwrap() - i64::try_from(offset_of!(CallFrame, bp)).unwrap();
        assert_eq!(layout.start(), from_bp(offset_of!(CallFrame, sp)));
        assert_eq!(layout.flags(), from_bp(offset_of!(CallFrame, flags)));
        assert_eq!(layout.parent(), from_bp(offset_of!(CallFrame, parent)));
        for (register, offset) in [
            (Gpr::AX, offset_of!(CallFrame, ax)),
            (Gpr::CX, offset_of!(CallFrame, cx)),
            (Gpr::DX, offset_of!(CallFrame, dx)),
            (Gpr::BX, offset_of!(CallFrame, bx)),
            (Gpr::SI, offset_of!(CallFrame, si)),
            (Gpr::DI, offset_of!(CallFrame, di)),
        ] {
            assert_eq!(layout.register(register), from_bp(offset), "{register:?}");
        }
        #[cfg(target_pointer_width = "64")]
        for (register, offset) in [
            (Gpr::R8, offset_of!(CallFrame, r8)),
            (Gpr::R9, offset_of!(CallFrame, r9)),
            (Gpr::R10, offset_of!(CallFrame, r10)),
            (Gpr::R11, offset_of!(CallFrame, r11)),
            (Gpr::R12, offset_of!(CallFrame, r12)),
            (Gpr::R13, offset_of!(CallFrame, r13)),
            (Gpr::R14, offset_of!(CallFrame, r14)),
            (Gpr::R15, offset_of!(CallFrame, r15)),
        ] {
            assert_eq!(layout.register(register), from_bp(offset), "{register:?}");
        }
    }
}
