// A filter that allows children and kills whoever opens a file: the child runs on, whatever a tracer would like to have of it.
#include "check.h"
#include <stddef.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>

TRACED long work(long value) { return value + 1; }

int main(void) {
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_openat, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {sizeof code / sizeof *code, code};
    long value = 0;
    for (int times = 0; times < 100; times++) value = work(value);
    EXPECT(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
    EXPECT(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0);
    pid_t child = fork();
    for (int times = 0; times < 10000; times++) value = work(value);
    if (child == 0) _exit(value == 10100 ? 7 : 99);
    int status;
    EXPECT(waitpid(child, &status, 0) == child);
    printf("value %ld child %d %d\n", value, WIFEXITED(status), WEXITSTATUS(status));
    // The child is not recorded.
    tell_calls("work", 100 + 10000);
    return 3;
}
