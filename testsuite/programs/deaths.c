// The ways to end: by signals with and without a core, by exit from a handler, by _exit in a thread, by abort. The argument says which.
#include "check.h"
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>

static long works;
static volatile int *volatile nowhere;
TRACED long work(long value) {
    works++;
    return value + 1;
}

TRACED void crash(long depth) {
    work(depth);
    if (depth == 0) *nowhere = 1;
    crash(depth - 1);
    __asm__("");
}

static void at_exit(void) { printf("atexit\n"); }
static void exit_in_handler(int signal) { exit(40 + signal); }
static void *exits_all(void *unused) {
    (void)unused;
    _exit(33);
}

int main(int argc, char **argv) {
    EXPECT(argc == 2);
    const char *way = argv[1];
    struct rlimit no_core = {0, 0};
    setrlimit(RLIMIT_CORE, &no_core);
    atexit(at_exit);
    for (int times = 0; times < 7000; times++) work(times);
    printf("%s\n", way);
    if (!strcmp(way, "crash")) {
        tell_calls("work", works + 21);
        crash(20);
    }
    tell_calls("work", works);
    if (!strcmp(way, "sigkill")) kill(getpid(), SIGKILL);
    if (!strcmp(way, "sigterm")) raise(SIGTERM);
    if (!strcmp(way, "sigtrap")) raise(SIGTRAP);
    if (!strcmp(way, "int3")) __asm__ volatile("int3");
    if (!strcmp(way, "sigsys")) raise(SIGSYS);
    if (!strcmp(way, "illegal")) __builtin_trap();
    if (!strcmp(way, "realtime")) raise(SIGRTMIN + 3);
    if (!strcmp(way, "abort")) abort();
    if (!strcmp(way, "handler")) {
        signal(SIGUSR1, exit_in_handler);
        raise(SIGUSR1);
    }
    if (!strcmp(way, "thread")) {
        pthread_t thread;
        pthread_create(&thread, 0, exits_all, 0);
        for (;;) pause();
    }
    // Only the leader ends; the process goes on until its last thread does.
    if (!strcmp(way, "leader")) {
        fflush(stdout);
        pthread_t thread;
        pthread_create(&thread, 0, exits_all, 0);
        syscall(SYS_exit, 1);
    }
    if (!strcmp(way, "status")) return 255;
    if (!strcmp(way, "raw")) syscall(SYS_exit_group, 77);
    return 98;
}
