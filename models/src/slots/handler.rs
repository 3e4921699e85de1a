//! The trap handler: the real slot functions, with room for an interruption between any two.
//!
//! Neighbours: [`Context`] is what it resumes, [`trampoline`](super::trampoline) what it resumes at. The engine's [`resume`] is one
//! function; where it takes a slot, the model takes the same steps one by one, and compares: at each trap, `resume` runs on a copy and has to come
//! to the same. Where it takes none, it runs as it is. Invariant: the engine's own functions do everything that is done to a slot.

use trapline_engine::{
    Addr, ThreadState,
    insn::Effect,
    slots::{SlotsFull, Snapshot},
    trap::{Resume, Resumed, TrapFrame, resume},
};

use super::{
    INT3_TRAMPOLINE, Mutant, SLOTS, SlotModel, State,
    code::Register,
    context::{At, Context, Thread, broken, return_to, target},
};
use crate::explore::Violation;

impl SlotModel {
    /// The next step of the handler of context `index`.
    pub(super) fn handle(&self, state: &mut State, index: usize) -> Result<(), Violation> {
        let State { contexts, thread } = state;
        let context = &mut contexts[index];
        match context.at {
            At::Handler => return self.enter_handler(context, thread, index),
            At::Reserved { slot } => {
                let real = self.real(thread)?;
                fill(&real, usize::from(slot), index);
                self.keep(thread, &real);
                context.at = At::Filled;
            }
            At::FilledFirst => {
                let real = self.real(thread)?;
                real.reserve(self.setting.slots).map_err(|SlotsFull| broken("no slot is left"))?;
                self.keep(thread, &real);
                context.at = At::Filled;
            }
            At::Filled => {
                context.check_frame(&self.setting)?;
                context.at = At::Trampoline { op: 0 };
            }
            At::Pushed { frame_moved } => {
                if !frame_moved {
                    context.check_frame(&self.setting)?;
                }
                context.arrive(&self.setting, target(index), thread.depth_bytes)?;
            }
            _ => {}
        }
        Ok(())
    }

    fn enter_handler(&self, context: &mut Context, thread: &mut Thread, index: usize) -> Result<(), Violation> {
        let real = self.real(thread)?;
        if self.setting.resume != Resume::Slots {
            return self.push(context, &real, index);
        }
        if self.setting.mutant == Some(Mutant::FillBeforeReserve) && real.depth() < self.setting.slots {
            fill(&real, real.depth(), index);
            self.keep(thread, &real);
            context.at = At::FilledFirst;
            return Ok(());
        }
        match real.reserve(self.setting.slots) {
            Ok(slot) => {
                self.compare_with_resume(*context, thread, index)?;
                self.keep(thread, &real);
                context.at = At::Reserved { slot: u8::try_from(slot).expect("there are few slots") };
                Ok(())
            }
            Err(SlotsFull) if self.setting.mutant == Some(Mutant::NoLimit) => {
                fill(&real, self.setting.slots - 1, index);
                self.keep(thread, &real);
                context.at = At::Filled;
                Ok(())
            }
            Err(SlotsFull) => self.push(context, &real, index),
        }
    }

    /// Runs the engine's `resume` where it pushes.
    fn push(&self, context: &mut Context, real: &ThreadState<SLOTS>, index: usize) -> Result<(), Violation> {
        let before = real.snapshot();
        let (resumed, ip) = self.resume(context, real, index)?;
        let is_push = matches!(resumed, Resumed::Overflow | Resumed::Direct);
        if !is_push || ip != target(index) || real.snapshot() != before {
            return Err(broken(format!("a full slot stack is answered by {resumed:?}, going on at {ip:#x}")));
        }
        context.at = At::Pushed { frame_moved: self.setting.mutant != Some(Mutant::PushThroughFrame) };
        Ok(())
    }

