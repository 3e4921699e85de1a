// Signal handlers that call traced functions, on the normal and on an alternate stack, nested, while traced functions run.
// A second thread sends them, each as soon as the one before was handled: they come at any instruction.
#include "check.h"
#include <pthread.h>
#include <sched.h>
#include <signal.h>

enum { SIGNALS = 800 };
static volatile long alarms, users;
static pthread_t receiver;
static long handled, descended;

TRACED long in_handler(long depth) {
    handled++;
    return depth == 0 ? 1 : OPAQUE(in_handler(depth - 1)) + 1;
}

static void on_alarm(int signal) {
    (void)signal;
    alarms++;
    in_handler(4);
    // Another one on top of it, on the other stack.
    raise(SIGUSR1);
}

static void on_user(int signal) {
    (void)signal;
    users++;
    in_handler(2);
}

TRACED long descend(long depth) {
    descended++;
    return depth == 0 ? 1 : OPAQUE(descend(depth - 1)) + 1;
}

static void *sends(void *unused) {
    (void)unused;
    for (long sent = 0; sent < SIGNALS; sent++) {
        pthread_kill(receiver, SIGALRM);
        while (alarms == sent) sched_yield();
    }
    return 0;
}

int main(void) {
    receiver = pthread_self();
    static char stack[65536];
    stack_t alternate = {.ss_sp = stack, .ss_size = sizeof stack};
    sigaltstack(&alternate, 0);
    for (int is_alarm_on_alternate = 0; is_alarm_on_alternate < 2; is_alarm_on_alternate++) {
        struct sigaction action = {.sa_handler = on_alarm, .sa_flags = is_alarm_on_alternate ? SA_ONSTACK : 0};
        struct sigaction user = {.sa_handler = on_user, .sa_flags = is_alarm_on_alternate ? 0 : SA_ONSTACK};
        sigaction(SIGALRM, &action, 0);
        sigaction(SIGUSR1, &user, 0);
        alarms = 0;
        pthread_t sender;
        EXPECT(pthread_create(&sender, 0, sends, 0) == 0);
        long wrong = 0;
        while (alarms < SIGNALS) {
            long before = alarms;
            // So much and no more for each signal: a machine that is busy elsewhere would fill a disk otherwise.
            for (int times = 0; times < 200; times++) wrong += descend(25) != 26;
            while (alarms == before && alarms < SIGNALS) sched_yield();
        }
        pthread_join(sender, 0);
        EXPECT(wrong == 0);
    }
    EXPECT(users == 2 * SIGNALS);
    // How many there were depends on the moment: the harness looks only whether it is what the trace says.
    tell_calls("in_handler", handled);
    tell_calls("descend", descended);
    return 0;
}
