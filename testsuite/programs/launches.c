// The other ways to a child: vfork with exec and with _exit, posix_spawn, system, popen. The child is this program.
#include "check.h"
#include <spawn.h>
#include <string.h>
#include <sys/wait.h>

extern char **environ;

TRACED long parent_work(long value) { return value * 3 + 1; }
TRACED long child_work(long value) { return value * 7 + 2; }
TRACED void vfork_child_work(volatile long *value) { *value += 1; }

static int child(const char *how) {
    long sum = 0;
    for (int times = 0; times < 1000; times++) sum = child_work(sum) % 1000;
    printf("child by %s: %ld\n", how, sum);
    return 21;
}

static int status_of(pid_t pid) {
    int status;
    EXPECT(waitpid(pid, &status, 0) == pid && WIFEXITED(status));
    return WEXITSTATUS(status);
}

TRACED int by_vfork(char *self) {
    pid_t pid = vfork();
    if (pid == 0) {
        execl(self, self, "vfork", NULL);
        _exit(98);
    }
    return status_of(pid);
}

TRACED int by_vfork_alone(void) {
    volatile long shared = 0;
    pid_t pid = vfork();
    if (pid == 0) {
        for (int times = 0; times < 100; times++) vfork_child_work(&shared);
        _exit(9);
    }
    EXPECT(shared == 100);
    return status_of(pid);
}

TRACED int by_failed_exec(void) {
    pid_t pid = vfork();
    if (pid == 0) {
        execl("/nonexistent/program", "program", NULL);
        _exit(97);
    }
    return status_of(pid);
}

int main(int argc, char **argv) {
    if (argc > 1) return child(argv[1]);
    char self[4096];
    ssize_t length = readlink("/proc/self/exe", self, sizeof self - 1);
    EXPECT(length > 0);
    self[length] = 0;
    long sum = 0;
    for (int round = 0; round < 5; round++) {
        sum = parent_work(sum) % 1000;
        printf("vfork %d\n", by_vfork(self));
        printf("vfork alone %d\n", by_vfork_alone());
        printf("failed exec %d\n", by_failed_exec());
        fflush(stdout);
        pid_t pid;
        char *arguments[] = {self, "posix_spawn", NULL};
        EXPECT(posix_spawn(&pid, self, 0, 0, arguments, environ) == 0);
        printf("posix_spawn %d\n", status_of(pid));
        fflush(stdout);
        char command[5000];
        snprintf(command, sizeof command, "'%s' system", self);
        int status = system(command);
        printf("system %d\n", WEXITSTATUS(status));
        snprintf(command, sizeof command, "'%s' popen", self);
        FILE *pipe = popen(command, "r");
        char line[200];
        while (fgets(line, sizeof line, pipe)) printf("read: %s", line);
        status = pclose(pipe);
        printf("popen %d\n", WEXITSTATUS(status));
        fflush(stdout);
    }
    tell_calls("child_work", 5 * 4 * 1000);
    tell_calls("vfork_child_work", 5 * 100);
    tell_calls("parent_work", 5);
    tell_calls("by_vfork", 5);
    tell_calls("by_vfork_alone", 5);
    return (int)(sum % 100);
}
