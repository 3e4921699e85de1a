//! What the recorder and the agent in the target know of each other.
//!
//! The agent is a shared object without dependencies. The recorder finds its symbols by name in its file, fills [`Config`] in its memory
//! before any site leads to it, and knows how its entries want to be called.
//!
//! A site's *stub* is laid out like this; both halves are reached by jumps from the site:
//!
//! ```text
//!         .long  site id
//! on:     jmp    enter          ; or `call` of an entry that does not hook the return. A nop while the site is off
//! off:    the function's first instructions, moved
//!         jmp    back
//! enter:  push   off
//!         jmp    entry          ; keeps every register, and flags if its name says so
//! ```
//!
//! An entry finds the address of `off` on the stack, and the id at [`SITE_ID_OFFSET`] from it; the word above that on the stack is the function's slot. One that hooks
//! the return *calls* `off`, so that the return address is the processor's prediction as well as the slot's; all else goes there by a jump or a return.
//!
//! At 32 bit every entry is called, from `on`. A function there may take its arguments off the stack when it returns, which the return code has to know: above the
//! site's id there is how much, [`POPPED_SHIFT`] says where.
//!
//! The stubs of a module lie in one piece of memory, an *area*. It begins with a [`StubArea`] and ends with a table of [`StubPlace`]s, so that the
//! agent knows which instruction of the program a thread is at that is in a stub.
//!
//! Some functions of the program's libraries are led through the agent, whether they are traced or not: those that unwind. Their sites jump to a
//! *detour*, which loads the address of its [`Detour`] into r10 (edx at 32 bit) and jumps to [`Detour::through`].

/// Where the site's id lies, from the address of a stub's second half.
pub const SITE_ID_OFFSET: i64 = -9;

/// Bytes of a site's id in front of a stub.
pub const SITE_ID_BYTES: usize = 4;

/// How far left of the site's id there is what a function of 32-bit code pops beside its return address, in words of 4 bytes (`ret imm16`).
pub const POPPED_SHIFT: u32 = crate::record::PAYLOAD_BITS;

/// In place of that: it is not known, as the function leaves by jumps only.
pub const POPPED_UNKNOWN: u32 = (1 << (u32::BITS - POPPED_SHIFT)) - 1;

