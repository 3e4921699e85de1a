// Signals to children that have only just begun, and children of several threads that stop and go on: what the parent is told, and that those who are
// stopped do nothing.
#include "check.h"
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>

enum { ROUNDS = 60, THREADS = 3 };

// Shared with the children.
static struct {
    volatile long turns;
    volatile int is_over;
} *shared;

TRACED long work(long value) { return value + 1; }

TRACED void on_user(int signal, siginfo_t *info, void *context) {
    (void)signal;
    (void)context;
    _exit(info->si_code == SI_QUEUE && info->si_pid == getppid() ? info->si_value.sival_int : 98);
}

static void *turns(void *unused) {
    while (!shared->is_over) __atomic_store_n(&shared->turns, work(shared->turns), __ATOMIC_RELAXED);
    return unused;
}

static pid_t child_of_threads(void) {
    shared->is_over = 0;
    pid_t pid = fork();
    if (pid == 0) {
        pthread_t threads[THREADS];
        for (int index = 0; index < THREADS; index++) EXPECT(pthread_create(&threads[index], 0, turns, 0) == 0);
        for (int index = 0; index < THREADS; index++) EXPECT(pthread_join(threads[index], 0) == 0);
        _exit(5);
    }
    return pid;
}

// The next SIGCHLD says this of this child.
static void expect_told(pid_t pid, int code, int status) {
    sigset_t child;
    sigemptyset(&child);
    sigaddset(&child, SIGCHLD);
    siginfo_t told;
    EXPECT(sigwaitinfo(&child, &told) == SIGCHLD);
    EXPECT(told.si_pid == pid && told.si_code == code && told.si_status == status);
}

static void expect_waited(pid_t pid, int options, int code, int status) {
    siginfo_t found;
    memset(&found, 0, sizeof found);
    EXPECT(waitid(P_PID, pid, &found, options | WNOWAIT) == 0 && found.si_code == code);
    EXPECT(waitid(P_PID, pid, &found, options) == 0);
    EXPECT(found.si_pid == pid && found.si_code == code && found.si_status == status);
    // Once and not again.
    memset(&found, 0, sizeof found);
    if (options != WEXITED) EXPECT(waitid(P_PID, pid, &found, options | WNOHANG) == 0 && found.si_pid == 0);
}

static void stop_and_go(pid_t pid, int signal) {
    EXPECT(kill(pid, signal) == 0);
    expect_told(pid, CLD_STOPPED, signal);
    expect_waited(pid, WSTOPPED, CLD_STOPPED, signal);
    long before = shared->turns;
    for (volatile long wait = 0; wait < 2000000; wait++) {}
    EXPECT(shared->turns == before);
    EXPECT(kill(pid, SIGCONT) == 0);
    expect_told(pid, CLD_CONTINUED, SIGCONT);
    expect_waited(pid, WCONTINUED, CLD_CONTINUED, SIGCONT);
}

int main(void) {
    shared = mmap(0, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    EXPECT(shared != MAP_FAILED);
    struct sigaction action = {.sa_sigaction = on_user, .sa_flags = SA_SIGINFO};
    sigaction(SIGUSR1, &action, 0);
    sigset_t child;
    sigemptyset(&child);
    sigaddset(&child, SIGCHLD);
    sigprocmask(SIG_BLOCK, &child, 0);
    for (int round = 0; round < ROUNDS; round++) {
        pid_t pid = fork();
        if (pid == 0) {
            for (;;) pause();
        }
        for (volatile long wait = 0; wait < round * 50; wait++) {}
        union sigval value = {.sival_int = round};
        switch (round % 3) {
        case 0:
            EXPECT(sigqueue(pid, SIGUSR1, value) == 0);
            expect_told(pid, CLD_EXITED, round);
            expect_waited(pid, WEXITED, CLD_EXITED, round);
            break;
        case 1:
            EXPECT(kill(pid, SIGTERM) == 0);
            expect_told(pid, CLD_KILLED, SIGTERM);
            expect_waited(pid, WEXITED, CLD_KILLED, SIGTERM);
            break;
        default:
            stop_and_go(pid, SIGSTOP);
            EXPECT(kill(pid, SIGKILL) == 0);
            expect_told(pid, CLD_KILLED, SIGKILL);
            expect_waited(pid, WEXITED, CLD_KILLED, SIGKILL);
        }
    }
    for (int round = 0; round < 5; round++) {
        pid_t pid = child_of_threads();
        while (shared->turns < 1000) {}
        stop_and_go(pid, round % 2 ? SIGTSTP : SIGSTOP);
        stop_and_go(pid, SIGTTIN);
        shared->is_over = 1;
        expect_told(pid, CLD_EXITED, 5);
        expect_waited(pid, WEXITED, CLD_EXITED, 5);
    }
    tell_calls("on_user", ROUNDS / 3);
    return 0;
}
