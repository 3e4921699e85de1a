// Threads that block every signal while they call, while others are created and end, and a target that blocks all in its only thread.
#include "check.h"
#include <pthread.h>
#include <signal.h>
#include <string.h>

enum { THREADS = 8, CALLS = 20000 };

TRACED long work(long value) { return value * 3 + 1; }

static void *blocked(void *result) {
    sigset_t all, seen;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, 0);
    long sum = 0;
    for (int times = 0; times < CALLS; times++) sum = work(sum) % 1000;
    pthread_sigmask(SIG_SETMASK, 0, &seen);
    int count = 0;
    for (int signal = 1; signal < NSIG; signal++) count += sigismember(&seen, signal) == 1;
    *(long *)result = sum * 100 + count;
    return 0;
}

int main(void) {
    pthread_t threads[THREADS];
    long results[THREADS];
    for (int thread = 0; thread < THREADS; thread++) EXPECT(pthread_create(&threads[thread], 0, blocked, &results[thread]) == 0);
    for (int thread = 0; thread < THREADS; thread++) pthread_join(threads[thread], 0);
    for (int thread = 0; thread < THREADS; thread++) printf("%ld\n", results[thread]);
    long result;
    blocked(&result);
    printf("main %ld\n", result);
    tell_calls("work", (THREADS + 1L) * CALLS);
    return 0;
}
