// Coroutines as hand-written libraries make them: a switch of stacks in assembly, 4 KiB each, a thousand at once, moved between threads.
#include "check.h"
#include <pthread.h>
#include <stdint.h>
#include <sys/mman.h>

enum { COROUTINES = 1000, ROUNDS = 20, STACK = 4096 };
static void *saved[COROUTINES];
static __thread void *home;
static long results[COROUTINES];
static long deep_calls;

// switch_stack(save, to): the callee-saved registers live on the stack that is left.
void switch_stack(void **save, void *to);
__asm__(".text\n"
        ".globl switch_stack\n"
        ".type switch_stack, @function\n"
        "switch_stack:\n"
#ifdef __i386__
        "    mov 4(%esp), %eax\n    mov 8(%esp), %ecx\n"
        "    push %ebp\n    push %ebx\n    push %esi\n    push %edi\n"
        "    mov %esp, (%eax)\n"
        "    mov %ecx, %esp\n"
        "    pop %edi\n    pop %esi\n    pop %ebx\n    pop %ebp\n"
        "    ret\n"
        ".size switch_stack, . - switch_stack\n"
        "first_run:\n"
        "    sub $8, %esp\n    push %ebx\n"
        "    call *%ebp\n"
        "    ud2\n");
#else
        "    push %rbp\n    push %rbx\n    push %r12\n    push %r13\n    push %r14\n    push %r15\n"
        "    mov %rsp, (%rdi)\n"
        "    mov %rsi, %rsp\n"
        "    pop %r15\n    pop %r14\n    pop %r13\n    pop %r12\n    pop %rbx\n    pop %rbp\n"
        "    ret\n"
        ".size switch_stack, . - switch_stack\n"
        "first_run:\n"
        "    mov %rbx, %rdi\n"
        "    call *%rbp\n"
        "    ud2\n");
#endif
extern char first_run[];

// Not inlined: on another thread, `home` is elsewhere.
TRACED void **where_home_is(void) { return &home; }

TRACED void pause_coroutine(long self) { switch_stack(&saved[self], *where_home_is()); }

TRACED long deep(long self, long depth) {
    __atomic_add_fetch(&deep_calls, 1, __ATOMIC_RELAXED);
    if (depth == 0) {
        pause_coroutine(self);
        return self;
    }
    return OPAQUE(deep(self, depth - 1)) + 1;
}

TRACED void body(long self) {
    for (int round = 0; round < ROUNDS; round++) results[self] += deep(self, 3);
    saved[self] = saved[self];
    for (;;) pause_coroutine(self);
}

static void resume_some(long first, long step) {
    for (int round = 0; round < ROUNDS; round++)
        for (long self = first; self < COROUTINES; self += step) switch_stack(where_home_is(), saved[self]);
}

static void *resume_rest(void *unused) {
    (void)unused;
    // The other half, and then once each, all that the main thread has begun: their frames come here from another thread.
    resume_some(1, 2);
    for (long self = 0; self < COROUTINES; self++) switch_stack(where_home_is(), saved[self]);
    return 0;
}

int main(void) {
    char *stacks = mmap(0, (size_t)COROUTINES * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    EXPECT(stacks != MAP_FAILED);
    for (long self = 0; self < COROUTINES; self++) {
        uintptr_t *top = (uintptr_t *)(stacks + (self + 1) * STACK);
        // At 32 bit the stack is aligned for arguments.
        for (int rest = 0; rest < (sizeof(long) == 8 ? 1 : 3); rest++) *--top = 0;
        *--top = (uintptr_t)first_run;
        *--top = (uintptr_t)body;
        *--top = (uintptr_t)self;
        for (int rest = 0; rest < (sizeof(long) == 8 ? 4 : 2); rest++) *--top = 0;
        saved[self] = top;
    }
    resume_some(0, 2);
    pthread_t thread;
    pthread_create(&thread, 0, resume_rest, 0);
    pthread_join(thread, 0);
    long sum = 0;
    for (long self = 0; self < COROUTINES; self++) sum += results[self];
    printf("sum %ld\n", sum);
    tell_calls("deep", deep_calls);
    tell_calls("body", COROUTINES);
    return 0;
}
