//! Entering the kernel without libc.
//!
//! libc's wrappers store `errno`, a thread-local variable, and some are cancellation points. The stopper task shares its creator's
//! thread-local storage, so it may use neither. [`syscall`] returns the kernel's answer by value and touches nothing else.

use super::errno::Errno;

/// The kernel's error values lie in `-4095..=-1` (include/linux/err.h, `MAX_ERRNO`).
const MAX_ERRNO: i32 = 4095;

/// The number of mmap with six arguments. i386 counts its offset in pages, which is the same for the only offset used: zero.
#[cfg(target_arch = "x86_64")]
pub(crate) const SYS_MMAP: libc::c_long = libc::SYS_mmap;
#[cfg(target_arch = "x86")]
pub(crate) const SYS_MMAP: libc::c_long = libc::SYS_mmap2;

/// Calls the kernel with up to six arguments.
///
/// # Safety
/// Whatever the man page of the call asks of its arguments: above all, pointers must be good for what the kernel does through them.
pub(crate) unsafe fn syscall<const N: usize>(number: libc::c_long, arguments: [usize; N]) -> Result<usize, Errno> {
    const { assert!(N <= 6, "Linux system calls take at most six arguments") };
    let mut six = [0; 6];
    six[..N].copy_from_slice(&arguments);
    // SAFETY: the caller upholds what this system call asks.
    let answer = unsafe { enter_kernel(number, six[0], six[1], six[2], six[3], six[4], six[5]) };
    match i32::try_from(answer.wrapping_neg()) {
        Ok(errno @ 1..=MAX_ERRNO) => Err(Errno(errno)),
        _ => Ok(answer),
    }
}

/// The C calling convention in, the kernel's out: number in rax, arguments in rdi, rsi, rdx, r10, r8, r9 (psABI for x86-64, A.2.1).
///
/// ```text
/// rsp+8    sixth
/// rsp      return address
/// ```
#[cfg(target_arch = "x86_64")]
#[unsafe(naked)]
unsafe extern "C" fn enter_kernel(
    number: libc::c_long,
    first: usize,
    second: usize,
    third: usize,
    fourth: usize,
    fifth: usize,
    sixth: usize,
) -> usize {
    core::arch::naked_asm!(
        ".cfi_startproc",
        "mov rax, rdi",
        "mov rdi, rsi",
        "mov rsi, rdx",
        "mov rdx, rcx",
        "mov r10, r8",
        "mov r8, r9",
        "mov r9, [rsp + 8]",
        "syscall",
        "ret",
        ".cfi_endproc",
    )
}

/// The C calling convention in, the kernel's out: number in eax, arguments in ebx, ecx, edx, esi, edi, ebp. `int 0x80` works in every
/// process; the vDSO's faster entry would have to be found first, and nothing here is hot.
///
/// ```text
/// esp+20.. number, first, second, third, fourth, fifth, sixth
/// esp+16   return address
/// esp      saved edi, esi, ebx, ebp
/// ```
#[cfg(target_arch = "x86")]
#[unsafe(naked)]
unsafe extern "C" fn enter_kernel(
    number: libc::c_long,
    first: usize,
    second: usize,
    third: usize,
    fourth: usize,
    fifth: usize,
    sixth: usize,
) -> usize {
    core::arch::naked_asm!(
        ".cfi_startproc",
        // All four belong to the caller (psABI for i386, table 2.3).
        "push ebp",
        ".cfi_adjust_cfa_offset 4",
        ".cfi_rel_offset ebp, 0",
        "push ebx",
        ".cfi_adjust_cfa_offset 4",
        ".cfi_rel_offset ebx, 0",
        "push esi",
        ".cfi_adjust_cfa_offset 4",
        ".cfi_rel_offset esi, 0",
        "push edi",
        ".cfi_adjust_cfa_offset 4",
        ".cfi_rel_offset edi, 0",
        "mov eax, [esp + 20]",
        "mov ebx, [esp + 24]",
        "mov ecx, [esp + 28]",
        "mov edx, [esp + 32]",
        "mov esi, [esp + 36]",
        "mov edi, [esp + 40]",
        "mov ebp, [esp + 44]",
        "int 0x80",
        "pop edi",
        ".cfi_adjust_cfa_offset -4",
        ".cfi_restore edi",
        "pop esi",
        ".cfi_adjust_cfa_offset -4",
        ".cfi_restore esi",
        "pop ebx",
        ".cfi_adjust_cfa_offset -4",
        ".cfi_restore ebx",
        "pop ebp",
        ".cfi_adjust_cfa_offset -4",
        ".cfi_restore ebp",
        "ret",
        ".cfi_endproc",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_come_back_as_values() {
        // SAFETY: closing a descriptor that does not exist changes nothing.
        assert_eq!(unsafe { syscall(libc::SYS_close, [usize::MAX]) }, Err(Errno(libc::EBADF)));
    }

    #[test]
    fn all_six_arguments_arrive() {
        let (from, mut to) = (0x1234_5678_u32, 0_u32);
        let there = libc::iovec { iov_base: (&raw const from).cast_mut().cast(), iov_len: 4 };
        let here = libc::iovec { iov_base: (&raw mut to).cast(), iov_len: 4 };
        let pid = std::process::id() as usize;
        let read = |flags| {
            let arguments = [pid, &raw const here as usize, 1, &raw const there as usize, 1, flags];
            // SAFETY: both vectors name a live local of four bytes.
            unsafe { syscall(libc::SYS_process_vm_readv, arguments) }
        };
        assert_eq!(read(1), Err(Errno(libc::EINVAL)), "the sixth argument are flags, and none is defined");
        assert_eq!(read(0), Ok(4));
        assert_eq!(to, from);
    }
}
