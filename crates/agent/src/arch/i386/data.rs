//! The agent's data: what the recorder tells it, and where each thread's state is.

use core::{arch::asm, sync::atomic::AtomicUsize};

use trapline_abi::agent::{Config, ErrandRegisters, INJECTED_THREAD_OFFSET};

use super::{Thread, global_asm};
use crate::thread::Word;

global_asm!(
    r#"
    .pushsection .data.trapline,"aw",@progbits
    .p2align 6
    .hidden trapline_config
    .globl trapline_config
    .type trapline_config, @object
    .size trapline_config, {CONFIG_BYTES}
trapline_config:
    .quad 0
    .quad -1
    .zero {CONFIG_BYTES} - 16

    # What is outside of all frames: a shadow whose slot is further out than any, and that is outside of itself.
    .p2align 4
    .hidden trapline_no_frame
    .globl trapline_no_frame
    .type trapline_no_frame, @object
    .size trapline_no_frame, 16
trapline_no_frame:
    .long 0
    .long trapline_no_frame
    .long -1
    .long 0

    .p2align 3
    .hidden trapline_errand_registers
    .globl trapline_errand_registers
    .type trapline_errand_registers, @object
    .size trapline_errand_registers, {ERRAND_BYTES}
trapline_errand_registers:
    .zero {ERRAND_BYTES}
    .popsection
    "#,
    CONFIG_BYTES = const size_of::<Config>(),
    ERRAND_BYTES = const size_of::<ErrandRegisters>(),
);

unsafe extern "C" {
    /// A `Config`, of which only the lower halves count.
    #[link_name = "trapline_config"]
    static CONFIG: [Word; size_of::<Config>() / 8];
    #[link_name = "trapline_no_frame"]
    static NO_FRAME: [u32; 4];
}

const _: () = assert!(core::mem::offset_of!(Config, pool) == 0 && core::mem::offset_of!(Config, max_depth) == 8);
const _: () = assert!(core::mem::offset_of!(Config, forbidden) == 24);
const _: () = assert!(core::mem::offset_of!(Config, areas) == 32);
const _: () = assert!(core::mem::offset_of!(Config, linker_state) == 40);

/// Where the pool is mapped; 0 before it is.
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

/// What is outside of all frames.
pub fn no_frame() -> usize {
    (&raw const NO_FRAME) as usize
}

/// The state of the calling thread.
pub fn thread() -> *mut Thread {
    #[expect(clippy::cast_possible_truncation, reason = "a small number")]
    const OFFSET: usize = INJECTED_THREAD_OFFSET as usize;
    let pointer: usize;
    // SAFETY: the word at the thread pointer is the thread pointer; the recorder sees to that before any code of this object runs.
    unsafe {
        asm!("mov {pointer}, dword ptr fs:[0]", pointer = out(reg) pointer, options(nostack, readonly, preserves_flags));
    }
    (pointer + OFFSET) as *mut Thread
}