/// The names of the agent's symbols.
pub mod symbol {
    /// A [`Config`](super::Config), in writable memory.
    pub const CONFIG: &str = "trapline_config";
    /// Entry: a call whose return is to be seen. Arithmetic flags are lost, as the psABI lets a call do.
    pub const ENTER: &str = "trapline_enter";
    /// The same; flags are kept, for functions that read them before they write them.
    pub const ENTER_KEEP_FLAGS: &str = "trapline_enter_keep_flags";
    /// The same; returns of frames deeper than [`Config::max_depth`](super::Config::max_depth) are not hooked and leave no record.
    pub const ENTER_LIMITED: &str = "trapline_enter_limited";
    /// Entry: a call whose return is not to be seen. Arithmetic flags are lost.
    pub const POINT: &str = "trapline_point";
    /// The same; flags are kept.
    pub const POINT_KEEP_FLAGS: &str = "trapline_point_keep_flags";
    /// Where hooked functions return to: the value that a hooked slot holds.
    pub const RETURN: &str = "trapline_return";
    /// Jumped to from the dynamic linker's `_dl_debug_state`: tells the recorder that objects came or went, waits until it has seen to that, and
    /// returns.
    pub const OBJECTS_CHANGED: &str = "trapline_objects_changed";
    /// Called like an entry at the beginning of the C library's [functions that can switch a sandbox on](super::SANDBOX_FUNCTIONS); the site's id is the place
    /// in that list. Keeps every register.
    pub const SANDBOX: &str = "trapline_sandbox";
    /// [`Detour::through`](super::Detour::through) of `_Unwind_Backtrace`; its helpers are `_Unwind_GetIP`, `_Unwind_GetCFA` and `_Unwind_SetIP`.
    pub const BACKTRACE: &str = "trapline_backtrace";
    /// [`Detour::through`](super::Detour::through) of `_Unwind_Find_FDE`, which finds the unwind information for an address. No helpers.
    pub const FIND_FDE: &str = "trapline_find_fde";
    /// Where a thread is when an unwinder has been moved on, and its `_Unwind_Find_FDE` is about to be jumped to: r10 is at the [`Detour`](super::Detour), and
    /// everything else is as the program's call left it, but the first argument, which is an address of the program's. While [`Config::is_leaving`](super::Config::is_leaving) is
    /// not 0, threads stay here.
    pub const ASKED: &str = "trapline_asked";
    /// The end of that.
    pub const ASKED_END: &str = "trapline_asked_end";
    /// `syscall` (`int 0x80` at 32 bit) and `int3`, for the recorder to run system calls in the target.
    pub const SYSCALL: &str = "trapline_syscall";
    /// `syscall`, for a thread of the target to run one for the recorder. Behind it, the thread takes its registers from
    /// [`ERRAND_REGISTERS`] and goes on with them: where it was, if the recorder is no more.
    pub const ERRAND: &str = "trapline_errand";
    /// An [`ErrandRegisters`](super::ErrandRegisters), in writable memory.
    pub const ERRAND_REGISTERS: &str = "trapline_errand_registers";
    /// Which blocks of stack have their shadow mapped: [`SHADOW_ENTRIES`](super::SHADOW_ENTRIES) words of 32 bits. At 32 bit see
    /// [`narrow`](crate::thread::narrow).
    pub const SHADOWS: &str = "trapline_shadows";
    /// Where the program's `_Unwind_Backtrace` returns to while it calls the program back. The only place where the agent has called the program.
    pub const WALKING: &str = "trapline_walking";
}

/// What a thread goes on with after it has run a system call for the recorder.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ErrandRegisters {
    /// r15, r14, r13, r12, rbp, rbx, r11, r10, r9, r8, rax, rcx, rdx, rsi, rdi. At 32 bit those that there are, in their lower halves.
    pub general: [u64; 15],
    /// The flags.
    pub flags: u64,
    /// The stack pointer.
    pub rsp: u64,
    /// Where it goes on.
    pub rip: u64,
    /// The signals that it blocks then, as the kernel has them. Set back unless [`Config::forbidden`] says that it must not.
    pub signal_mask: u64,
}

/// What the agent is told.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Config {
    /// Where the pool is mapped; 0 before it is, and events are left out.
    pub pool: u64,
    /// Frames deeper than this are left out by [`symbol::ENTER_LIMITED`].
    pub max_depth: u64,
    /// Filled by the dynamic linker: the distance of the thread's [`Thread`](crate::thread::Thread) from the thread pointer.
    pub thread_offset: i64,
    /// Which of the [`CALLS`] a sandbox forbids: bit n for the nth. These are never made.
    pub forbidden: u64,
    /// The [`StubArea`] that came last; 0 for none.
    pub areas: u64,
    /// Where the dynamic linker says whether it is changing the set of objects: `_r_debug.r_state` of `<link.h>`, which is 0 when it is not. 0 if that
    /// is not known.
    pub linker_state: u64,
    /// Whether the recorder is about to leave the process: threads wait at [`symbol::ASKED`].
    pub is_leaving: u64,
    /// Where the memory of [counters](crate::counters) is mapped: events are counted there, and not recorded. 0: they are recorded.
    pub counters: u64,
    /// Of what is counted, the [selected](crate::counters::CountersHeader::selected) functions are recorded as well. Which time it is that this is so; 0: it is not.
    pub recorded: u64,
}

/// The beginning of an area of stubs. It never changes once [`Config::areas`] leads to it.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct StubArea {
    /// The area that came before; 0 for none.
    pub next: u64,
    /// Its size, with this and the table.
    pub len_bytes: u64,
    /// Where its table of [`StubPlace`]s is, from its start.
    pub places_at: u32,
    /// How many there are.
    pub place_count: u32,
}

