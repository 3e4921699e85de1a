// A program that uses SIGTRAP itself: its handler installed, replaced, asked for, raised, run by its own int3, blocked, pending and ignored.
#include "check.h"
#include <pthread.h>
#include <signal.h>

static volatile long first, second, codes;

TRACED long work(long value) { return value + 1; }

static void first_handler(int signal) {
    first += signal;
    work(1);
}

static void second_handler(int signal, siginfo_t *info, void *context) {
    (void)context;
    second += signal;
    codes += info->si_code == SI_KERNEL ? 1 : info->si_code == SI_TKILL ? 100 : info->si_code == SI_USER ? 10000 : 1000000;
}

static void *works(void *unused) {
    (void)unused;
    long value = 0;
    for (int times = 0; times < 10000; times++) value = work(value);
    return (void *)value;
}

int main(void) {
    struct sigaction old;
    EXPECT(sigaction(SIGTRAP, 0, &old) == 0 && old.sa_handler == SIG_DFL && old.sa_flags == 0);
    EXPECT(signal(SIGTRAP, first_handler) == SIG_DFL);
    raise(SIGTRAP);
    EXPECT(first == SIGTRAP);
    __asm__ volatile("int3");
    EXPECT(first == 2 * SIGTRAP);
    struct sigaction action = {.sa_sigaction = second_handler, .sa_flags = SA_SIGINFO | SA_RESTART};
    EXPECT(sigaction(SIGTRAP, &action, &old) == 0 && old.sa_handler == first_handler);
    EXPECT(sigaction(SIGTRAP, 0, &old) == 0 && old.sa_sigaction == second_handler);
    __asm__ volatile("int3");
    raise(SIGTRAP);
    kill(getpid(), SIGTRAP);
    printf("second %ld codes %ld\n", second, codes);
    pthread_t thread;
    pthread_create(&thread, 0, works, 0);
    sigset_t trap, pending;
    sigemptyset(&trap);
    sigaddset(&trap, SIGTRAP);
    EXPECT(sigprocmask(SIG_BLOCK, &trap, 0) == 0);
    works(0);
    EXPECT(sigprocmask(SIG_BLOCK, 0, &pending) == 0 && sigismember(&pending, SIGTRAP));
    raise(SIGTRAP);
    EXPECT(sigpending(&pending) == 0 && sigismember(&pending, SIGTRAP));
    works(0);
    long before = second;
    EXPECT(sigprocmask(SIG_UNBLOCK, &trap, 0) == 0);
    EXPECT(second == before + SIGTRAP);
    EXPECT(signal(SIGTRAP, SIG_IGN) != SIG_ERR);
    works(0);
    raise(SIGTRAP);
    EXPECT(sigaction(SIGTRAP, 0, &old) == 0 && old.sa_handler == SIG_IGN);
    pthread_join(thread, 0);
    tell_calls("work", 4 * 10000 + 2);
    return 8;
}
