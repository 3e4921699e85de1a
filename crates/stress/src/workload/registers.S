/*
 * Known values in every register, around a call of a traced function.
 *
 *   stress_call_held   loads all registers, calls a probe, and stores what came back
 *   stress_fn_000[0-3] the probes: traced functions that change no register and no flag, so that whatever came back different was
 *                      changed by a trampoline, a trap or a signal
 *   stress_spoil       the worst that a callback may do: ruins every vector, mask and x87 register
 *
 * One source for both widths: A(x) is the full register of that name, and what i386 does not have is left out.
 */
#include "workload.h"

#define EIGHT(f) f(0) f(1) f(2) f(3) f(4) f(5) f(6) f(7)
#ifdef __x86_64__
#define A(name) %r##name
#define CURRENT %fs:stress_current@tpoff
#define ADDRESS .quad
#define VECTORS(f) EIGHT(f) f(8) f(9) f(10) f(11) f(12) f(13) f(14) f(15)
/* These exist at the AVX-512 level only. */
#define HIGH_VECTORS(f) f(16) f(17) f(18) f(19) f(20) f(21) f(22) f(23) f(24) f(25) f(26) f(27) f(28) f(29) f(30) f(31)
#else
#define A(name) %e##name
#define CURRENT %gs:stress_current@ntpoff
#define ADDRESS .long
#define VECTORS(f) EIGHT(f)
#define HIGH_VECTORS(f)
#endif

/* Where a struct registers at di keeps a register. */
#define VECTOR_AT(n) REGISTERS_VECTORS + 64 * n(A(di))
#define MASK_AT(n) REGISTERS_MASKS + 8 * n(A(di))
#define X87_AT(n) REGISTERS_X87 + 16 * n(A(di))
#define GENERAL_AT(n) REGISTERS_GENERAL + WORD * n(A(di))

    .hidden stress_current

/*
 * void stress_call_held(const struct registers *load, struct registers *found, unsigned level, void (*probe)(void));
 *
 *   callee-saved registers     pushed
 *   x87 control word, MXCSR    of the caller
 *   level
 *   probe
 *   found                      <- sp, and 16-byte aligned, when the probe is called
 */
#define FOUND 0(A(sp))
#define PROBE WORD(A(sp))
#define LEVEL 2*WORD(A(sp))
#define CALLER_MXCSR 3*WORD(A(sp))
#define CALLER_X87_CONTROL 3*WORD+4(A(sp))
#define LOCALS (3*WORD+8+8)

.macro keep register
    push \register
    .cfi_adjust_cfa_offset WORD
    .cfi_rel_offset \register, 0
.endm

.macro give_back register
    pop \register
    .cfi_adjust_cfa_offset -WORD
    .cfi_restore \register
.endm

    .text
    .globl stress_call_held
    .hidden stress_call_held
    .type stress_call_held, @function
    .p2align 4
stress_call_held:
    .cfi_startproc
    keep A(bx)
    keep A(bp)
#ifdef __x86_64__
    keep %r12
    keep %r13
    keep %r14
    keep %r15
#else
    keep %esi
    keep %edi
    mov 20(%esp), %edi
    mov 24(%esp), %esi
    mov 28(%esp), %edx
    mov 32(%esp), %ecx
#endif
    sub $LOCALS, A(sp)
    .cfi_adjust_cfa_offset LOCALS
    mov A(si), FOUND
    mov A(cx), PROBE
    mov %edx, LEVEL
    stmxcsr CALLER_MXCSR
    fnstcw CALLER_X87_CONTROL

    /* Vector and mask registers, as many as there are. */
#define LOAD_XMM(n) movups VECTOR_AT(n), %xmm##n;
#define LOAD_YMM(n) vmovups VECTOR_AT(n), %ymm##n;
#define LOAD_ZMM(n) vmovups VECTOR_AT(n), %zmm##n;
#define LOAD_MASK(n) kmovq MASK_AT(n), %k##n;
    cmp $VECTORS_AVX, %edx
    je 2f
    ja 3f
    VECTORS(LOAD_XMM)
    jmp 4f
2:  VECTORS(LOAD_YMM)
    jmp 4f
3:  VECTORS(LOAD_ZMM)
    HIGH_VECTORS(LOAD_ZMM)
    EIGHT(LOAD_MASK)
4:  ldmxcsr REGISTERS_MXCSR(A(di))

    /* x87: all eight. The last one loaded is st(0). */
#define LOAD_X87(n) fldt X87_AT(n);
    fninit
    fldcw REGISTERS_X87_CONTROL(A(di))
    LOAD_X87(7) LOAD_X87(6) LOAD_X87(5) LOAD_X87(4) LOAD_X87(3) LOAD_X87(2) LOAD_X87(1) LOAD_X87(0)

    /* Flags; from here on nothing may change them. Then the general registers, the pointer last. */
    push REGISTERS_FLAGS(A(di))
    popf
    mov GENERAL_AT(0), A(ax)
    mov GENERAL_AT(1), A(bx)
    mov GENERAL_AT(2), A(cx)
    mov GENERAL_AT(3), A(dx)
    mov GENERAL_AT(4), A(si)
    mov GENERAL_AT(6), A(bp)
#ifdef __x86_64__
    mov GENERAL_AT(7), %r8
    mov GENERAL_AT(8), %r9
    mov GENERAL_AT(9), %r10
    mov GENERAL_AT(10), %r11
    mov GENERAL_AT(11), %r12
    mov GENERAL_AT(12), %r13
    mov GENERAL_AT(13), %r14
    mov GENERAL_AT(14), %r15
