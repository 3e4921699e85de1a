// fork from inside traced functions: children return through their parent's frames, work, and fork again.
#include "check.h"
#include <sys/mman.h>
#include <sys/wait.h>

static long *calls;

TRACED long work(long value) {
    __atomic_add_fetch(&calls[0], 1, __ATOMIC_RELAXED);
    return value * 5 + 1;
}

TRACED long fork_below(long depth, long *is_child) {
    __atomic_add_fetch(&calls[1], 1, __ATOMIC_RELAXED);
    if (depth > 0) return OPAQUE(fork_below(depth - 1, is_child)) + 1;
    pid_t child = fork();
    EXPECT(child >= 0);
    *is_child = child == 0;
    return work(depth);
}

int main(void) {
    calls = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    long status_sum = 0;
    for (int round = 0; round < 20; round++) {
        long is_child;
        long result = fork_below(10, &is_child);
        if (is_child) {
            long sum = result;
            for (int times = 0; times < 6000; times++) sum = work(sum) % 100;
            long is_grandchild;
            fork_below(3, &is_grandchild);
            if (is_grandchild) _exit(work(1) == 6 ? 4 : 99);
            int status;
            EXPECT(wait(&status) > 0 && WIFEXITED(status));
            exit((int)(sum % 50) + WEXITSTATUS(status));
        }
        int status;
        EXPECT(wait(&status) > 0 && WIFEXITED(status));
        status_sum += WEXITSTATUS(status);
    }
    printf("statuses %ld\n", status_sum);
    tell_calls("work", calls[0]);
    tell_calls("fork_below", calls[1]);
    return 0;
}
