// Signal handlers that call backtrace(), between any two instructions of traced functions, in several threads and in a forked child: each list of
// frames leads from the handler through the functions that were interrupted to the thread's first, and has nothing else in it.
#include "check.h"
#include <dlfcn.h>
#include <execinfo.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/wait.h>

enum { THREADS = 2, SIGNALS = 200, FRAMES = 60 };
static _Thread_local volatile long seen;
static long wrong, ended;

static const char *name_of(char *address) {
    Dl_info info;
    return dladdr(address, &info) && info.dli_sname ? info.dli_sname : "?";
}

static void complain(void **frames, int count) {
    if (__atomic_fetch_add(&wrong, 1, __ATOMIC_RELAXED) > 5) return;
    for (int frame = 0; frame < count; frame++) printf(" %s", name_of((char *)frames[frame] - (frame != 2)));
    printf("\n");
}

TRACED void on_signal(int signal) {
    (void)signal;
    void *frames[FRAMES];
    int count = backtrace(frames, FRAMES);
    seen++;
    // This function, what it returns to, what was interrupted: perhaps a leaf, then functions of one name, then the body. And what begins and ends it.
    int frame = 2;
    const char *name = name_of(frames[frame]);
#ifdef __i386__
    // Functions ask another one, which has no name, where they are; and the kernel has code of its own for system calls.
    if (strcmp(name, "?") == 0 || strcmp(name, "__kernel_vsyscall") == 0) name = name_of((char *)frames[++frame] - 1);
#endif
    if (strcmp(name, "leaf") == 0 || strcmp(name, "pthread_sigmask") == 0) name = name_of((char *)frames[++frame] - 1);
    while (strcmp(name, "descend") == 0 && frame + 1 < count) name = name_of((char *)frames[++frame] - 1);
    if (strcmp(name, "body") != 0 || count - frame > 4) complain(frames, count);
}

TRACED long leaf(long value) { return value * 3 + 1; }

TRACED long descend(long depth) {
    if (depth == 0) return leaf(depth);
    return OPAQUE(descend(depth - 1)) + leaf(depth);
}

// Interrupted only in here and further in.
void *body(void *mask) {
    long sum = 0;
    pthread_sigmask(SIG_UNBLOCK, mask, 0);
    while (seen < SIGNALS) sum += descend(5);
    pthread_sigmask(SIG_BLOCK, mask, 0);
    __atomic_add_fetch(&ended, 1, __ATOMIC_RELEASE);
    return (void *)sum;
}

static void storm(void) {
    sigset_t mask;
    sigemptyset(&mask);
    sigaddset(&mask, SIGUSR1);
    pthread_sigmask(SIG_BLOCK, &mask, 0);
    ended = 0;
    pthread_t threads[THREADS];
    for (int index = 0; index < THREADS; index++) EXPECT(pthread_create(&threads[index], 0, body, &mask) == 0);
    while (__atomic_load_n(&ended, __ATOMIC_ACQUIRE) < THREADS) {
        for (int index = 0; index < THREADS; index++) pthread_kill(threads[index], SIGUSR1);
        sched_yield();
    }
    for (int index = 0; index < THREADS; index++) EXPECT(pthread_join(threads[index], 0) == 0);
    EXPECT(wrong == 0);
}

int main(void) {
    // Brings the unwinder.
    void *frame;
    backtrace(&frame, 1);
    signal(SIGUSR1, on_signal);
    storm();
    int status;
    pid_t child = fork();
    if (child == 0) {
        storm();
        _exit(0);
    }
    EXPECT(waitpid(child, &status, 0) == child && status == 0);
    tell_calls("body", 2 * THREADS);
    return 0;
}
