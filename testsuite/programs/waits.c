// wait() and SIGCHLD: only the program's own children, each once; stopped and continued ones as well.
#include "check.h"
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/wait.h>

static volatile long children_signals;
static void on_child(int signal) {
    (void)signal;
    children_signals++;
}

TRACED long work(long value) { return value + 1; }

int main(void) {
    int status;
    EXPECT(waitpid(-1, &status, WNOHANG) == -1 && errno == ECHILD);
    EXPECT(wait(&status) == -1 && errno == ECHILD);
    siginfo_t info;
    EXPECT(waitid(P_ALL, 0, &info, WEXITED | WNOHANG) == -1 && errno == ECHILD);
    struct sigaction action = {.sa_handler = on_child, .sa_flags = SA_NOCLDSTOP};
    sigaction(SIGCHLD, &action, 0);
    sigset_t child, old;
    sigemptyset(&child);
    sigaddset(&child, SIGCHLD);
    for (int round = 0; round < 20; round++) {
        sigprocmask(SIG_BLOCK, &child, &old);
        pid_t pid = fork();
        if (pid == 0) _exit((int)work(round));
        long before = children_signals;
        while (children_signals == before) sigsuspend(&old);
        EXPECT(waitpid(-1, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) == round + 1);
        EXPECT(waitpid(-1, &status, WNOHANG) == -1 && errno == ECHILD);
        sigprocmask(SIG_SETMASK, &old, 0);
    }
    EXPECT(children_signals == 20);
    // Job control: a child stops itself, is seen to, goes on, is seen to, and ends.
    for (int round = 0; round < 5; round++) {
        int seen[2];
        EXPECT(pipe(seen) == 0);
        pid_t pid = fork();
        if (pid == 0) {
            raise(round % 2 ? SIGTSTP : SIGSTOP);
            long value = 0;
            for (int times = 0; times < 1000; times++) value = work(value);
            // One that has ended is not continued any more.
            char byte;
            EXPECT(read(seen[0], &byte, 1) == 1);
            _exit(value == 1000 ? 3 : 99);
        }
        EXPECT(waitpid(pid, &status, WUNTRACED) == pid && WIFSTOPPED(status) && WSTOPSIG(status) == (round % 2 ? SIGTSTP : SIGSTOP));
        // It stays stopped.
        EXPECT(waitpid(pid, &status, WNOHANG | WCONTINUED) == 0);
        EXPECT(kill(pid, SIGCONT) == 0);
        EXPECT(waitpid(pid, &status, WCONTINUED) == pid && WIFCONTINUED(status));
        EXPECT(write(seen[1], "", 1) == 1);
        close(seen[0]);
        close(seen[1]);
        EXPECT(waitpid(pid, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) == 3);
    }
    pid_t pid = fork();
    if (pid == 0) {
        for (;;) pause();
    }
    kill(pid, SIGKILL);
    EXPECT(waitpid(pid, &status, 0) == pid && WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
    printf("signals %ld\n", children_signals);
    tell_calls("work", 20 + 5 * 1000);
    return 0;
}
