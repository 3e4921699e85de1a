//! Ops as a Rust program uses them: callbacks with their data, alive as long as a thread can be inside.
//!
//! Owns [`OpsBuilder`], [`Ops`] and [`Call`], and the step from a closure to the `extern "C"` function that a trampoline calls. Neighbours: the
//! [`Tracer`](crate::Tracer) keeps the closures and the engine. Invariant: a closure is dropped only after the grace period that follows its
//! ops' unregistration.

use std::{any::Any, ffi::c_void, sync::Arc, sync::atomic::AtomicUsize, sync::atomic::Ordering};

use trapline_engine::{Addr, CallFrame, Filter, Mode, OpsFlags, OpsId};

use crate::{Error, tracer::Inner};

/// A callback in the trampolines' own convention: the frame, and the pointer that it was registered with.
pub type RawCallback = unsafe extern "C" fn(frame: *mut CallFrame, data: *const c_void);

/// One call of a traced function, as its callback sees it: before the function's first instruction.
#[derive(Debug)]
pub struct Call<'a> {
    frame: &'a mut CallFrame,
    flags: OpsFlags,
}

impl<'a> Call<'a> {
    /// The call that a [`RawCallback`] was called for. `is_whole` says that the ops has `SAVE_REGS` or IPMODIFY, so that the frame has all registers.
    pub fn of_frame(frame: &'a mut CallFrame, is_whole: bool) -> Self {
        Self { frame, flags: OpsFlags { save_regs: is_whole, ip_modify: is_whole, ..OpsFlags::default() } }
    }

    /// The site: at the function's entry, behind `endbr` if it has one.
    pub fn site(&self) -> Addr {
        self.frame.site()
    }

    /// Where the traced function will return to.
    pub fn return_address(&self) -> Addr {
        Addr::new(self.frame.parent as u64)
    }

    /// The integer or pointer argument with this index, from 0, by the C convention of the width: 64 bit rdi, rsi, rdx, rcx, r8, r9 and then the
    /// stack; 32 bit the stack. What it means, and whether there is one, only the function's declaration tells. Arguments in vector
    /// registers are not seen.
    pub fn arg(&self, index: usize) -> usize {
        match self.register(index) {
            Some(register) => *register,
            // SAFETY: see `stack_argument`; reading a word of the stack has no effect.
            None => unsafe { self.stack_argument(index).read() },
        }
    }

    /// Replaces an argument: the function sees the new value.
    ///
    /// # Safety
    /// The function has an integer or pointer argument with this index, and works with the value.
    pub unsafe fn set_arg(&mut self, index: usize, value: usize) {
        match self.register_mut(index) {
            Some(register) => *register = value,
            // SAFETY: the caller vouches that the argument exists; its stack slot belongs to the called function (psABI, section 3.2.2).
            None => unsafe { self.stack_argument(index).write(value) },
        }
    }

    /// All registers; only for an ops with `SAVE_REGS` or IPMODIFY, else `None`.
    pub fn registers(&self) -> Option<&CallFrame> {
        (self.flags.save_regs || self.flags.ip_modify).then_some(&*self.frame)
    }

    /// All registers, to be changed; only for an ops with `SAVE_REGS` or IPMODIFY, else `None`. `sp` is not taken back.
    ///
    /// # Safety
    /// The traced function and its callers work with the changed registers.
    pub unsafe fn registers_mut(&mut self) -> Option<&mut CallFrame> {
        (self.flags.save_regs || self.flags.ip_modify).then_some(&mut *self.frame)
    }

    /// Makes the call go to another function instead of the traced one, which is not executed. Only for an ops with IPMODIFY; else nothing happens, and
    /// `false` is returned.
    ///
    /// # Safety
    /// `function` is the entry of a function with the traced one's signature.
    pub unsafe fn redirect(&mut self, function: Addr) -> bool {
        if self.flags.ip_modify {
            #[expect(clippy::cast_possible_truncation, reason = "an address of the own process")]
            {
                self.frame.ip = function.value() as usize;
            }
        }
        self.flags.ip_modify
    }

    #[cfg(target_pointer_width = "64")]
    fn register(&self, index: usize) -> Option<&usize> {
        let frame = &*self.frame;
        [&frame.di, &frame.si, &frame.dx, &frame.cx, &frame.r8, &frame.r9].get(index).copied()
    }

