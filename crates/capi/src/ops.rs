//! Attaching callbacks to functions, and functions to functions.
//!
//! Owns [`Ops`] and the flags. Trampolines call a program's callback directly, without a step in between: so its own machine code decides which registers are
//! saved, and one that counts costs little more than a call.

use std::{
    ffi::{c_char, c_void},
    mem, ptr,
};

use trapline_process::{Addr, Filter as Rules, Ops as Inner, OpsBuilder, RawCallback, called_from};

use crate::{
    call::Call,
    entry::{self, with_frames},
    filter::Filter,
    status::{Failure, Status, guard, room_of, taken_back, target_of, text_of},
    tracer::Tracer,
};

/// Register without attaching; `trapline_enable` does that.
pub const TRAPLINE_DISABLED: u32 = 1;
/// The callback sees and may change all registers: `trapline_call_register`.
pub const TRAPLINE_SAVE_REGISTERS: u32 = 2;
/// The callback may send the call elsewhere: `trapline_call_redirect`. One ops for each function may.
pub const TRAPLINE_IP_MODIFY: u32 = 4;
/// The callback may be entered while it runs, if it calls traced functions. Without this such calls are left out and counted: `trapline_recursions`.
pub const TRAPLINE_RECURSION_SAFE: u32 = 8;

const ALL_FLAGS: u32 = TRAPLINE_DISABLED | TRAPLINE_SAVE_REGISTERS | TRAPLINE_IP_MODIFY | TRAPLINE_RECURSION_SAFE;

/// Called before the first instruction of a traced function, in the thread that calls it, in the middle of anything: it must not wait for what that thread may
/// hold, and must not leave by an exception or a jump. `call` is good until it returns.
pub type Callback = Option<unsafe extern "C" fn(call: *mut Call, data: *mut c_void)>;

/// A function of any signature.
pub type Function = Option<unsafe extern "C" fn()>;

/// A callback that is attached to functions.
pub struct Ops {
    inner: Inner,
}

/// Attaches a callback to every function whose name matches `glob`, or to all if that is NULL: when this returns, every further call in every thread is seen.
/// `flags` are `TRAPLINE_...` or 0. `trapline_detach` ends it.
///
/// # Safety
/// `tracer` is a tracer; `glob` is NULL or text that ends with a zero byte; `callback` may be called with `data` from every thread until
/// `trapline_synchronize` has succeeded after the ops was detached; `ops` is good for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trapline_attach(
    tracer: *const Tracer,
    glob: *const c_char,
    flags: u32,
    callback: Callback,
    data: *mut c_void,
    ops: *mut *mut Ops,
) -> Status {
    guard(|| {
        // SAFETY: the caller vouches for it.
        let rules = unsafe { rules_of(glob) }?;
        // SAFETY: as above.
        unsafe { attach(tracer, rules, flags, callback, data, ops) }
    })
}

/// Attaches a callback as `trapline_attach` does, to the functions that a filter selects.
///
/// # Safety
/// As for `trapline_attach`; `filter` is a filter.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trapline_attach_filter(
    tracer: *const Tracer,
    filter: *const Filter,
    flags: u32,
    callback: Callback,
    data: *mut c_void,
    ops: *mut *mut Ops,
) -> Status {
    guard(|| {
        // SAFETY: the caller vouches for it.
        let rules = unsafe { target_of(filter, "filter") }?.rules.clone();
        // SAFETY: as above.
        unsafe { attach(tracer, rules, flags, callback, data, ops) }
    })
}

/// Sends every call of the functions whose names match `glob` to `function`, which has their signature. It may call what it replaces at its `body`: see
/// `trapline_site`. Callbacks on the functions see the calls as before. Callers that GCC compiles together with the functions need `-fno-ipa-ra`: otherwise they may
/// rely on registers that only the replaced function leaves alone.
///
/// # Safety
/// `tracer` is a tracer; `glob` is text that ends with a zero byte; `function` has the signature and the calling convention of all of them, and stays loaded as
/// long as a thread may be in it; `ops` is good for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trapline_replace(
    tracer: *const Tracer,
    glob: *const c_char,
    function: Function,
    ops: *mut *mut Ops,
) -> Status {
    guard(|| {
        // SAFETY: the caller vouches for it.
        let glob = unsafe { text_of(glob, "glob") }?;
        let function = function.ok_or_else(|| Failure::argument("function is NULL"))?;
        let function = Addr::new((function as *const ()).expose_provenance() as u64);
        let replace = |builder: OpsBuilder| {
            // SAFETY: the caller vouches for the function.
            unsafe { builder.replace(function) }
        };
        // SAFETY: as above.
        unsafe { register(tracer, Rules::name(glob), replace, ops) }
    })
}

