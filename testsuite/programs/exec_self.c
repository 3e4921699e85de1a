// A program that replaces itself by itself, from its only thread and from one that is not the leader.
#include "check.h"
#include <pthread.h>
#include <string.h>

TRACED long work(long value) { return value + 1; }

static char *self;
static char count_text[30], way[20];

static void *replace(void *unused) {
    (void)unused;
    execl("/proc/self/exe", self, count_text, way, NULL);
    _exit(98);
}

static void *works_on(void *unused) {
    (void)unused;
    for (long value = 0;; value++) __asm__ volatile("pause" ::"r"(value));
    return 0;
}

int main(int argc, char **argv) {
    self = argv[0];
    long count = argc > 2 ? atol(argv[1]) : 0;
    const char *asked = argc > 2 ? argv[2] : argv[1];
    strncpy(way, asked, sizeof way - 1);
    for (int times = 0; times < 100; times++) count = work(count);
    if (count < 1000) {
        snprintf(count_text, sizeof count_text, "%ld", count);
        if (strcmp(way, "thread")) replace(0);
        pthread_t other, thread;
        pthread_create(&other, 0, works_on, 0);
        pthread_create(&thread, 0, replace, 0);
        for (;;) pause();
    }
    printf("by %s\n", way);
    tell_calls("work", 1000);
    return 12;
}