    #[cfg(target_pointer_width = "64")]
    fn register_mut(&mut self, index: usize) -> Option<&mut usize> {
        let CallFrame { di, si, dx, cx, r8, r9, .. } = &mut *self.frame;
        [di, si, dx, cx, r8, r9].into_iter().nth(index)
    }

    #[cfg(target_pointer_width = "32")]
    #[expect(clippy::unused_self, reason = "the 64-bit one needs it")]
    fn register(&self, _index: usize) -> Option<&usize> {
        None
    }

    #[cfg(target_pointer_width = "32")]
    #[expect(clippy::unused_self, reason = "the 64-bit one needs it")]
    fn register_mut(&mut self, _index: usize) -> Option<&mut usize> {
        None
    }

    /// Stack arguments lie above the return address.
    fn stack_argument(&self, index: usize) -> *mut usize {
        let in_registers = if Mode::NATIVE == Mode::Bits64 { 6 } else { 0 };
        (&raw const self.frame.parent).wrapping_add(1 + index - in_registers).cast_mut()
    }
}

/// What a registered ops' trampolines point to.
pub(crate) trait Context: Any + Send + Sync {}

impl<T: Any + Send + Sync> Context for T {}

/// A closure and what its calls need to know.
struct Closure<F> {
    flags: OpsFlags,
    callback: F,
}

/// The function that trampolines call for closures of type `F`. Its machine code, with the closure inlined, is what decides which registers are saved.
///
/// A panic in the closure aborts: it could not unwind through a trampoline.
unsafe extern "C" fn call_closure<F: Fn(&mut Call<'_>)>(frame: *mut CallFrame, data: *const c_void) {
    // SAFETY: trampolines pass the pointer that the ops was registered with, a `Closure<F>` that lives until nobody can be here.
    let closure = unsafe { &*data.cast::<Closure<F>>() };
    // SAFETY: trampolines pass their frame, which nobody else accesses during the call.
    let frame = unsafe { &mut *frame };
    (closure.callback)(&mut Call { frame, flags: closure.flags });
}

/// Describes an ops; [`register`](Self::register) attaches it.
#[must_use = "an ops is attached by `register`"]
pub struct OpsBuilder {
    pub(crate) inner: Arc<Inner>,
    pub(crate) name: String,
    pub(crate) filter: Filter,
    pub(crate) flags: OpsFlags,
    pub(crate) disabled: bool,
}

impl OpsBuilder {
    /// Which functions it is attached to; all of them if not called.
    pub fn filter(mut self, filter: Filter) -> Self {
        self.filter = filter;
        self
    }

    /// `SAVE_REGS`: the callback sees all registers ([`Call::registers`]).
    pub fn save_regs(mut self) -> Self {
        self.flags.save_regs = true;
        self
    }

    /// IPMODIFY: the callback may send the call elsewhere ([`Call::redirect`]). Exclusive for each function.
    pub fn ip_modify(mut self) -> Self {
        self.flags.ip_modify = true;
        self
    }

    /// `RECURSION_SAFE`: the callback may be entered while it runs, if it calls traced functions itself. Without this such calls are left
    /// out and counted ([`Ops::recursions`]).
    pub fn recursion_safe(mut self) -> Self {
        self.flags.recursion_safe = true;
        self
    }

    /// Registers without attaching; [`Ops::enable`] does that later.
    pub fn disabled(mut self) -> Self {
        self.disabled = true;
        self
    }

