// Signal masks, dispositions, pending signals and the alternate stack, as found at the start, in a thread, and in a child.
#include "check.h"
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/wait.h>

TRACED void show(const char *who) {
    sigset_t blocked, pending;
    EXPECT(sigprocmask(SIG_BLOCK, 0, &blocked) == 0 && sigpending(&pending) == 0);
    printf("%s:", who);
    for (int signal = 1; signal < NSIG; signal++) {
        struct sigaction action;
        if (sigaction(signal, 0, &action)) continue;
        if (sigismember(&blocked, signal)) printf(" blocked %d", signal);
        if (sigismember(&pending, signal)) printf(" pending %d", signal);
        if (action.sa_handler == SIG_IGN) printf(" ignored %d", signal);
        else if (action.sa_handler != SIG_DFL) printf(" handled %d", signal);
        if (action.sa_flags) printf(" flags %d %x", signal, action.sa_flags);
    }
    stack_t stack;
    EXPECT(sigaltstack(0, &stack) == 0);
    printf(" stack %d %zu\n", stack.ss_flags, stack.ss_size);
    fflush(stdout);
}

static void *in_thread(void *unused) {
    (void)unused;
    show("thread");
    return 0;
}

int main(int argc, char **argv) {
    (void)argc;
    show(argv[1] ? argv[1] : "start");
    if (argv[1]) return 0;
    pthread_t thread;
    pthread_create(&thread, 0, in_thread, 0);
    pthread_join(thread, 0);
    sigset_t some;
    sigemptyset(&some);
    sigaddset(&some, SIGTRAP);
    sigaddset(&some, SIGUSR2);
    sigprocmask(SIG_BLOCK, &some, 0);
    signal(SIGHUP, SIG_IGN);
    signal(SIGTRAP, SIG_IGN);
    if (fork() == 0) {
        show("child");
        execl("/proc/self/exe", argv[0], "executed", NULL);
    }
    int status;
    EXPECT(wait(&status) > 0 && status == 0);
    tell_calls("show", 4);
    return 0;
}
