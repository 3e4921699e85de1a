/* Counts the calls of a function that other threads are making all the while.
 *
 *     cc -O2 -fpatchable-function-entry=5 count.c -o count -pthread $(pkg-config --cflags --libs trapline)
 */

#include "check.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>

enum { THREADS = 4, ENOUGH = 100000 };

static atomic_ulong seen;
static atomic_bool is_attached, is_over;

/* The function that we want to know about. */
__attribute__((noinline)) unsigned long parse_header(unsigned long bytes) {
    __asm__ volatile("" : "+r"(bytes));
    return bytes + 1;
}

/* Runs before the function's first instruction, in the thread that calls it. It only counts, so trapline saves next to nothing for it. */
static void count(trapline_call *call, void *counter) {
    (void)call;
    atomic_fetch_add_explicit((atomic_ulong *)counter, 1, memory_order_relaxed);
}

/* Calls the function, and counts the calls that begin after it is known that the callback is attached. */
static void *work(void *due_calls) {
    unsigned long due = 0;
    while (!atomic_load(&is_over)) {
        bool is_due = atomic_load(&is_attached);
        parse_header(100);
        due += is_due;
    }
    *(unsigned long *)due_calls = due;
    return NULL;
}

int main(void) {
    trapline_tracer *tracer;
    check(trapline_start(&tracer));

    pthread_t threads[THREADS];
    unsigned long due[THREADS];
    for (int i = 0; i < THREADS; i++)
        if (pthread_create(&threads[i], NULL, work, &due[i]) != 0)
            return EXIT_FAILURE;

    trapline_ops *ops;
    check(trapline_attach(tracer, "parse_header", 0, count, &seen, &ops));
    atomic_store(&is_attached, true);
    unsigned long begin = atomic_load(&seen);
    while (atomic_load(&seen) - begin < ENOUGH)
        sched_yield();
    atomic_store(&is_over, true);
    unsigned long all_due = 0;
    for (int i = 0; i < THREADS; i++) {
        pthread_join(threads[i], NULL);
        all_due += due[i];
    }

    trapline_detach(ops);
    unsigned long before = atomic_load(&seen);
    parse_header(100);
    printf("seen %lu calls; %lu of them had to be seen\n", before, all_due);
    trapline_stop(tracer);
    return before >= all_due && all_due > 0 && atomic_load(&seen) == before ? EXIT_SUCCESS : EXIT_FAILURE;
}
