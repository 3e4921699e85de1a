//! Threads parked in code whose addresses are known, down to the byte.

use std::{
    arch::global_asm,
    ffi::c_void,
    sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
    },
};

use trapline_engine::{Addr, AddrRange};

use crate::child::{Worker, wait_until};

/// What a parked thread and its keeper tell each other. The code below knows the layout.
#[derive(Default)]
#[repr(C)]
pub(crate) struct Flags {
    arrived: AtomicU32,
    may_leave: AtomicU32,
    /// Set by whoever leaves through [`Parking::exit`].
    left_by_exit: AtomicU32,
    /// For a thread that parks twice.
    then: OnceLock<&'static Flags>,
}

impl Flags {
    /// Waits until a thread has arrived.
    pub(crate) fn wait_for_arrival(&self) {
        wait_until(|| self.arrived.load(Ordering::SeqCst) != 0);
    }

    pub(crate) fn release(&self) {
        self.may_leave.store(1, Ordering::SeqCst);
    }

    /// The flags of the next parking.
    pub(crate) fn then(&self) -> &'static Self {
        self.then.get_or_init(|| Box::leak(Box::default()))
    }

    pub(crate) fn left_by_exit(&self) -> bool {
        self.left_by_exit.load(Ordering::SeqCst) != 0
    }
}

// Two copies of each function, so that one can be asked about while a thread is in the other.
//
// park(flags): arrive, spin until told to leave. Its second exit says that it was taken.
// call_through(function, argument): call a function; its own code is then on the stack as a return address only.
#[cfg(target_arch = "x86_64")]
global_asm!(
    ".macro parking name",
    ".globl \\name\\()_park, \\name\\()_park_exit, \\name\\()_park_end, \\name\\()_call, \\name\\()_call_end",
    ".type \\name\\()_park, @function",
    "\\name\\()_park:",
    "mov dword ptr [rdi], 1",
    "2: pause",
    "cmp dword ptr [rdi + 4], 0",
    "je 2b",
    "ret",
    "\\name\\()_park_exit:",
    "mov dword ptr [rdi + 8], 1",
    "ret",
    "\\name\\()_park_end:",
    "nop",
    ".type \\name\\()_call, @function",
    "\\name\\()_call:",
    "sub rsp, 8",
    "mov rax, rdi",
    "mov rdi, rsi",
    "call rax",
    "add rsp, 8",
    "ret",
    "\\name\\()_call_end:",
    "nop",
    ".endm",
    "parking first",
    "parking second",
);

#[cfg(target_arch = "x86")]
global_asm!(
    ".macro parking name",
    ".globl \\name\\()_park, \\name\\()_park_exit, \\name\\()_park_end, \\name\\()_call, \\name\\()_call_end",
    ".type \\name\\()_park, @function",
    "\\name\\()_park:",
    "mov eax, [esp + 4]",
    "mov dword ptr [eax], 1",
    "2: pause",
    "cmp dword ptr [eax + 4], 0",
    "je 2b",
    "ret",
    "\\name\\()_park_exit:",
    "mov dword ptr [eax + 8], 1",
    "ret",
    "\\name\\()_park_end:",
    "nop",
    ".type \\name\\()_call, @function",
    "\\name\\()_call:",
    "mov eax, [esp + 4]",
    "mov ecx, [esp + 8]",
    "sub esp, 8",
    "push ecx",
    "call eax",
    "add esp, 12",
    "ret",
    "\\name\\()_call_end:",
    "nop",
    ".endm",
    "parking first",
    "parking second",
);

type Function = unsafe extern "C" fn(*const c_void);
type CallThrough = unsafe extern "C" fn(Function, *const c_void);

unsafe extern "C" {
    fn first_park(flags: *const c_void);
    fn first_park_exit();
    fn first_park_end();
    fn first_call(function: Function, argument: *const c_void);
    fn first_call_end();
    fn second_park(flags: *const c_void);
    fn second_park_exit();
    fn second_park_end();
    fn second_call(function: Function, argument: *const c_void);
    fn second_call_end();
}

/// One copy of the two functions. The copies are statics, so that no thread has their addresses on its stack unless it is in them.
pub(crate) struct Parking {
    park: Function,
    exit: unsafe extern "C" fn(),
    park_end: unsafe extern "C" fn(),
    call: CallThrough,
    call_end: unsafe extern "C" fn(),
}

pub(crate) static FIRST: Parking = Parking {
    park: first_park,
    exit: first_park_exit,
    park_end: first_park_end,
    call: first_call,
    call_end: first_call_end,
};

pub(crate) static SECOND: Parking = Parking {
    park: second_park,
    exit: second_park_exit,
    park_end: second_park_end,
    call: second_call,
    call_end: second_call_end,
};

impl Parking {
    /// Spins in this copy's code until released.
    pub(crate) fn park(&'static self, flags: &'static Flags) {
        // SAFETY: the flags live for ever, and the code accesses nothing else.
        unsafe { (self.park)(std::ptr::from_ref(flags).cast()) };
    }

    /// Calls `function` from this copy's code.
    pub(crate) fn call(&'static self, function: Function, flags: &'static Flags) {
        // SAFETY: the functions that the tests pass take flags, which live for ever.
        unsafe { (self.call)(function, std::ptr::from_ref(flags).cast()) };
    }

    /// Calls this copy's park from the other copy's call.
    pub(crate) fn park_called_through(&'static self, other: &'static Self, flags: &'static Flags) {
        other.call(self.park, flags);
    }

    /// The code that a parked thread spins in, but its first byte: callers have that address.
    pub(crate) fn park_range(&'static self) -> AddrRange {
        AddrRange { start: Addr::new(self.park as usize as u64 + 1), end: Addr::new(self.park_end as usize as u64) }
    }

    /// The code that calls through, but its first byte.
    pub(crate) fn call_range(&'static self) -> AddrRange {
        AddrRange { start: Addr::new(self.call as usize as u64 + 1), end: Addr::new(self.call_end as usize as u64) }
    }

    /// The other way out of the parking.
    pub(crate) fn exit(&'static self) -> Addr {
        Addr::new(self.exit as usize as u64)
    }
}

/// Starts a thread that runs `body` with fresh flags.
pub(crate) fn start(body: impl FnOnce(&'static Flags) + Send + 'static) -> (Worker<()>, &'static Flags) {
    let flags: &'static Flags = Box::leak(Box::default());
    (Worker::start(move || body(flags)), flags)
}
