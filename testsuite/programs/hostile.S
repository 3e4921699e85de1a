// Functions that no compiler would make like this, for hostile.c: loops to the own head, jumps into the prologue, jump tables right behind it,
// flags that live across the entry and the return, short bodies that lie side by side.
        .text
        .macro function name
        .globl  \name
        .type   \name, @function
        .balign 16
\name:
        .cfi_startproc
        .endm
        .macro end name
        .cfi_endproc
        .size   \name, . - \name
        .endm

#ifdef __x86_64__
// Counts rdi down to zero by jumps to its own first instruction; rsi counts up.
        function self_loop
        lea     1(%rsi), %rsi
        dec     %rdi
        jnz     self_loop
        mov     %rsi, %rax
        ret
        end     self_loop

// The same with a first instruction of one byte, and a jump back into what a window of five bytes covers.
        function into_prologue
        push    %rbx
1:      inc     %rsi
        dec     %rdi
        jnz     1b
        mov     %rsi, %rax
        pop     %rbx
        ret
        end     into_prologue

// A jump table whose targets lie two and four bytes behind the entry.
        function table_behind
        jmp     *%rsi
.Ltable_first:
        inc     %eax
.Ltable_second:
        dec     %edx
        lea     (%rdi,%rdi), %rax
        ret
        end     table_behind

        function table_call
        lea     table(%rip), %rcx
        movslq  (%rcx,%rsi,4), %rsi
        add     %rcx, %rsi
        jmp     table_behind
        end     table_call

        .section .rodata
        .balign 4
table:  .long   .Ltable_first - table
        .long   .Ltable_second - table
        .text

// Switches like a compiler's with a table, right behind the entry.
        function table_switch
        and     $3, %edi
        lea     cases(%rip), %rdx
        movslq  (%rdx,%rdi,4), %rax
        add     %rdx, %rax
        notrack jmp *%rax
.Lcase0: mov    $10, %eax
        ret
.Lcase1: mov    $11, %eax
        ret
.Lcase2: mov    $12, %eax
        ret
.Lcase3: xor    %edi, %edi
        jmp     table_switch
        end     table_switch
        .section .rodata
        .balign 4
cases:  .long   .Lcase0 - cases, .Lcase1 - cases, .Lcase2 - cases, .Lcase3 - cases
        .text

// rdi + rsi + carry, the carry set by the caller.
        function add_with_carry
        adc     %rsi, %rdi
        mov     %rdi, %rax
        ret
        end     add_with_carry

// Returns carry in the carry: whether rdi is odd.
        function odd_in_carry
        bt      $0, %rdi
        ret
        end     odd_in_carry

// Parity, sign, zero, overflow and direction of the entry as pushf sees them.
        function flags_at_entry
        pushf
        pop     %rax
        ret
        end     flags_at_entry

// Short ones, without room between them.
        .globl  short_one, short_two, short_three
        .type   short_one, @function
        .type   short_two, @function
        .type   short_three, @function
        .balign 16
short_one:
        ret
        .size   short_one, 1
short_two:
        mov     %edi, %eax
        ret
        .size   short_two, 3
short_three:
        lea     1(%rdi), %eax
        ret
        .size   short_three, 4
        .balign 16

// Reads its own return address, and pops it.
        function where_from
        mov     (%rsp), %rax
        ret
        end     where_from

        function pops_first
        pop     %rcx
        lea     3(%rdi), %rax
        jmp     *%rcx
        end     pops_first

// call_next: a call whose return address is data, as PC thunks and old position-independent code do.
        function call_next
        call    1f
1:      pop     %rax
        lea     1b(%rip), %rcx
        sub     %rcx, %rax
        ret
        end     call_next

// rcx times, by `loop`, and a first instruction that jumps over nothing much.
        function loops
        mov     %rdi, %rcx
        xor     %eax, %eax
1:      inc     %rax
        loop    1b
        ret
        end     loops

        function jrcxz_first
        mov     %rdi, %rcx
        jrcxz   1f
        mov     $1, %eax
        ret
1:      mov     $2, %eax
        ret
        end     jrcxz_first