/// From where on the code of a stub stands for which of the program's: up to the next place, in ascending order.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct StubPlace {
    /// From the area's start.
    pub stub: u32,
    /// From the area's start; or [`NO_CODE`], [`ENTRY_CODE`], or [`CALLED_CODE`].
    pub code: i32,
}

/// What stands for nothing in the program.
pub const NO_CODE: i32 = i32::MIN;

/// What stands for the first instruction of an entry: a jump to it.
pub const ENTRY_CODE: i32 = i32::MIN + 1;

/// What stands for the first instruction of a function that was called from the place before: the call's return address is pushed, perhaps not yet
/// its upper half.
pub const CALLED_CODE: i32 = i32::MIN + 2;

/// Entries of [`symbol::SHADOWS`]: enough for the stacks of as many threads as Linux starts by default.
pub const SHADOW_ENTRIES: u32 = 1 << 17;

/// How far left a block's number is in an entry; a state is to the right of it.
pub const SHADOW_STATE_BITS: u32 = 2;

/// The state of a block whose shadow is mapped.
pub const SHADOW_MAPPED: u32 = 2;

/// Where the threads of a process that the agent is injected into have their [`Thread`](crate::thread::Thread), from their thread pointers on: the
/// base of the gs segment, or of the fs segment at 32 bit. The word there is the thread pointer itself.
pub const INJECTED_THREAD_OFFSET: u64 = 64;

/// From one thread pointer to the next.
pub const INJECTED_THREAD_BYTES: usize = 256;

/// How many functions a [`Detour`] can name.
pub const DETOUR_HELPERS: usize = 3;

/// What a detour tells the code that it leads through.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Detour {
    /// Where it leads.
    pub through: u64,
    /// The function itself, as the program calls it.
    pub function: u64,
    /// Other functions of the same object, entered without being recorded; 0 where there is none.
    pub helpers: [u64; DETOUR_HELPERS],
}

/// The functions by which a program can forbid itself system calls.
pub const SANDBOX_FUNCTIONS: [&str; 2] = ["prctl", "syscall"];

/// A system call that the agent makes where nothing forbids it, as its place in [`CALLS`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u32)]
pub enum Call {
    /// `mmap`.
    Mmap = 0,
    /// `munmap`.
    Munmap = 1,
    /// `rt_sigprocmask`.
    Sigprocmask = 2,
    /// `madvise`.
    Madvise = 3,
    /// `nanosleep`.
    Nanosleep = 4,
    /// `getpid`.
    Getpid = 5,
    /// `kill`.
    Kill = 6,
    /// `sigaltstack`.
    Sigaltstack = 7,
    /// `gettid`.
    Gettid = 8,
    /// `futex`.
    Futex = 9,
    /// `openat`, which only the recorder has a thread make.
    Openat = 10,
    /// `close`, likewise.
    Close = 11,
}

impl Call {
    /// Its bit in [`Config::forbidden`].
    pub const fn bit(self) -> u64 {
        1 << self as u32
    }
}

/// What it takes to map the recorder's memory.
pub const TO_MAP: u64 = Call::Mmap.bit() | Call::Openat.bit() | Call::Close.bit();

/// Their numbers (`arch/x86/entry/syscalls/syscall_64.tbl`).
pub const CALLS: [u32; 12] = [9, 11, 14, 28, 35, 39, 62, 131, 186, 202, 257, 3];

/// Their numbers at 32 bit (`arch/x86/entry/syscalls/syscall_32.tbl`); `mmap2` for `mmap`.
pub const NARROW_CALLS: [u32; 12] = [192, 91, 175, 219, 162, 20, 37, 186, 224, 240, 295, 6];

/// [`Config::forbidden`] where nothing is allowed.
pub const ALL_FORBIDDEN: u64 = (1 << CALLS.len()) - 1;

const _: () =
    assert!(INJECTED_THREAD_OFFSET + size_of::<crate::thread::Thread>() as u64 <= INJECTED_THREAD_BYTES as u64);
