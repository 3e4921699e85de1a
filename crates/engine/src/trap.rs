//! The int3 handler's decision and its effect on the interrupted context.
//!
//! Owns what the handler reads ([`TrapState`]: the live batch, the known sites), the decision ([`TrapState::decide`], pure), and the
//! carrying out ([`resume`]: emulates the *new* instruction of a site, by one of the [`Resume`] strategies). A host's trap entry wraps
//! its frame in [`TrapFrame`], calls both, and returns from the trap. Upstream is [`poke`](crate::poke); downstream is the int3
//! trampoline.
//!
//! Invariant: nothing here allocates, locks, formats or panics, and whoever trapped on one of our int3s goes on as if it had executed the
//! new instruction (I1), or executes the site again when its int3 is gone.

use alloc::{sync::Arc, vec::Vec};
use core::sync::atomic::{AtomicUsize, Ordering};

use crate::{
    Addr,
    insn::{CALL_BYTES, Effect, INT3},
    poke::PokeSet,
    published::Published,
    slots::ThreadState,
    trampoline::R11_ENTRY_BYTES,
};

/// What a breakpoint turns out to be. `R` is what became of it where it was ours.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Decision<R = Effect> {
    /// One of the live batch: the new instruction has been emulated.
    Emulate(R),
    /// One of ours that is gone already: execute the site again, from this address.
    Rewind(Addr),
    /// None of ours: hand it to whoever else handles breakpoints.
    Foreign,
}

/// What trap handlers read. One for each address space.
#[derive(Debug, Default)]
pub struct TrapState {
    batch: Published<PokeSet>,
    sites: Published<Vec<Addr>>,
    /// Counts publications, so that a handler that found no batch can tell whether one appeared meanwhile.
    generation: AtomicUsize,
}

impl TrapState {
    /// No batch, no sites.
    pub const fn new() -> Self {
        Self { batch: Published::new(), sites: Published::new(), generation: AtomicUsize::new(0) }
    }

    /// Step [`Publish`](crate::poke::Step::Publish) of a batch.
    pub fn publish(&self, batch: Arc<PokeSet>, relax: impl FnMut()) {
        self.batch.replace(Some(batch), relax);
        // Release: pairs with the Acquire loads in `decide`. It is counted before the first int3 of the batch is written.
        self.generation.fetch_add(1, Ordering::Release);
    }

    /// Step [`Retire`](crate::poke::Step::Retire) of the batch; returns when no handler reads it any more.
    pub fn retire(&self, relax: impl FnMut()) {
        self.batch.replace(None, relax);
    }

    /// Makes known which addresses are sites, sorted: a breakpoint there whose batch is over is [`Decision::Rewind`].
    pub fn know_sites(&self, sorted: Arc<Vec<Addr>>, relax: impl FnMut()) {
        self.sites.replace(Some(sorted), relax);
    }

    /// Forgets the sites again. No thread may be on its way from a breakpoint at one of them to [`decide`](Self::decide).
    pub fn forget_sites(&self, relax: impl FnMut()) {
        self.sites.replace(None, relax);
    }

    /// Forgets handlers that other threads were in when this process was forked. They do not exist here.
    ///
    /// # Safety
    /// This is the only thread of a forked child, and it is not in [`decide`](Self::decide).
    pub unsafe fn forget_handlers(&self) {
        // SAFETY: the caller vouches for it.
        unsafe { self.batch.forget_readers() };
        // SAFETY: as above.
        unsafe { self.sites.forget_readers() };
    }

