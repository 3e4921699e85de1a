// What the programs of this folder share. Each prints what it found on standard output; a line `calls NAME COUNT` says how often the function
// NAME was called in all of its processes, and the harness looks that up in the trace.
#ifndef CHECK_H
#define CHECK_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

// A function that stays one: not inlined, cloned, folded with another, or specialised by what its callers are known to pass.
#define TRACED __attribute__((noipa))

// A value that the compiler knows nothing about: without it, it makes loops of recursions.
#define OPAQUE(expression)                                                                                                                           \
    ({                                                                                                                                               \
        __typeof__(expression) opaque = (expression);                                                                                                \
        __asm__ volatile("" : "+r"(opaque));                                                                                                         \
        opaque;                                                                                                                                      \
    })

static inline void tell_calls(const char *name, long count) {
    printf("calls %s %ld\n", name, count);
    fflush(stdout);
}

// Ends the process with status 99 where something is not as it has to be.
#define EXPECT(condition)                                                                                                                            \
    do {                                                                                                                                             \
        if (!(condition)) {                                                                                                                          \
            printf("FAILED line %d: %s\n", __LINE__, #condition);                                                                                     \
            fflush(stdout);                                                                                                                          \
            _exit(99);                                                                                                                               \
        }                                                                                                                                            \
    } while (0)
#endif
