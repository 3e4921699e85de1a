// Calls by the million, in threads, as many as its argument says for each: far more than there is room for.
#include "check.h"
#include <pthread.h>

enum { THREADS = 3 };

TRACED long work(long value) { return value + 1; }

static void *body(void *times) {
    long value = 0;
    while (value < (long)times) value = work(value);
    return (void *)value;
}

int main(int argc, char **argv) {
    long times = argc > 1 ? atol(argv[1]) : 1;
    pthread_t threads[THREADS];
    long sum = 0;
    for (int at = 0; at < THREADS; at++) EXPECT(pthread_create(&threads[at], 0, body, (void *)times) == 0);
    for (int at = 0; at < THREADS; at++) {
        void *value;
        EXPECT(pthread_join(threads[at], &value) == 0);
        sum += (long)value;
    }
    tell_calls("work", sum);
    return 0;
}
