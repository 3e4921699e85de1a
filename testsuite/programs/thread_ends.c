// Threads that end from deep inside: pthread_exit, deferred and asynchronous cancellation, with cleanup handlers.
#include "check.h"
#include <pthread.h>
#include <semaphore.h>

static long exits, cleaned;
static sem_t inside;

static void clean(void *amount) { __atomic_add_fetch(&cleaned, (long)amount, __ATOMIC_RELAXED); }

TRACED long exit_below(long depth) {
    __atomic_add_fetch(&exits, 1, __ATOMIC_RELAXED);
    long result;
    pthread_cleanup_push(clean, (void *)1);
    if (depth == 0) pthread_exit((void *)42);
    result = OPAQUE(exit_below(depth - 1)) + 1;
    pthread_cleanup_pop(0);
    return result;
}

static void *exits_deep(void *depth) { return (void *)exit_below((long)depth); }

TRACED long wait_below(long depth) {
    long result;
    pthread_cleanup_push(clean, (void *)1000);
    if (depth == 0) {
        sem_post(&inside);
        for (;;) pause();
    }
    result = OPAQUE(wait_below(depth - 1)) + 1;
    pthread_cleanup_pop(0);
    return result;
}

static void *is_cancelled(void *depth) { return (void *)wait_below((long)depth); }

TRACED long work(long value) { return value * 3 + 1; }

TRACED long spin_below(long depth) {
    volatile long result = 0;
    pthread_cleanup_push(clean, (void *)1000000);
    if (depth == 0) {
        pthread_setcanceltype(PTHREAD_CANCEL_ASYNCHRONOUS, 0);
        sem_post(&inside);
        for (;;) result = work(result);
    }
    result = OPAQUE(spin_below(depth - 1)) + 1;
    pthread_cleanup_pop(0);
    return result;
}

static void *is_cancelled_anywhere(void *depth) { return (void *)spin_below((long)depth); }

static long run(void *(*body)(void *), long depth, int is_cancelled_then) {
    pthread_t thread;
    void *result;
    EXPECT(pthread_create(&thread, 0, body, (void *)depth) == 0);
    if (is_cancelled_then) {
        while (sem_wait(&inside)) {}
        EXPECT(pthread_cancel(thread) == 0);
    }
    EXPECT(pthread_join(thread, &result) == 0);
    return result == PTHREAD_CANCELED ? -1 : (long)result;
}

int main(void) {
    sem_init(&inside, 0, 0);
    long sum = 0;
    for (int round = 0; round < 30; round++) {
        sum += run(exits_deep, 20, 0);
        sum += run(is_cancelled, 10, 1);
        sum += run(is_cancelled_anywhere, 5, 1);
    }
    printf("sum %ld cleaned %ld\n", sum, cleaned);
    tell_calls("exit_below", exits);
    tell_calls("wait_below", 30 * 11);
    tell_calls("spin_below", 30 * 6);
    return 5;
}
