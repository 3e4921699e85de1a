// A daemon: two forks, a session of its own, its parent gone first. It works on, and answers on the output that it inherited.
#include "check.h"
#include <signal.h>
#include <sys/types.h>
#include <sys/wait.h>

TRACED long work(long value) { return value * 3 + 1; }

int main(void) {
    int released[2];
    EXPECT(pipe(released) == 0);
    printf("starting\n");
    fflush(stdout);
    pid_t pid = fork();
    if (pid > 0) {
        int status;
        EXPECT(waitpid(pid, &status, 0) == pid && status == 0);
        // The daemon waits until this process is gone and its end of the pipe with it.
        printf("parent is done\n");
        return 6;
    }
    EXPECT(setsid() > 0);
    pid = fork();
    if (pid > 0) _exit(0);
    alarm(60);
    close(released[1]);
    char byte;
    while (read(released[0], &byte, 1) > 0) {}
    long sum = 0;
    for (int times = 0; times < 20000; times++) sum = work(sum) % 1000;
    printf("daemon %ld, a session of its own: %d\n", sum, getsid(0) != getpid());
    tell_calls("work", 20000);
    return 0;
}
