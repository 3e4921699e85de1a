//! The agent's data: what the recorder tells it, and each thread's state.

use core::sync::atomic::AtomicUsize;

use trapline_abi::agent::Config;

use super::{Thread, asm, global_asm};

// The thread's state is initial-exec thread-local storage, defined here because stable Rust cannot; all zero when a thread starts.
global_asm!(
    r#"
    .pushsection .tbss.trapline,"awT",@nobits
    .p2align 6
    .hidden trapline_thread
    .globl trapline_thread
    .type trapline_thread, @object
    .size trapline_thread, {BYTES}
trapline_thread:
    .zero 8
    .hidden trapline_thread_told
    .globl trapline_thread_told
trapline_thread_told:
    .zero {BYTES} - 8
    .popsection

    .pushsection .data.trapline,"aw",@progbits
    .p2align 6
    .hidden trapline_config
    .globl trapline_config
    .type trapline_config, @object
    .size trapline_config, {CONFIG_BYTES}
trapline_config:
    .quad 0
    .quad -1
    # `object.rs` moves the relocation of `trapline_thread_told` here: GNU ld relocates no such word in a shared object, but only its own table.
    .quad {TOLD}
    .zero {CONFIG_BYTES} - 24

    .p2align 3
    .hidden trapline_errand_registers
    .globl trapline_errand_registers
    .type trapline_errand_registers, @object
    .size trapline_errand_registers, {ERRAND_BYTES}
trapline_errand_registers:
    .zero {ERRAND_BYTES}
    .popsection
    "#,
    TOLD = const TOLD,
    CONFIG_BYTES = const size_of::<Config>(),
    ERRAND_BYTES = const size_of::<trapline_abi::agent::ErrandRegisters>(),
    BYTES = const size_of::<Thread>().next_multiple_of(64),
);

// Has the linker make the relocation; never runs.
global_asm!(
    r#"
    .pushsection .text.trapline,"ax",@progbits
    mov rcx, qword ptr [rip + trapline_thread_told@GOTTPOFF]
    int3
    .popsection
    "#
);

/// What the object's file has in place of the thread's offset.
const TOLD: u64 = u64::from_le_bytes(*b"trapline");

unsafe extern "C" {
    /// A `Config`: the pool's address comes first.
    #[link_name = "trapline_config"]
    static CONFIG: [AtomicUsize; size_of::<Config>() / 8];
}

const _: () = assert!(core::mem::offset_of!(Config, pool) == 0);
const _: () = assert!(core::mem::offset_of!(Config, max_depth) == 8);
const _: () = assert!(core::mem::offset_of!(Config, thread_offset) == 16);
const _: () = assert!(core::mem::offset_of!(Config, forbidden) == 24);
const _: () = assert!(core::mem::offset_of!(Config, areas) == 32);
const _: () = assert!(core::mem::offset_of!(Config, linker_state) == 40);
const _: () = assert!(core::mem::offset_of!(Config, counters) == 56);
const _: () = assert!(core::mem::offset_of!(Config, recorded) == 64);

/// Where the pool is mapped; `None` before it is.
pub fn config_pool() -> &'static AtomicUsize {
    // SAFETY: the static is defined above, is aligned, and is only ever accessed atomically by this program; the recorder writes it while the
    // program stands still.
    unsafe { &CONFIG[0] }
}

/// What a sandbox forbids the agent: a bit for each of the `CALLS`.
pub fn config_forbidden() -> &'static AtomicUsize {
    // SAFETY: as in `config_pool`; the program's threads write it too.
    unsafe { &CONFIG[3] }
}

/// The area of stubs that came last; 0 before the first.
pub fn config_areas() -> &'static AtomicUsize {
    // SAFETY: as in `config_pool`; the recorder writes the word at once, while other threads run.
    unsafe { &CONFIG[4] }
}

/// Where the dynamic linker says whether it is changing the set of objects; 0 if that is not known.
pub fn config_linker_state() -> &'static AtomicUsize {
    // SAFETY: as in `config_pool`.
    unsafe { &CONFIG[5] }
}

/// Where events are counted; 0 where they are recorded.
pub fn config_counters() -> &'static AtomicUsize {
    // SAFETY: as in `config_pool`; the recorder writes the word at once, while other threads run.
    unsafe { &CONFIG[7] }
}

/// Which time it is that something is recorded beside what is counted; 0 where nothing is.
pub fn config_recorded() -> &'static AtomicUsize {
    // SAFETY: as in `config_counters`.
    unsafe { &CONFIG[8] }
}

/// The state of the calling thread.
pub fn thread() -> *mut Thread {
    let thread: *mut Thread;
    // SAFETY: (1) the word at the thread pointer is the thread pointer (ELF Handling For Thread-Local Storage, section 3.4.6; the
    // recorder sees to that where it gives threads a pointer of their own); (2) the distance is filled in by
    // the dynamic linker, or the recorder, before any code of this object runs.
    unsafe {
        asm!(
            concat!("mov {thread}, qword ptr ", thread_segment!(), ":[0]"),
            "add {thread}, qword ptr [rip + trapline_thread@GOTTPOFF]",
            thread = out(reg) thread,
            options(nostack, readonly),
        );
    }
    thread
}
