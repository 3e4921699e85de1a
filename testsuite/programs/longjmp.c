// longjmp over traced frames, and siglongjmp out of handlers of synchronous and asynchronous signals, on both stacks.
#include "check.h"
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>

enum { ALARMS = 2000 };
static jmp_buf place;
static sigjmp_buf signal_place;
static long descended, worked;
static volatile long alarms;
static volatile int is_ready;
static pthread_t receiver;
static volatile int *volatile nowhere;

TRACED long descend(long depth) {
    descended++;
    if (depth == 0) longjmp(place, 1);
    return OPAQUE(descend(depth - 1)) + 1;
}

TRACED long fault(long depth) {
    descended++;
    if (depth == 0) *nowhere = 1;
    return OPAQUE(fault(depth - 1)) + 1;
}

TRACED long work(long value) {
    worked++;
    return value * 7 + 3;
}

static void leave(int signal) {
    (void)signal;
    siglongjmp(signal_place, 1);
}

static void *sends(void *unused) {
    (void)unused;
    while (!is_ready) sched_yield();
    for (long sent = 0; sent < ALARMS; sent++) {
        pthread_kill(receiver, SIGALRM);
        while (alarms == sent) sched_yield();
    }
    return 0;
}

TRACED long round_trip(void) {
    volatile long sum = 0;
    for (volatile long round = 0; round < 300; round++) {
        if (setjmp(place) == 0) descend(30);
        sum = work(sum) % 1000;
    }
    return sum;
}

int main(void) {
    volatile long faults = 0;
    static char stack[65536];
    stack_t alternate = {.ss_sp = stack, .ss_size = sizeof stack};
    sigaltstack(&alternate, 0);
    printf("longjmp %ld\n", round_trip());
    tell_calls("descend", descended);
    for (int flags = 0; flags < 2; flags++) {
        struct sigaction action = {.sa_handler = leave, .sa_flags = flags ? SA_ONSTACK : 0};
        sigaction(SIGSEGV, &action, 0);
        for (volatile int round = 0; round < 100; round++) {
            if (sigsetjmp(signal_place, 1) == 0) fault(12);
            else faults++;
        }
    }
    printf("faults %ld\n", faults);
    tell_calls("fault", 2 * 100 * 13);
    // Asynchronous: left at any instruction whatever. How often `work` was called is not known exactly then.
    struct sigaction action = {.sa_handler = leave, .sa_flags = SA_ONSTACK};
    sigaction(SIGALRM, &action, 0);
    receiver = pthread_self();
    pthread_t sender;
    volatile long sum = 0;
    pthread_create(&sender, 0, sends, 0);
    if (sigsetjmp(signal_place, 1)) alarms++;
    is_ready = 1;
    while (alarms < ALARMS) {
        // So much and no more for each signal: a machine that is busy elsewhere would fill a disk otherwise.
        for (int times = 0; times < 2000; times++) sum = work(sum);
        sched_yield();
        for (long before = alarms; alarms == before;) sched_yield();
    }
    pthread_join(sender, 0);
    printf("alarms %ld\n", alarms);
    return 0;
}
