// 2,000 functions called from four threads, until the log that the argument names has 24 lines: it tells when all sites were switched. Some of the
// calls are noted with the time-stamp counter before and after them: `stamp THREAD FUNCTION BEFORE AFTER`. Then how often each was called.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "check.h"

enum { THREADS = 4, FUNCTIONS = 2000, STAMPS = 30000, LINES = 24, STRIDE = 100 };

static uint64_t made[FUNCTIONS];

#define FUNCTION(n)                                                  \
    __attribute__((noinline)) unsigned numbered_##n(unsigned x) {    \
        __atomic_fetch_add(&made[1##n - 10000], 1, __ATOMIC_RELAXED); \
        return x * 31 + 1##n;                                        \
    }
#define NAME(n) numbered_##n,
#define TEN(M, n) M(n##0) M(n##1) M(n##2) M(n##3) M(n##4) M(n##5) M(n##6) M(n##7) M(n##8) M(n##9)
#define HUNDRED(M, n) TEN(M, n##0) TEN(M, n##1) TEN(M, n##2) TEN(M, n##3) TEN(M, n##4) TEN(M, n##5) TEN(M, n##6) TEN(M, n##7) TEN(M, n##8) TEN(M, n##9)
#define THOUSAND(M, n) HUNDRED(M, n##0) HUNDRED(M, n##1) HUNDRED(M, n##2) HUNDRED(M, n##3) HUNDRED(M, n##4) HUNDRED(M, n##5) HUNDRED(M, n##6) HUNDRED(M, n##7) HUNDRED(M, n##8) HUNDRED(M, n##9)

THOUSAND(FUNCTION, 0)
THOUSAND(FUNCTION, 1)

static unsigned (*const functions[FUNCTIONS])(unsigned) = {THOUSAND(NAME, 0) THOUSAND(NAME, 1)};

struct stamp {
    int function;
    uint64_t before, after;
};

static struct stamp stamps[THREADS][STAMPS];
static int stamp_counts[THREADS];
static int tids[THREADS];
static unsigned results[THREADS];
static int is_over;
static const char *log_path;

// Nothing before it is executed later, and nothing behind it earlier.
static inline uint64_t tsc(void) {
    uint32_t low, high;
    __asm__ volatile("lfence\n\trdtsc\n\tlfence" : "=a"(low), "=d"(high) : : "memory");
    return (uint64_t)high << 32 | low;
}

static int log_is_long(void) {
    FILE *log = fopen(log_path, "r");
    EXPECT(log != NULL);
    int lines = 0;
    for (int c; (c = fgetc(log)) != EOF;)
        lines += c == '\n';
    fclose(log);
    return lines >= LINES;
}

static void *work(void *argument) {
    int thread = (int)(intptr_t)argument;
    unsigned x = 1;
    tids[thread] = (int)syscall(SYS_gettid);
    for (int turn = 0; !__atomic_load_n(&is_over, __ATOMIC_ACQUIRE); turn++) {
        for (int i = 0; i < FUNCTIONS; i++) {
            int slot = stamp_counts[thread];
            if ((i + turn) % STRIDE != 0 || slot == STAMPS) {
                x = functions[i](x);
                continue;
            }
            stamps[thread][slot].function = i;
            stamps[thread][slot].before = tsc();
            x = functions[i](x);
            stamps[thread][slot].after = tsc();
            stamp_counts[thread]++;
        }
        if (thread == 0 && log_is_long())
            __atomic_store_n(&is_over, 1, __ATOMIC_RELEASE);
    }
    results[thread] = x;
    return NULL;
}

int main(int argc, char **argv) {
    pthread_t threads[THREADS];
    EXPECT(argc == 2);
    log_path = argv[1];
    for (intptr_t i = 0; i < THREADS; i++)
        EXPECT(pthread_create(&threads[i], NULL, work, (void *)i) == 0);
    for (int i = 0; i < THREADS; i++)
        EXPECT(pthread_join(threads[i], NULL) == 0);
    for (int i = 0; i < THREADS; i++)
        for (int k = 0; k < stamp_counts[i]; k++) {
            struct stamp *stamp = &stamps[i][k];
            printf("stamp %d numbered_%04d %lu %lu\n", tids[i], stamp->function, stamp->before, stamp->after);
        }
    for (int i = 0; i < FUNCTIONS; i++)
        printf("made numbered_%04d %lu\n", i, made[i]);
    return 0;
}
