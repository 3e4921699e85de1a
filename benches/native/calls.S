/* What calls cost: the same leaf function, once traced by trapline and once with what a tracer cannot avoid written into it. Both
   widths; the argument and the result are one word. */
#ifdef __x86_64__
#define WORD .quad
#define ADD lea 1(%rdi), %rax
#else
#define WORD .long
#define ADD mov 4(%esp), %eax; add $1, %eax
#endif

        .section .note.GNU-stack, "", @progbits
        .text

/* The traced leaf. */
        .balign 16
        .globl bench_leaf
        .type bench_leaf, @function
bench_leaf:
        .byte 0x0f, 0x1f, 0x44, 0, 0
        ADD
        ret
        .size bench_leaf, . - bench_leaf

/* Floor: the nop alone, in a function that nobody pokes. */
        .balign 16
        .globl floor_nop
        .type floor_nop, @function
floor_nop:
        .byte 0x0f, 0x1f, 0x44, 0, 0
        ADD
        ret
        .size floor_nop, . - floor_nop

/* Floor: a call to a function that only returns. */
        .balign 16
        .globl floor_empty_call
        .type floor_empty_call, @function
floor_empty_call:
        call empty
        ADD
        ret
        .size floor_empty_call, . - floor_empty_call

        .balign 16
empty:  ret

/* An ops callback that does nothing. */
        .balign 16
        .globl bench_empty_callback
        .type bench_empty_callback, @function
bench_empty_callback:
        ret
        .size bench_empty_callback, . - bench_empty_callback

        .section __patchable_function_entries, "awo", @progbits, .text
        WORD bench_leaf
