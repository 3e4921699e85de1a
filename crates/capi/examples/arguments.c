/* Logs what a function is called with.
 *
 *     cc -O2 -fpatchable-function-entry=5 arguments.c -o arguments $(pkg-config --cflags --libs trapline)
 */

#include "check.h"

#include <stdatomic.h>
#include <string.h>

enum { ROOM = 64 };

/* A callback runs in the middle of anything: so it writes to memory that is there, and something else prints it later. */
struct entry {
    char owner[16];
    long cents;
    const void *caller;
};

struct log {
    struct entry entries[ROOM];
    atomic_uint count;
};

/* The function that we want to know about. */
__attribute__((noinline)) long deposit(const char *owner, long cents) {
    __asm__ volatile("" : "+r"(owner), "+r"(cents));
    return cents;
}

static void note(trapline_call *call, void *data) {
    struct log *log = data;
    unsigned index = atomic_fetch_add(&log->count, 1);
    if (index >= ROOM)
        return;
    struct entry *entry = &log->entries[index];
    /* What the arguments are only the function's declaration tells. */
    const char *owner = (const char *)trapline_call_argument(call, 0);
    strncpy(entry->owner, owner, sizeof entry->owner - 1);
    entry->cents = (long)trapline_call_argument(call, 1);
    entry->caller = trapline_call_return_address(call);
}

int main(void) {
    static struct log log;
    trapline_tracer *tracer;
    trapline_ops *ops;
    check(trapline_start(&tracer));
    check(trapline_attach(tracer, "deposit", 0, note, &log, &ops));
    deposit("Ada", 1250);
    deposit("Grace", -300);
    trapline_detach(ops);
    deposit("Barbara", 1);
    trapline_stop(tracer);

    unsigned count = atomic_load(&log.count);
    for (unsigned i = 0; i < count && i < ROOM; i++)
        printf("deposit(\"%s\", %ld) from %p\n", log.entries[i].owner, log.entries[i].cents, log.entries[i].caller);
    return count == 2 && strcmp(log.entries[1].owner, "Grace") == 0 && log.entries[1].cents == -300 ? EXIT_SUCCESS
                                                                                                     : EXIT_FAILURE;
}