    /// Decides what a breakpoint is whose reported instruction pointer is `ip` (the byte behind the int3). `byte_at` reads the text
    /// as it is now.
    ///
    /// A breakpoint of the live batch is handed to `emulate`, once, while the batch is kept from being retired: when a poke has returned, every handler
    /// that it concerned has set where its thread resumes, and a look at the threads finds them there.
    ///
    /// A thread may arrive late: it executed the int3, was descheduled on its way here, and meanwhile the batch was finished and retired.
    /// Then the byte at the site is an instruction's again, and the thread just executes it.
    pub fn decide<R>(
        &self,
        ip: Addr,
        byte_at: impl Fn(Addr) -> u8,
        mut emulate: impl FnMut(Effect) -> R,
    ) -> Decision<R> {
        let site = ip.offset(-1);
        loop {
            let generation = self.generation.load(Ordering::Acquire);
            let emulated = self.batch.read(|batch| batch.find(site).map(|poke| emulate(poke.effect)));
            if let Some(Some(result)) = emulated {
                return Decision::Emulate(result);
            }
            let is_site = self.sites.read(|sites| sites.binary_search(&site).is_ok());
            if is_site != Some(true) {
                return Decision::Foreign;
            }
            if byte_at(site) != INT3 {
                return Decision::Rewind(site);
            }
            // An int3 at a site of ours without a batch: either a batch appeared since we looked, or a debugger's.
            if self.generation.load(Ordering::Acquire) == generation {
                return Decision::Foreign;
            }
        }
    }
}

/// How the return address of an emulated call gets to where the call would have pushed it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Resume {
    /// Through the thread's slot stack and the int3 trampoline: every width, every host.
    #[default]
    Slots,
    /// The handler writes it to the interrupted stack: only where nothing of the trap lies directly below the interrupted stack pointer (the
    /// 128-byte red zone of the x86-64 psABI sees to that in a process).
    Push,
    /// In register r11, which is dead at a function's entry (x86-64 psABI, section 3.2.3); the trampoline's r11 entry pushes it. The
    /// first proposal of the original discussion; i386 has no such register.
    R11,
    /// Not at all: resume behind the site, as if it were a nop. The old behaviour, which loses calls; kept to show the loss.
    Skip,
}

/// The interrupted context, as a host's trap entry sees it.
pub trait TrapFrame {
    /// Stack pointer.
    fn sp(&self) -> Addr;
    /// Sets the stack pointer.
    fn set_sp(&mut self, sp: Addr);
    /// Sets the instruction pointer at which the context resumes.
    fn set_ip(&mut self, ip: Addr);
    /// FLAGS register (SDM volume 1, section 3.4.3).
    fn flags(&self) -> u64;
    /// Sets r11. Only called with [`Resume::R11`].
    fn set_r11(&mut self, value: Addr);
    /// The word on top of the interrupted stack.
    fn top_of_stack(&self) -> Addr;
    /// Pushes a word to the interrupted stack: by a store where that is safe, else by moving the trap frame out of the way.
    fn push(&mut self, word: Addr);
    /// Bytes of a machine word of the interrupted code.
    fn word_bytes(&self) -> i64;
}

/// How [`resume`] resumed a context; hosts count these.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Resumed {
    /// A call, through the slot with this index.
    Slot(usize),
    /// A call, by a push because all slots were in use.
    Overflow,
    /// A call, by a push or through r11, as the strategy asks.
    Direct,
    /// An instruction that pushes nothing.
    NotACall,
    /// A call that was left out ([`Resume::Skip`]).
    Skipped,
}

