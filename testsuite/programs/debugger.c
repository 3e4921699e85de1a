// A program that traces its own child. What a tracer of ours makes of that is told on standard output, and the program ends well either way.
#include "check.h"
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/wait.h>

TRACED long work(long value) { return value + 1; }

int main(void) {
    long value = 0;
    for (int times = 0; times < 5000; times++) value = work(value);
    pid_t pid = fork();
    if (pid == 0) {
        if (ptrace(PTRACE_TRACEME, 0, 0, 0)) _exit(errno == EPERM ? 50 : 51);
        raise(SIGSTOP);
        _exit(value == 5000 ? 52 : 53);
    }
    int status;
    EXPECT(waitpid(pid, &status, 0) == pid);
    if (WIFSTOPPED(status)) {
        EXPECT(WSTOPSIG(status) == SIGSTOP);
        EXPECT(ptrace(PTRACE_CONT, pid, 0, 0) == 0);
        EXPECT(waitpid(pid, &status, 0) == pid);
    }
    EXPECT(WIFEXITED(status));
    printf("child %d\n", WEXITSTATUS(status));
    tell_calls("work", 5000);
    return 0;
}
