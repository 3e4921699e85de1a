//! Contexts of one thread, and the thread's state in memory.
//!
//! Owns [`Context`] and [`Thread`], and what traps and interruptions do to them. The steps between are those of [`handler`](super::handler) and
//! [`trampoline`](super::trampoline). Invariant: every context has numbers of its own (site, target, stack, registers), so that whatever is
//! taken for another context's shows.

use trapline_engine::slots::ThreadLayout;

use super::{
    SLOTS, Setting,
    code::{REGISTERS, Register},
};
use crate::explore::{Invariant, Violation};

/// Words of each context's stack that are modelled: the one at the stack pointer at the site, and those below.
pub(super) const WORDS: usize = 6;
/// What is left of a word that an interruption's frame was written over.
const LOST: u32 = 0xdead_dead;
/// `FP_XSTATE_MAGIC2` (arch/x86/include/uapi/asm/sigcontext.h), the last word of a signal frame.
const MAGIC2: u32 = 0x4650_5845;

fn number(context: usize) -> u32 {
    u32::try_from(context).expect("there are few contexts")
}

/// The address of the call that a context makes.
pub(super) fn site(context: usize) -> u32 {
    0x0040_1000 + 0x100 * number(context)
}

/// Where its call returns to.
pub(super) fn return_to(context: usize) -> u32 {
    site(context) + 5
}

/// Where its call goes.
pub(super) fn target(context: usize) -> u32 {
    0x0080_0000 + 0x100 * number(context)
}

fn stack(context: usize) -> u32 {
    0x7f00_0000 - 0x1000 * number(context)
}

/// What a context is at.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum At {
    /// It does not exist.
    Absent,
    /// About to execute the int3 at its site.
    Site,
    /// In the trap handler, which has done nothing yet.
    Handler,
    /// In the trap handler, which has reserved a slot.
    Reserved { slot: u8 },
    /// In the trap handler, which has filled a slot that it has not reserved yet ([`Mutant::FillBeforeReserve`](super::Mutant)).
    FilledFirst,
    /// In the trap handler, about to return to the int3 trampoline.
    Filled,
    /// In the trap handler, about to return to the target: the return address is pushed, and the trap's frame moved out of its way, or not.
    Pushed { frame_moved: bool },
    /// At an instruction of the int3 trampoline.
    Trampoline { op: u8 },
    /// At its target.
    Arrived,
    /// Back behind its site.
    Back,
}

impl At {
    pub(super) fn is_handler(self) -> bool {
        matches!(self, Self::Handler | Self::Reserved { .. } | Self::FilledFirst | Self::Filled | Self::Pushed { .. })
    }
}

/// One context.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Context {
    pub(super) at: At,
    number: u8,
    registers: [u32; REGISTERS],
    flags_written: bool,
    /// Bytes of slots in use when it trapped.
    depth_before: u32,
    words: [u32; WORDS],
}

impl Context {
    pub(super) const ABSENT: Self = Self {
        at: At::Absent,
        number: 0,
        registers: [0; REGISTERS],
        flags_written: false,
        depth_before: 0,
        words: [0; WORDS],
    };

    /// The context with this number, about to call its site.
    pub(super) fn new(index: usize) -> Self {
        let mut words = [LOST; WORDS];
        words[0] = parent(index);
        let number = u8::try_from(index).expect("there are few contexts");
        Self { at: At::Site, number, registers: registers_at_site(index), words, ..Self::ABSENT }
    }

    fn index(&self) -> usize {
        usize::from(self.number)
    }

    pub(super) fn register(&mut self, register: Register) -> &mut u32 {
        &mut self.registers[register as usize]
    }

    pub(super) fn sp(&self) -> u32 {
        self.registers[Register::Sp as usize]
    }

    /// Notes that an instruction wrote the flags.
    pub(super) fn write_flags(&mut self) {
        self.flags_written = true;
    }

    /// A word of its stack.
    ///
    /// # Errors
    /// If the address is none that a call and an int3 trampoline have business with.
    pub(super) fn word(&mut self, setting: &Setting, at: u32) -> Result<&mut u32, Violation> {
        let below = stack(self.index()).wrapping_sub(at);
        let index = usize::try_from(below / setting.word()).unwrap_or(WORDS);
        if below.is_multiple_of(setting.word()) && index < WORDS {
            Ok(&mut self.words[index])
        } else {
            Err(broken(format!("context {} uses {at:#x}, which is not near its stack pointer", self.number)))
        }
    }

