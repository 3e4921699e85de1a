// Code before main and after it: constructors and destructors of C and of C++, thread-local ones, functions chosen by ifunc, weak ones.
#include "check.h"
#include <pthread.h>

static long constructed, worked;

extern "C" TRACED long work(long value) {
    worked++;
    return value + 1;
}

__attribute__((constructor(200))) static void first(void) { constructed = work(constructed); }
__attribute__((constructor)) static void second(void) { constructed = work(constructed) * 10; }

struct Object {
    long value;
    Object() : value(work(100)) {}
    ~Object() { value = work(value); }
};
static Object global;
static thread_local Object local;

extern "C" long plain_version(long value) { return work(value) + 1000; }
extern "C" long (*choose(void))(long) { return plain_version; }
extern "C" long chosen(long value) __attribute__((ifunc("choose")));
extern "C" __attribute__((weak)) long missing(void);

static void *body(void *) { return (void *)local.value; }

__attribute__((destructor)) static void last(void) {
    work(1);
    tell_calls("work", worked);
}

int main(void) {
    printf("constructed %ld global %ld\n", constructed, global.value);
    printf("chosen %ld missing %d\n", chosen(5), missing == 0);
    for (int thread = 0; thread < 3; thread++) {
        pthread_t created;
        void *result;
        pthread_create(&created, 0, body, 0);
        pthread_join(created, &result);
        printf("local %ld\n", (long)result);
    }
    fflush(stdout);
    return 1;
}