/// Attaches an ops again that was disabled: from the return on every call is seen.
///
/// # Safety
/// `ops` is an ops.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trapline_enable(ops: *const Ops) -> Status {
    // SAFETY: the caller vouches for it.
    guard(|| Ok(unsafe { target_of(ops, "ops") }?.inner.enable()?))
}

/// Detaches an ops for a while: calls that begin after the return are not seen. A thread may still be inside the callback.
///
/// # Safety
/// `ops` is an ops.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trapline_disable(ops: *const Ops) -> Status {
    // SAFETY: the caller vouches for it.
    guard(|| Ok(unsafe { target_of(ops, "ops") }?.inner.disable()?))
}

/// Attaches an ops to other functions. Those that both filters select see no gap.
///
/// # Safety
/// `ops` is an ops, `filter` a filter.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trapline_set_filter(ops: *const Ops, filter: *const Filter) -> Status {
    guard(|| {
        // SAFETY: the caller vouches for it.
        let rules = unsafe { target_of(filter, "filter") }?.rules.clone();
        // SAFETY: as above.
        Ok(unsafe { target_of(ops, "ops") }?.inner.set_filter(rules)?)
    })
}

/// How many calls were left out because the callback ran already: it, or what it calls, calls a traced function. 0 if `ops` is NULL.
///
/// # Safety
/// `ops` is NULL or an ops.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trapline_recursions(ops: *const Ops) -> usize {
    // SAFETY: the caller vouches for it.
    unsafe { ops.as_ref() }.map_or(0, |ops| ops.inner.recursions())
}

/// Detaches an ops and frees it; nothing if it is NULL. A thread may still be inside the callback: see `trapline_synchronize`.
///
/// # Safety
/// `ops` is NULL, or an ops that has not been detached.
#[unsafe(no_mangle)]
#[unsafe(naked)]
pub unsafe extern "C" fn trapline_detach(ops: *mut Ops) {
    with_frames!(detach)
}

/// # Safety
/// As [`trapline_detach`]; `frames` is the caller's stack pointer.
unsafe extern "C" fn detach(ops: *mut Ops, _: usize, frames: usize) {
    guard(|| {
        // SAFETY: the caller vouches for it.
        let ops = unsafe { taken_back(ops) };
        called_from(entry::address(frames), || drop(ops));
        Ok(())
    });
}

/// # Safety
/// `glob` is null, or text that ends with a zero byte.
unsafe fn rules_of(glob: *const c_char) -> Result<Rules, Failure> {
    if glob.is_null() {
        return Ok(Rules::all());
    }
    // SAFETY: the caller vouches for it.
    Ok(Rules::name(unsafe { text_of(glob, "glob") }?))
}

/// # Safety
/// As [`trapline_attach`].
unsafe fn attach(
    tracer: *const Tracer,
    rules: Rules,
    flags: u32,
    callback: Callback,
    data: *mut c_void,
    ops: *mut *mut Ops,
) -> Result<(), Failure> {
    let callback = callback.ok_or_else(|| Failure::argument("callback is NULL"))?;
    if flags & !ALL_FLAGS != 0 {
        return Err(Failure::argument(format!("flags has bits that mean nothing: {:#x}", flags & !ALL_FLAGS)));
    }
    // SAFETY: the same function; `Call` is how C sees a `CallFrame`.
    let callback = unsafe { mem::transmute::<unsafe extern "C" fn(*mut Call, *mut c_void), RawCallback>(callback) };
    let attach = |mut builder: OpsBuilder| {
        for (flag, with) in [
            (TRAPLINE_DISABLED, OpsBuilder::disabled as fn(OpsBuilder) -> OpsBuilder),
            (TRAPLINE_SAVE_REGISTERS, OpsBuilder::save_regs),
            (TRAPLINE_IP_MODIFY, OpsBuilder::ip_modify),
            (TRAPLINE_RECURSION_SAFE, OpsBuilder::recursion_safe),
        ] {
            builder = if flags & flag == 0 { builder } else { with(builder) };
        }
        // SAFETY: the caller vouches for callback and data.
        unsafe { builder.register_raw(callback, data) }
    };
    // SAFETY: the caller vouches for it.
    unsafe { register(tracer, rules, attach, ops) }
}

/// # Safety
/// `tracer` is null or a tracer, `ops` null or good for a write.
unsafe fn register(
    tracer: *const Tracer,
    rules: Rules,
    attach: impl FnOnce(OpsBuilder) -> Result<Inner, trapline_process::Error>,
    ops: *mut *mut Ops,
) -> Result<(), Failure> {
    // SAFETY: the caller vouches for it.
    let tracer = unsafe { target_of(tracer, "tracer") }?;
    // SAFETY: as above.
    let room = unsafe { room_of(ops, "ops") }?;
    room.write(ptr::null_mut());
    let inner = attach(tracer.inner.ops("from C").filter(rules))?;
    room.write(Box::into_raw(Box::new(Ops { inner })));
    Ok(())
}