// keeps_everything(values in, values out): loads every register, calls a function that does nothing, and stores every register.
        function keeps_everything
        push    %rbp
        .cfi_def_cfa_offset 16
        push    %rbx
        .cfi_def_cfa_offset 24
        push    %r12
        .cfi_def_cfa_offset 32
        push    %r13
        .cfi_def_cfa_offset 40
        push    %r14
        .cfi_def_cfa_offset 48
        push    %r15
        .cfi_def_cfa_offset 56
        push    %rsi
        .cfi_def_cfa_offset 64
        push    %rdi
        .cfi_def_cfa_offset 72
        .irp    n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
        movups  (128 + 16 * \n)(%rdi), %xmm\n
        .endr
        fldt    112(%rdi)
        mov     0(%rdi), %rax
        mov     8(%rdi), %rbx
        mov     16(%rdi), %rcx
        mov     24(%rdi), %rdx
        mov     32(%rdi), %rsi
        mov     40(%rdi), %rbp
        mov     48(%rdi), %r8
        mov     56(%rdi), %r9
        mov     64(%rdi), %r10
        mov     72(%rdi), %r11
        mov     80(%rdi), %r12
        mov     88(%rdi), %r13
        mov     96(%rdi), %r14
        mov     104(%rdi), %r15
        call    does_nothing
        push    %rdi
        mov     16(%rsp), %rdi
        mov     %rax, 0(%rdi)
        mov     %rbx, 8(%rdi)
        mov     %rcx, 16(%rdi)
        mov     %rdx, 24(%rdi)
        mov     %rsi, 32(%rdi)
        mov     %rbp, 40(%rdi)
        mov     %r8, 48(%rdi)
        mov     %r9, 56(%rdi)
        mov     %r10, 64(%rdi)
        mov     %r11, 72(%rdi)
        mov     %r12, 80(%rdi)
        mov     %r13, 88(%rdi)
        mov     %r14, 96(%rdi)
        mov     %r15, 104(%rdi)
        fstpt   112(%rdi)
        .irp    n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
        movups  %xmm\n, (128 + 16 * \n)(%rdi)
        .endr
        pop     %rax
        cmp     (%rsp), %rax
        sete    %al
        movzbl  %al, %eax
        add     $16, %rsp
        .cfi_def_cfa_offset 56
        pop     %r15
        pop     %r14
        pop     %r13
        pop     %r12
        pop     %rbx
        pop     %rbp
        .cfi_def_cfa_offset 8
        ret
        end     keeps_everything

        function does_nothing
        nop
        nop
        nop
        nop
        nop
        nop
        ret
        end     does_nothing

// keeps_upper_halves(values in, values out): the same for the whole of the YMM registers.
        function keeps_upper_halves
        .irp    n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
        vmovups (32 * \n)(%rdi), %ymm\n
        .endr
        call    does_nothing
        .irp    n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
        vmovups %ymm\n, (32 * \n)(%rsi)
        .endr
        vzeroupper
        ret
        end     keeps_upper_halves

// carries(value): calls with the carry set and clear, and returns what came back in flags.
        function carries
        push    %rbx
        .cfi_def_cfa_offset 16
        xor     %ebx, %ebx
        mov     $3, %edi
        mov     $4, %esi
        stc
        call    add_with_carry
        add     %rax, %rbx
        mov     $3, %edi
        mov     $4, %esi
        clc
        call    add_with_carry
        lea     (%rbx,%rax), %rbx
        mov     $7, %edi
        call    odd_in_carry
        adc     $0, %rbx
        mov     $8, %edi
        call    odd_in_carry
        adc     $0, %rbx
        mov     %rbx, %rax
        pop     %rbx
        .cfi_def_cfa_offset 8
        ret
        end     carries

// seen_flags(flags): the arithmetic flags that flags_at_entry finds.
        function seen_flags
        push    %rdi
        .cfi_def_cfa_offset 16
        popf
        .cfi_def_cfa_offset 8
        call    flags_at_entry
        cld
        and     $0xcd5, %eax
        ret
        end     seen_flags
#else
// The same for i386, with arguments on the stack.

// Counts the first argument down to zero by jumps to its own first instruction; the second one counts up.
        function self_loop
        incl    8(%esp)
        decl    4(%esp)
        jnz     self_loop
        mov     8(%esp), %eax
        ret
        end     self_loop

        function into_prologue
        push    %ebx
1:      incl    12(%esp)
        decl    8(%esp)
        jnz     1b
        mov     12(%esp), %eax
        pop     %ebx
        ret
        end     into_prologue

// Targets that lie two and three bytes behind the entry.
        function table_behind
        jmp     *%ecx
.Ltable_first:
        inc     %ecx
.Ltable_second:
        dec     %edx
        mov     4(%esp), %eax
        add     %eax, %eax
        ret
        end     table_behind

        function table_call
        call    1f
1:      pop     %edx
        lea     table - 1b(%edx), %edx
        mov     8(%esp), %ecx
        mov     (%edx,%ecx,4), %ecx
        add     %edx, %ecx
        jmp     table_behind
        end     table_call

        .section .rodata
        .balign 4
table:  .long   .Ltable_first - table
        .long   .Ltable_second - table
        .text

        function table_switch
        mov     4(%esp), %ecx
        and     $3, %ecx
        call    1f
1:      pop     %edx
        lea     cases - 1b(%edx), %edx
        mov     (%edx,%ecx,4), %eax
        add     %edx, %eax
        notrack jmp *%eax
.Lcase0: mov    $10, %eax
        ret
.Lcase1: mov    $11, %eax
        ret
.Lcase2: mov    $12, %eax
        ret
.Lcase3: movl   $0, 4(%esp)
        jmp     table_switch
        end     table_switch
        .section .rodata
        .balign 4
