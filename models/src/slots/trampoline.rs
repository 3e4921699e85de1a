//! The CPU inside the int3 trampoline: one instruction at a time.
//!
//! Neighbours: [`code`](super::code) says what the instructions are, [`Context`] holds what they work on. Invariant: an access outside of the
//! context's own stack words and the thread's depth and slots is a violation.

use trapline_engine::slots::ThreadLayout;

use super::{
    SLOTS, SlotModel, State, THREAD_OFFSET,
    code::{Op, Place, Register},
    context::{At, Context, Thread, broken},
};
use crate::explore::Violation;

impl SlotModel {
    /// Executes one instruction of the trampoline in context `index`.
    pub(super) fn execute(&self, state: &mut State, index: usize, op: usize) -> Result<(), Violation> {
        let State { contexts, thread } = state;
        let context = &mut contexts[index];
        let word = i64::from(self.setting.word());
        match self.ops[op] {
            Op::Lea { to, base, displacement } => *context.register(to) = offset(*context.register(base), displacement),
            Op::Add { to, displacement } => {
                *context.register(to) = offset(*context.register(to), displacement);
                context.write_flags();
            }
            Op::Push(from) => {
                let value = *context.register(from);
                let sp = offset(context.sp(), -word);
                *context.register(Register::Sp) = sp;
                *context.word(&self.setting, sp)? = value;
            }
            Op::Pop(to) => {
                let sp = context.sp();
                let value = *context.word(&self.setting, sp)?;
                *context.register(Register::Sp) = offset(sp, word);
                *context.register(to) = value;
            }
            Op::Load { to, from } => *context.register(to) = *self.place(context, thread, from)?,
            Op::Store { to, from } => {
                let value = *context.register(from);
                *self.place(context, thread, to)? = value;
            }
            Op::Ret => {
                let sp = context.sp();
                let ip = *context.word(&self.setting, sp)?;
                *context.register(Register::Sp) = offset(sp, word);
                return context.arrive(&self.setting, ip, thread.depth_bytes);
            }
        }
        context.at = At::Trampoline { op: u8::try_from(op + 1).expect("the trampoline is short") };
        Ok(())
    }

    fn place<'a>(
        &self,
        context: &'a mut Context,
        thread: &'a mut Thread,
        place: Place,
    ) -> Result<&'a mut u32, Violation> {
        match place {
            Place::Stack { base, displacement } => {
                let at = offset(*context.register(base), displacement);
                context.word(&self.setting, at)
            }
            Place::Thread { index, displacement } => {
                let index = index.map_or(0, |index| *context.register(index));
                let at = i64::from(index) + displacement - THREAD_OFFSET;
                thread.word(self.setting.layout(), at)
            }
        }
    }
}

/// Address arithmetic wraps.
fn offset(base: u32, bytes: i64) -> u32 {
    base.wrapping_add_signed(i32::try_from(bytes).expect("displacements are small"))
}

impl Thread {
    /// The word at a distance from the beginning of the thread's state.
    fn word(&mut self, layout: ThreadLayout, at: i64) -> Result<&mut u32, Violation> {
        if at == layout.depth() {
            return Ok(&mut self.depth_bytes);
        }
        let (slot, inside) = ((at - layout.slots()) / layout.slot_bytes(), (at - layout.slots()) % layout.slot_bytes());
        let slots = usize::try_from(slot).ok().filter(|slot| at >= layout.slots() && *slot < SLOTS);
        match slots.map(|slot| &mut self.slots[slot]) {
            Some((return_to, _)) if inside == layout.slot_return_to() => Ok(return_to),
            Some((_, target)) if inside == layout.slot_target() => Ok(target),
            _ => Err(broken(format!("the trampoline uses byte {at} of the thread's state"))),
        }
    }
}