    /// What the handler does step by step has to be what the engine's `resume` does.
    fn compare_with_resume(&self, mut context: Context, thread: &Thread, index: usize) -> Result<(), Violation> {
        let (whole, steps) = (self.real(thread)?, self.real(thread)?);
        let (resumed, ip) = self.resume(&mut context, &whole, index)?;
        let slot = steps.reserve(self.setting.slots).expect("the caller has just reserved one");
        fill(&steps, slot, index);
        if resumed == Resumed::Slot(slot) && ip == INT3_TRAMPOLINE && whole.snapshot() == steps.snapshot() {
            Ok(())
        } else {
            Err(broken("the engine resumes in other steps than the model"))
        }
    }

    fn resume(
        &self,
        context: &mut Context,
        real: &ThreadState<SLOTS>,
        index: usize,
    ) -> Result<(Resumed, u32), Violation> {
        let [target, return_to] = [target(index), return_to(index)].map(|at| Addr::new(at.into()));
        let effect = Effect::Call { target, return_to };
        let mut frame = Frame { model: self, context, ip: Addr::default(), outside: None };
        let int3_trampoline = Addr::new(INT3_TRAMPOLINE.into());
        let resumed = resume(&mut frame, effect, self.setting.resume, real, self.setting.slots, int3_trampoline);
        match frame.outside {
            Some(violation) => Err(violation),
            None => Ok((resumed, narrow(frame.ip))),
        }
    }

    /// The engine's thread state, holding what the modelled memory holds.
    fn real(&self, thread: &Thread) -> Result<ThreadState<SLOTS>, Violation> {
        let depth = thread.depth(self.setting.layout());
        let depth = depth.ok_or_else(|| broken(format!("{} bytes of slots cannot be in use", thread.depth_bytes)))?;
        let slots = thread.slots.map(|(return_to, target)| (return_to as usize, target as usize));
        Ok(Snapshot { depth, slots }.into())
    }

    /// The modelled memory, holding what the engine's thread state holds.
    fn keep(&self, thread: &mut Thread, real: &ThreadState<SLOTS>) {
        let Snapshot { depth, slots } = real.snapshot();
        let word = |word: usize| u32::try_from(word).expect("addresses of the model have 32 bits");
        thread.depth_bytes = word(depth) * u32::try_from(self.setting.layout().slot_bytes()).expect("a slot is small");
        thread.slots = slots.map(|(return_to, target)| (word(return_to), word(target)));
    }
}

fn fill(real: &ThreadState<SLOTS>, slot: usize, index: usize) {
    real.fill(slot, return_to(index) as usize, target(index) as usize);
}

fn narrow(addr: Addr) -> u32 {
    u32::try_from(addr.value()).expect("addresses of the model have 32 bits")
}

/// The interrupted context, as the engine's `resume` sees it.
struct Frame<'a> {
    model: &'a SlotModel,
    context: &'a mut Context,
    ip: Addr,
    /// A push to where there is no stack.
    outside: Option<Violation>,
}

impl TrapFrame for Frame<'_> {
    fn sp(&self) -> Addr {
        Addr::new(self.context.sp().into())
    }
    fn set_sp(&mut self, sp: Addr) {
        *self.context.register(Register::Sp) = narrow(sp);
    }
    fn set_ip(&mut self, ip: Addr) {
        self.ip = ip;
    }
    fn flags(&self) -> u64 {
        0
    }
    fn set_r11(&mut self, _: Addr) {}
    fn top_of_stack(&self) -> Addr {
        Addr::default()
    }
    fn push(&mut self, word: Addr) {
        let sp = self.context.sp() - self.model.setting.word();
        *self.context.register(Register::Sp) = sp;
        match self.context.word(&self.model.setting, sp) {
            Ok(place) => *place = narrow(word),
            Err(violation) => self.outside = Some(violation),
        }
    }
    fn word_bytes(&self) -> i64 {
        self.model.setting.word().into()
    }
}
