//! Where the program's unwinders are led through, and whose code an address is.
//!
//! A detour jumps here with edx at its [`Detour`], a register that no argument is in, and everything else as the program's call left it: the arguments are on the
//! stack, and are the callee's to change.

use core::mem::offset_of;

use trapline_abi::agent::{Config, Detour};

use super::global_asm;

global_asm!(
    r#"
    .hidden trapline_frame
    .hidden trapline_real_place
    .hidden trapline_own_information
    .pushsection .text.trapline,"ax",@progbits

    # `_Unwind_Backtrace`: its first argument is called back for each frame, with the second one as its own second. It is called with `trapline_frame` instead, and with
    # a `Walk` that lies here.
    .p2align 4
    .hidden trapline_backtrace
    .globl trapline_backtrace
    .type trapline_backtrace, @function
trapline_backtrace:
    .cfi_startproc
    push 0
    .cfi_adjust_cfa_offset 4
    push edx
    .cfi_adjust_cfa_offset 4
    push dword ptr [esp + 16]
    .cfi_adjust_cfa_offset 4
    push dword ptr [esp + 16]
    .cfi_adjust_cfa_offset 4
    mov ecx, esp
    sub esp, 4
    .cfi_adjust_cfa_offset 4
    push ecx
    .cfi_adjust_cfa_offset 4
    # Not pushed as a constant: that would be one of 16 bits for some assemblers.
    mov eax, offset trapline_frame
    push eax
    .cfi_adjust_cfa_offset 4
    call dword ptr [edx + {FUNCTION}]
    .hidden trapline_walking
    .globl trapline_walking
trapline_walking:
    add esp, 28
    .cfi_adjust_cfa_offset -28
    ret
    .cfi_endproc
    .size trapline_backtrace, . - trapline_backtrace

    # `_Unwind_Find_FDE`: an address of code, and where the answer goes. It is jumped to with an address of the program's; addresses of the
    # agent's are answered here.
    .p2align 4
    .hidden trapline_find_fde
    .globl trapline_find_fde
    .type trapline_find_fde, @function
trapline_find_fde:
    .cfi_startproc
    push edx
    .cfi_adjust_cfa_offset 4
    push dword ptr [esp + 12]
    .cfi_adjust_cfa_offset 4
    push dword ptr [esp + 12]
    .cfi_adjust_cfa_offset 4
    call trapline_real_place
    mov dword ptr [esp + 16], eax
    mov dword ptr [esp], eax
    call trapline_own_information
    add esp, 8
    .cfi_adjust_cfa_offset -8
    pop edx
    .cfi_adjust_cfa_offset -4
    test eax, eax
    jz trapline_asked
    ret
    .hidden trapline_asked
    .globl trapline_asked
trapline_asked:
    cmp dword ptr [trapline_config + {IS_LEAVING}], 0
    jne 2f
    jmp dword ptr [edx + {FUNCTION}]
2:  pause
    jmp trapline_asked
    .hidden trapline_asked_end
    .globl trapline_asked_end
trapline_asked_end:
    .cfi_endproc
    .size trapline_find_fde, . - trapline_find_fde
    .popsection
    "#,
    FUNCTION = const offset_of!(Detour, function),
    IS_LEAVING = const offset_of!(Config, is_leaving),
);

unsafe extern "C" {
    /// The agent's first byte. The linker defines it.
    #[link_name = "__ehdr_start"]
    static START: u8;
    /// The end of its code. The linker defines it.
    #[link_name = "etext"]
    static CODE_END: u8;
    #[link_name = "trapline_enter"]
    static ENTRIES: u8;
    #[link_name = "trapline_entries_end"]
    static ENTRIES_END: u8;
    #[link_name = "trapline_return"]
    static RETURN: u8;
    #[link_name = "trapline_find_fde"]
    static ANY_FUNCTION: u8;
}

/// Whose code it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Code {
    /// One of the entries. An address in the stub lies two words below what the caller of the armed function has for its canonical frame
    /// address.
    Entry,
    /// The agent's.
    Agent,
    /// Another's.
    Other,
}

/// The agent's first byte, which its ELF header begins with.
pub fn start() -> usize {
    (&raw const START) as usize
}

/// Whether an address is of the agent's code.
pub fn is_own(address: usize) -> bool {
    (start()..(&raw const CODE_END) as usize).contains(&address)
}

/// The first instruction of an entry.
pub fn entry() -> usize {
    (&raw const ENTRIES) as usize
}

/// The first instruction of a function of the agent's that is none of the entries.
pub fn any_function() -> usize {
    (&raw const ANY_FUNCTION) as usize
}

/// Where hooked functions return to.
pub fn return_code() -> usize {
    (&raw const RETURN) as usize
}

/// Whose code is at `address`, or before it if it is a return address.
pub fn code_at(address: usize) -> Code {
    let is_in = |start: *const u8, end: *const u8| (start as usize..end as usize).contains(&address);
    if is_in(&raw const ENTRIES, &raw const ENTRIES_END) {
        Code::Entry
    } else if is_own(address) {
        Code::Agent
    } else {
        Code::Other
    }
}