    /// Attaches `callback` to every function that the filter selects: when this returns, every further call in every thread is seen, before the
    /// function's first instruction.
    ///
    /// The callback runs in the calling thread, in the middle of anything: it must not block on what that thread may hold. All registers are
    /// kept for the function, vector registers only where the callback's code can change them. A panic aborts the process.
    ///
    /// # Errors
    /// If the filter selects nothing, if another IPMODIFY ops holds one of the functions, if text is not what it should be, if no memory is within
    /// reach. Nothing has changed then.
    pub fn register<F>(self, callback: F) -> Result<Ops, Error>
    where
        F: Fn(&mut Call<'_>) + Send + Sync + 'static,
    {
        let context = Arc::new(Closure { flags: self.flags, callback });
        let data = Arc::as_ptr(&context).cast();
        self.attach(call_closure::<F>, data, context)
    }

    /// Sends every call of the selected functions to `function`, by an IPMODIFY ops. Other ops on them see the calls as before. `function` may call what it
    /// stands for, at its [`body`](crate::SiteInfo::body): so it sees what the function returns, and how long it takes.
    ///
    /// Calls made in callbacks are replaced as well. Threads that are in the function when this returns stay in it; threads that are in `function` when the
    /// [`Ops`] is dropped stay there, and nothing waits for them. Callers that GCC compiles together with the selected functions need `-fno-ipa-ra`: otherwise they may
    /// rely on registers that only the replaced function leaves alone.
    ///
    /// # Safety
    /// `function` is the entry of a function that has the signature and the calling convention of each of the selected ones, and that stays loaded
    /// for as long as a thread may be in it.
    ///
    /// # Errors
    /// As [`register`](Self::register).
    pub unsafe fn replace(mut self, function: Addr) -> Result<Ops, Error> {
        self.flags.ip_modify = true;
        // It calls nothing. With the guard, a call made in a callback would go to the old function.
        self.flags.recursion_safe = true;
        self.register(move |call| {
            // SAFETY: the caller vouches for the function.
            unsafe { call.redirect(function) };
        })
    }

    /// Attaches a function in the trampolines' own convention, C code for instance.
    ///
    /// # Safety
    /// `callback` may be called with `data` from every thread at any time, until [`Tracer::synchronize`](crate::Tracer::synchronize) has
    /// succeeded after the returned [`Ops`] was dropped; it changes the frame only as [`Call`]'s methods would.
    ///
    /// # Errors
    /// As [`register`](Self::register).
    pub unsafe fn register_raw(self, callback: RawCallback, data: *const c_void) -> Result<Ops, Error> {
        self.attach(callback, data, Arc::new(()))
    }

    fn attach(self, callback: RawCallback, data: *const c_void, context: Arc<dyn Context>) -> Result<Ops, Error> {
        let recursions = Arc::new(AtomicUsize::new(0));
        let kept = Kept { _context: context, recursions: Arc::clone(&recursions) };
        let id = self.inner.register(self.name, self.filter, self.flags, callback, data, kept)?;
        let ops = Ops { inner: self.inner, id, recursions };
        if !self.disabled {
            ops.enable()?;
        }
        Ok(ops)
    }
}

/// What lives until the grace period after an ops' unregistration.
pub(crate) struct Kept {
    _context: Arc<dyn Context>,
    pub(crate) recursions: Arc<AtomicUsize>,
}

/// A registered ops. Dropping it detaches and unregisters it; its callback's memory is freed once no thread can be inside.
#[must_use = "dropping an ops unregisters it"]
pub struct Ops {
    inner: Arc<Inner>,
    id: OpsId,
    recursions: Arc<AtomicUsize>,
}

impl std::fmt::Debug for Ops {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ops").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Ops {
    /// Attaches it: from the return on every call is seen. Nothing happens if it is attached already.
    ///
    /// # Errors
    /// As [`OpsBuilder::register`]; nothing has changed then.
    pub fn enable(&self) -> Result<(), Error> {
        self.inner.with_engine(|engine| engine.enable(self.id))
    }

    /// Detaches it: calls that begin after the return are not seen. A thread may still be inside the callback.
    ///
    /// # Errors
    /// If text is not what it should be or cannot be written; nothing has changed then.
    pub fn disable(&self) -> Result<(), Error> {
        self.inner.with_engine(|engine| engine.disable(self.id))
    }

    /// Attaches it to other functions, in one batch: those that both filters select see no gap.
    ///
    /// # Errors
    /// As [`OpsBuilder::register`]; the old filter stays in force then.
    pub fn set_filter(&self, filter: Filter) -> Result<(), Error> {
        self.inner.with_engine(|engine| engine.set_filter(self.id, filter))
    }

    /// How many calls were left out because the callback ran already in the same context: it, or what it calls, calls a traced function.
    pub fn recursions(&self) -> usize {
        self.recursions.load(Ordering::Relaxed)
    }
}

impl Drop for Ops {
    fn drop(&mut self) {
        // Text that cannot be written keeps the ops attached, and its memory is kept with it.
        self.inner.unregister(self.id);
    }
}
