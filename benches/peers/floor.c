// The floor that tracers are measured against: the least that has to be done to say which function was entered when, or when it was entered and left.
//
// `-pg -mfentry` has each function of work.c call `__fentry__` first, at whose entry the stack holds
//
//     rsp + 8   the function's return address
//     rsp       the address behind the call, which tells the function
//
// With FLOOR_PAIR, a frame (return address, function, time) is put aside at the entry, and the record (function, time of entry, duration) is written at the
// return; without, the record is (function, time). Records go to a buffer of the thread that fits the processor's cache, over and over. No filters, no other
// stacks, no unwinding, nobody who reads: a tracer has to do more than this. With FLOOR_KEEPS, the C library's `__fentry__` is called all the same, as for a tracer
// that leaves the program's own calls in place.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdlib.h>

enum { BUFFER_BYTES = 1 << 20, FRAMES = 4096, WORDS_PER_FRAME = 3 };

__thread char *floor_at, *floor_end, *floor_buffer;
__thread uint64_t *floor_frame;
__thread uint64_t floor_turns;
void *floor_kept;

__attribute__((no_instrument_function)) void floor_start(void) {
    floor_buffer = aligned_alloc(4096, BUFFER_BYTES);
    floor_frame = calloc(FRAMES, WORDS_PER_FRAME * sizeof *floor_frame);
    if (!floor_buffer || !floor_frame) abort();
    for (int byte = 0; byte < BUFFER_BYTES; byte += 4096) floor_buffer[byte] = 0;
    floor_at = floor_buffer;
    floor_end = floor_buffer + BUFFER_BYTES - 24;
#ifdef FLOOR_KEEPS
    floor_kept = dlsym(RTLD_NEXT, "__fentry__");
    if (!floor_kept) abort();
#endif
}

#ifdef FLOOR_PAIR
#define RECORD_BYTES 24
#else
#define RECORD_BYTES 16
#endif

__attribute__((no_instrument_function)) unsigned long floor_records(void) {
    unsigned long a_turn = (BUFFER_BYTES - 24 + RECORD_BYTES - 1) / RECORD_BYTES;
    return floor_turns * a_turn + (unsigned long)(floor_at - floor_buffer) / RECORD_BYTES;
}

#ifdef __i386__
#ifdef FLOOR_KEEPS
#error "only for 64-bit code"
#endif
// edx:eax = the time. The next record's place is ecx, which is lost.
#define NARROW_TEXT(words) #words
#define NARROW_NUMBER(macro) NARROW_TEXT(macro)
#define NARROW_NEXT \
    "add $" NARROW_NUMBER(RECORD_BYTES) ", %ecx\n cmp %gs:floor_end@ntpoff, %ecx\n jae 2f\n1: mov %ecx, %gs:floor_at@ntpoff\n"
#define NARROW_AGAIN "2: mov %gs:floor_buffer@ntpoff, %ecx\n incl %gs:floor_turns@ntpoff\n jmp 1b\n"

#ifdef FLOOR_PAIR
__asm__(".text\n .p2align 6\n .globl __fentry__\n .type __fentry__, @function\n"
        "__fentry__:\n"
        " push %eax\n push %ecx\n push %edx\n rdtsc\n"
        " mov %gs:floor_frame@ntpoff, %ecx\n"
        " mov %eax, 8(%ecx)\n mov %edx, 12(%ecx)\n"
        " mov 16(%esp), %eax\n mov %eax, (%ecx)\n"
        " mov 12(%esp), %eax\n mov %eax, 4(%ecx)\n"
        " add $24, %ecx\n mov %ecx, %gs:floor_frame@ntpoff\n"
        " movl $floor_return, 16(%esp)\n"
        " pop %edx\n pop %ecx\n pop %eax\n ret\n"
        ".size __fentry__, . - __fentry__\n"
        ".p2align 6\n .type floor_return, @function\n"
        "floor_return:\n"
        " lea -4(%esp), %esp\n push %eax\n push %ecx\n push %edx\n push %esi\n rdtsc\n"
        " mov %gs:floor_frame@ntpoff, %esi\n sub $24, %esi\n mov %esi, %gs:floor_frame@ntpoff\n"
        " mov %gs:floor_at@ntpoff, %ecx\n"
        " sub 8(%esi), %eax\n sbb 12(%esi), %edx\n mov %eax, 16(%ecx)\n mov %edx, 20(%ecx)\n"
        " mov 8(%esi), %eax\n mov %eax, 8(%ecx)\n mov 12(%esi), %eax\n mov %eax, 12(%ecx)\n"
        " mov 4(%esi), %eax\n mov %eax, (%ecx)\n"
        " mov (%esi), %eax\n mov %eax, 16(%esp)\n" NARROW_NEXT
        " pop %esi\n pop %edx\n pop %ecx\n pop %eax\n lea 4(%esp), %esp\n"
        // Not `ret`, as below. A signal handler would spoil it; there are none.
        " jmp *-4(%esp)\n" NARROW_AGAIN
        ".size floor_return, . - floor_return\n");
