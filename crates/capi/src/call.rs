//! What a callback sees of a call.
//!
//! Owns [`Call`] and its functions. All of them are called in the middle of a program's functions, between any two instructions: they do not allocate, lock
//! or panic. A null pointer for the call is a defect of the caller's that they do not look for.

use std::{ffi::c_void, ptr};

use trapline_process::{Addr, Call as Inner, CallFrame};

/// A call of a traced function, before its first instruction. A callback gets it, and may use it until it returns.
pub struct Call {
    frame: CallFrame,
}

/// A general register, by the names that it has at both widths.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Register {
    /// Accumulator.
    Ax = 0,
    /// Base; a register that functions keep.
    Bx = 1,
    /// Count.
    Cx = 2,
    /// Data.
    Dx = 3,
    /// Source.
    Si = 4,
    /// Destination.
    Di = 5,
    /// Frame pointer.
    Bp = 6,
    /// Stack pointer, which points to the return address. A change has no effect.
    Sp = 7,
    /// 64 bit only, as the following.
    R8 = 8,
    /// 64 bit only.
    R9 = 9,
    /// 64 bit only.
    R10 = 10,
    /// 64 bit only.
    R11 = 11,
    /// 64 bit only.
    R12 = 12,
    /// 64 bit only.
    R13 = 13,
    /// 64 bit only.
    R14 = 14,
    /// 64 bit only.
    R15 = 15,
    /// The flags.
    Flags = 16,
}

/// The integer or pointer argument with this index, from 0, by the C convention of the width: 64 bit rdi, rsi, rdx, rcx, r8, r9 and then the stack; 32 bit the
/// stack. What it means, and whether there is one, only the function's declaration tells. Arguments in vector registers are not seen.
///
/// # Safety
/// `call` is the callback's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trapline_call_argument(call: *mut Call, index: u32) -> usize {
    // SAFETY: the caller vouches for it.
    unsafe { inner(call) }.arg(index as usize)
}

/// Replaces an argument: the function sees the new value.
///
/// # Safety
/// `call` is the callback's; the function has an integer or pointer argument with this index, and works with the value.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trapline_call_set_argument(call: *mut Call, index: u32, value: usize) {
    // SAFETY: the caller vouches for it.
    let mut call = unsafe { inner(call) };
    // SAFETY: as above.
    unsafe { call.set_arg(index as usize, value) };
}

/// The site of the function that is called: see `trapline_site`.
///
/// # Safety
/// `call` is the callback's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trapline_call_site(call: *mut Call) -> *const c_void {
    // SAFETY: the caller vouches for it.
    pointer(unsafe { inner(call) }.site())
}

/// Where the function will return to.
///
/// # Safety
/// `call` is the callback's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trapline_call_return_address(call: *mut Call) -> *const c_void {
    // SAFETY: the caller vouches for it.
    pointer(unsafe { inner(call) }.return_address())
}

/// Makes the call go to another function instead.
///
/// # Safety
/// `call` is the callback's, of an ops with `TRAPLINE_IP_MODIFY`; `function` has the signature of the one that is called.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trapline_call_redirect(call: *mut Call, function: crate::ops::Function) {
    let Some(function) = function else { return };
    // SAFETY: the caller vouches for it.
    let mut call = unsafe { inner(call) };
    // SAFETY: as above.
    unsafe { call.redirect(Addr::new((function as *const ()).addr() as u64)) };
}

/// Where a register is kept, to be read and changed; NULL if this width has none with the number. `number` is a `trapline_register`.
///
/// # Safety
/// `call` is the callback's, of an ops with `TRAPLINE_SAVE_REGISTERS` or `TRAPLINE_IP_MODIFY`; the function and its callers work with changed registers.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trapline_call_register(call: *mut Call, number: u32) -> *mut usize {
    // SAFETY: the caller vouches for it.
    let frame = unsafe { &mut (*call).frame };
    // Not a `Register`: C may pass any number.
    let named = [
        (Register::Ax, &raw mut frame.ax),
        (Register::Bx, &raw mut frame.bx),
        (Register::Cx, &raw mut frame.cx),
        (Register::Dx, &raw mut frame.dx),
        (Register::Si, &raw mut frame.si),
        (Register::Di, &raw mut frame.di),
        (Register::Bp, &raw mut frame.bp),
        (Register::Sp, &raw mut frame.sp),
        (Register::Flags, &raw mut frame.flags),
        #[cfg(target_pointer_width = "64")]
        (Register::R8, &raw mut frame.r8),
        #[cfg(target_pointer_width = "64")]
        (Register::R9, &raw mut frame.r9),
        #[cfg(target_pointer_width = "64")]
        (Register::R10, &raw mut frame.r10),
        #[cfg(target_pointer_width = "64")]
        (Register::R11, &raw mut frame.r11),
        #[cfg(target_pointer_width = "64")]
        (Register::R12, &raw mut frame.r12),
        #[cfg(target_pointer_width = "64")]
        (Register::R13, &raw mut frame.r13),
        #[cfg(target_pointer_width = "64")]
        (Register::R14, &raw mut frame.r14),
        #[cfg(target_pointer_width = "64")]
        (Register::R15, &raw mut frame.r15),
    ];
    named.into_iter().find(|(register, _)| *register as u32 == number).map_or(ptr::null_mut(), |(_, kept)| kept)
}

/// # Safety
/// `call` is one that a trampoline has handed to a callback that has not returned, and nobody else uses it.
unsafe fn inner<'a>(call: *mut Call) -> Inner<'a> {
    // SAFETY: the caller vouches for it; a `Call` is a frame.
    Inner::of_frame(unsafe { &mut (*call).frame }, true)
}

fn pointer(address: Addr) -> *const c_void {
    ptr::with_exposed_provenance(usize::try_from(address.value()).unwrap_or(0))
}
