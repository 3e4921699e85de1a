// FUNCTIONS of them, called one after the other by as many threads as the first argument says, without a rest, until SIGTERM. Each returns a number of its own.
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>

#ifndef FUNCTIONS
#define FUNCTIONS 10000
#endif
#define TEXT(words) #words
#define NUMBER(macro) TEXT(macro)

#ifdef __i386__
#define WORD ".long"
#define BODY "push %ebp\n mov %esp, %ebp\n mov 8(%ebp), %eax\n lea number(%eax), %eax\n pop %ebp\n ret\n"
#else
#define WORD ".quad"
#define BODY "push %rbp\n mov %rsp, %rbp\n lea number(%rdi), %rax\n pop %rbp\n ret\n"
#endif

// As an assembler makes them, which is far quicker than a compiler.
__asm__(".altmacro\n"
        ".macro function count\n"
        ".type function_\\count, @function\n .p2align 4\n"
        "function_\\count:\n"
        ".set number, \\count\n" BODY ".size function_\\count, . - function_\\count\n"
        ".pushsection .data.rel.ro.table, \"aw\"\n" WORD " function_\\count\n .popsection\n"
        ".endm\n"
        ".pushsection .data.rel.ro.table, \"aw\"\n .balign 8\n .globl table\ntable:\n .popsection\n"
        ".text\n .set count, 0\n"
        ".rept " NUMBER(FUNCTIONS) "\n"
        "function %count\n"
        ".set count, count + 1\n"
        ".endr\n"
        ".noaltmacro\n");

extern long (*const table[FUNCTIONS])(long);
static volatile int is_over;
static int begun, wrong;

static void *call_all(void *unused) {
    (void)unused;
    __atomic_add_fetch(&begun, 1, __ATOMIC_RELAXED);
    while (!is_over)
        for (long index = 0; index < FUNCTIONS && !is_over; index++)
            if (table[index](7) != 7 + index) wrong = 1;
    return 0;
}

static void end(int signal) {
    (void)signal;
    is_over = 1;
}

int main(int count, char **words) {
    long threads = count > 1 ? atol(words[1]) : 1;
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    pthread_sigmask(SIG_BLOCK, &set, 0);
    pthread_t *started = calloc((size_t)threads, sizeof *started);
    for (long index = 0; index < threads; index++)
        if (pthread_create(&started[index], 0, call_all, 0)) return 2;
    while (__atomic_load_n(&begun, __ATOMIC_RELAXED) < threads) sched_yield();
    signal(SIGTERM, end);
    // From here on nothing of this thread changes, however long it waits for a processor.
    pthread_sigmask(SIG_UNBLOCK, &set, 0);
    mkdir("ready", 0700);
    for (long index = 0; index < threads; index++) pthread_join(started[index], 0);
    printf(wrong ? "wrong\n" : "right\n");
    return 7;
}