#endif
    mov GENERAL_AT(5), A(di)

    call *PROBE

    /* The same way back: di becomes the pointer, and its value waits on the stack. No flag changes until they are stored. */
    xchg A(di), FOUND
    mov A(ax), GENERAL_AT(0)
    mov A(bx), GENERAL_AT(1)
    mov A(cx), GENERAL_AT(2)
    mov A(dx), GENERAL_AT(3)
    mov A(si), GENERAL_AT(4)
    mov A(bp), GENERAL_AT(6)
#ifdef __x86_64__
    mov %r8, GENERAL_AT(7)
    mov %r9, GENERAL_AT(8)
    mov %r10, GENERAL_AT(9)
    mov %r11, GENERAL_AT(10)
    mov %r12, GENERAL_AT(11)
    mov %r13, GENERAL_AT(12)
    mov %r14, GENERAL_AT(13)
    mov %r15, GENERAL_AT(14)
#endif
    mov FOUND, A(ax)
    mov A(ax), GENERAL_AT(5)
    pushf
    pop REGISTERS_FLAGS(A(di))
    cld

#define STORE_X87(n) fstpt X87_AT(n);
    EIGHT(STORE_X87)
    fnstcw REGISTERS_X87_CONTROL(A(di))
    fninit
    fldcw CALLER_X87_CONTROL

#define STORE_XMM(n) movups %xmm##n, VECTOR_AT(n);
#define STORE_YMM(n) vmovups %ymm##n, VECTOR_AT(n);
#define STORE_ZMM(n) vmovups %zmm##n, VECTOR_AT(n);
#define STORE_MASK(n) kmovq %k##n, MASK_AT(n);
    stmxcsr REGISTERS_MXCSR(A(di))
    ldmxcsr CALLER_MXCSR
    mov LEVEL, %edx
    cmp $VECTORS_AVX, %edx
    je 2f
    ja 3f
    VECTORS(STORE_XMM)
    jmp 5f
2:  VECTORS(STORE_YMM)
    jmp 4f
3:  VECTORS(STORE_ZMM)
    HIGH_VECTORS(STORE_ZMM)
    EIGHT(STORE_MASK)
    /* What follows in the caller may be SSE code: no penalty for it. */
4:  vzeroupper

5:  add $LOCALS, A(sp)
    .cfi_adjust_cfa_offset -LOCALS
#ifdef __x86_64__
    give_back %r15
    give_back %r14
    give_back %r13
    give_back %r12
#else
    give_back %edi
    give_back %esi
#endif
    give_back A(bp)
    give_back A(bx)
    ret
    .cfi_endproc
    .size stress_call_held, . - stress_call_held

/* A traced function that counts its call and changes nothing else. Its site is one nop of five bytes, not five of one. */
.macro probe name, number
    .text
    .globl \name
    .hidden \name
    .type \name, @function
    .p2align 4
\name:
    .cfi_startproc
1:  .byte 0x0f, 0x1f, 0x44, 0x00, 0x00
    push A(ax)
    .cfi_adjust_cfa_offset WORD
    push A(cx)
    .cfi_adjust_cfa_offset WORD
    mov CURRENT, A(ax)
    mov STRESS_OWN + 4 * \number(A(ax)), %ecx
    lea 1(A(cx)), %ecx
    mov %ecx, STRESS_OWN + 4 * \number(A(ax))
    pop A(cx)
    .cfi_adjust_cfa_offset -WORD
    pop A(ax)
    .cfi_adjust_cfa_offset -WORD
    ret
    .cfi_endproc
    .size \name, . - \name

    .section __patchable_function_entries, "awo", @progbits, \name
    ADDRESS 1b
    .previous
.endm

    probe stress_fn_0000, 0
    probe stress_fn_0001, 1
    probe stress_fn_0002, 2
    probe stress_fn_0003, 3

/*
 * void stress_spoil(unsigned level);
 *
 * All ones in every vector and mask register, a full x87 stack, another rounding mode in both control registers. That is against the
 * psABI, which the trampoline around it has to make good.
 */
    .text
    .globl stress_spoil
    .hidden stress_spoil
    .type stress_spoil, @function
    .p2align 4
stress_spoil:
    .cfi_startproc
#ifdef __x86_64__
    mov %edi, %eax
#else
    mov 4(%esp), %eax
#endif
#define SPOIL_XMM(n) pcmpeqd %xmm##n, %xmm##n;
#define SPOIL_YMM(n) vcmptrueps %ymm##n, %ymm##n, %ymm##n;
#define SPOIL_ZMM(n) vpternlogd $0xff, %zmm##n, %zmm##n, %zmm##n;
#define SPOIL_MASK(n) kxnorq %k##n, %k##n, %k##n;
    cmp $VECTORS_AVX, %eax
    je 2f
    ja 3f
    VECTORS(SPOIL_XMM)
    jmp 4f
2:  VECTORS(SPOIL_YMM)
    jmp 4f
3:  VECTORS(SPOIL_ZMM)
    HIGH_VECTORS(SPOIL_ZMM)
    EIGHT(SPOIL_MASK)
4:
    /* All exceptions masked, round towards zero. */
    push $0x7f80
    .cfi_adjust_cfa_offset WORD
    ldmxcsr (A(sp))
    pop A(ax)
    .cfi_adjust_cfa_offset -WORD
    fninit
    push $0x0f7f
    .cfi_adjust_cfa_offset WORD
    fldcw (A(sp))
    pop A(ax)
    .cfi_adjust_cfa_offset -WORD
    fldpi; fldpi; fldpi; fldpi; fldpi; fldpi; fldpi; fldpi
    ret
    .cfi_endproc
    .size stress_spoil, . - stress_spoil

    .section .note.GNU-stack, "", @progbits