    /// It is interrupted, by a trap of its own or by another context: what is below its stack pointer is lost, except a red zone. In a trap
    /// handler it is on another part of the stack, far below.
    pub(super) fn lose_words_below(&mut self, setting: &Setting) {
        if self.at.is_handler() {
            return;
        }
        let kept_bytes = stack(self.index()) - self.sp() + setting.red_zone_bytes;
        let kept = usize::try_from(kept_bytes / setting.word()).unwrap_or(WORDS) + 1;
        self.words.iter_mut().skip(kept).for_each(|word| *word = LOST);
    }

    /// It executes the int3 at its site. Where there is no red zone, the trap's frame begins right below its stack pointer.
    pub(super) fn trap(&mut self, setting: &Setting, depth_bytes: u32) {
        self.lose_words_below(setting);
        if setting.red_zone_bytes == 0 {
            self.words[1] = MAGIC2;
        }
        self.depth_before = depth_bytes;
        self.at = At::Handler;
    }

    /// The frame of its trap is taken down.
    ///
    /// # Errors
    /// If the last word of the frame is not what it was.
    pub(super) fn check_frame(&self, setting: &Setting) -> Result<(), Violation> {
        if setting.red_zone_bytes == 0 && self.words[1] != MAGIC2 {
            let what = "the last word of the trap's frame is overwritten: sigreturn will not restore the YMM registers";
            return Err(broken(format!("context {}: {what}", self.number)));
        }
        Ok(())
    }

    /// It comes to `ip`, which has to be its target, in the state in which a call would have left it.
    ///
    /// # Errors
    /// If anything is different.
    pub(super) fn arrive(&mut self, setting: &Setting, ip: u32, depth_bytes: u32) -> Result<(), Violation> {
        let index = self.index();
        if ip != target(index) {
            let what = format!("context {index} calls {:#x} and comes to {ip:#x}", target(index));
            return Err(Violation::new(Invariant::NoSkippedCall, what));
        }
        let mut expected = registers_at_site(index);
        expected[Register::Sp as usize] -= setting.word();
        let complaint = if self.words[1] != return_to(index) {
            format!("returns to {:#x} instead of {:#x}", self.words[1], return_to(index))
        } else if self.registers != expected {
            let [ax, cx, sp] = self.registers.map(|value| format!("{value:#x}"));
            format!(
                "comes to its target with ax = {ax}, cx = {cx}, sp = {sp}, and had {:#x}, {:#x}, {:#x}",
                expected[0], expected[1], expected[2]
            )
        } else if self.flags_written {
            "comes to its target with other flags".into()
        } else if self.words[0] != parent(index) {
            "comes to its target with an overwritten word on its stack".into()
        } else if depth_bytes != self.depth_before {
            format!("leaves {depth_bytes} bytes of slots in use, and found {}", self.depth_before)
        } else {
            self.at = At::Arrived;
            return Ok(());
        };
        Err(broken(format!("context {index} {complaint}")))
    }

    /// The callee returns.
    pub(super) fn return_from_target(&mut self, setting: &Setting) {
        *self.register(Register::Sp) += setting.word();
        self.at = At::Back;
    }
}

/// The return address of the function that a context is at the entry of.
fn parent(context: usize) -> u32 {
    0xaaaa_0000 + number(context)
}

fn registers_at_site(context: usize) -> [u32; REGISTERS] {
    let mut registers = [0x1000_0000 + number(context); REGISTERS];
    registers[Register::Cx as usize] = 0x2000_0000 + number(context);
    registers[Register::Sp as usize] = stack(context);
    registers
}

/// The thread's state as memory holds it, in the target's layout.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub(super) struct Thread {
    pub(super) depth_bytes: u32,
    /// Return address and target in each slot.
    pub(super) slots: [(u32, u32); SLOTS],
}

impl Thread {
    /// How many slots are in use, if that is a number.
    pub(super) fn depth(&self, layout: ThreadLayout) -> Option<usize> {
        let slot_bytes = u32::try_from(layout.slot_bytes()).ok()?;
        let depth = usize::try_from(self.depth_bytes / slot_bytes).ok()?;
        (self.depth_bytes.is_multiple_of(slot_bytes) && depth <= SLOTS).then_some(depth)
    }
}

pub(super) fn broken(what: impl Into<String>) -> Violation {
    Violation::new(Invariant::Transparency, what)
}
