//! The registers of another process's thread, with the names that 64-bit code has for them.
//!
//! Owns [`ThreadRegisters`]. A 64-bit tracer gets those of a 32-bit thread in the lower halves of its own, so this is what one program knows that traces both. A
//! 32-bit tracer gets them as i386 has them: they are put into the same places.

/// `user_regs_struct` of `<sys/user.h>`.
#[cfg(target_arch = "x86_64")]
pub type ThreadRegisters = libc::user_regs_struct;

/// What 64-bit programs know as `user_regs_struct`: 32-bit threads have nothing in the upper halves, nor in the registers that they have not.
#[cfg(target_arch = "x86")]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[expect(missing_docs, reason = "the registers of these names")]
pub struct ThreadRegisters {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub rbp: u64,
    pub rbx: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rax: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub orig_rax: u64,
    pub rip: u64,
    pub cs: u64,
    pub eflags: u64,
    pub rsp: u64,
    pub ss: u64,
    pub fs_base: u64,
    pub gs_base: u64,
    pub ds: u64,
    pub es: u64,
    pub fs: u64,
    pub gs: u64,
}

/// What `PTRACE_GETREGS` gave.
#[cfg(target_arch = "x86_64")]
pub fn from_native(native: libc::user_regs_struct) -> ThreadRegisters {
    native
}

/// What `PTRACE_SETREGS` takes.
#[cfg(target_arch = "x86_64")]
pub fn to_native(registers: &ThreadRegisters) -> libc::user_regs_struct {
    *registers
}

/// What `PTRACE_GETREGS` gave.
#[cfg(target_arch = "x86")]
pub fn from_native(native: libc::user_regs_struct) -> ThreadRegisters {
    let wide = |register: libc::c_long| u64::from(register.cast_unsigned());
    ThreadRegisters {
        rbp: wide(native.ebp),
        rbx: wide(native.ebx),
        rax: wide(native.eax),
        rcx: wide(native.ecx),
        rdx: wide(native.edx),
        rsi: wide(native.esi),
        rdi: wide(native.edi),
        orig_rax: wide(native.orig_eax),
        rip: wide(native.eip),
        cs: wide(native.xcs),
        eflags: wide(native.eflags),
        rsp: wide(native.esp),
        ss: wide(native.xss),
        ds: wide(native.xds),
        es: wide(native.xes),
        fs: wide(native.xfs),
        gs: wide(native.xgs),
        ..ThreadRegisters::default()
    }
}

/// What `PTRACE_SETREGS` takes.
#[cfg(target_arch = "x86")]
pub fn to_native(registers: &ThreadRegisters) -> libc::user_regs_struct {
    #[expect(clippy::cast_possible_truncation, reason = "nothing is in the upper half but a sign")]
    let narrow = |register: u64| (register as u32).cast_signed();
    libc::user_regs_struct {
        ebx: narrow(registers.rbx),
        ecx: narrow(registers.rcx),
        edx: narrow(registers.rdx),
        esi: narrow(registers.rsi),
        edi: narrow(registers.rdi),
        ebp: narrow(registers.rbp),
        eax: narrow(registers.rax),
        xds: narrow(registers.ds),
        xes: narrow(registers.es),
        xfs: narrow(registers.fs),
        xgs: narrow(registers.gs),
        orig_eax: narrow(registers.orig_rax),
        eip: narrow(registers.rip),
        xcs: narrow(registers.cs),
        eflags: narrow(registers.eflags),
        esp: narrow(registers.rsp),
        xss: narrow(registers.ss),
    }
}