cases:  .long   .Lcase0 - cases, .Lcase1 - cases, .Lcase2 - cases, .Lcase3 - cases
        .text

// eax + edx + carry, the carry set by the caller.
        function add_with_carry
        adc     %edx, %eax
        mov     %eax, %ecx
        mov     %ecx, %eax
        ret
        end     add_with_carry

// Returns carry in the carry: whether eax is odd.
        function odd_in_carry
        bt      $0, %eax
        ret
        end     odd_in_carry

        function flags_at_entry
        pushf
        pop     %eax
        ret
        end     flags_at_entry

        .globl  short_one, short_two, short_three
        .type   short_one, @function
        .type   short_two, @function
        .type   short_three, @function
        .balign 16
short_one:
        ret
        .size   short_one, 1
short_two:
        mov     4(%esp), %eax
        ret
        .size   short_two, 5
short_three:
        mov     4(%esp), %eax
        inc     %eax
        ret
        .size   short_three, 6
        .balign 16

        function where_from
        mov     (%esp), %eax
        ret
        end     where_from

        function pops_first
        pop     %ecx
        mov     (%esp), %eax
        add     $3, %eax
        jmp     *%ecx
        end     pops_first

        function call_next
        call    1f
1:      pop     %eax
        call    2f
2:      pop     %ecx
        lea     1b - 2b(%ecx), %ecx
        sub     %ecx, %eax
        ret
        end     call_next

        function loops
        mov     4(%esp), %ecx
        xor     %eax, %eax
1:      inc     %eax
        loop    1b
        ret
        end     loops

        function jrcxz_first
        mov     4(%esp), %ecx
        jecxz   1f
        mov     $1, %eax
        ret
1:      mov     $2, %eax
        ret
        end     jrcxz_first

        function keeps_everything
        push    %ebp
        .cfi_def_cfa_offset 8
        push    %ebx
        .cfi_def_cfa_offset 12
        push    %esi
        .cfi_def_cfa_offset 16
        push    %edi
        .cfi_def_cfa_offset 20
        mov     20(%esp), %edi
        .irp    n, 0,1,2,3,4,5,6,7
        movups  (128 + 16 * \n)(%edi), %xmm\n
        .endr
        fldt    112(%edi)
        mov     0(%edi), %eax
        mov     4(%edi), %ebx
        mov     8(%edi), %ecx
        mov     12(%edi), %edx
        mov     16(%edi), %esi
        mov     20(%edi), %ebp
        mov     24(%edi), %edi
        call    does_nothing
        push    %edi
        .cfi_def_cfa_offset 24
        mov     28(%esp), %edi
        mov     %eax, 0(%edi)
        mov     %ebx, 4(%edi)
        mov     %ecx, 8(%edi)
        mov     %edx, 12(%edi)
        mov     %esi, 16(%edi)
        mov     %ebp, 20(%edi)
        pop     24(%edi)
        .cfi_def_cfa_offset 20
        fstpt   112(%edi)
        .irp    n, 0,1,2,3,4,5,6,7
        movups  %xmm\n, (128 + 16 * \n)(%edi)
        .endr
        mov     $1, %eax
        pop     %edi
        .cfi_def_cfa_offset 16
        pop     %esi
        .cfi_def_cfa_offset 12
        pop     %ebx
        .cfi_def_cfa_offset 8
        pop     %ebp
        .cfi_def_cfa_offset 4
        ret
        end     keeps_everything

        function does_nothing
        nop
        nop
        nop
        nop
        nop
        nop
        ret
        end     does_nothing

        function keeps_upper_halves
        mov     4(%esp), %eax
        .irp    n, 0,1,2,3,4,5,6,7
        vmovups (32 * \n)(%eax), %ymm\n
        .endr
        call    does_nothing
        mov     8(%esp), %eax
        .irp    n, 0,1,2,3,4,5,6,7
        vmovups %ymm\n, (32 * \n)(%eax)
        .endr
        vzeroupper
        ret
        end     keeps_upper_halves

        function carries
        push    %ebx
        .cfi_def_cfa_offset 8
        xor     %ebx, %ebx
        mov     $3, %eax
        mov     $4, %edx
        stc
        call    add_with_carry
        add     %eax, %ebx
        mov     $3, %eax
        mov     $4, %edx
        clc
        call    add_with_carry
        lea     (%ebx,%eax), %ebx
        mov     $7, %eax
        call    odd_in_carry
        adc     $0, %ebx
        mov     $8, %eax
        call    odd_in_carry
        adc     $0, %ebx
        mov     %ebx, %eax
        pop     %ebx
        .cfi_def_cfa_offset 4
        ret
        end     carries

        function seen_flags
        push    4(%esp)
        .cfi_def_cfa_offset 8
        popf
        .cfi_def_cfa_offset 4
        call    flags_at_entry
        cld
        and     $0xcd5, %eax
        ret
        end     seen_flags
#endif
        .section .note.GNU-stack,"",@progbits
