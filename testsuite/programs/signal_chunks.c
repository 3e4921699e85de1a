// A signal handler that calls so often that each time it fills what a tracer may have set aside for its thread, while the same function is called
// outside of it. A timer sends the signals, each some varying time after the one before was handled: they come at any instruction.
#include "check.h"
#include <sched.h>
#include <signal.h>
#include <sys/time.h>

enum { SIGNALS = 800, CALLS = 2100 };
static volatile long handled;

TRACED long work(long value) { return value + 1; }

static void wait_for_next(void) {
    struct itimerval once = {.it_value = {0, 30 + handled * 37 % 100}};
    setitimer(ITIMER_REAL, &once, 0);
}

static void on_alarm(int signal) {
    (void)signal;
    long value = 0;
    while (value < CALLS) value = work(value);
    handled++;
    if (handled < SIGNALS) wait_for_next();
}

int main(void) {
    struct sigaction action = {.sa_handler = on_alarm};
    EXPECT(sigaction(SIGALRM, &action, 0) == 0);
    long calls = 0;
    wait_for_next();
    while (handled < SIGNALS) {
        long before = handled;
        // So much and no more for each signal: a machine that is busy elsewhere would fill a disk otherwise.
        for (int times = 0; times < 4000 && handled == before; times++) calls = work(calls);
        while (handled == before) sched_yield();
    }
    // How many there were depends on the moment: the harness looks only whether it is what the trace says.
    tell_calls("work", calls + (long)SIGNALS * CALLS);
    return 0;
}
