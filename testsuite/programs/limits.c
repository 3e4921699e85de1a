// Resource limits that leave some room, but not much: address space, stack, open files, file size, processes' locked memory.
#include "check.h"
#include <pthread.h>
#include <string.h>
#include <sys/resource.h>

TRACED long deeper(long depth) { return depth == 0 ? 0 : OPAQUE(deeper(depth - 1)) + 1; }
TRACED long work(long value) { return value + 1; }

static void *body(void *unused) {
    (void)unused;
    return (void *)deeper(3000);
}

static void limit(int resource, rlim_t value) {
    struct rlimit both = {value, value};
    EXPECT(setrlimit(resource, &both) == 0);
}

int main(void) {
    long value = 0;
    for (int times = 0; times < 5000; times++) value = work(value);
    limit(RLIMIT_NOFILE, 3);
    limit(RLIMIT_FSIZE, 1 << 20);
    limit(RLIMIT_MEMLOCK, 0);
    limit(RLIMIT_STACK, 4 << 20);
    for (int times = 0; times < 50000; times++) value = work(value);
    printf("value %ld\n", value);
    printf("depth %ld\n", deeper(30000));
    limit(RLIMIT_AS, sizeof(long) == 8 ? (rlim_t)1 << 40 : (rlim_t)3 << 30);
    pthread_t thread;
    void *result;
    EXPECT(pthread_create(&thread, 0, body, 0) == 0);
    pthread_join(thread, &result);
    printf("thread %ld\n", (long)result);
    tell_calls("work", 55000);
    tell_calls("deeper", 30001 + 3001);
    return 0;
}
