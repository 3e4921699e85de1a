// Recursion a hundred thousand frames deep, up and down again several times, also on a thread's big stack.
#include "check.h"
#include <pthread.h>
#include <sys/resource.h>

TRACED long deeper(long depth) { return depth == 0 ? 0 : OPAQUE(deeper(depth - 1)) + 1; }

static void *body(void *unused) {
    (void)unused;
    return (void *)(deeper(100000) + deeper(10) + deeper(99999));
}

int main(void) {
    pthread_t thread;
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, 64L << 20);
    EXPECT(pthread_create(&thread, &attributes, body, 0) == 0);
    void *result;
    pthread_join(thread, &result);
    printf("thread %ld\n", (long)result);
    // The usual 8 MiB hold this at any optimisation.
    printf("main %ld\n", deeper(100000) + deeper(100000));
    tell_calls("deeper", 100001L + 11 + 100000 + 2 * 100001L);
    return 0;
}