/// Makes the interrupted context go on as if it had executed an instruction with this `effect`.
///
/// `slots` belong to the interrupted thread, of which at most `slot_limit` are used; `int3_trampoline` is the code that moves a slot to
/// the stack.
pub fn resume<const SLOTS: usize>(
    frame: &mut impl TrapFrame,
    effect: Effect,
    strategy: Resume,
    slots: &ThreadState<SLOTS>,
    slot_limit: usize,
    int3_trampoline: Addr,
) -> Resumed {
    match effect {
        Effect::Call { target, return_to } => match strategy {
            Resume::Slots => {
                if let Ok(index) = slots.reserve(slot_limit) {
                    slots.fill(index, native(return_to), native(target));
                    frame.set_ip(int3_trampoline);
                    Resumed::Slot(index)
                } else {
                    frame.push(return_to);
                    frame.set_ip(target);
                    Resumed::Overflow
                }
            }
            Resume::Push => {
                frame.push(return_to);
                frame.set_ip(target);
                Resumed::Direct
            }
            Resume::R11 => {
                frame.set_r11(return_to);
                frame.set_ip(target.offset(-R11_ENTRY_BYTES));
                Resumed::Direct
            }
            Resume::Skip => {
                frame.set_ip(return_to);
                Resumed::Skipped
            }
        },
        Effect::Nop { next } => {
            frame.set_ip(next);
            Resumed::NotACall
        }
        Effect::Jmp { target } => {
            frame.set_ip(target);
            Resumed::NotACall
        }
        Effect::Jcc { condition, taken, next } => {
            frame.set_ip(if condition.holds(frame.flags()) { taken } else { next });
            Resumed::NotACall
        }
        Effect::Ret { pop_bytes } => {
            frame.set_ip(frame.top_of_stack());
            frame.set_sp(frame.sp().offset(frame.word_bytes() + i64::from(pop_bytes)));
            Resumed::NotACall
        }
    }
}

/// The site of a call with this return address.
pub const fn call_site(return_to: Addr) -> Addr {
    #[expect(clippy::cast_possible_wrap, reason = "five")]
    const CALL: i64 = CALL_BYTES as i64;
    return_to.offset(-CALL)
}