#else
__asm__(".text\n .p2align 6\n .globl __fentry__\n .type __fentry__, @function\n"
        "__fentry__:\n"
        " push %eax\n push %ecx\n push %edx\n rdtsc\n"
        " mov %gs:floor_at@ntpoff, %ecx\n"
        " mov %eax, 8(%ecx)\n mov %edx, 12(%ecx)\n"
        " mov 12(%esp), %edx\n mov %edx, (%ecx)\n" NARROW_NEXT
        " pop %edx\n pop %ecx\n pop %eax\n ret\n" NARROW_AGAIN
        ".size __fentry__, . - __fentry__\n");
#endif
#else
#define TEXT(words) #words
#define NUMBER(macro) TEXT(macro)
// rax = the time; rdx is lost.
#define TIME "rdtsc\n shl $32, %rdx\n or %rdx, %rax\n"
// The next record's place is rcx, which is lost.
#define NEXT "add $" NUMBER(RECORD_BYTES) ", %rcx\n cmp %fs:floor_end@tpoff, %rcx\n jae 2f\n1: mov %rcx, %fs:floor_at@tpoff\n"
#ifdef FLOOR_KEEPS
#define BACK "jmp *floor_kept(%rip)\n"
#else
#define BACK "ret\n"
#endif
#define AGAIN "2: mov %fs:floor_buffer@tpoff, %rcx\n incq %fs:floor_turns@tpoff\n jmp 1b\n"

#ifdef FLOOR_PAIR
__asm__(".text\n .p2align 6\n .globl __fentry__\n .type __fentry__, @function\n"
        "__fentry__:\n"
        " push %rax\n push %rcx\n push %rdx\n" TIME
        " mov %fs:floor_frame@tpoff, %rcx\n"
        " mov 32(%rsp), %rdx\n mov %rdx, (%rcx)\n"
        " mov 24(%rsp), %rdx\n mov %rdx, 8(%rcx)\n"
        " mov %rax, 16(%rcx)\n"
        " add $24, %rcx\n mov %rcx, %fs:floor_frame@tpoff\n"
        " lea floor_return(%rip), %rdx\n mov %rdx, 32(%rsp)\n"
        " pop %rdx\n pop %rcx\n pop %rax\n" BACK
        ".size __fentry__, . - __fentry__\n"
        ".p2align 6\n .type floor_return, @function\n"
        "floor_return:\n"
        " lea -8(%rsp), %rsp\n push %rax\n push %rcx\n push %rdx\n push %rsi\n" TIME
        " mov %fs:floor_frame@tpoff, %rsi\n sub $24, %rsi\n mov %rsi, %fs:floor_frame@tpoff\n"
        " mov (%rsi), %rdx\n mov %rdx, 32(%rsp)\n"
        " mov %fs:floor_at@tpoff, %rcx\n"
        " mov 8(%rsi), %rdx\n mov %rdx, (%rcx)\n"
        " mov 16(%rsi), %rdx\n mov %rdx, 8(%rcx)\n"
        " sub %rdx, %rax\n mov %rax, 16(%rcx)\n" NEXT
        " pop %rsi\n pop %rdx\n pop %rcx\n pop %rax\n lea 8(%rsp), %rsp\n"
        // Not `ret`, whose prediction was used up by the function's own.
        " jmp *-8(%rsp)\n" AGAIN
        ".size floor_return, . - floor_return\n");
#else
__asm__(".text\n .p2align 6\n .globl __fentry__\n .type __fentry__, @function\n"
        "__fentry__:\n"
        " push %rax\n push %rcx\n push %rdx\n" TIME
        " mov %fs:floor_at@tpoff, %rcx\n"
        " mov 24(%rsp), %rdx\n mov %rdx, (%rcx)\n"
        " mov %rax, 8(%rcx)\n" NEXT
        " pop %rdx\n pop %rcx\n pop %rax\n" BACK AGAIN
        ".size __fentry__, . - __fentry__\n");
#endif
#endif
