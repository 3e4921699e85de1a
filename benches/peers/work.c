// Work whose calls are known: what `cargo xtask bench-peers` runs under each tracer.
//
//     work CALLS THREADS FILE
//
// Every thread makes CALLS calls of `leaf`, `middle` and `root`: half of the loop's ten are trees. Each times itself around them, so that what a tracer does
// at the program's start and end is left out, and the slowest thread's times go to FILE, as JSON: `wall_ns`, `cpu_ns`, and what the floor recorded.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#ifdef __clang__
#define CALLED __attribute__((noinline))
#else
#define CALLED __attribute__((noipa))
#endif
#define UNTRACED __attribute__((no_instrument_function))

enum { CALLS_PER_ROUND = 10, MOST_THREADS = 64 };

// The empty statement keeps compilers from leaving out a call whose result they know.
CALLED unsigned long leaf(unsigned long value) {
    __asm__ volatile("");
    return (value ^ value >> 7) * 5;
}

CALLED unsigned long middle(unsigned long value) {
    unsigned long left = leaf(value + 1);
    return leaf(left) + value;
}

CALLED unsigned long root(unsigned long value) {
    unsigned long left = middle(value + 1);
    return middle(left) + value;
}

// 3 leaves, and a tree of 7.
UNTRACED static unsigned long round_of_calls(unsigned long value) {
    value = leaf(value);
    value = root(value);
    value = leaf(value);
    return leaf(value);
}

// Of a tracer that is linked in, and of the floor.
__attribute__((weak)) void tracer_start(void);
__attribute__((weak)) void tracer_stop(void);
__attribute__((weak)) void floor_start(void);
__attribute__((weak)) unsigned long floor_records(void);

struct worker {
    pthread_t thread;
    unsigned long rounds, result, records;
    double wall_ns, cpu_ns;
};

static pthread_barrier_t ready;

UNTRACED static double now_ns(clockid_t clock) {
    struct timespec time;
    clock_gettime(clock, &time);
    return (double)time.tv_sec * 1e9 + (double)time.tv_nsec;
}

UNTRACED static void *work(void *argument) {
    struct worker *worker = argument;
    if (floor_start) floor_start();
    pthread_barrier_wait(&ready);
    double cpu = now_ns(CLOCK_THREAD_CPUTIME_ID), wall = now_ns(CLOCK_MONOTONIC);
    unsigned long value = 1;
    for (unsigned long round = 0; round < worker->rounds; round++) value = round_of_calls(value);
    worker->wall_ns = now_ns(CLOCK_MONOTONIC) - wall;
    worker->cpu_ns = now_ns(CLOCK_THREAD_CPUTIME_ID) - cpu;
    worker->result = value;
    worker->records = floor_records ? floor_records() : 0;
    return 0;
}

UNTRACED int main(int count, char **words) {
    static struct worker workers[MOST_THREADS];
    if (count != 4) return 2;
    unsigned long calls = strtoul(words[1], 0, 10), threads = strtoul(words[2], 0, 10);
    if (calls % CALLS_PER_ROUND || threads < 1 || threads > MOST_THREADS) return 2;
    if (tracer_start) tracer_start();
    pthread_barrier_init(&ready, 0, (unsigned)threads);
    for (unsigned long index = 0; index < threads; index++) {
        workers[index].rounds = calls / CALLS_PER_ROUND;
        if (pthread_create(&workers[index].thread, 0, work, &workers[index])) return 1;
    }
    double wall_ns = 0, cpu_ns = 0;
    unsigned long records = 0;
    for (unsigned long index = 0; index < threads; index++) {
        struct worker *worker = &workers[index];
        pthread_join(worker->thread, 0);
        if (worker->wall_ns > wall_ns) wall_ns = worker->wall_ns;
        if (worker->cpu_ns > cpu_ns) cpu_ns = worker->cpu_ns;
        records += worker->records;
        // Every thread does the same.
        if (worker->result != workers[0].result) return 1;
    }
    if (tracer_stop) tracer_stop();
    FILE *file = fopen(words[3], "w");
    if (!file) return 1;
    fprintf(file, "{\"wall_ns\": %.0f, \"cpu_ns\": %.0f, \"records\": %lu}\n", wall_ns, cpu_ns, records);
    return fclose(file) ? 1 : 0;
}
