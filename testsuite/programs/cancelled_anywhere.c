// Threads that are cancelled between any two instructions: the frames further out are unwound, each with its cleanup.
#include "check.h"
#include <pthread.h>
#include <semaphore.h>

enum { ROUNDS = 400 };
static long cleaned, outer_calls;
static sem_t inside;

static void clean(long *amount) { __atomic_add_fetch(&cleaned, *amount, __ATOMIC_RELAXED); }

TRACED long leaf(long value) { return value * 3 + 1; }

TRACED long work(long value) { return leaf(value) ^ leaf(value + 1); }

// Has nothing to clean: wherever in here or further in it happens, it happens inside of a call of `guarded`.
TRACED long loop(long value) {
    pthread_setcanceltype(PTHREAD_CANCEL_ASYNCHRONOUS, 0);
    sem_post(&inside);
    for (;;) value = work(value);
}

TRACED long guarded(long depth) {
    __attribute__((cleanup(clean))) long amount = 1;
    if (depth == 0) return OPAQUE(loop(amount)) + 1;
    return OPAQUE(guarded(depth - 1)) + amount;
}

static void *body(void *unused) {
    (void)unused;
    return (void *)guarded(4);
}

int main(void) {
    sem_init(&inside, 0, 0);
    for (long round = 0; round < ROUNDS; round++) {
        pthread_t thread;
        void *result;
        EXPECT(pthread_create(&thread, 0, body, 0) == 0);
        while (sem_wait(&inside)) {}
        // Not always as early as possible.
        for (volatile long wait = 0; wait < round * 7; wait++) {}
        EXPECT(pthread_cancel(thread) == 0);
        EXPECT(pthread_join(thread, &result) == 0 && result == PTHREAD_CANCELED);
        outer_calls += 5;
    }
    printf("cleaned %ld\n", cleaned);
    tell_calls("guarded", outer_calls);
    tell_calls("loop", ROUNDS);
    return 0;
}