/// A trap handler runs in the width of the thread it interrupted, so its words hold the target's addresses.
#[expect(clippy::cast_possible_truncation, reason = "the target is as wide as the handler")]
fn native(addr: Addr) -> usize {
    addr.value() as usize
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use super::*;
    use crate::{Mode, insn, poke::Poke};

    const SITE: Addr = Addr::new(0x40_1000);
    const TRAMPOLINE: Addr = Addr::new(0x40_8000);
    const INT3_TRAMPOLINE: Addr = Addr::new(0x40_9000);

    #[derive(Default)]
    struct Frame {
        ip: Addr,
        sp: Addr,
        flags: u64,
        r11: Addr,
        stack: Vec<Addr>,
    }

    impl TrapFrame for Frame {
        fn sp(&self) -> Addr {
            self.sp
        }
        fn set_sp(&mut self, sp: Addr) {
            self.sp = sp;
        }
        fn set_ip(&mut self, ip: Addr) {
            self.ip = ip;
        }
        fn flags(&self) -> u64 {
            self.flags
        }
        fn set_r11(&mut self, value: Addr) {
            self.r11 = value;
        }
        fn top_of_stack(&self) -> Addr {
            *self.stack.last().unwrap()
        }
        fn push(&mut self, word: Addr) {
            self.sp = self.sp.offset(-self.word_bytes());
            self.stack.push(word);
        }
        fn word_bytes(&self) -> i64 {
            8
        }
    }

    fn decide(state: &TrapState, ip: Addr, byte_at: impl Fn(Addr) -> u8) -> Decision {
        state.decide(ip, byte_at, |effect| effect)
    }

    fn call_batch() -> Arc<PokeSet> {
        let call = insn::encode::call(SITE, TRAMPOLINE, Mode::Bits64).unwrap();
        let poke = Poke::new(Mode::Bits64, SITE, insn::encode::nop(5), call).unwrap();
        Arc::new(PokeSet::new(vec![poke]).unwrap())
    }

    const CALL: Effect = Effect::Call { target: TRAMPOLINE, return_to: SITE.offset(5) };

    #[test]
    fn a_breakpoint_of_the_live_batch_is_emulated_as_the_new_instruction() {
        let state = TrapState::new();
        state.publish(call_batch(), || ());
        assert_eq!(decide(&state, SITE.offset(1), |_| INT3), Decision::Emulate(CALL));
        assert_eq!(decide(&state, SITE.offset(2), |_| INT3), Decision::Foreign);
    }

    #[test]
    fn a_late_arrival_executes_the_site_again() {
        let state = TrapState::new();
        state.know_sites(Arc::new(vec![SITE]), || ());
        state.publish(call_batch(), || ());
        state.retire(|| ());
        assert_eq!(decide(&state, SITE.offset(1), |_| 0xe8), Decision::Rewind(SITE));
        assert_eq!(decide(&state, SITE.offset(1), |_| INT3), Decision::Foreign, "an int3 that a debugger set");
        assert_eq!(decide(&state, Addr::new(0x1234), |_| 0xe8), Decision::Foreign, "no site of ours");
    }

    #[test]
    fn a_batch_that_appears_while_the_handler_looks_is_not_taken_for_a_debugger() {
        let state = TrapState::new();
        state.know_sites(Arc::new(vec![SITE]), || ());
        let decision = decide(&state, SITE.offset(1), |_| {
            state.publish(call_batch(), || ());
            INT3
        });
        assert_eq!(decision, Decision::Emulate(CALL));
    }

    fn resume_with(strategy: Resume, effect: Effect, frame: &mut Frame, limit: usize) -> Resumed {
        resume(frame, effect, strategy, &ThreadState::<4>::default(), limit, INT3_TRAMPOLINE)
    }

    #[test]
    fn each_strategy_resumes_a_call_in_its_own_way() {
        let mut frame = Frame { sp: Addr::new(0x8000), ..Frame::default() };
        assert_eq!(resume_with(Resume::Slots, CALL, &mut frame, 4), Resumed::Slot(0));
        assert_eq!((frame.ip, frame.stack.len()), (INT3_TRAMPOLINE, 0));

        assert_eq!(resume_with(Resume::Slots, CALL, &mut frame, 0), Resumed::Overflow);
        assert_eq!((frame.ip, frame.stack.pop()), (TRAMPOLINE, Some(SITE.offset(5))));

        assert_eq!(resume_with(Resume::Push, CALL, &mut frame, 4), Resumed::Direct);
        assert_eq!((frame.ip, frame.stack.pop()), (TRAMPOLINE, Some(SITE.offset(5))));

        assert_eq!(resume_with(Resume::R11, CALL, &mut frame, 4), Resumed::Direct);
        assert_eq!((frame.ip, frame.r11), (TRAMPOLINE.offset(-R11_ENTRY_BYTES), SITE.offset(5)));

        assert_eq!(resume_with(Resume::Skip, CALL, &mut frame, 4), Resumed::Skipped);
        assert_eq!(frame.ip, SITE.offset(5), "the call is lost: the defect that the other strategies mend");
    }

    #[test]
    fn nop_jmp_jcc_and_ret_are_emulated() {
        let next = SITE.offset(6);
        let mut frame = Frame { sp: Addr::new(0x8000), stack: vec![Addr::new(0x77)], ..Frame::default() };
        assert_eq!(resume_with(Resume::Slots, Effect::Nop { next }, &mut frame, 4), Resumed::NotACall);
        assert_eq!(frame.ip, next);
        resume_with(Resume::Slots, Effect::Jmp { target: TRAMPOLINE }, &mut frame, 4);
        assert_eq!(frame.ip, TRAMPOLINE);

        // jz rel32 at SITE to SITE + 6 + 0x10.
        let jz = Effect::decode(Mode::Bits64, SITE, &[0x0f, 0x84, 0x10, 0, 0, 0]).unwrap();
        resume_with(Resume::Slots, jz, &mut frame, 4);
        assert_eq!(frame.ip, next);
        frame.flags = 1 << 6;
        resume_with(Resume::Slots, jz, &mut frame, 4);
        assert_eq!(frame.ip, next.offset(0x10));

        resume_with(Resume::Slots, Effect::Ret { pop_bytes: 4 }, &mut frame, 4);
        assert_eq!((frame.ip, frame.sp), (Addr::new(0x77), Addr::new(0x8000 + 8 + 4)));
    }
}
