//! From QEMU's PVH entry to [`start`](crate::start) on each CPU, at either width.
//!
//! Owns the assembly that runs before Rust can: the PVH note, the first page tables (identity, everything writable and executable; see
//! [`paging`](crate::paging) for those that stay), the real-mode entry of the other CPUs, the GDT. Both widths page with PAE, so that both
//! have the no-execute bit and the same tables below the top.

use core::arch::global_asm;

/// What is different between the widths: code descriptor, flags of the third-level entries, EFER.
const WIDE: bool = cfg!(target_arch = "x86_64");

global_asm!(
    r#"
.section .note.Xen,"a",@note
.balign 4
.long 4, 4, 18
.asciz "Xen"
.long pvh_start

.section .boot,"ax"
.code32
.globl pvh_start
pvh_start:
    cli
    cld
    movl $boot_stack_top, %esp
    movl %ebx, START_INFO
    /* identity mapping of 4 GiB by 2 MiB pages */
    movl $third + 7, fourth
    movl $second + {third_flags}, %eax
    movl $third, %edi
    movl $4, %ecx
1:  movl %eax, (%edi)
    addl $0x1000, %eax
    addl $8, %edi
    loop 1b
    movl $0x83, %eax
    movl $second, %edi
    movl $2048, %ecx
2:  movl %eax, (%edi)
    addl $0x200000, %eax
    addl $8, %edi
    loop 2b
    xorl %esi, %esi
    jmp start_paging

.globl other_cpu_start
other_cpu_start:
    movw $0x10, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movl $1, %esi
    lock xaddl %esi, NEXT_CPU
    /* stacks of 64 KiB: the first one is the boot CPU's */
    movl %esi, %esp
    incl %esp
    shll $16, %esp
    addl $boot_stacks, %esp

start_paging:
    lgdtl gdt_pointer
    movl %cr4, %eax
    orl $0x20, %eax
    movl %eax, %cr4
    movl $third - {below_third}, %eax
    movl %eax, %cr3
    movl $0xC0000080, %ecx
    rdmsr
    orl ${efer}, %eax
    wrmsr
    movl %cr0, %eax
    orl $0x80010001, %eax
    movl %eax, %cr0
    ljmpl $8, $paged

.code16
.globl real_mode_start, real_mode_end
real_mode_start:
    cli
    xorw %ax, %ax
    movw %ax, %ds
    lgdtl (0x8000 + real_mode_gdt - real_mode_start)
    movl %cr0, %eax
    orl $1, %eax
    movl %eax, %cr0
    ljmpl $0x18, $other_cpu_start
.balign 4
real_mode_gdt:
    .word gdt_end - gdt - 1
    .long gdt
real_mode_end:

.section .data
.balign 16
.globl gdt
gdt:
    .quad 0
    .quad {code_segment}
    .quad 0x00cf92000000ffff
    .quad 0x00cf9a000000ffff
    .fill 8, 8, 0
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt, 0
.balign 4
NEXT_CPU: .long 1
.globl START_INFO
START_INFO: .long 0
.section .bss
.balign 4096
.globl third, second
fourth: .skip 4096
third:  .skip 4096
second: .skip 16384
boot_stacks: .skip 0x10000
boot_stack_top: .skip 0x10000 * 8
"#,
    third_flags = const if WIDE { 7 } else { 1 },
    below_third = const if WIDE { 4096 } else { 0 },
    efer = const if WIDE { 0x900 } else { 0x800 },
    code_segment = const if WIDE { 0x00af_9a00_0000_ffff_u64 } else { 0x00cf_9a00_0000_ffff_u64 },
    options(att_syntax)
);

#[cfg(target_arch = "x86_64")]
global_asm!(
    r#"
.section .boot,"ax"
.code64
.globl paged
paged:
    movw $0x10, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movl %esi, %edi
    call {start}
    ud2
.section .text
"#,
    start = sym crate::start,
    options(att_syntax)
);

#[cfg(target_arch = "x86")]
global_asm!(
    r#"
.section .boot,"ax"
.code32
.globl paged
paged:
    movw $0x10, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    subl $12, %esp
    pushl %esi
    call {start}
    ud2
.section .text
"#,
    start = sym crate::start,
    options(att_syntax)
);
