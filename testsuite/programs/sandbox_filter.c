// A filter as sandboxes install it: memory and thread calls are forbidden with an error, and what a tracer might need along with them.
#include "check.h"
#include <errno.h>
#include <pthread.h>
#include <stddef.h>
#include <string.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

TRACED long work(long value) { return value + 1; }
TRACED long deeper(long depth) { return depth == 0 ? 0 : OPAQUE(deeper(depth - 1)) + 1; }

int main(void) {
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_write, 3, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_exit_group, 2, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_fstat, 1, 0),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {sizeof code / sizeof *code, code};
    long value = 0;
    for (int times = 0; times < 100; times++) value = work(value);
    EXPECT(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
    EXPECT(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program) == 0);
    EXPECT(mmap(0, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == MAP_FAILED && errno == EPERM);
    for (int times = 0; times < 30000; times++) value = work(value);
    printf("value %ld depth %ld\n", value, deeper(60000));
    tell_calls("work", 100 + 30000);
    tell_calls("deeper", 60001);
    return 2;
}
