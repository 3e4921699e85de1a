/* Measures how long the calls of a function take: a function of ours takes its place and calls it.
 * `-fno-ipa-ra` is for GCC: callers must not know which registers the function that is replaced leaves alone.
 *
 *     cc -O2 -fpatchable-function-entry=5 -fno-ipa-ra histogram.c -o histogram $(pkg-config --cflags --libs trapline)
 */

#include "check.h"

#include <stdatomic.h>
#include <time.h>

enum { CALLS = 2000, BUCKETS = 64 };

/* Bucket n has the calls that took from 2^n up to 2^(n+1) ns. */
static atomic_ulong histogram[BUCKETS];

/* The function that we want to know about. */
__attribute__((noinline)) unsigned long compress(unsigned long rounds) {
    unsigned long sum = 0;
    for (unsigned long i = 0; i < rounds; i++) {
        __asm__ volatile("" : "+r"(sum));
        sum += i;
    }
    return sum;
}

/* The same function as trapline knows it behind its site: calls of it are not sent to us again. */
static unsigned long (*compress_itself)(unsigned long);

static unsigned long long now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return 1000000000ULL * (unsigned long long)now.tv_sec + (unsigned long long)now.tv_nsec;
}

static unsigned long timed_compress(unsigned long rounds) {
    unsigned long long begin = now_ns();
    unsigned long sum = compress_itself(rounds);
    unsigned long long took_ns = now_ns() - begin;
    int bucket = 63 - __builtin_clzll(took_ns | 1);
    atomic_fetch_add_explicit(&histogram[bucket], 1, memory_order_relaxed);
    return sum;
}

int main(void) {
    trapline_tracer *tracer;
    check(trapline_start(&tracer));

    trapline_site site;
    check(trapline_site_find(tracer, "compress", &site));
    compress_itself = (unsigned long (*)(unsigned long))site.body;

    trapline_ops *ops;
    check(trapline_replace(tracer, "compress", (trapline_function)timed_compress, &ops));
    for (unsigned long i = 0; i < CALLS; i++)
        if (compress(i) != i * (i - 1) / 2)
            return EXIT_FAILURE;
    trapline_detach(ops);
    compress(CALLS);
    trapline_stop(tracer);

    unsigned long measured = 0;
    for (int bucket = 0; bucket < BUCKETS; bucket++) {
        unsigned long calls = atomic_load(&histogram[bucket]);
        if (calls > 0)
            printf("%12llu ns and more: %lu\n", 1ULL << bucket, calls);
        measured += calls;
    }
    return measured == CALLS ? EXIT_SUCCESS : EXIT_FAILURE;
}
