// makecontext and swapcontext with small stacks: coroutines that call traced functions and are left in the middle of them.
#include "check.h"
#include <ucontext.h>

enum { COROUTINES = 50, ROUNDS = 40, STACK = 16384 };
static ucontext_t scheduler, contexts[COROUTINES];
static char stacks[COROUTINES][STACK];
static long results[COROUTINES], deep_calls, yields;

TRACED void yield_to_scheduler(int self) {
    yields++;
    swapcontext(&contexts[self], &scheduler);
}

TRACED long deep(int self, long depth) {
    deep_calls++;
    if (depth == 0) {
        yield_to_scheduler(self);
        return self;
    }
    return OPAQUE(deep(self, depth - 1)) + 1;
}

static void body(int self) {
    for (int round = 0; round < ROUNDS; round++) results[self] += deep(self, 5 + (self + round) % 7);
}

int main(void) {
    for (int self = 0; self < COROUTINES; self++) {
        getcontext(&contexts[self]);
        contexts[self].uc_stack.ss_sp = stacks[self];
        contexts[self].uc_stack.ss_size = STACK;
        contexts[self].uc_link = &scheduler;
        makecontext(&contexts[self], (void (*)(void))body, 1, self);
    }
    for (int round = 0; round < ROUNDS + 1; round++)
        for (int self = 0; self < COROUTINES; self++)
            // Backwards in every other round, so that stacks are not used in one order.
            swapcontext(&scheduler, &contexts[round % 2 ? COROUTINES - 1 - self : self]);
    long sum = 0;
    for (int self = 0; self < COROUTINES; self++) sum += results[self];
    printf("sum %ld\n", sum);
    tell_calls("deep", deep_calls);
    tell_calls("yield_to_scheduler", yields);
    return 3;
}
