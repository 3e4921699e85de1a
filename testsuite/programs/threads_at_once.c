// 400 threads at the same time: all inside traced functions before the first leaves.
#include "check.h"
#include <pthread.h>

enum { THREADS = 400, CALLS = 300 };
static pthread_barrier_t together;

TRACED long work(long value) { return value + 1; }

TRACED long meet(long value) {
    pthread_barrier_wait(&together);
    return work(value);
}

static void *body(void *start) {
    long value = (long)start;
    for (int times = 0; times < CALLS; times++) value = work(value);
    value = meet(value);
    for (int times = 0; times < CALLS; times++) value = work(value);
    return (void *)value;
}

int main(void) {
    static pthread_t threads[THREADS];
    pthread_barrier_init(&together, 0, THREADS);
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, 65536);
    for (long thread = 0; thread < THREADS; thread++) EXPECT(pthread_create(&threads[thread], &attributes, body, (void *)thread) == 0);
    long sum = 0;
    for (int thread = 0; thread < THREADS; thread++) {
        void *result;
        pthread_join(threads[thread], &result);
        sum += (long)result;
    }
    printf("sum %ld\n", sum);
    tell_calls("work", THREADS * (2L * CALLS + 1));
    tell_calls("meet", THREADS);
    return 0;
}
